"""Inpainting: what a mask covers of a picture is drawn anew, as the text says; the rest stays.

Two kinds of U-Net do it. One with 9 input channels was trained for it (Rombach et al. 2022, arXiv 2112.10752,
section 4.5): it sees the mask, and the latents of the picture without what is covered, beside the noisy
latents. One with 4 knows nothing of masks: what is to stay is put back after each step, with the noise of the
next (Lugmayr et al. 2022, arXiv 2201.09865, eq. 8). Read `StableDiffusionInpaintPipeline.__call__`, `_blend`
and `_model_input`.
"""

from typing import ClassVar

import torch

from minidiff.boundary import like, to_numpy
from minidiff.pictures import crop_region, from_images, from_masks, is_latents, overlay, resize_nearest, sizes
from minidiff.pipelines.img2img import StableDiffusionImg2ImgPipeline, check_number, tile
from minidiff.pipelines.stable_diffusion import (
    StableDiffusionPipelineOutput,
    choose_timesteps,
    count_prompts,
)


class StableDiffusionInpaintPipeline(StableDiffusionImg2ImgPipeline):
    """Pictures in which a part is painted anew, with an inpainting model or one for text to image.

    Of old schedulers' configs, steps_offset=1 and skip_prk_steps=True are repaired, as in diffusers.
    """

    callback_tensors: ClassVar = (
        *StableDiffusionImg2ImgPipeline.callback_tensors,
        "mask",
        "masked_image_latents",
    )
    repairs: ClassVar = {"steps_offset": 1, "skip_prk_steps": True}

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str] | None = None, image=None, mask_image=None, masked_image_latents=None,
        height: int | None = None, width: int | None = None, padding_mask_crop: int | None = None,
        strength: float = 1.0, num_inference_steps: int = 50, timesteps=None, sigmas=None,
        guidance_scale: float = 7.5, negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1, eta: float = 0.0, generator=None, latents=None, prompt_embeds=None,
        negative_prompt_embeds=None, *, output_type: str = "pil", return_dict: bool = True,
        clip_skip: int | None = None, callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=("latents",),
    ):  # fmt: skip
        """Pictures of a prompt, or of several, painted into image where mask_image is white; B are made.

        image: as for StableDiffusionImg2ImgPipeline. mask_image: of the same sizes, PIL images, arrays or
        tensors of one channel; values from 0.5 on mean: paint. Both are resized to height x width, as in
        training if None. masked_image_latents (N, 4, h, w): of the picture without what is to be painted,
        in place of those encoded here; needed where image is latents. padding_mask_crop: only the mask's
        surroundings, so many pixels further on each side, are drawn, at height x width, and put back into
        image; for one PIL image and mask. strength: 1 starts from noise alone, less from image with noise.
        latents (B, 4, h, w): the noise. All else as for StableDiffusionImg2ImgPipeline; callbacks also get
        mask and masked_image_latents.

        -> StableDiffusionPipelineOutput, or a tuple (images, None). ValueError for values that do not fit.
        """
        count = num_images_per_prompt * count_prompts(
            prompt, prompt_embeds, negative_prompt, negative_prompt_embeds
        )
        self._check_call(count, generator, output_type, callback_on_step_end_tensor_inputs)
        size = self._latent_size(height, width, self._given_latents(image) if latents is None else latents)
        self._check_pair(image, mask_image, masked_image_latents, size, count)
        region = self._region(image, mask_image, size, padding_mask_crop, output_type)
        pictures, masks = self._read(image, mask_image, size, region, count)
        steps = choose_timesteps(self.scheduler, num_inference_steps, timesteps, sigmas)
        timesteps, _ = self.get_timesteps(steps, strength)
        self._guidance_scale, self._guidance_rescale = guidance_scale, 0.0

        text = self.bind_text(prompt, negative_prompt, num_images_per_prompt, prompt_embeds,
                              negative_prompt_embeds, clip_skip)  # fmt: skip
        from_noise = strength == 1 or latents is not None
        if self._blends or not from_noise:
            image_latents = tile(self.encode_images(pictures, generator), count)  # (B, 4, h, w)
        noise = self.draw_noise((count, self.vae.config.latent_channels, *size), generator, latents)
        latents = noise * float(self.scheduler.init_noise_sigma)
        if not from_noise:
            latents = self.scheduler.add_noise(image_latents, noise, timesteps[:1])
        text |= self.bind_mask(masks, pictures, masked_image_latents, count, generator)
        blend = self._blend(image_latents, noise, text, timesteps) if self._blends else None
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        latents = self.denoise(latents, text, timesteps, generator, eta, callback, blend)
        images = self.show(latents, output_type)
        if region is not None:
            images = [overlay(image, painted, mask_image, region) for painted in images]
        return StableDiffusionPipelineOutput(images) if return_dict else (images, None)

    def bind_mask(self, masks, pictures, masked_image_latents, count: int, generator=None) -> dict:
        """What the U-Net sees beside the latents: mask (B, 1, h, w), masked_image_latents (B, 4, h, w).

        masks (N, 1, H, W) and pictures (N, 3, H, W) or latents (N, 4, h, w): arrays. With guidance, both
        tensors have 2B rows. Masked pictures are encoded even for a U-Net of 4 channels, which does not see
        them: so a generator draws what it draws in diffusers.
        """
        weight = self.unet.conv_in.weight
        mask = resize_nearest(masks, *(side // self.vae_scale_factor for side in masks.shape[2:]))
        if masked_image_latents is None:
            covered = mask if pictures.shape[2:] == mask.shape[2:] else masks
            masked_image_latents = self.encode_images(pictures * (covered < 0.5), generator)
        tensors = {"mask": mask, "masked_image_latents": to_numpy(masked_image_latents)}
        tensors = {name: like(tile(rows, count), weight) for name, rows in tensors.items()}
        if self.do_classifier_free_guidance:
            tensors = {name: torch.cat([rows, rows]) for name, rows in tensors.items()}
        return tensors

    def _blend(self, image_latents, noise, text, timesteps):
        """blend(latents, i): after step i, what is not masked is the image again, noisy for step i + 1."""

        def blend(latents, i):
            known = image_latents
            if i + 1 < len(timesteps):
                known = self.scheduler.add_noise(image_latents, noise, timesteps[i + 1 : i + 2])
            mask = to_numpy(text["mask"])[: len(latents)]  # without the copy for guidance
            return (1 - mask) * known + mask * latents

        return blend

    def _model_input(self, latents, text):
        """(B, 4, h, w); for an inpainting model, with the mask and the masked image's latents: 9 channels."""
        if self._blends:
            return latents
        rows = len(latents)  # fewer than the masks' if a callback has ended guidance
        return torch.cat([latents, text["mask"][:rows], text["masked_image_latents"][:rows]], dim=1)

    @property
    def _blends(self):
        """Whether the U-Net was not trained for inpainting."""
        return self.unet.config.in_channels == self.vae.config.latent_channels

    @property
    def _input_channels(self):
        latents = self.vae.config.latent_channels
        return latents, latents + 1 + latents  # the noisy ones, the mask, the masked image's

    def _given_latents(self, image):
        channels = self.vae.config.latent_channels
        return from_images(image, latent_channels=channels) if is_latents(image, channels) else None

    def _check_pair(self, image, mask_image, masked_image_latents, size, count):
        """Raises ValueError for an image, a mask and masked latents that do not belong together."""
        latents, factor = self._given_latents(image), self.vae_scale_factor
        pixels = sizes(image)
        if latents is not None:
            pixels = {(h * factor, w * factor) for h, w in pixels}
            if latents.shape[2:] != size:
                raise ValueError(f"image is latents of {latents.shape[2:]}; this call needs {size}")
        if sizes(mask_image, "mask_image") != pixels:
            ours, theirs = (
                " and ".join(f"{h} x {w}" for h, w in sorted(each))
                for each in (pixels, sizes(mask_image, "mask_image"))
            )
            what = "image (4 channels: latents)" if latents is not None else "image"
            raise ValueError(f"{what} has {ours} pixels and mask_image {theirs}; make them equal")
        if latents is not None and masked_image_latents is None and not self._blends:
            raise ValueError("image is latents, which can't be masked; pass masked_image_latents, too")
        if masked_image_latents is not None:
            shape, needed = tuple(masked_image_latents.shape), (self.vae.config.latent_channels, *size)
            if len(shape) != 4 or shape[1:] != needed:
                raise ValueError(
                    f"masked_image_latents have the shape {shape}; this call needs (N, *{needed})"
                )
            check_number(masked_image_latents, count, "masked_image_latents")

    def _region(self, image, mask_image, size, padding, output_type):
        """The part of image (left, top, right, bottom) that is drawn; None: all of it."""
        if padding is None:
            return None
        if output_type != "pil":
            raise ValueError(f"with padding_mask_crop, output_type must be 'pil', not {output_type!r}")
        height, width = (side * self.vae_scale_factor for side in size)
        return crop_region(image, mask_image, width, height, padding)

    def _read(self, image, mask_image, size, region, count):
        """image (N, 3, H, W) or latents (N, 4, h, w), and mask_image (N, 1, H, W), as arrays of this size."""
        factor = self.vae_scale_factor
        height, width = (side * factor for side in size)
        pictures = from_images(image, height, width, factor, region, self.vae.config.latent_channels)
        masks = from_masks(mask_image, height, width, factor, region)
        self._check_pictures(pictures, count)
        check_number(masks, count, "mask_image")
        if len(pictures) != len(masks) and 1 not in (len(pictures), len(masks)):
            raise ValueError(
                f"got {len(pictures)} of image and {len(masks)} of mask_image; pass one for each"
            )
        return pictures, masks
