"""What scripts written for diffusers use of a pipeline beside its call; no picture needs it: skip it first.

`Ported` is inherited by every pipeline, `PortedDecoder` by those with an autoencoder. What minidiff doesn't
have is in one table, `ABSENT`, with what to do in its place.
"""

import logging

import numpy as np
import torch
from tqdm.auto import tqdm

import minidiff
from minidiff.boundary import to_images, to_pil
from minidiff.pictures import blur, from_images, from_masks

logger = logging.getLogger(__name__)

_LORA = (
    "minidiff knows no LoRA: with diffusers, fuse_lora() and save_pretrained(folder), then load that folder"
)
_INVERSION = "minidiff knows no textual inversion: encode prompts with diffusers, and pass prompt_embeds"
_ADAPTER = "minidiff knows no IP-Adapter: use diffusers for it, whose parts load from the same folder"
_OFFLOAD = (
    "models stay where pipe.to(device) puts them; to need less memory, load with torch_dtype=torch.float16 "
)
_OFFLOAD += "and call pipe.enable_vae_tiling()"
_HOOKS = "nothing is offloaded here, so leave this line out"
_FUSE = "it changes how fast pictures come, not the pictures: leave this line out, or call pipe.compile()"
_FREEU = "minidiff knows no FreeU; without this line the pictures are those of the model itself"
ABSENT = {  # what diffusers' pipelines have -> what to do here
    "load_lora_weights": _LORA, "unload_lora_weights": _LORA, "fuse_lora": _LORA, "unfuse_lora": _LORA,
    "set_adapters": _LORA, "load_textual_inversion": _INVERSION, "unload_textual_inversion": _INVERSION,
    "load_ip_adapter": _ADAPTER, "unload_ip_adapter": _ADAPTER, "set_ip_adapter_scale": _ADAPTER,
    "enable_model_cpu_offload": _OFFLOAD, "enable_sequential_cpu_offload": _OFFLOAD,
    "enable_group_offload": _OFFLOAD, "maybe_free_model_hooks": _HOOKS, "remove_all_hooks": _HOOKS,
    "reset_device_map": _HOOKS, "fuse_qkv_projections": _FUSE, "unfuse_qkv_projections": _FUSE,
    "enable_freeu": _FREEU, "disable_freeu": _FREEU,
    "config": "each part has its own, such as pipe.unet.config",
    "check_inputs": "the call itself checks what it gets, before any work is done",
    "prepare_extra_step_kwargs": "minidiff.sampling.sample gives each scheduler's step what it takes",
    "decode_latents": "write pipe.image_processor.postprocess(pipe.vae.decode(latents / "
                      "pipe.vae.config.scaling_factor).sample)",
    "upcast_vae": "a float16 decoder that would overflow runs in float32 by itself, so leave this line out",
    "run_safety_checker": "minidiff has no safety checker, so leave this line out",
    "push_to_hub": "write pipe.save_pretrained(folder), and send the folder with huggingface_hub",
}  # fmt: skip


class OwnScheduler:
    """A pipeline's attribute `scheduler`: one of diffusers' is refused when it is set, not some steps later.

    TypeError says what to write instead. There is no __get__, so reading it is as plain as any attribute.
    """

    def __set__(self, pipeline, scheduler):
        if isinstance(scheduler, type):
            raise TypeError(f"scheduler is the class {scheduler.__name__}; make an object of it: "
                            f"{scheduler.__name__}.from_config(pipe.scheduler.config)")  # fmt: skip
        if isinstance(scheduler, str):
            raise TypeError(f"scheduler is {scheduler!r}; pass an object, such as "
                            "minidiff.DDIMScheduler.from_config(pipe.scheduler.config)")  # fmt: skip
        theirs = [c for c in type(scheduler).__mro__ if c.__module__.split(".")[0] == "diffusers"]
        if any("step" in vars(c) for c in theirs):  # not where only a base without numbers is theirs
            names = [c.__name__ for c in theirs if c.__name__ in minidiff.__all__]
            name = names[0] if names else "DDIMScheduler"
            have = "computes with tensors" if names else "minidiff does not have"
            raise TypeError(f"scheduler is a {type(scheduler).__name__} of diffusers, which {have}; write "
                            f"minidiff.{name}.from_config(scheduler.config)")  # fmt: skip
        vars(pipeline)["scheduler"] = scheduler


class Ported:
    """The part of diffusers' pipelines that has nothing to do with making pictures."""

    scheduler = OwnScheduler()
    _progress_bar_config = {}  # noqa: RUF012  replaced, never changed

    def __getattr__(self, name):  # only called for what is not there
        if name in ABSENT:
            raise AttributeError(f"{type(self).__name__} has no {name}: {ABSENT[name]}", name=name, obj=self)
        return object.__getattribute__(self, name)  # Python's own error, or the one inside a property

    def register_modules(self, **parts):
        """Sets the parts of a pipeline of your own, whose constructor must have arguments of these names."""
        for name, part in parts.items():
            setattr(self, name, part)

    def set_progress_bar_config(self, **config):
        """Arguments of tqdm for every later call: `disable=True`, `desc="..."`, `leave=False`, ..."""
        self._progress_bar_config = config

    def progress_bar(self, iterable=None, total: int | None = None):
        """tqdm's bar over an iterable, or over `total` steps, as set_progress_bar_config wants it."""
        return tqdm(iterable, total=total, **self._progress_bar_config)

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list:
        """Pictures (B, H, W, C) or (H, W, C) in [0, 1] as a list of PIL images."""
        return to_pil(images if images.ndim == 4 else images[None])

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    def enable_attention_slicing(self, slice_size="auto"):
        """Accepted, with a line of notice: attention never holds its whole matrix, so slices save nothing.

        The backend "reference" does hold it; it is there to be compared with (see ops.py).
        """
        self._tell_about_attention("enable_attention_slicing")

    def disable_attention_slicing(self):
        """Accepted: there is nothing to disable."""

    def enable_xformers_memory_efficient_attention(self, attention_op=None):
        """Accepted, with a line of notice: as for enable_attention_slicing."""
        self._tell_about_attention("enable_xformers_memory_efficient_attention")

    def disable_xformers_memory_efficient_attention(self):
        """Accepted: there is nothing to disable."""

    def _tell_about_attention(self, method):
        logger.warning('%s changes nothing: attention never holds its whole matrix here, but with backend '
                       '"reference" (this pipeline runs %s)', method, self.backend)  # fmt: skip


class PortedDecoder:
    """What pipelines with an autoencoder, `vae`, have besides."""

    safety_checker = feature_extractor = image_encoder = None  # parts of theirs that are never there

    def enable_vae_tiling(self):
        """`vae.enable_tiling()`: decodes large pictures in tiles, which needs less memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self):
        """`vae.disable_tiling()`."""
        self.vae.disable_tiling()

    def enable_vae_slicing(self):
        """`vae.enable_slicing()`: decodes the pictures of a batch one by one, which needs less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self):
        """`vae.disable_slicing()`."""
        self.vae.disable_slicing()

    @property
    def image_processor(self) -> "ImageProcessor":
        """Pictures to tensors for the autoencoder, and back."""
        return ImageProcessor(self.vae_scale_factor)

    @property
    def mask_processor(self) -> "ImageProcessor":
        """Masks to tensors, and blurred ones."""
        return ImageProcessor(self.vae_scale_factor, of_masks=True)


class ImageProcessor:
    """Pictures in and out by the names of diffusers' VaeImageProcessor; the work is done in pictures.py."""

    blur = staticmethod(blur)

    def __init__(self, vae_scale_factor: int = 8, of_masks: bool = False):
        self.read, self.vae_scale_factor = from_masks if of_masks else from_images, vae_scale_factor

    def preprocess(self, image, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """Pictures as a tensor (N, C, H, W) in [-1, 1], masks (N, 1, H, W) of 0 and 1; see `from_images`."""
        return torch.from_numpy(np.ascontiguousarray(self.read(image, height, width, self.vae_scale_factor)))

    def postprocess(self, image: torch.Tensor, output_type: str = "pil", do_denormalize=None):
        """Pictures (B, C, H, W) in [-1, 1] as "pil", "np" or "pt" (see `to_images`); "latent": as they are.

        do_denormalize: for each picture, whether it is in [-1, 1]; those that are not are in [0, 1].
        """
        if output_type == "latent":
            return image
        signed = [True] * len(image) if do_denormalize is None else do_denormalize
        rows = [row if each else 2 * row - 1 for row, each in zip(image, signed, strict=True)]
        return to_images(torch.stack(rows), output_type)
