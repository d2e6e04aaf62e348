"""One file that holds a whole Stable Diffusion: opened, recognised, and its parts built.

`open_file` finds the parts by their names (`ldm.py`) and the configs that the file does not hold (`kinds.py`,
or a folder that the caller names). A part looks like an open weight file to `load.py`: it has shapes, and
reads a tensor when it is asked for.
"""

import inspect
import logging
from typing import ClassVar

import torch

from minidiff.checkpoints import files, hub, kinds, ldm, vocabulary
from minidiff.checkpoints.errors import CheckpointError
from minidiff.checkpoints.load import PretrainedModel, check_dtype

logger = logging.getLogger(__name__)


class Part:
    """One part of a file, its tensors under the names that they have here."""

    def __init__(self, stored, sources):
        self._stored, self._sources = stored, sources
        self._users = {}  # {name in the file: how many tensors here are still to be read from it}
        for source in sources.values():
            self._users[source.name] = self._users.get(source.name, 0) + 1
        self._whole = {}  # {name in the file: its tensor}, while some of its users are still to be read
        self.shapes = {name: self._shape(source) for name, source in sources.items()}

    def _shape(self, source):
        shape = tuple(self._stored[source.name].shapes[source.name])
        if source.change is None or 0 in shape:  # empty tensors, which no model has, may be of any size
            return shape
        return tuple(source.change(torch.empty(shape, device="meta")).shape)

    def read(self, name, dtype=None) -> torch.Tensor:
        """The tensor called name here; if it is floating and a dtype is given, in that."""
        source = self._sources[name]
        tensor = self._whole.pop(source.name, None)
        if tensor is None or dtype not in (None, tensor.dtype):
            tensor = self._stored[source.name].read(source.name, dtype)
        self._users[source.name] -= 1
        if self._users[source.name] > 0:  # so that the thirds of one tensor are copied together
            self._whole[source.name] = tensor
        return tensor if source.change is None else source.change(tensor)


class SingleFile:
    """An open file: parts, {name: Part}; index, as in a folder's model_index.json; title, in words."""

    def __init__(self, path, parts, description, prediction_type=None):
        self.path, self.parts, self._description = path, parts, description
        self._prediction_type = prediction_type
        self.index, self.title = description.index, description.title

    def build(self, part, part_class, torch_dtype=None):
        """A model, tokenizer or scheduler of the given class; CheckpointError if its weights are missing."""
        if part == "scheduler":
            return part_class.from_config(self.scheduler_config())
        if part.startswith("tokenizer"):
            return self._description.tokenizer(part, part_class)
        if part not in self.parts:
            raise CheckpointError(
                f"{self.path} holds no {part}, only {', '.join(self.parts)}; pass "
                f"{part}={part_class.__name__}.from_pretrained(...)"
            )
        config, described_in = self._description.config(part)
        return part_class._from_stored(self.stored(part), config, described_in, self.path, torch_dtype)

    def scheduler_config(self) -> dict:
        """The scheduler's config, with the prediction_type that the caller asked for."""
        config, _ = self._description.config("scheduler")
        if self._prediction_type is None:
            return config
        return config | {"prediction_type": self._prediction_type}

    def stored(self, part) -> dict:
        """{our name: what reads it} for all tensors of a part, as `files.open_tensors` gives them."""
        return dict.fromkeys(self.parts[part].shapes, self.parts[part])


class _Shipped:
    """The configs of a kind, which ship with the code."""

    def __init__(self, kind):
        self._kind, self.index, self.title = kind, kind.index(), kind.title

    def config(self, part):
        return self._kind.configs[part], f"{self.title} ({part})"

    def tokenizer(self, part, part_class):
        return part_class(**vocabulary.clip(self._kind.configs[part]["pad_token"]))


class _Folder:
    """The configs of a folder in diffusers' layout, or of a repository."""

    def __init__(self, name_or_path, source):
        self._name, self._source = name_or_path, source
        self.index = hub.read_json(name_or_path, "model_index.json", **source)
        self.title = f"described by {name_or_path}"

    def config(self, part):
        filename = "scheduler_config.json" if part == "scheduler" else "config.json"
        return hub.read_json(self._name, filename, part, **self._source), f"{self._name}/{part}/{filename}"

    def tokenizer(self, part, part_class):
        return part_class.from_pretrained(self._name, part, **self._source)


def open_file(
    name_or_path, *, config=None, original_config=None, extract_ema=False, prediction_type=None, **source
) -> SingleFile:
    """The file of that name, with all of its parts and their configs.

    name_or_path: a path, a URL of the hub, or "owner/repository/file". config: a folder in diffusers' layout,
    or a repository's id, that describes the parts; recognised if None. extract_ema: take the running averages
    of the U-Net's weights, where the file has them beside the weights. prediction_type: see kinds.recognise.
    source: revision, cache_dir, local_files_only, token. CheckpointError for all that can be wrong with the
    file; ValueError for an original_config, which is not read, and for an unknown prediction_type.
    """
    refuse_original_config(original_config)
    if prediction_type not in (None, "epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"prediction_type is {prediction_type!r}; it must be epsilon, v_prediction or sample"
        )
    path = hub.single_file(name_or_path, **source)
    stored = files.open_tensors([path])
    names, unknown = _by_part(stored, path)
    if unknown:
        raise ldm.unknown_names(unknown, path)
    if "unet" not in names:
        raise CheckpointError(
            f"{path} holds no U-Net, only {', '.join(names)}; a VAE is loaded with "
            "AutoencoderKL.from_single_file, and given to a pipeline as vae="
        )
    parts = {part: _part(stored, found, part, extract_ema, path) for part, found in names.items()}
    if config is not None:
        return SingleFile(path, parts, _Folder(config, source), prediction_type)
    kind = kinds.recognise({name: stored[name].shapes[name] for name in stored}, path, prediction_type)
    if kind is kinds.SD2_V and prediction_type is None:
        logger.warning(
            "%s: no tensor says whether this Stable Diffusion 2 predicts v (768 x 768) or noise (512 x 512, "
            "called base); it is taken for the former. For the latter pass prediction_type='epsilon'",
            path,
        )
    return SingleFile(path, parts, _Shipped(kind), prediction_type)


def refuse_original_config(original_config):
    """ValueError if a YAML file of the original code is given."""
    if original_config is not None:
        raise ValueError(
            f"original_config={original_config!r:.80} is not read: the kind of model is recognised from its "
            "tensors. Leave it out; pass prediction_type= where it matters, or config=, a folder"
        )


def _by_part(names, path) -> tuple[dict, list]:
    """{part: (prefix, table, names)} of all names in a file that are needed, and the names without a part."""
    found, unknown = {}, []
    for name in names:
        if ldm.is_ignored(name):
            continue
        place = next((row for row in ldm.PREFIXES if name.startswith(row[0])), None)
        if place is None:
            unknown.append(name)
            continue
        prefix, part, table = place
        known = found.setdefault(part, (prefix, table, []))
        if known[0] != prefix:
            raise CheckpointError(f"{path} has two of the part {part}: {known[0]}* and {prefix}*")
        known[2].append(name)
    if not found and all(name.startswith(ldm.ALONE) for name in unknown):
        found, unknown = {"vae": ("", ldm.VAE, unknown)} if unknown else {}, []
    if not found or ("vae" in found and any(".down_blocks." in name for name in found["vae"][2])):
        raise CheckpointError(f"{path} is no single file of Stable Diffusion: {ldm.explain(names)}")
    return found, unknown


def _part(stored, found, part, extract_ema, path):
    """The Part of the names that _by_part found for it."""
    prefix, table, names = found
    sources = ldm.convert(names, prefix, table, path)
    if part == "unet":
        sources = _averaged(stored, sources, extract_ema, path)
    return Part(stored, sources)


def _averaged(stored, sources, extract_ema, path):
    """The U-Net's sources, or those of the running averages; says which it took, if that is unclear."""
    there = any(name.startswith(ldm.EMA) for name in stored)
    if there and not extract_ema:
        logger.warning("%s: beside the U-Net's weights it has their running averages (EMA), which usually "
                       "draw better; extract_ema=True takes those", path)  # fmt: skip
    if extract_ema and not there:
        logger.warning("%s: it has no averages (EMA) beside the U-Net's weights; those are taken, which may "
                       "be averages already", path)  # fmt: skip
    if not (there and extract_ema):
        return sources
    averages = {ours: ldm.Source(ldm.ema_name(s.name), s.change) for ours, s in sources.items()}
    missing = sorted(source.name for source in averages.values() if source.name not in stored)
    if missing:
        raise CheckpointError(
            f"{path} has averages (EMA) of some weights only; it lacks {files.some(missing)}"
        )
    return averages


class SingleFileModel(PretrainedModel):
    """Base of the models that `from_single_file` can take out of a file in the original layout."""

    single_file_part: ClassVar[str]

    @classmethod
    def from_single_file(
        cls, name_or_path, *, config=None, subfolder=None, original_config=None, torch_dtype=None, dtype=None,
        extract_ema=False, revision=None, cache_dir=None, local_files_only=False, token=None, **options,
    ):  # fmt: skip
        """The model from a file in the original layout, whole or of this part alone, in eval mode on the CPU.

        name_or_path: a path, a file's page on the hub, or "owner/repository/file". config: a folder or
        repository that holds the config.json, in subfolder; recognised from the tensors if None. torch_dtype
        (or dtype): as for from_pretrained. extract_ema: take the running averages of a U-Net's weights, where
        the file has both. options: changes of the config, such as scaling_factor=0.13025: a VAE alone does
        not say whose it is, and gets Stable Diffusion 1's. CheckpointError for all that is wrong with the
        file; ValueError for an original_config, which is not read; TypeError for an unknown argument.
        """
        torch_dtype = check_dtype(torch_dtype, dtype)
        refuse_original_config(original_config)
        unknown = sorted(set(options) - set(inspect.signature(cls.__init__).parameters) - {"self"})
        if unknown:
            raise TypeError(f"{cls.__name__}.from_single_file has no argument {', '.join(unknown)}")
        source = {"revision": revision, "cache_dir": cache_dir, "token": token}
        source["local_files_only"] = local_files_only
        path, part = hub.single_file(name_or_path, **source), cls.single_file_part
        stored = files.open_tensors([path])
        names, _ = _by_part(stored, path)
        if part not in names:
            raise CheckpointError(f"{path} holds no {part}, only {', '.join(names)}")
        tensors = _part(stored, names[part], part, extract_ema, path)
        if config is not None:
            values, described_in = hub.read_json(config, "config.json", subfolder, **source), config
        else:
            kind = kinds.SD1
            if "unet" in names:
                kind = kinds.recognise({name: stored[name].shapes[name] for name in stored}, path)
            values, described_in = kind.configs[part], kind.title
        stored = dict.fromkeys(tensors.shapes, tensors)
        return cls._from_stored(stored, values | options, described_in, path, torch_dtype)
