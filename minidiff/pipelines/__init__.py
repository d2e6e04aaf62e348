"""Pipelines: the parts of a checkpoint and the story that they tell together.

Start with `stable_diffusion.py`, whose `__call__` is that story; `img2img.py` begins it with a picture,
`inpaint.py` with a picture and a mask; `ddpm.py` is the same without words; `stable_diffusion_xl.py` has two
text encoders; `base.py` loads, saves and moves the parts; `auto.py` picks a class for a task; `porting.py`
has what scripts for diffusers use besides.
"""

from minidiff.pipelines.auto import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from minidiff.pipelines.base import DiffusionPipeline, ImagePipelineOutput
from minidiff.pipelines.ddpm import DDIMPipeline, DDPMPipeline
from minidiff.pipelines.img2img import StableDiffusionImg2ImgPipeline
from minidiff.pipelines.inpaint import StableDiffusionInpaintPipeline
from minidiff.pipelines.stable_diffusion import StableDiffusionPipeline, StableDiffusionPipelineOutput
from minidiff.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "DDIMPipeline",
    "DDPMPipeline",
    "DiffusionPipeline",
    "ImagePipelineOutput",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionPipelineOutput",
    "StableDiffusionXLPipeline",
]
