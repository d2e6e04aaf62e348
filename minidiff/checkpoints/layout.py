"""What lies in a checkpoint's folder, without torch: safe paths, JSON, and which files hold the weights.

A folder may come from anywhere, so nothing in it is trusted: no name leads out of the folder, and JSON must
be an object of reasonable size with each key once.
"""

import contextlib
import json
import math
import os
import re
import shutil
from pathlib import Path, PurePosixPath

from minidiff import config
from minidiff.checkpoints.errors import CheckpointError

MAX_TEXT_BYTES = 16 << 20  # the largest real one, SDXL's tokenizer.json, has 4 MB
MAX_JSON_VALUES = 500_000  # that one has 200 000; each may cost a few hundred bytes of memory
LFS_POINTER = b"version https://git-lfs"


def inside(folder, name) -> Path:
    """folder/name, if that stays in the folder: no absolute name, no "..", no link that leads out of it.

    In the hub's cache, where every file is a link to a blob beside the snapshots, the repository's folder is
    the limit. CheckpointError otherwise, also for a Git-LFS pointer in place of the file.
    """
    folder, path = Path(folder), Path(folder, plain(name))
    root = folder.resolve()
    snapshot = next((p for p in (root, *root.parents) if p.parent.name == "snapshots"), None)
    if snapshot is not None and snapshot.parent.parent.name.startswith("models--"):
        root = snapshot.parent.parent
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a link that leads nowhere: {error}") from error
    if not target.is_relative_to(root):
        raise CheckpointError(
            f"{path} is a link that leads out of the checkpoint's folder; put the file itself there"
        )
    return path


def plain(name) -> str:
    """name, if it is a relative path without ".."; CheckpointError otherwise."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in str(name) or "\0" in str(name):
        raise CheckpointError(f"{str(name)!r} is not a name inside the checkpoint's folder")
    return str(name)


def read_text(path) -> str:
    """The text of a UTF-8 file; CheckpointError if absent, too large, not UTF-8, or a Git-LFS pointer."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    if data.startswith(LFS_POINTER):
        raise lfs_pointer(path)
    if len(data) > MAX_TEXT_BYTES:
        raise CheckpointError(
            f"{path} is larger than {MAX_TEXT_BYTES >> 20} MiB: no config and no vocabulary"
        )
    try:
        return decode(data)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error


def decode(data: bytes) -> str:
    """The text in UTF-8 bytes; ValueError, a predicate, if they are something else."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_json(path) -> dict:
    """The object in a JSON file; CheckpointError if it is none, or none that parse_json takes."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error


def parse_json(text: str) -> dict:
    """The object in a JSON text from a stranger; ValueError, a predicate such as "is no valid JSON", if not.

    Refused beside what is no JSON: a key that stands twice, since readers differ in which one they take; NaN,
    which no setting means (infinity is: a scheduler's lambda_min_clipped); and what would take more time or
    memory than any real file: nested a thousand deep, or of millions of values.
    """
    if text.count(",") + text.count("[") + text.count("{") > MAX_JSON_VALUES:
        raise ValueError(f"holds more than {MAX_JSON_VALUES:,} values, far more than any real one")
    try:
        values = json.loads(text, object_pairs_hook=_with_keys_once, parse_constant=_number)
    except RecursionError:
        raise ValueError("is nested too deeply to be a config") from None
    except ValueError as error:
        raise ValueError(f"is no valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"must hold a JSON object, not a {type(values).__name__}")
    return values


def _with_keys_once(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r:.80} stands twice")
    return values


def _number(constant):
    """Infinity, -Infinity or NaN, which Python writes into JSON and reads from it."""
    if constant == "NaN":
        raise ValueError("NaN is no value of a setting")
    return float(constant)


@contextlib.contextmanager
def replacing(path):
    """`config.replacing` with a CheckpointError where path can't be written."""
    with writing(path), config.replacing(path) as temporary:
        yield temporary


@contextlib.contextmanager
def new_folder(path):
    """The name of a temporary folder beside path, which becomes path if the block ends without an error.

    So an interruption or a full disk leaves nothing behind. CheckpointError where path has something in it,
    or can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise CheckpointError(f"{path} exists already; name a folder that does not, or an empty one")
        temporary.mkdir(parents=True)
    try:
        with writing(path):
            yield temporary
            if path.exists():
                path.rmdir()  # where a system does not rename onto an empty folder
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def writing(path):
    """Turns the system's errors in the block into a CheckpointError that names path."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} can't be written: {error.strerror or error}") from error


def write_text(path, text):
    """Writes a UTF-8 file, complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def lfs_pointer(path) -> CheckpointError:
    """The error for a file whose content was never fetched."""
    return CheckpointError(
        f"{path} is a Git-LFS pointer, not the file itself; run git lfs pull in its repository"
    )


class WeightNames:
    """What the files of a model's weights are called: whole, or an index and its shards.

    weights_name: the plain name, such as "model.safetensors"; variant "fp16" means model.fp16.safetensors,
    model.safetensors.index.fp16.json and model.fp16-00001-of-00002.safetensors, as in diffusers.
    """

    def __init__(self, weights_name, variant=None):
        base, ending = weights_name.rsplit(".", 1)
        infix = f".{plain(variant)}" if variant else ""
        self.whole = f"{base}{infix}.{ending}"
        self.index = f"{base}.{ending}.index{infix}.json"
        self._shard = f"{base}{infix}-{{:05}}-of-{{:05}}.{ending}"
        self._shards = re.compile(re.escape(base + infix) + r"-\d{5}-of-\d{5}\." + ending)

    def shard(self, i, count) -> str:
        """The name of shard i, from 0, of count."""
        return self._shard.format(i + 1, count)

    def shards_among(self, names) -> list[str]:
        """Those of the names that are shards, in order."""
        return sorted(name for name in names if self._shards.fullmatch(name))

    def among(self, names) -> list[str]:
        """Those of the names that belong to these weights."""
        return [name for name in (self.whole, self.index) if name in names] + self.shards_among(names)


def pick_weights(names, where, weights_name, variant=None, use_safetensors=None) -> list[str]:
    """Of a folder's file names those that hold the weights: one file, or an index and its shards.

    weights_name: the plain name, such as "model.safetensors". variant "fp16" means model.fp16.safetensors.
    safetensors come before .bin; use_safetensors True or False leaves only one of them. CheckpointError,
    saying what where has.
    """
    stem = weights_name.removesuffix(".safetensors")
    pickled = {"model": "pytorch_model"}.get(stem, stem)  # the name that transformers gives to its .bin
    infix = f".{variant}" if variant else ""
    candidates = [] if use_safetensors is False else [(stem, "safetensors")]
    candidates += [] if use_safetensors is True else [(pickled, "bin")]
    for base, ending in candidates:
        accepted = WeightNames(f"{base}.{ending}", variant)
        if accepted.whole in names:
            return [accepted.whole]
        if accepted.index in names:
            return [accepted.index, *accepted.shards_among(names)]
    asked = " or ".join(f"{base}{infix}.{ending}" for base, ending in candidates)
    there = sorted(n for n in names if n.startswith((stem, pickled)) and n.endswith((".safetensors", ".bin")))
    has = (
        f"it has {', '.join(there)}: choose with variant= and use_safetensors="
        if there
        else "it has no weights"
    )
    raise CheckpointError(f"{where} has no {asked}; {has}")


UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def bytes_in(size: int | str) -> int:
    """A number of bytes, or a text such as "10GB", as a number; ValueError for anything else."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    number = float(parts[1]) * UNITS.get(parts[2], 0) if parts and not isinstance(size, bool) else 0
    if not 1 <= number < math.inf:
        raise ValueError(f"max_shard_size is a number of bytes or a text such as '10GB', not {size!r}")
    return int(number)


def split(tensors, most_bytes) -> list[dict]:
    """The table {name: tensor} as tables of at most so many bytes; a larger tensor has one for itself.

    In the same order and with the same borders as diffusers.
    """
    shards, open_shard, size = [], {}, 0
    for name, tensor in tensors.items():
        if tensor.nbytes > most_bytes:
            shards.append({name: tensor})
            continue
        if size + tensor.nbytes > most_bytes:
            shards.append(open_shard)
            open_shard, size = {}, 0
        open_shard[name] = tensor
        size += tensor.nbytes
    return [*shards, open_shard] if open_shard or not shards else shards
