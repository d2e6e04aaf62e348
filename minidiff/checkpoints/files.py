"""The tensors in weight files: safetensors, whole or in shards, and pickles that hold nothing but tensors.

Tensors are mapped: their bytes are read from the disk when they are first used, and never written back.
"""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minidiff.checkpoints import layout
from minidiff.checkpoints.errors import CheckpointError

# What torch's reader raises on damaged archives and pickles; fuzzing found no other.
_DAMAGED = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)


def read_tensors(paths) -> dict[str, torch.Tensor]:
    """All tensors by name, on the CPU: of one file, or of the shards that stand behind their index in paths.

    CheckpointError for a file that is absent, truncated, tampered with or a Git-LFS pointer, and for an index
    that its shards don't agree with.
    """
    first, *shards = map(Path, paths)
    if first.suffix != ".json":
        return _read_file(first)
    where = layout.read_json(first).get("weight_map")  # {tensor: file name}
    if not isinstance(where, dict):
        raise CheckpointError(f"{first} is no index of weights: it has no weight_map")
    missing = sorted({str(shard) for shard in where.values()} - {shard.name for shard in shards})
    if missing:
        raise CheckpointError(f"{first} names {some(missing)}, which its folder does not have")
    tensors = {}
    for shard in shards:
        tensors |= {name: t for name, t in _read_file(shard).items() if where.get(name) == shard.name}
    absent = sorted(where.keys() - tensors.keys())
    if absent:
        raise CheckpointError(f"{first} names tensors that are not in their shards: {some(absent)}")
    return tensors


def settled(tensor, dtype=None) -> torch.Tensor:
    """The tensor at an address that its type allows, and, if it is floating, converted to a given dtype.

    In files of 2022, whose headers were not padded, the tensors begin anywhere: those are copied, all others
    stay mapped.
    """
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def write_tensors(path, tensors):
    """Writes a safetensors file, complete or not at all; CheckpointError where the disk does not take it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with layout.replacing(path) as temporary:
        temporary.touch()  # as any new file of this user
        mode = temporary.stat().st_mode
        try:
            save_file(
                tensors, temporary, metadata={"format": "pt"}
            )  # without it transformers refuses the file
            temporary.chmod(mode)  # safetensors makes private files
        except SafetensorError as error:  # wraps the system's error as text
            raise CheckpointError(f"{path} can't be written: {error}") from error


def _read_file(path):
    try:
        with path.open("rb") as file:
            start = file.read(len(layout.LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    if start == layout.LFS_POINTER:
        raise layout.lfs_pointer(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, start)


def _read_safetensors(path):
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    return tensors


def _read_pickle(path, start):
    """A .bin or .ckpt file of torch.save, without running anything that it may hold."""
    zipped = start.startswith(b"PK")  # the format since torch 1.6; only that one can be mapped
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is damaged or holds more than tensors, and loading that can run any "
                              "program; ask its author for safetensors") from error  # fmt: skip
    except _DAMAGED as error:
        raise CheckpointError(f"{path} is damaged or no file of torch.save ({_first_line(error)})") from error
    # training checkpoints hold the weights in state_dict
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} holds no table of tensors")
    return dict(tensors)


def _first_line(error):
    return str(error).partition("\n")[0]


def some(names, most=4) -> str:
    """The first names and how many there are more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
