"""Stable Diffusion, text to image (Rombach et al. 2022, arXiv 2112.10752); see `__call__`.

A text encoder turns the prompt into 77 vectors; a U-Net, which looks at them, takes the noise out of a small
latent picture step by step; a decoder makes the large picture of it. What later pipelines share with this one
(text in, guided U-Net, picture out) are methods of their own.
"""

import inspect
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from tqdm.auto import tqdm

from minidiff.boundary import draw_normal, like, to_images, to_numpy
from minidiff.models.layers import timestep_embedding
from minidiff.pipelines.base import DiffusionPipeline, ImagePipelineOutput, refuse_parts, repair_configs
from minidiff.pipelines.porting import PortedDecoder
from minidiff.sampling import guide, sample

MOST_PICTURES = 1024  # in one call: far more exhaust the memory, and the process ends without a word


@dataclass
class StableDiffusionPipelineOutput(ImagePipelineOutput):
    """What a call made: `.images`; nsfw_content_detected, which diffusers has, is always None."""

    nsfw_content_detected: None = None

    def to_tuple(self):
        """The results without their names, as with return_dict=False."""
        return (self.images, self.nsfw_content_detected)


class StableDiffusionPipeline(DiffusionPipeline, PortedDecoder):
    """Pictures of a text, for Stable Diffusion 1 and 2 and everything that is built like them.

    Configs are repaired as in diffusers: old checkpoints lack steps_offset=1 and clip_sample=False in the
    scheduler's, and have a U-Net's sample_size too small. There is no safety checker; ValueError if one, or
    another part that is not used here, is given. Parts of a loaded pipeline serve another, without copies:
    `StableDiffusionImg2ImgPipeline.from_pipe(pipe)`.
    """

    part_classes: ClassVar = {
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer",),
        "unet": ("UNet2DConditionModel",),
        "scheduler": (),
    }
    options = ("requires_safety_checker",)
    callback_tensors: ClassVar = ("latents", "prompt_embeds", "negative_prompt_embeds")
    repairs: ClassVar = {"steps_offset": 1, "clip_sample": False}  # of the scheduler's config

    def __init__(
        self, vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        image_encoder=None, requires_safety_checker: bool = False,
    ):  # fmt: skip
        refuse_parts(self, safety_checker=safety_checker, feature_extractor=feature_extractor,
                     image_encoder=image_encoder)  # fmt: skip
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.unet, self.scheduler = unet, scheduler
        repair_configs(scheduler, unet, self.repairs)
        self.requires_safety_checker = requires_safety_checker
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels of a latent's side

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str] | None = None, height: int | None = None, width: int | None = None,
        num_inference_steps: int = 50, timesteps=None, sigmas=None, guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None, num_images_per_prompt: int = 1, eta: float = 0.0,
        generator=None, latents=None, prompt_embeds=None, negative_prompt_embeds=None, *,
        output_type: str = "pil", return_dict: bool = True, guidance_rescale: float = 0.0,
        clip_skip: int | None = None, callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=("latents",),
    ):  # fmt: skip
        """Pictures of a prompt, or of several, each num_images_per_prompt times; B is their number in all.

        height, width in pixels, multiples of 8; as in training if None. timesteps or sigmas: lists in place
        of num_inference_steps, for schedulers that take them. guidance_scale > 1 follows the prompt more
        closely, away from negative_prompt (sampling.guide has it and guidance_rescale). eta in [0, 1]: DDIM's
        noise. generator: a torch.Generator or numpy.random.Generator, or a list with one for each picture;
        None is torch's global one. latents (B, 4, height / 8, width / 8): standard normal noise to start
        from. prompt_embeds, negative_prompt_embeds (prompts, 77, D): texts that are encoded already.
        output_type: "pil" (a list), "np" (B, H, W, 3) float32 or "pt" (B, 3, H, W) in [0, 1], or "latent" (B,
        4, h, w). clip_skip: so many of the text encoder's last layers are left out.
        callback_on_step_end(pipe, i, t, tensors) runs after each step with a dict of the tensors that
        callback_on_step_end_tensor_inputs names, and may return others; it stops the loop with
        pipe._interrupt = True.

        -> StableDiffusionPipelineOutput, or a tuple (images, None). ValueError for values that do not fit,
        TypeError where prompt and negative_prompt are of different types.
        """
        count = num_images_per_prompt * count_prompts(
            prompt, prompt_embeds, negative_prompt, negative_prompt_embeds
        )
        self._check_call(count, generator, output_type, callback_on_step_end_tensor_inputs)
        size = self._latent_size(height, width, latents)
        choose_timesteps(self.scheduler, num_inference_steps, timesteps, sigmas)
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale

        text = self.bind_text(prompt, negative_prompt, num_images_per_prompt, prompt_embeds,
                              negative_prompt_embeds, clip_skip)  # fmt: skip
        latents = self.prepare_latents((count, self.unet.config.in_channels, *size), generator, latents)
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        latents = self.denoise(latents, text, self.scheduler.timesteps, generator, eta, callback)
        images = self.show(latents, output_type)
        return StableDiffusionPipelineOutput(images) if return_dict else (images, None)

    def bind_text(
        self, prompt, negative_prompt, num_images_per_prompt, prompt_embeds, negative_prompt_embeds, clip_skip
    ) -> dict:
        """What `predictor` needs: the texts of `encode_prompt`, as one batch where there is guidance."""
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt, None, num_images_per_prompt, self.do_classifier_free_guidance, negative_prompt,
            prompt_embeds, negative_prompt_embeds, clip_skip=clip_skip,
        )  # fmt: skip
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])  # (2B, 77, D)
        return {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}

    def encode_prompt(
        self, prompt, device=None, num_images_per_prompt: int = 1, do_classifier_free_guidance: bool = True,
        negative_prompt=None, prompt_embeds=None, negative_prompt_embeds=None, *, clip_skip=None,
    ):  # fmt: skip
        """(prompt_embeds, negative_prompt_embeds), each (B, 77, D), the pictures of a prompt adjacent.

        What is given as embeddings is only repeated. The second one is None without guidance. Errors as for
        the call.
        """
        weight = self.unet.conv_in.weight
        device = weight.device if device is None else torch.device(device)
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds = self._encode(prompts, None, device, clip_skip)  # (prompts, 77, D)
        if not do_classifier_free_guidance:
            return repeat(prompt_embeds, num_images_per_prompt, device, weight.dtype), None
        if negative_prompt_embeds is None:
            negatives = match_prompts(negative_prompt, prompt, len(prompt_embeds))
            length = prompt_embeds.shape[1]
            negative_prompt_embeds = self._encode(negatives, length, device)  # never skips layers
        if prompt_embeds.shape != negative_prompt_embeds.shape:
            raise ValueError(
                f"prompt_embeds have the shape {tuple(prompt_embeds.shape)}, negative_prompt_embeds "
                f"{tuple(negative_prompt_embeds.shape)}; they must be equal"
            )
        both = prompt_embeds, negative_prompt_embeds
        return tuple(repeat(embeds, num_images_per_prompt, device, weight.dtype) for embeds in both)

    def _encode(self, prompts, length, device, clip_skip=None):
        """Texts as vectors (prompts, length, D); length is the tokenizer's own, 77, if None."""
        output = self._run_text_encoder(self.tokenizer, self.text_encoder, prompts, length, device)
        if clip_skip is None:
            return output.last_hidden_state  # (prompts, length, D)
        return self.text_encoder.text_model.final_layer_norm(self._layer(output.hidden_states, clip_skip))

    def _run_text_encoder(self, tokenizer, text_encoder, prompts, length, device):
        """The text encoder's output, all of its layers included, for texts padded to length tokens."""
        if text_encoder is None or tokenizer is None:
            raise ValueError(
                "this pipeline has no text encoder or no tokenizer; pass all texts as embeddings"
            )
        length = length or tokenizer.model_max_length
        ids = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return text_encoder(ids.input_ids.to(device), output_hidden_states=True)

    def _layer(self, hidden_states, clip_skip, before=0):
        """A text encoder's vectors (prompts, length, D), clip_skip layers before the last but `before`."""
        most = len(hidden_states) - 1 - before
        if clip_skip not in range(most + 1):
            raise ValueError(
                f"clip_skip is {clip_skip!r}; this text encoder has {len(hidden_states) - 1} layers, so take "
                f"0 to {most}"
            )
        return hidden_states[most - clip_skip]

    def prepare_latents(self, shape, generator=None, latents=None) -> np.ndarray:
        """Where sampling starts: `draw_noise`, times the scheduler's first level."""
        return self.draw_noise(shape, generator, latents) * float(self.scheduler.init_noise_sigma)

    def draw_noise(self, shape, generator=None, latents=None) -> np.ndarray:
        """Standard normal noise, or the latents that are given in its place; float32 (B, C, h, w).

        Half-precision models get the numbers that float32 ones get: torch draws in float32 for both.
        """
        weight = self.unet.conv_in.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if latents is None:
            return draw_normal(shape, generator, dtype, weight.device)
        if tuple(latents.shape) != tuple(shape):
            raise ValueError(f"latents have the shape {tuple(latents.shape)}; this call needs {tuple(shape)}")
        return to_numpy(torch.as_tensor(latents).to(dtype))

    def denoise(
        self, latents, text: dict, timesteps, generator=None, eta=0.0, callback=(None, ()), blend=None
    ):
        """The loop: latents (B, 4, h, w) from the noise of timesteps[0] to pictures' latents, float32 arrays.

        text: what `predictor` needs. callback: a function that runs after each step, and the names of the
        tensors that it gets; see the call. blend(latents, i) -> latents, if any, runs after step i before it.
        """
        self._num_timesteps, self._interrupt = len(timesteps), False
        loop = sample(self.predictor(text), latents, self.scheduler, timesteps=timesteps,
                      generator=generator, eta=eta)  # fmt: skip
        with tqdm(total=len(timesteps), **self._progress_bar_config) as bar:
            for step in loop:
                if blend is not None:
                    step.latents = blend(step.latents, step.index)
                if callback[0] is not None:
                    self._call_back(*callback, step, text)
                latents = step.latents
                bar.update()
                if self._interrupt:
                    break
        return latents

    def predictor(self, text: dict):
        """The U-Net and guidance with the text bound to them: predict(x, t), arrays (B, 4, h, w) in and out.

        text["prompt_embeds"]: (B, 77, D), with guidance (2B, 77, D), the negative ones first; for SDXL also
        add_text_embeds and add_time_ids. All are looked up at every step: callbacks may exchange them.
        """

        def predict(x, t):
            embeds, guided = text["prompt_embeds"], self.do_classifier_free_guidance
            latents = like(np.concatenate([x, x]) if guided else x, embeds)  # one batch for both texts
            conditions = {"timestep_cond": self._guidance_embedding(embeds)}
            if "add_text_embeds" in text:
                added = {"text_embeds": text["add_text_embeds"], "time_ids": text["add_time_ids"]}
                conditions["added_cond_kwargs"] = added
            output = self.unet(
                self._model_input(latents, text), torch.as_tensor(t), embeds, **conditions
            ).sample
            output = like(to_numpy(output), x)
            if not guided:
                return output
            return guide(*np.split(output, 2), self._guidance_scale, self._guidance_rescale)

        return predict

    def _model_input(self, latents, text):
        """What the U-Net sees of the latents, a tensor (B, 4, h, w); inpainting adds channels to it."""
        return latents

    def _guidance_embedding(self, embeds):
        """For models distilled with the guidance as an input (LCM): it as waves, (B, time_cond_proj_dim)."""
        dim = self.unet.config.time_cond_proj_dim
        if dim is None:
            return None
        scale = torch.full((len(embeds),), 1000 * (self._guidance_scale - 1), device=embeds.device)
        return timestep_embedding(scale, dim, flip_sin_to_cos=False, freq_shift=1).to(embeds.dtype)

    def show(self, latents: np.ndarray, output_type: str):
        """Latents, an array (B, 4, h, w), as what a call returns."""
        if output_type == "latent":
            return like(latents, self.unet.conv_in.weight)
        return to_images(self.decode(latents), output_type)

    def decode(self, latents: np.ndarray) -> torch.Tensor:
        """Latents, an array (B, 4, h, w) -> pictures in about [-1, 1], a tensor (B, 3, H, W)."""
        latents = like(latents / self.vae.config.scaling_factor, next(self.vae.parameters()))
        return self.vae.decode(latents).sample

    def _check_call(self, count, generator, output_type, tensor_names):
        """Raises ValueError, before any work is done, for what a call can't do."""
        if count != int(count) or not 0 < count <= MOST_PICTURES:
            raise ValueError(f"this call asks for {count} pictures; one call makes 1 to {MOST_PICTURES}")
        if isinstance(generator, list | tuple) and len(generator) != count:
            raise ValueError(
                f"got {len(generator)} generators for {count} pictures; pass one, or one for each"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}; it must be 'pil', 'np', 'pt' or 'latent'")
        unknown = sorted(set(tensor_names) - set(self.callback_tensors))
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {', '.join(unknown)}; "
                f"there are {', '.join(self.callback_tensors)}"
            )

    def _latent_size(self, height, width, latents):
        """(h, w) of the latents: for a picture of height x width, else as given, else as in training."""
        factor, size = self.vae_scale_factor, self.unet.config.sample_size
        default = size if isinstance(size, list | tuple) else (size, size)
        h, w = default if latents is None else latents.shape[2:]
        # diffusers takes the default for both sides where one of them is missing, and so ignores the other
        height, width = h * factor if height is None else height, w * factor if width is None else width
        multiple = math.lcm(8, factor)
        for side in (height, width):
            if not isinstance(side, int | float | np.number) or side % multiple or side < multiple:
                given = f"{height!r} and {width!r}"
                raise ValueError(f"height and width must be multiples of {multiple}, not {given}")
        return int(height) // factor, int(width) // factor

    def _call_back(self, callback, names, step, text):
        """One call of callback_on_step_end; what it returns replaces step.latents and the texts."""
        tensors = text | {"latents": like(step.latents, text["prompt_embeds"])}
        names = getattr(callback, "tensor_inputs", names)  # diffusers' PipelineCallback has its own
        changed = callback(self, step.index, step.t, {name: tensors[name] for name in names}) or {}
        if "latents" in changed:
            step.latents = like(to_numpy(changed["latents"]), step.latents)
        text.update({name: changed[name] for name in text if name in changed})

    @property
    def guidance_scale(self) -> float:
        """The running call's. Callbacks may set _guidance_scale; for 1 or less, they halve prompt_embeds."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """The running call's."""
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether each step asks the U-Net twice, with the prompt and with the negative one."""
        return self._guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None

    @property
    def num_timesteps(self) -> int:
        """How many steps the running call takes."""
        return self._num_timesteps


def count_prompts(prompt, prompt_embeds, negative_prompt=None, negative_prompt_embeds=None) -> int:
    """How many prompts there are; ValueError if it is unclear which they are."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError(
            f"got {'neither' if prompt is None else 'both'} prompt and prompt_embeds; pass one of them"
        )
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("got both negative_prompt and negative_prompt_embeds; pass one of them")
    if prompt is None:
        if prompt_embeds.ndim != 3:
            raise ValueError(
                f"prompt_embeds have the shape {tuple(prompt_embeds.shape)}, not (prompts, tokens, channels)"
            )
        return len(prompt_embeds)
    if isinstance(prompt, str):
        return 1
    if not isinstance(prompt, list) or not prompt or not all(isinstance(text, str) for text in prompt):
        raise ValueError(f"prompt is {prompt!r:.100}; it must be a string, or a list of at least one string")
    return len(prompt)


def match_prompts(other, prompt, count, name="negative_prompt") -> list[str]:
    """count texts of the argument called name; TypeError or ValueError if they do not go with the prompts."""
    if other is None:
        return [""] * count
    if prompt is not None and type(other) is not type(prompt):
        raise TypeError(
            f"{name} is a {type(other).__name__} and prompt a {type(prompt).__name__}; "
            "make both a string, or both a list"
        )
    texts = [other] * count if isinstance(other, str) else other
    if len(texts) != count:
        raise ValueError(f"got {len(texts)} texts as {name} for {count} prompts; pass one for each")
    return texts


def choose_timesteps(scheduler, num_inference_steps, timesteps=None, sigmas=None) -> int:
    """Sets the scheduler's timesteps: a number of them, or a list of timesteps or sigmas if it takes one.

    Returns how many steps that are. ValueError for both lists, and for one that this scheduler can't take.
    """
    lists = {"timesteps": timesteps, "sigmas": sigmas}
    lists = {name: values for name, values in lists.items() if values is not None}
    if len(lists) > 1:
        raise ValueError("got timesteps and sigmas; both say where the sampling goes, so pass one of them")
    for name in lists:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(
                f"{type(scheduler).__name__} takes no list of {name}; pass num_inference_steps instead"
            )
    scheduler.set_timesteps(**(lists or {"num_inference_steps": num_inference_steps}))
    return len(scheduler.timesteps) if lists else num_inference_steps


def repeat(embeds, times, device, dtype):
    """(prompts, T, D) -> (prompts * times, T, D), the copies of one text adjacent."""
    return torch.as_tensor(embeds).to(device, dtype).repeat_interleave(times, dim=0)
