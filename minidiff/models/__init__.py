"""The networks: read `layers.py`, then `unet.py`, `vae.py` and `clip.py`; `unet_ddpm.py` has no text.

`levels.py` builds what they share from a config.
"""

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
        raise AttributeError(f"module 'minidiff.models' has no {name!r}; it exports {', '.join(_WHERE)}")
    return getattr(importlib.import_module(f"minidiff.models.{_WHERE[name]}"), name)
