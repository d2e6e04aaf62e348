"""minidiff: Stable Diffusion and DDPM in code that one person can read, change and trust.

Reading order: `sampling.py` (the loop), `schedulers/schedule.py` (the noise), `schedulers/ddim.py` (one
update rule), `models/layers.py`, `models/unet.py`, `models/vae.py`, `models/clip.py`, `ops.py`, `boundary.py`
(where torch and NumPy meet), and `pipelines/stable_diffusion.py`, which tells the whole story in one call.

Importing minidiff is cheap: a name is imported from its module when it is first used.
"""

import importlib

__version__ = "0.1.0"

_WHERE = {  # module -> its public names
    "minidiff.checkpoints.errors": ("CheckpointError",),
    "minidiff.schedulers": (
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "DDIMInverseScheduler",
        "IPNDMScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "EDMEulerScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "EDMDPMSolverMultistepScheduler",
    ),
    "minidiff.models": (
        "UNet2DModel",
        "UNet2DConditionModel",
        "AutoencoderKL",
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "CLIPTokenizer",
    ),
    "minidiff.pipelines": (
        "DiffusionPipeline",
        "DDPMPipeline",
        "DDIMPipeline",
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLPipeline",
        "AutoPipelineForText2Image",
        "AutoPipelineForImage2Image",
        "AutoPipelineForInpainting",
    ),
    "minidiff.optimization": ("optimize",),
    "minidiff.editing": (
        "compose",
        "compose_guidance",
        "interpolate",
        "invert",
        "invert_ddim",
        "reconstruct",
        "slerp",
    ),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name):  # lazy, so that `import minidiff.schedulers` needs no torch
    if name not in _MODULE_OF:
        names = ", ".join(_MODULE_OF)
        raise AttributeError(f"module 'minidiff' has no attribute {name!r}; it exports {names}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__():
    return __all__
