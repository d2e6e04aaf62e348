"""The networks: `layers.py` first, then `unet.py`, `vae.py`, `clip.py`; `unet_ddpm.py` is the one without text."""

import importlib

_WHERE = {
    "AutoencoderKL": "vae",
    "CLIPTextModel": "clip",
    "CLIPTextModelWithProjection": "clip",
    "CLIPTokenizer": "clip",
    "UNet2DConditionModel": "unet",
    "UNet2DModel": "unet_ddpm",
}
__all__ = list(_WHERE)


def __getattr__(name):  # lazy, as in minidiff itself: the tokenizer alone needs none of the networks
    if name not in _WHERE:
        raise AttributeError(f"module 'minidiff.models' has no attribute {name!r}; it exports {', '.join(_WHERE)}")
    return getattr(importlib.import_module(f"minidiff.models.{_WHERE[name]}"), name)
