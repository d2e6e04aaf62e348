"""Pictures without a text: noise in the size of the picture, a U-Net, a scheduler.

Denoising diffusion probabilistic models: Ho et al. 2020, arXiv 2006.11239. DDIM, which needs fewer steps:
Song et al. 2020, arXiv 2010.02502. Read `DDPMPipeline._run`.
"""

from typing import ClassVar

import numpy as np
import torch
from tqdm.auto import tqdm

from minidiff.boundary import draw_normal, like, to_images, to_numpy
from minidiff.pipelines.base import DiffusionPipeline, ImagePipelineOutput
from minidiff.sampling import sample
from minidiff.schedulers import DDIMScheduler


class DDPMPipeline(DiffusionPipeline):
    """Unconditional pictures from a UNet2DModel and a scheduler."""

    part_classes: ClassVar = {"unet": ("UNet2DModel",), "scheduler": ()}

    def __init__(self, unet, scheduler):
        self.unet, self.scheduler = unet, scheduler

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator=None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """batch_size pictures of the size that the U-Net was trained on.

        generator: a torch.Generator or numpy.random.Generator, or a list with one for each picture; None is
        torch's global one. output_type: "pil" (a list), "np" (B, H, W, C) float32 in [0, 1] or "pt" (B, C, H,
        W) in [0, 1]. -> ImagePipelineOutput, or a tuple. ValueError for values that do not fit.
        """
        return self._run(batch_size, generator, num_inference_steps, output_type, return_dict)

    def _run(self, batch_size, generator, num_inference_steps, output_type, return_dict, **step_options):
        """Draws noise, takes it out step by step, and makes pictures of what is left."""
        _check_call(batch_size, generator, output_type)
        self.scheduler.set_timesteps(num_inference_steps)
        pictures = self._noise(batch_size, generator)
        with tqdm(total=len(self.scheduler.timesteps), **self._progress_bar_config) as bar:
            for step in sample(self._predict, pictures, self.scheduler, generator=generator, **step_options):
                pictures = step.latents  # (B, C, H, W), float32 NumPy
                bar.update()
        images = to_images(
            like(pictures, self.unet.conv_in.weight) if output_type == "pt" else pictures, output_type
        )
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _noise(self, batch_size, generator):
        """Where sampling starts: noise of the scheduler's first level, (B, C, H, W), float32."""
        config, weight = self.unet.config, self.unet.conv_in.weight
        size = (
            config.sample_size if isinstance(config.sample_size, list | tuple) else [config.sample_size] * 2
        )
        dtype = torch.promote_types(weight.dtype, torch.float32)  # torch draws the same numbers for float16
        noise = draw_normal((batch_size, config.in_channels, *size), generator, dtype, weight.device)
        # diffusers' DDPMPipeline leaves the factor out; it is 1 for all schedulers that work there
        return noise * float(self.scheduler.init_noise_sigma)

    def _predict(self, x, t):
        """The U-Net on arrays: (B, C, H, W) and a timestep -> (B, C, H, W)."""
        t = torch.as_tensor(t)  # of a plain number, the U-Net would cut off the fraction, as diffusers' does
        return like(to_numpy(self.unet(like(x, self.unet.conv_in.weight), t).sample), x)


class DDIMPipeline(DDPMPipeline):
    """The same with DDIM's steps: any scheduler becomes a DDIMScheduler with the same noise schedule."""

    def __init__(self, unet, scheduler):
        super().__init__(unet, DDIMScheduler.from_config(scheduler.config))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator=None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """As DDPMPipeline; eta in [0, 1] and use_clipped_model_output are explained at DDIMScheduler.step."""
        options = {"eta": eta, "use_clipped_model_output": bool(use_clipped_model_output)}
        return self._run(batch_size, generator, num_inference_steps, output_type, return_dict, **options)


def _check_call(batch_size, generator, output_type):
    """Raises ValueError, before any work is done, for what a call can't do."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number from 1 on")
    if isinstance(generator, list | tuple) and len(generator) != batch_size:
        raise ValueError(
            f"got {len(generator)} generators for {batch_size} pictures; pass one, or one for each"
        )
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type is {output_type!r}; it must be 'pil', 'np' or 'pt'")
