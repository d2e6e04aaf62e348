"""A model from a checkpoint and back: `from_pretrained` and `save_pretrained`, which every model inherits.

The config and the weights must fit exactly: whatever is missing, left over or of another shape is reported by
name.
"""

import contextlib
import os
import threading
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from minidiff.checkpoints import files, hub, keys, layout
from minidiff.checkpoints.errors import CheckpointError
from minidiff.config import Config, Configured


class PretrainedModel(Configured, nn.Module):
    """Base of every model: a config, weights under the published names, `from_pretrained`, `save_pretrained`.

    A class names its weight file in weights_name, and in fixed_options the options that it knows with one
    value only.
    """

    config_name = "config.json"
    weights_name = "diffusion_pytorch_model.safetensors"

    @classmethod
    def _check_foreign(cls, foreign):
        unknown = sorted(key for key in foreign if not key.startswith("_"))  # _class_name, _name_or_path, ...
        if unknown:
            raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path,
        subfolder: str | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ):
        """The model of a checkpoint, in eval mode on the CPU; its weights are read when they are first used.

        name_or_path: a built-in name, a folder or a repository id; subfolder: where in it, such as "unet".
        variant: the infix of the weight file, such as "fp16"; use_safetensors: False for the .bin file, True
        for nothing else, None for what is there. torch_dtype: float32 if None, whatever the file holds, as in
        diffusers; "auto" keeps the file's. revision, cache_dir, local_files_only, token: see checkpoints.hub.
        CheckpointError, before anything large is built, for all that is wrong with folder, config or weights.
        """
        check_dtype(torch_dtype)

        def choose(names, where):
            config = hub.one_of(names, where, cls.config_name)
            return [config, *layout.pick_weights(names, where, cls.weights_name, variant, use_safetensors)]

        source = {
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
        }
        config_file, *weight_files = hub.resolve(name_or_path, choose, subfolder, **source)
        stored = files.open_tensors(weight_files)
        config = layout.read_json(config_file)
        return cls._from_stored(stored, config, config_file, weight_files[0], torch_dtype)

    @classmethod
    def _from_stored(cls, stored, config, config_file, weight_file, torch_dtype):
        """The model of a config with the weights in stored, {name: open file}; two names for errors."""
        model = cls._described_by(config, config_file, most_tensors=2 * len(stored) + 1000)
        names = _fitting(model, stored, config_file, weight_file)
        dtype = None if torch_dtype == "auto" else torch_dtype or torch.float32
        wanted, tensors = model.state_dict(), {}
        for ours, theirs in names.items():
            tensors[ours] = tensor = stored[theirs].read(theirs, dtype)
            if tensor.is_floating_point() != wanted[ours].is_floating_point():
                raise CheckpointError(f"{weight_file}: {theirs} has the type {tensor.dtype}, which can't "
                                      f"stand for {wanted[ours].dtype}")  # fmt: skip
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    @classmethod
    def _described_by(cls, config, config_file, most_tensors):
        """The model of a config without memory for its weights; CheckpointError if it can't be built."""
        named = config.get("_class_name", cls.__name__)
        if named not in (base.__name__ for base in cls.__mro__):
            raise CheckpointError(f"{config_file} describes a {named}, not a {cls.__name__}")
        try:
            with torch.device("meta"), _Undrawn(), _at_most(most_tensors):
                model = cls.from_config(config)
            if "_diffusers_version" in config:  # pipelines repair what old versions wrote
                model._set_config(Config(model.config | {"_diffusers_version": config["_diffusers_version"]}))
            return model
        # Values of a wrong type or size fail in as many ways as there are uses of them.
        except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{config_file}: {error}") from error

    def save_pretrained(self, save_directory, variant: str | None = None, max_shard_size: int | str = "10GB",
                        safe_serialization: bool = True):  # fmt: skip
        """Writes config.json and the weights as safetensors; diffusers (transformers for CLIP) reads both.

        variant: an infix for the weight files' names. max_shard_size: bytes, or a text such as "500MB";
        weights of more than that become several files with an index. Weights that an earlier call left there
        under other names are deleted. ValueError for safe_serialization=False, which would be pickles;
        CheckpointError where the disk does not take the files; each is then as before, or absent.
        """
        if not safe_serialization:
            raise ValueError("minidiff writes weights as safetensors alone; leave safe_serialization=True")
        folder, tensors = Path(save_directory), self.state_dict()
        names = layout.WeightNames(self.weights_name, variant)
        shards = layout.split(tensors, layout.bytes_in(max_shard_size))
        if len(shards) == 1:
            written = [names.whole]
            files.write_tensors(folder / names.whole, tensors)
        else:
            parts = {names.shard(i, len(shards)): part for i, part in enumerate(shards)}
            written = [names.index, *parts]
            files.write_shards(folder / names.index, parts)
        for name in names.among(os.listdir(folder)):
            if name not in written:
                folder.joinpath(name).unlink()
        with layout.writing(folder / self.config_name):
            self.save_config(save_directory)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def check_dtype(torch_dtype, dtype=None):
    """The one that is given of two names of one argument; ValueError for both, TypeError for no type."""
    if torch_dtype is not None and dtype is not None:
        raise ValueError("got torch_dtype and dtype; they are two names of one thing, so pass one of them")
    torch_dtype = dtype if torch_dtype is None else torch_dtype
    if torch_dtype not in (None, "auto") and not isinstance(torch_dtype, torch.dtype):
        raise TypeError(f"torch_dtype is a torch.dtype, 'auto' or None, not {torch_dtype!r}")
    return torch_dtype


class _Undrawn(TorchFunctionMode):
    """Draws no first values for weights: on the meta device that imports torch's compiler, in seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


@contextlib.contextmanager
def _at_most(most_tensors):
    """Ends the construction of a model of too many tensors: one of 1000000000 layers never ends by itself."""
    builder, count = threading.get_ident(), 0

    def registered(module, name, parameter):
        nonlocal count
        count += threading.get_ident() == builder
        if count > most_tensors:
            raise CheckpointError(
                f"it describes a model with more than {most_tensors} tensors, far more than its file has"
            )

    hook = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def _fitting(model, stored, config_file, weight_file):
    """{our name: the file's name} of all tensors; CheckpointError if they are not exactly the model's.

    stored: {the file's name: the open file}.
    """
    wanted = model.state_dict()
    names = keys.translate(stored, wanted)
    found = {ours: tuple(stored[theirs].shapes[theirs]) for ours, theirs in names.items()}
    faults = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {found[name]} instead of {tuple(wanted[name].shape)}"
            for name in sorted(wanted.keys() & found.keys())
            if found[name] != wanted[name].shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(n)} {what}: {files.some(n)}" for what, n in faults.items() if n)
        raise CheckpointError(f"{weight_file} does not fit {config_file}; tensors: {listed}")
    return names
