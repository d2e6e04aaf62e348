"""The tensors in weight files: safetensors, whole or in shards, and pickles that hold nothing but tensors.

A file is opened first: then the names and shapes of its tensors are known, and can be held against a model,
before a value is read. Read tensors are mapped: their bytes come from the disk when they are first used, and
are never written back. What must be copied, to another type or to an address that its type allows, is copied
tensor by tensor, and the file's pages behind it are let go, so that no file is in memory beside its copy.
"""

import contextlib
import json
import mmap
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from minidiff.checkpoints import headers, layout
from minidiff.checkpoints.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
PICKLE_PIECE = 256 << 20  # bytes of a pickle that are copied before it is opened again, to forget them
MAX_PICKLE_BYTES = 16 << 20  # of the part without the values; real ones have 0.3 MB
# Without this flag Linux maps no file larger than memory and swap, such as SDXL's U-Net on a laptop, lest all
# of it be written to. Python has the name since 3.13.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class _Nothing:
    """Stands for an object that nobody needs: made of anything, and empty."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# The .ckpt files of 2022 hold the state of training beside the weights: a class of Lightning as a key, and
# scalars of NumPy. torch refuses both, rightly; as nothing they do no harm.
_BOOKKEEPING = [
    (_Nothing, name)
    for name in (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
    )
]

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
    ArithmeticError,
    MemoryError,
    struct.error,
)


def open_tensors(paths) -> dict:
    """Where each tensor is: {name: its open file}, of one file, or of the shards behind their index in paths.

    A file has `shapes`, {name: shape}, and `read(name, dtype=None)`. CheckpointError for a file that is
    absent, truncated, tampered with or a Git-LFS pointer, and for an index that its shards don't agree with.
    """
    first, *shards = map(Path, paths)
    if first.suffix != ".json":
        file = _open(first)
        return dict.fromkeys(file.shapes, file)
    where = layout.read_json(first).get("weight_map")  # {tensor: file name}
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise CheckpointError(f"{first} is no index of weights: it has no weight_map of names of files")
    shards = {shard.name: shard for shard in shards}
    missing = sorted(set(where.values()) - shards.keys())
    if missing:
        raise CheckpointError(f"{first} names {some(missing)}, which its folder does not have")
    opened = {name: _open(shards[name]) for name in sorted(set(where.values()))}
    absent = sorted(name for name, shard in where.items() if name not in opened[shard].shapes)
    if absent:
        raise CheckpointError(f"{first} names tensors that are not in their shards: {some(absent)}")
    for shard, file in opened.items():
        more = sorted(name for name in file.shapes if where.get(name) != shard)
        if more:
            raise CheckpointError(f"{file.path} has tensors that {first} does not expect there: {some(more)}")
    return {name: opened[shard] for name, shard in where.items()}


def read_tensors(paths) -> dict[str, torch.Tensor]:
    """All tensors by name, on the CPU, as they are in the files; errors as for open_tensors."""
    return {name: file.read(name) for name, file in open_tensors(paths).items()}


class SafetensorsFile:
    """An open safetensors file; it is closed when the last tensor that was read from it is gone."""

    def __init__(self, path):
        self.path, self.entries = Path(path), headers.read_header(path)
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}
        with self.path.open("rb") as file:
            self._map = _map(file)
        if len(self._map) < max((entry.end for entry in self.entries.values()), default=0):
            raise CheckpointError(f"{path} has changed while it was read")

    def read(self, name, dtype=None) -> torch.Tensor:
        """The tensor called name; if it is floating and a dtype is given, in that. Mapped, or else copied."""
        entry = self.entries[name]
        stored = DTYPES[entry.dtype]
        wanted = dtype if dtype is not None and stored.is_floating_point else stored
        if entry.size == 0:
            return torch.empty(entry.shape, dtype=wanted)
        if wanted == stored and entry.aligned:
            return self._view(entry.start, entry.end, stored).view(entry.shape)
        values = self._view(entry.start, entry.end, torch.uint8)
        values = (values if entry.aligned else values.clone()).view(stored).to(wanted)
        self._forget(entry.start, entry.end)
        return values.view(entry.shape)

    def _view(self, start, end, dtype):
        """The bytes from start to end, which are not read yet, as numbers: (values,)."""
        count = (end - start) // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)

    def _forget(self, start, end):
        """Lets the whole pages between two bytes of the file go from memory."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):  # absent on Windows
            self._map.madvise(mmap.MADV_DONTNEED, first, length)


class PickleFile:
    """An open .bin or .ckpt file of torch.save; nothing that it may hold beside tensors is run."""

    def __init__(self, path, zipped):
        self.path, self._zipped, self._copied = Path(path), zipped, 0
        if zipped:  # the format since torch 1.6; only that one can be mapped
            _check_archive(self.path)
        self._tensors = self._load()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        values = sum(tensor.nbytes for tensor in self._tensors.values())
        if values > 2 * self.path.stat().st_size:
            raise CheckpointError(f"{path} declares {values:,} bytes of tensors, far more than it has")

    def read(self, name, dtype=None) -> torch.Tensor:
        """As SafetensorsFile.read."""
        tensor = self._tensors[name]
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if dtype in (None, tensor.dtype) and tensor.data_ptr() % tensor.element_size() == 0:
            return tensor
        values = torch.empty_like(tensor, dtype=wanted).copy_(tensor)
        if self._zipped:
            self._copied += tensor.nbytes
            if self._copied > PICKLE_PIECE:  # opened anew it is not in memory
                self._tensors, self._copied = self._load(), 0
        else:  # it was read whole: what is copied is not needed there
            self._tensors[name] = values
        return values

    def _load(self):
        try:
            with torch.serialization.safe_globals(_BOOKKEEPING):
                loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._zipped)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{self.path} is damaged, no file of torch.save, or holds more than "
                                  "tensors, and loading that can run any program; ask its author for "
                                  "safetensors") from error  # fmt: skip
        except _DAMAGED as error:
            why = str(error).partition("\n")[0]
            why = "" if why.isdigit() else f" ({why})"  # a number is a byte of no pickle
            raise CheckpointError(f"{self.path} is damaged or no file of torch.save{why}") from error
        # training checkpoints hold the weights in state_dict
        tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
        if not isinstance(tensors, dict):
            raise CheckpointError(f"{self.path} holds no table of tensors")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not _is_plain(tensor):
                raise CheckpointError(f"{self.path} holds no table of tensors: {name!r:.80} is none")
        return dict(tensors)


def write_tensors(path, tensors):
    """Writes a safetensors file, complete or not at all; CheckpointError where the disk does not take it."""
    with layout.replacing(path) as temporary:
        _save(path, temporary, tensors)


def write_shards(index_path, shards):
    """Writes several safetensors files and their index, all or none of them; errors as for write_tensors.

    shards: {file name: {tensor name: tensor}}, beside the index.
    """
    index_path = Path(index_path)
    where = {name: shard for shard, tensors in shards.items() for name in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    with contextlib.ExitStack() as all_or_none:
        write_index = all_or_none.enter_context(layout.replacing(index_path))  # in place last of all
        write_index.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for shard, tensors in shards.items():
            path = index_path.with_name(shard)
            _save(path, all_or_none.enter_context(layout.replacing(path)), tensors)


def _save(path, temporary, tensors):
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary.touch()  # as any new file of this user
    mode = temporary.stat().st_mode
    try:
        # without the metadata transformers refuses the file
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # safetensors makes private files
    except SafetensorError as error:  # wraps the system's error as text
        raise CheckpointError(f"{path} can't be written: {error}") from error


def _open(path):
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(layout.LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    if start == layout.LFS_POINTER:
        raise layout.lfs_pointer(path)
    return PickleFile(path, zipped=start.startswith(b"PK"))


def _map(file):
    """All of an open file as memory that may be written to, which changes no file."""
    if os.name == "nt":
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    flags = mmap.MAP_PRIVATE | NO_RESERVE
    return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _check_archive(path):
    """CheckpointError for an archive that torch did not write, and that may unpack to anything.

    torch compresses nothing, and would take the bytes of a compressed entry for values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, LookupError) as error:
        raise CheckpointError(f"{path} is damaged or no file of torch.save ({error})") from error
    packed = [e.filename for e in entries if e.compress_type or e.compress_size != e.file_size]
    if packed:
        raise CheckpointError(f"{path} holds compressed entries, which torch.save does not write; "
                              f"they may unpack to any size: {some(packed)}")  # fmt: skip
    large = [e.filename for e in entries if e.filename.endswith(".pkl") and e.file_size > MAX_PICKLE_BYTES]
    if large:
        raise CheckpointError(f"{path} holds a {large[0]} too large to be a table of tensors")


def _is_plain(tensor):
    """Whether it is a tensor whose values are all there: dense, in memory, each one in its own place."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.device.type == "cpu"
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def some(names, most=4) -> str:
    """The first names and how many there are more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name:.200}" for name in map(str, names[:most])) + more
