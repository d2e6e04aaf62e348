"""Image to image: a picture, partly dissolved in noise, is drawn again as the text says.

SDEdit (Meng et al. 2021, arXiv 2108.01073, algorithm 1), on latents. Read
`StableDiffusionImg2ImgPipeline.__call__`: only where the loop starts differs from text to image.
"""

import numpy as np
import torch

from minidiff.boundary import draw_normal, like, to_numpy
from minidiff.pictures import from_images
from minidiff.pipelines.stable_diffusion import (
    StableDiffusionPipeline,
    StableDiffusionPipelineOutput,
    choose_timesteps,
    count_prompts,
)


class StableDiffusionImg2ImgPipeline(StableDiffusionPipeline):
    """Pictures of a text that start from pictures, for the models of StableDiffusionPipeline."""

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str] | None = None, image=None, strength: float = 0.8,
        num_inference_steps: int = 50, timesteps=None, sigmas=None, guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None, num_images_per_prompt: int = 1, eta: float = 0.0,
        generator=None, prompt_embeds=None, negative_prompt_embeds=None, *, output_type: str = "pil",
        return_dict: bool = True, clip_skip: int | None = None, callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=("latents",),
    ):  # fmt: skip
        """Pictures of a prompt, or of several, that start from image; B is their number in all.

        image: PIL images, arrays (N, H, W, 3) in [0, 1], tensors (N, 3, H, W) in [0, 1] or [-1, 1], or
        latents, tensors (N, 4, h, w), one or N that divide B, which are then taken in turn; see from_images.
        strength in [0, 1]: 1 leaves (almost) nothing of it, and of num_inference_steps so large a part is
        made. All else as for StableDiffusionPipeline. A list of generators draws each picture's latents and
        noise with its own.

        -> StableDiffusionPipelineOutput, or a tuple (images, None). ValueError for values that do not fit,
        and for a strength that leaves no step, where diffusers returns nothing.
        """
        count = num_images_per_prompt * count_prompts(
            prompt, prompt_embeds, negative_prompt, negative_prompt_embeds
        )
        self._check_call(count, generator, output_type, callback_on_step_end_tensor_inputs)
        channels = self.vae.config.latent_channels
        image = from_images(image, multiple=self.vae_scale_factor, latent_channels=channels)
        self._check_pictures(image, count)
        steps = choose_timesteps(self.scheduler, num_inference_steps, timesteps, sigmas)
        timesteps, _ = self.get_timesteps(steps, strength)
        self._guidance_scale, self._guidance_rescale = guidance_scale, 0.0

        text = self.bind_text(prompt, negative_prompt, num_images_per_prompt, prompt_embeds,
                              negative_prompt_embeds, clip_skip)  # fmt: skip
        if isinstance(generator, list | tuple):
            image = tile(image, count)
        latents = tile(self.encode_images(image, generator), count)  # (B, 4, h, w)
        noise = self.draw_noise(latents.shape, generator)
        latents = self.scheduler.add_noise(latents, noise, timesteps[:1])
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        latents = self.denoise(latents, text, timesteps, generator, eta, callback)
        images = self.show(latents, output_type)
        return StableDiffusionPipelineOutput(images) if return_dict else (images, None)

    def get_timesteps(self, num_inference_steps: int, strength: float, device=None):
        """The scheduler's last timesteps, that part of all which strength says, and how many steps they are.

        The scheduler must have its timesteps already; it will begin there. device is not used. ValueError for
        a strength outside [0, 1], or one that leaves no step.
        """
        if isinstance(strength, str) or strength is None or not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength!r}; it must be in [0, 1]")
        left = int(num_inference_steps * strength)
        # steps of two timesteps (Heun, KDPM2) are counted once, but those of a list of timesteps are not
        start = (num_inference_steps - left) * self.scheduler.order
        if left < 1 or start >= len(self.scheduler.timesteps):
            raise ValueError(
                f"strength {strength} leaves none of {num_inference_steps} steps; raise one of the two, for "
                f"strength * num_inference_steps must be at least 1"
            )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        return self.scheduler.timesteps[start:], left

    def encode_images(self, images: np.ndarray, generator=None) -> np.ndarray:
        """Pictures (N, 3, H, W) in [-1, 1] as latents (N, 4, h, w), drawn from what the encoder gives.

        Latents remain what they are. Of a list of generators, each picture takes its own.
        """
        if images.shape[1] == self.vae.config.latent_channels:
            return images
        weight = next(self.vae.parameters())
        spread = self.vae.encode(like(images, weight)).latent_dist
        mean, std = to_numpy(spread.mean), to_numpy(spread.std)
        if isinstance(generator, list | tuple):
            generator = generator[: len(images)]
        dtype = torch.promote_types(weight.dtype, torch.float32)  # as in draw_noise
        noise = draw_normal(mean.shape, generator, dtype, weight.device)
        return self.vae.config.scaling_factor * (mean + std * noise)

    def _check_pictures(self, images, count):
        """Raises ValueError for pictures or latents (N, C, H, W) of another number or kind than is needed."""
        channels = self.vae.config.in_channels, self.vae.config.latent_channels
        if images.shape[1] not in channels:
            raise ValueError(
                f"image has {images.shape[1]} channels; this autoencoder takes pictures of {channels[0]} "
                f"(grey ones: image.convert('RGB')) or latents of {channels[1]}"
            )
        check_number(images, count, "image")
        given, accepted = self.unet.config.in_channels, self._input_channels
        if given not in accepted:
            accepted = " or ".join(map(str, accepted))
            raise ValueError(
                f"this U-Net takes {given} channels; {type(self).__name__} needs one of {accepted}"
            )

    @property
    def _input_channels(self):
        """How many channels the U-Net may take."""
        return (self.vae.config.latent_channels,)


def check_number(rows, count, name):
    """Raises ValueError for rows that can't be repeated to make count."""
    if count % len(rows):
        raise ValueError(
            f"got {len(rows)} of {name} for {count} pictures; pass one, one for each, or a divisor of {count}"
        )


def tile(rows, count: int) -> np.ndarray:
    """(N, …) -> (count, …): all rows, then all again, as diffusers repeats pictures, but not prompts."""
    return np.concatenate([rows] * (count // len(rows)))
