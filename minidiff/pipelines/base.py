"""What every pipeline has beside its call: its parts, how they are loaded, saved and moved."""

import inspect
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import minidiff
from minidiff import backends, models
from minidiff.checkpoints import CheckpointError, hub, single_file
from minidiff.checkpoints.load import check_dtype
from minidiff.config import DIFFUSERS_VERSION, Config, write_json
from minidiff.pipelines.porting import Ported

logger = logging.getLogger(__name__)

INDEX = "model_index.json"
FROM_TRANSFORMERS = ("text_encoder", "tokenizer")  # the library that the index names; else diffusers
NOT_USED = ("safety_checker", "feature_extractor", "image_encoder")  # parts of repositories, not of minidiff


@dataclass
class ImagePipelineOutput:
    """What a call made: `.images` is a list of PIL images, or an array or a tensor (see output_type)."""

    images: object

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self):
        """The results without their names, as with return_dict=False."""
        return (self.images,)


class DiffusionPipeline(Ported):
    """Base of the pipelines; `DiffusionPipeline.from_pretrained` picks the class that the checkpoint names.

    A pipeline's parts are plain attributes: `pipe.scheduler = ...` switches. `.components` holds them all. In
    a class of your own that names no part_classes, they are what its constructor can't do without.
    """

    part_classes: ClassVar[dict] = {}  # part -> the names that its class may have; (): any scheduler
    optional_parts: ClassVar[tuple] = ()  # parts that a checkpoint may go without
    options: ClassVar[tuple] = ()  # constructor arguments that stand in the index as plain values

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not cls.part_classes:
            arguments = inspect.signature(cls).parameters.values()
            needed = [a.name for a in arguments if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD]
            classes = tuple(models.__all__)
            cls.part_classes = {name: () if "scheduler" in name else classes for name in needed}

    @classmethod
    def from_pretrained(
        cls, name_or_path, *, torch_dtype=None, dtype=None, variant=None, use_safetensors=None, revision=None,
        cache_dir=None, local_files_only=False, token=None, device_map=None, low_cpu_mem_usage=True, **parts,
    ):  # fmt: skip
        """The pipeline of a built-in name ("scenes"), a folder in diffusers' layout, or a repository's id.

        torch_dtype (or dtype, its newer name): the type of all models, float32 if None, whatever the files
        hold. variant: a file-name infix such as "fp16". Parts may be given instead of read: `vae=my_vae`.
        device_map: the device of all models, as if .to() were called. low_cpu_mem_usage is not used: weights
        are mapped, and converted one by one. CheckpointError for a checkpoint that lacks a part or names a
        class that minidiff does not have; ValueError for a device_map that is no device, TypeError for an
        argument that is no part.
        """
        device = _one_device(device_map)
        torch_dtype = check_dtype(torch_dtype, dtype)
        source = {"revision": revision, "cache_dir": cache_dir, "token": token}
        source["local_files_only"] = local_files_only
        # models: float32 if None. diffusers 0.42 leaves a text encoder in the type of its file, beside a
        # float32 U-Net
        weights = {
            "torch_dtype": torch_dtype,
            "variant": variant,
            "use_safetensors": use_safetensors,
        }
        index = hub.read_json(name_or_path, INDEX, **source)

        def load(name, part_class):
            options = source | weights if issubclass(part_class, torch.nn.Module) else source
            subfolder = hub.part_subfolder(name_or_path, name, **source)
            return part_class.from_pretrained(name_or_path, subfolder, **options)

        pipeline = cls._assemble(index, f"{name_or_path}: {INDEX}", parts, load)
        if _named_class(index, "safety_checker") and "safety_checker" not in parts:
            logger.warning("%s: its safety checker is left out; minidiff has none", name_or_path)
        return pipeline.to(device=device)

    @classmethod
    def from_single_file(
        cls, name_or_path, *, torch_dtype=None, dtype=None, config=None, original_config=None,
        extract_ema=False, prediction_type=None, revision=None, cache_dir=None, local_files_only=False,
        token=None, **parts,
    ):  # fmt: skip
        """The pipeline of one file in the original layout: Stable Diffusion 1, 2 or XL, safetensors or ckpt.

        name_or_path: a path, a file's page on the hub, or "owner/repository/file". The kind of model is
        recognised from its tensors, and its configs and vocabulary ship with minidiff, so nothing is fetched;
        config, a folder in diffusers' layout or a repository's id, describes other models. original_config is
        not needed, and refused. extract_ema: take the running averages of the U-Net's weights, where the file
        has both. prediction_type: "epsilon" for Stable Diffusion 2 base, whose tensors look like 2's.
        torch_dtype (or dtype) and parts: as for from_pretrained. CheckpointError for a file that is no single
        file, lacks a part, has tensors that fit nothing or is of another pipeline; TypeError for an argument
        that is no part.
        """
        torch_dtype = check_dtype(torch_dtype, dtype)
        if prediction_type is not None and parts.get("scheduler") is not None:
            raise ValueError("got a scheduler and a prediction_type; set it in the scheduler's config")
        file = single_file.open_file(
            name_or_path, config=config, original_config=original_config, extract_ema=extract_ema,
            prediction_type=prediction_type, revision=revision, cache_dir=cache_dir,
            local_files_only=local_files_only, token=token,
        )  # fmt: skip
        known = set(cls.part_classes)
        if known and (set(file.parts) - known or "unet" not in known):
            raise CheckpointError(f"{file.path} is {file.title}; load it with {file.index['_class_name']}, "
                                  f"not with {cls.__name__}")  # fmt: skip

        def load(name, part_class):
            return file.build(name, part_class, torch_dtype)

        return cls._assemble(file.index, f"{file.path} ({file.title})", parts, load)

    @classmethod
    def from_pipe(cls, pipeline, *, torch_dtype=None, dtype=None, **parts):
        """A pipeline of this class with the parts of another: shared, not copied, so no memory is needed.

        What changes a part, such as .to(), changes it for both. Parts and options may be given to replace the
        other's. torch_dtype (or dtype): as if .to() were called; the parts keep their own type if None, where
        diffusers makes them float32. ValueError for a pipeline whose parts are not this one's, TypeError for
        what is no pipeline and for an argument that is no part.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise TypeError(f"{cls.__name__}.from_pipe takes a pipeline, not a {type(pipeline).__name__}")
        target = type(pipeline) if cls is DiffusionPipeline else cls
        target._check_given(parts)
        theirs = pipeline.components | {key: getattr(pipeline, key) for key in pipeline.options}
        made = {key: part for key, part in theirs.items() if key in (*target.part_classes, *target.options)}
        made |= parts
        unused = [key for key, part in pipeline.components.items() if key not in made and part is not None]
        wanted = [key for key in target.part_classes if key not in made or not target._fits(key, made[key])]
        if unused or wanted:
            why = f"has no use for {', '.join(unused)}" if unused else f"needs another {', '.join(wanted)}"
            source = type(pipeline).__name__
            raise ValueError(f"{target.__name__} can't be made of a {source}: {target.__name__} {why}")
        torch_dtype = check_dtype(torch_dtype, dtype)
        new = target(**made)
        return new if torch_dtype in (None, "auto") else new.to(torch_dtype)

    @classmethod
    def _fits(cls, name, part):
        """Whether part, if its class is one of ours, can be the pipeline's part called name."""
        accepted, given = cls.part_classes[name], type(part).__name__
        return not accepted or given in accepted or given not in minidiff.__all__

    @classmethod
    def _assemble(cls, index, where, parts, load):
        """The pipeline that an index describes, of the given parts and of load(name, class) for the others.

        where: what errors call the index.
        """
        pipeline_class = cls._class_for(index, where)
        pipeline_class._check_given(parts)
        made = {key: index[key] for key in pipeline_class.options if key in index} | parts
        for name in pipeline_class.part_classes:
            if name in pipeline_class.optional_parts and _named_class(index, name) is None:
                made.setdefault(name)
            if name not in made:
                made[name] = load(name, pipeline_class._part_class(name, index, where))
        return pipeline_class(**made)

    @classmethod
    def _class_for(cls, index, where):
        """cls, or for DiffusionPipeline itself the class that the index names."""
        if cls is not DiffusionPipeline:
            return cls
        known = [n for n in minidiff.__all__ if n.endswith("Pipeline") and n != "DiffusionPipeline"]
        name = index.get("_class_name")
        if name not in known:
            raise CheckpointError(f"{where} asks for a {name}; minidiff has {', '.join(known)}")
        return getattr(minidiff, name)

    @classmethod
    def _check_given(cls, parts):
        unknown = set(parts) - set(cls.part_classes) - set(cls.options) - set(NOT_USED)
        if unknown:
            raise TypeError(
                f"{cls.__name__} has no argument {', '.join(sorted(unknown))}; "
                f"the parts that can be given are {', '.join(cls.part_classes)}"
            )

    @classmethod
    def _part_class(cls, part, index, where):
        """The class of a part, as the index names it; CheckpointError where that is none of ours."""
        name = (_named_class(index, part) or "").removesuffix("Fast")  # CLIPTokenizerFast does the same
        if not name:
            raise CheckpointError(f"{where} names no {part}, which a {cls.__name__} needs")
        accepted = cls.part_classes[part] or [n for n in minidiff.__all__ if n.endswith("Scheduler")]
        if name not in accepted:
            raise CheckpointError(f"{where} asks for the {part} {name}; minidiff has {', '.join(accepted)}")
        return getattr(minidiff, name)

    def save_pretrained(self, save_directory, safe_serialization: bool = True, variant: str | None = None,
                        max_shard_size: int | str | None = None):  # fmt: skip
        """Writes every part, then the index, in a layout that diffusers loads too.

        variant and max_shard_size: for the weights of each model, see PretrainedModel.save_pretrained.
        ValueError for safe_serialization=False: weights are written as safetensors alone.
        """
        options = {"variant": variant, "max_shard_size": max_shard_size}
        options |= {} if safe_serialization else {"safe_serialization": False}
        options = {name: value for name, value in options.items() if value is not None}
        index = {"_class_name": type(self).__name__, "_diffusers_version": DIFFUSERS_VERSION}
        for name, part in self.components.items():
            library = "transformers" if name.removesuffix("_2") in FROM_TRANSFORMERS else "diffusers"
            index[name] = [None, None] if part is None else [library, type(part).__name__]
            if part is not None:
                weights = options if isinstance(part, torch.nn.Module) else {}
                part.save_pretrained(Path(save_directory, name), **weights)
        write_json(Path(save_directory, INDEX), index | {key: getattr(self, key) for key in self.options})

    @property
    def components(self) -> dict:
        """All parts by name: `OtherPipeline(**pipe.components)` shares them."""
        return {name: getattr(self, name) for name in self.part_classes}

    @property
    def models(self) -> list[torch.nn.Module]:
        """The parts that have weights."""
        return [part for part in self.components.values() if isinstance(part, torch.nn.Module)]

    def to(self, *args, device=None, dtype=None):
        """Moves all models to a device, a floating dtype or both; returns the pipeline.

        On a GPU, attention and group norm then run as kernels (see backends.py), but for models that were
        given another backend by name. Raises BackendUnavailable, and moves nothing, if that can't run there.
        """
        targets = [value for value in (*args, device, dtype) if value is not None]
        for target in targets:
            if isinstance(target, torch.dtype) and not target.is_floating_point:
                raise ValueError(f"models can't have the type {target}; take float32, float16 or bfloat16")
            if not isinstance(target, torch.dtype):
                for model in self.models:
                    backends.check_move(model, torch.device(target))
        for model in self.models:
            for target in targets:
                model.to(target)
        return self

    def compile(self):
        """minidiff.optimize for all models, and the U-Net replays a CUDA graph; returns the pipeline.

        For a Stable Diffusion pipeline on a GPU, after `.to`; the pictures stay the same but for rounding.
        Raises BackendUnavailable without a GPU, TypeError for another U-Net. See optimization/.
        """
        from minidiff import optimization  # inside: it is outside the core, and read by those who call this

        optimization.compile_unet(self.unet)
        for model in self.models:
            if model is not self.unet:
                optimization.optimize(model)
        return self

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.models[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the models' weights."""
        return self.models[0].dtype

    @property
    def backend(self) -> str:
        """Which version of attention and group norm the models run, such as "torch"; all, if several.

        `minidiff.ops.use_backend(pipe.unet, attention="reference")` chooses another.
        """
        layers = [layer for model in self.models for layer in model.modules()]
        used = {layer.backend for layer in layers if getattr(layer, "op", None) in backends.FOLLOWING}
        return ", ".join(sorted(used))

    @backend.setter
    def backend(self, name):
        raise AttributeError(f"pipe.backend can't be set, for models may run different ones; choose with "
                             f"minidiff.ops.use_backend(pipe.unet, attention={name!r})")  # fmt: skip

    def __repr__(self):
        parts = (
            f"{name}={type(part).__name__}" for name, part in self.components.items() if part is not None
        )
        return f"{type(self).__name__}({', '.join(parts)})"


def _one_device(device_map):
    """device_map as a torch.device, or None; ValueError where it asks for more than one, or for none."""
    if device_map is None:
        return None
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map is {device_map!r}; a pipeline's models stay together here, so name "
                         'one device, such as "cuda"') from error  # fmt: skip


def refuse_parts(pipeline, **parts):
    """Raises ValueError for a part that is given although this pipeline has no use for it."""
    for name, part in parts.items():
        if part is not None:
            raise ValueError(f"{type(pipeline).__name__} has no use for a {name}; pass {name}=None")


def repair_configs(scheduler, unet, repairs: dict):
    """Gives a scheduler whose config has a key of repairs, {key: value}, that value, and a U-Net its size.

    diffusers before 0.9 wrote a sample_size that is too small for those U-Nets, all for latents of 64 x 64.
    """
    for key, value in repairs.items():
        if scheduler.config.get(key, value) != value:
            # not through from_config: the key still counts as left at its default, as it does in diffusers
            scheduler._set_config(Config(scheduler.config | {key: value}))
    config = {} if unet is None else unet.config
    written_by = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version")))
    size = config.get("sample_size")
    if written_by and tuple(map(int, written_by.groups())) < (0, 9) and isinstance(size, int) and size < 64:
        unet._set_config(Config(config | {"sample_size": 64}))


def _named_class(index, part):
    """The class that the index gives for a part; None where it is null, absent or malformed."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else None
