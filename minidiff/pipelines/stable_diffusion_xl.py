"""Stable Diffusion XL, text to image (Podell et al. 2023, arXiv 2307.01952): what differs from 1 and 2.

Two text encoders look at the prompt: their vectors are put side by side, and the second one's vector of the
whole text goes into the time embedding, beside six numbers: the size of the picture that the model should
believe it came from, where it was cropped, and its size now (section 2.2). All else is Stable Diffusion.
"""

from typing import ClassVar

import torch

from minidiff.pipelines.base import ImagePipelineOutput, refuse_parts
from minidiff.pipelines.stable_diffusion import (
    StableDiffusionPipeline,
    choose_timesteps,
    count_prompts,
    match_prompts,
    repeat,
)


class StableDiffusionXLPipeline(StableDiffusionPipeline):
    """Pictures of a text, for Stable Diffusion XL and everything that is built like it, such as sdxl-turbo.

    force_zeros_for_empty_prompt: without a negative prompt its vectors are zeros, not the empty text's.
    add_watermarker must be None or False: there are no invisible watermarks here. text_encoder and tokenizer
    may be None, as in SDXL's refiner. ValueError for a part that is not used.
    """

    part_classes: ClassVar = {
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer": ("CLIPTokenizer",),
        "tokenizer_2": ("CLIPTokenizer",),
        "unet": ("UNet2DConditionModel",),
        "scheduler": (),
    }
    optional_parts = ("text_encoder", "tokenizer")
    options = ("force_zeros_for_empty_prompt", "add_watermarker")
    callback_tensors: ClassVar = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids")

    def __init__(
        self, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler, image_encoder=None,
        feature_extractor=None, force_zeros_for_empty_prompt: bool = True, add_watermarker=None,
    ):  # fmt: skip
        refuse_parts(self, image_encoder=image_encoder, feature_extractor=feature_extractor)
        if add_watermarker:
            raise ValueError("minidiff draws no invisible watermarks; pass add_watermarker=None")
        self.vae, self.unet, self.scheduler = vae, unet, scheduler
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        self.force_zeros_for_empty_prompt, self.add_watermarker = force_zeros_for_empty_prompt, None
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str] | None = None, prompt_2: str | list[str] | None = None,
        height: int | None = None, width: int | None = None, num_inference_steps: int = 50, timesteps=None,
        sigmas=None, denoising_end: float | None = None, guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None, negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1, eta: float = 0.0, generator=None, latents=None, prompt_embeds=None,
        negative_prompt_embeds=None, pooled_prompt_embeds=None, negative_pooled_prompt_embeds=None, *,
        output_type: str = "pil", return_dict: bool = True, guidance_rescale: float = 0.0,
        original_size=None, crops_coords_top_left=(0, 0), target_size=None, negative_original_size=None,
        negative_crops_coords_top_left=(0, 0), negative_target_size=None, clip_skip: int | None = None,
        callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",),
    ):  # fmt: skip
        """Pictures of a prompt, or of several. What StableDiffusionPipeline has, too, means the same.

        prompt_2, negative_prompt_2: for the second text encoder; the same as for the first if None.
        pooled_prompt_embeds, negative_pooled_prompt_embeds (prompts, P): needed beside prompt_embeds and
        negative_prompt_embeds. denoising_end in (0, 1): the share of the noise after whose removal the loop
        ends, for a refiner to go on. original_size, target_size (height, width; the picture's if None) and
        crops_coords_top_left (top, left), in pixels: what the model should believe about its picture; the
        negative ones for the negative prompt.

        -> ImagePipelineOutput, or a tuple (images,). Errors as for StableDiffusionPipeline.
        """
        count = num_images_per_prompt * count_prompts(
            prompt, prompt_embeds, negative_prompt, negative_prompt_embeds
        )
        self._check_call(count, generator, output_type, callback_on_step_end_tensor_inputs)
        size = self._latent_size(height, width, latents)
        choose_timesteps(self.scheduler, num_inference_steps, timesteps, sigmas)
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale

        embeds, negative_embeds, pooled, negative_pooled = self.encode_prompt(
            prompt, prompt_2, None, num_images_per_prompt, self.do_classifier_free_guidance, negative_prompt,
            negative_prompt_2, prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds,
            negative_pooled_prompt_embeds, clip_skip=clip_skip,
        )  # fmt: skip
        picture = tuple(side * self.vae_scale_factor for side in size)
        ids = [(*(original_size or picture), *crops_coords_top_left, *(target_size or picture))]
        if self.do_classifier_free_guidance:
            embeds = torch.cat([negative_embeds, embeds])  # (2B, 77, D)
            pooled = torch.cat([negative_pooled, pooled])  # (2B, P)
            own = negative_original_size is not None and negative_target_size is not None
            negative = (negative_original_size, negative_crops_coords_top_left, negative_target_size)
            ids = [sum(map(tuple, negative), ()) if own else ids[0], *ids]
        text = {"prompt_embeds": embeds, "add_text_embeds": pooled}
        text["add_time_ids"] = self._time_ids(ids, count, embeds)
        latents = self.prepare_latents((count, self.unet.config.in_channels, *size), generator, latents)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        latents = self.denoise(latents, text, self._until(denoising_end), generator, eta, callback)
        images = self.show(latents, output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def encode_prompt(
        self, prompt, prompt_2=None, device=None, num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True, negative_prompt=None, negative_prompt_2=None,
        prompt_embeds=None, negative_prompt_embeds=None, pooled_prompt_embeds=None,
        negative_pooled_prompt_embeds=None, *, clip_skip=None,
    ):  # fmt: skip
        """(prompt_embeds, negative_prompt_embeds (B, 77, D), pooled_prompt_embeds, negative… (B, P)).

        The pictures of a prompt are adjacent; the negative ones are None without guidance. Errors as for the
        call.
        """
        weight = self.unet.conv_in.weight
        device = weight.device if device is None else torch.device(device)
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            second = match_prompts(prompt_2, prompt, len(prompts), "prompt_2") if prompt_2 else prompts
            prompt_embeds, pooled = self._encode_twice(prompts, second, None, device, clip_skip)
            pooled_prompt_embeds = pooled if pooled_prompt_embeds is None else pooled_prompt_embeds
        elif prompt_2 is not None:
            raise ValueError("got both prompt_2 and prompt_embeds; pass one of them")
        _check_pooled(prompt_embeds, pooled_prompt_embeds, "")
        if not do_classifier_free_guidance:
            negative_prompt_embeds = negative_pooled_prompt_embeds = None
        elif negative_prompt_embeds is not None:
            if negative_prompt_2 is not None:
                raise ValueError("got both negative_prompt_2 and negative_prompt_embeds; pass one of them")
            _check_pooled(negative_prompt_embeds, negative_pooled_prompt_embeds, "negative_")
        elif negative_prompt is None and self.force_zeros_for_empty_prompt:
            negative_prompt_embeds = torch.zeros_like(prompt_embeds)
            negative_pooled_prompt_embeds = torch.zeros_like(pooled_prompt_embeds)
        else:
            texts = match_prompts(negative_prompt, prompt, len(prompt_embeds))
            second = texts
            if negative_prompt_2:
                second = match_prompts(negative_prompt_2, prompt, len(texts), "negative_prompt_2")
            negative_prompt_embeds, pooled = self._encode_twice(texts, second, prompt_embeds.shape[1], device)
            if negative_pooled_prompt_embeds is None:
                negative_pooled_prompt_embeds = pooled
        if negative_prompt_embeds is not None and prompt_embeds.shape != negative_prompt_embeds.shape:
            raise ValueError(
                f"prompt_embeds have the shape {tuple(prompt_embeds.shape)}, negative_prompt_embeds "
                f"{tuple(negative_prompt_embeds.shape)}; they must be equal"
            )
        every = prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds
        return tuple(
            None if embeds is None else repeat(embeds, num_images_per_prompt, device, weight.dtype)
            for embeds in every
        )

    def _encode_twice(self, prompts, prompts_2, length, device, clip_skip=None):
        """Both encoders' vectors side by side, (prompts, length, D1 + D2), and the second's of whole texts.

        They are the last layer's but one, without the final norm; clip_skip goes further back.
        """
        encoders = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        if self.text_encoder is None:  # a refiner: its one encoder reads the first prompt, as in diffusers
            encoders = encoders[1:]
        layers = []
        for parts, texts in zip(encoders, (prompts, prompts_2), strict=False):
            output = self._run_text_encoder(*parts, texts, length, device)
            layers.append(self._layer(output.hidden_states, clip_skip or 0, before=1))
        return torch.cat(layers, dim=-1), output.text_embeds

    def _time_ids(self, ids, count, embeds):
        """The six numbers of each row as a tensor, (B, 6), with guidance (2B, 6).

        The pair of negative and positive rows is repeated, as in diffusers, where the texts of all pictures
        are negative first; so where the two differ, make one picture a call.
        """
        expected = self.unet.config.projection_class_embeddings_input_dim
        projected = expected - len(ids[0]) * self.unet.config.addition_time_embed_dim
        pooled = self.text_encoder_2.config.projection_dim if self.text_encoder_2 is not None else projected
        if pooled != projected:
            raise ValueError(
                f"this U-Net takes {len(ids[0])} numbers and a text vector of {projected}; the second text "
                f"encoder's has {pooled}: they do not belong together"
            )
        return torch.tensor(ids, dtype=embeds.dtype, device=embeds.device).repeat(count, 1)

    def _until(self, denoising_end):
        """The scheduler's timesteps, without those that a refiner is to make."""
        timesteps = self.scheduler.timesteps
        if denoising_end is None:
            return timesteps
        if not 0 < denoising_end < 1:
            raise ValueError(f"denoising_end is {denoising_end}; it must be between 0 and 1, or None")
        n = self.scheduler.config.num_train_timesteps
        return timesteps[: (timesteps >= round(n - denoising_end * n)).sum()]

    def decode(self, latents):
        """As in the base class; float16 weights that would overflow (force_upcast) decode in float32."""
        if not (self.vae.dtype == torch.float16 and self.vae.config.force_upcast):
            return super().decode(latents)
        self.vae.float()
        try:
            return super().decode(latents)
        finally:
            self.vae.half()


def _check_pooled(embeds, pooled, prefix):
    if pooled is None:
        raise ValueError(f"{prefix}prompt_embeds need {prefix}pooled_prompt_embeds; pass both")
    if pooled.ndim != 2 or len(pooled) != len(embeds):
        raise ValueError(
            f"{prefix}pooled_prompt_embeds have the shape {tuple(pooled.shape)}; they must be "
            f"({len(embeds)}, channels), one row for each prompt"
        )
