"""Pipelines: the parts of a checkpoint and the story that they tell together.

Start with `stable_diffusion.py`, whose `__call__` is that story; `ddpm.py` is the same without words;
`stable_diffusion_xl.py` has two text encoders; `base.py` loads, saves and moves the parts.
"""

from minidiff.pipelines.base import DiffusionPipeline, ImagePipelineOutput
from minidiff.pipelines.ddpm import DDIMPipeline, DDPMPipeline
from minidiff.pipelines.stable_diffusion import StableDiffusionPipeline, StableDiffusionPipelineOutput
from minidiff.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline

__all__ = [
    "DDIMPipeline",
    "DDPMPipeline",
    "DiffusionPipeline",
    "ImagePipelineOutput",
    "StableDiffusionPipeline",
    "StableDiffusionPipelineOutput",
    "StableDiffusionXLPipeline",
]
