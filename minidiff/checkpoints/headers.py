"""The header of a safetensors file, without torch: every tensor's name, type, shape and place, all checked.

The file is 8 bytes with the header's length, the header (JSON) and the tensors' bytes. Nothing in it is
believed before it fits: the tensors must fill the rest of the file without overlap, hole or remainder.
safetensors' own reader checks the same, but takes a name that stands twice, minutes for a header of millions
of empty tensors, and does not say where a tensor lies.
"""

import math
from pathlib import Path
from typing import NamedTuple

from minidiff.checkpoints import layout
from minidiff.checkpoints.errors import CheckpointError

SIZES = {  # bytes per value of every type that can be read; the names are also torch's, see files.DTYPES
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
METADATA = "__metadata__"  # not a tensor: a table of texts


class Entry(NamedTuple):
    """What the header says of one tensor; start and end are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def aligned(self) -> bool:
        """Whether it begins where its type may lie in memory; in files of 2022 many don't."""
        return self.start % SIZES[self.dtype] == 0


def read_header(path) -> dict[str, Entry]:
    """All tensors of a safetensors file by name; CheckpointError, saying what is wrong, if it is none."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            length = file.read(8)
            if len(length) < 8 or length == layout.LFS_POINTER[:8]:
                raise _damaged(path, length)
            length = int.from_bytes(length, "little")
            file_size = file.seek(0, 2)
            if length > file_size - 8:
                raise CheckpointError(f"{path} is damaged or no safetensors file: it has {file_size:,} "
                                      f"bytes, but its header says that it has {length:,} alone")  # fmt: skip
            file.seek(8)
            if length > layout.MAX_TEXT_BYTES:
                raise CheckpointError(f"{path} has a header of {length:,} bytes, far too large to be true")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    try:
        found = _parsed(text)
        entries = {name: _entry(name, values, 8 + length) for name, values in found.items()}
        _check_places(entries, 8 + length, file_size)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    return entries


def _parsed(text):
    """The header's table without its metadata; ValueError if it is no table."""
    try:
        found = layout.parse_json(layout.decode(text))
    except ValueError as error:
        raise ValueError(f"its header {error}") from error
    metadata = found.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"its header has a {METADATA} that is no table of texts")
    return found


def _damaged(path, start) -> CheckpointError:
    if start == layout.LFS_POINTER[:8]:
        return layout.lfs_pointer(path)
    return CheckpointError(f"{path} is damaged or no safetensors file: it has {len(start)} bytes")


def _entry(name, values, data):
    """One tensor's entry; data is where the first tensor begins."""
    if not isinstance(values, dict) or not values.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header has no dtype, shape and data_offsets of {name!r}")
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"{name!r} has the type {dtype!r:.40}; minidiff reads {', '.join(SIZES)}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has the shape {shape!r:.60} and the place {offsets!r:.60}")
    start, end = offsets
    if math.prod(shape) * SIZES[dtype] != end - start:
        raise ValueError(f"{name!r} is {shape!r:.60} of {dtype}, which are not the bytes {start} to {end}")
    return Entry(dtype, tuple(shape), data + start, data + end)


def _sizes(values) -> bool:
    """Whether it is a list of few whole numbers that 63 bits hold: of more no file can be."""
    return isinstance(values, list) and len(values) < 64 and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )  # fmt: skip


def _check_places(entries, data, file_size):
    """ValueError unless the tensors fill the file from data to its end, each byte once."""
    at = data
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != at:
            fault = "overlaps another tensor" if entry.start < at else "leaves a hole in front of it"
            raise ValueError(f"{name!r} {fault}")
        at = entry.end
    if at != file_size:
        raise ValueError(f"it has {file_size:,} bytes, but its tensors end at byte {at:,}; was it cut off?")
