"""What lies in a checkpoint's folder, without torch: safe paths, JSON, and which files hold the weights.

A folder may come from anywhere, so nothing in it is trusted: no name leads out of the folder, and JSON must
be an object of reasonable size with each key once.
"""

import contextlib
import json
import os
import re
from pathlib import Path, PurePosixPath

from minidiff.checkpoints.errors import CheckpointError

MAX_TEXT_BYTES = 64 << 20  # the largest real one, SDXL's tokenizer.json, has 4 MB
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
    if not path.resolve().is_relative_to(root):
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
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_json(path) -> dict:
    """The object in a JSON file; CheckpointError if it is none, is nested too deeply, or has a key twice."""

    def once(pairs):
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError(
                f"the key {next(k for k, _ in pairs if [q for q, _ in pairs].count(k) > 1)!r} stands twice"
            )
        return values

    try:
        values = json.loads(read_text(path), object_pairs_hook=once)
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply to be a config") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


@contextlib.contextmanager
def replacing(path):
    """The name of a temporary file beside path, which takes path's place if the block ends without an error.

    So an interruption or a full disk leaves the old file, or none. CheckpointError where path can't be
    written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


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
        if f"{base}{infix}.{ending}" in names:
            return [f"{base}{infix}.{ending}"]
        # shards: model.safetensors.index.json or model.safetensors.index.fp16.json,
        # model.fp16-00001-of-00002.safetensors
        index = f"{base}.{ending}.index{infix}.json"
        if index in names:
            shard = re.compile(re.escape(base + infix) + r"-\d{5}-of-\d{5}\." + ending)
            return [index, *sorted(name for name in names if shard.fullmatch(name))]
    asked = " or ".join(f"{base}{infix}.{ending}" for base, ending in candidates)
    there = sorted(n for n in names if n.startswith((stem, pickled)) and n.endswith((".safetensors", ".bin")))
    has = (
        f"it has {', '.join(there)}: choose with variant= and use_safetensors="
        if there
        else "it has no weights"
    )
    raise CheckpointError(f"{where} has no {asked}; {has}")
