"""minidiff: Stable Diffusion and DDPM in code that one person can read, change and trust.

Reading order: `sampling.py` (the loop), `schedulers/schedule.py` (the noise), `schedulers/ddim.py` (one update rule),
`models/layers.py`, `models/unet.py`, `models/vae.py`, `models/clip.py`, `ops.py`, `boundary.py` (where torch and NumPy
meet), and `pipelines/stable_diffusion.py`, which tells the whole story in one call.

Importing minidiff is cheap: a name is imported from its module when it is first used.
"""

import importlib

__version__ = "0.1.0"

_WHERE = {  # public name -> the module it lives in
    "CheckpointError": "minidiff.checkpoints.errors",
    **dict.fromkeys(
        ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler"), "minidiff.schedulers"
    ),
    **dict.fromkeys(
        ("UNet2DModel", "UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection",
         "CLIPTokenizer"),
        "minidiff.models",
    ),
    **dict.fromkeys(
        ("DiffusionPipeline", "DDPMPipeline", "DDIMPipeline", "StableDiffusionPipeline"), "minidiff.pipelines"
    ),
}  # fmt: skip
__all__ = ["__version__", *_WHERE]


def __getattr__(name):  # lazy, so that `import minidiff.schedulers` needs no torch
    if name not in _WHERE:
        raise AttributeError(f"module 'minidiff' has no attribute {name!r}; it exports {', '.join(_WHERE)}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__():
    return __all__
