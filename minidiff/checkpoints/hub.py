"""A name to local files, without torch: a checkpoint that ships, a folder, or a repository of the hub.

The only file that touches the network. Pipelines and schedulers use `read_json` and `part_subfolder`, models
`resolve`. The four arguments that all of them share: revision, a branch, tag or commit; cache_dir,
huggingface_hub's own cache if None; local_files_only, to ask nobody (HF_HUB_OFFLINE=1 does the same); token,
for gated and private repositories.
"""

import errno
import glob
import logging
import os
import re
from pathlib import Path
from urllib.parse import unquote

from minidiff.checkpoints import layout
from minidiff.checkpoints.errors import CheckpointError

logger = logging.getLogger(__name__)

BUILT_IN = Path(__file__).resolve().parent.parent / "weights"
BUILT_IN_NAMES = ("scenes", "scenes-ddpm", "scenes-scorer")


def resolve(
    name_or_path,
    choose,
    subfolder=None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> list[Path]:
    """The files of a checkpoint that choose picks, as local paths.

    name_or_path: one of BUILT_IN_NAMES, which ship (write "./scenes" for a folder of that name); a
    folder; or a repository id "owner/name". choose(names, where) gets the names in that folder or its
    subfolder (folders end in "/") and the words for it in errors, and returns the names that are needed or
    raises CheckpointError. Only those are fetched from the hub, in their newest state; where it can't be
    reached, the cache must do. CheckpointError: no such checkpoint, folder, repository, revision or file; a
    gated repository; no network.
    """
    if subfolder:
        layout.plain(subfolder)
    folder = _local_folder(name_or_path)
    if folder is None:
        place = {"revision": revision, "cache_dir": cache_dir}
        return _from_hub(name_or_path, choose, subfolder, local_files_only, token, place)
    return _chosen(folder, choose, subfolder)


def read_json(name_or_path, filename, subfolder=None, **source) -> dict:
    """One JSON file of a checkpoint, such as "model_index.json"; arguments and errors as for resolve."""
    [path] = resolve(name_or_path, lambda names, where: [one_of(names, where, filename)], subfolder, **source)
    return layout.read_json(path)


def part_subfolder(name_or_path, part, **source) -> str | None:
    """Where a part of a pipeline lies: the folder of its name, or None, the root, if there is no such folder.

    The oldest DDPM repositories keep all parts in the root, although their model_index.json names them.
    """
    found = []

    def look(names, where):
        found.extend(name for name in names if name == f"{part}/")
        return []

    resolve(name_or_path, look, **source)
    return part if found else None


def one_of(names, where, *accepted) -> str:
    """The first of the accepted names that is in names; CheckpointError if none is."""
    for name in accepted:
        if name in names:
            return name
    raise CheckpointError(f"{where} has no {' or '.join(accepted)}")


def single_file(name_or_path, *, revision: str | None = None, **source) -> Path:
    """One file: a local path, its page or address on the hub, or "owner/repository/file"; source as resolve.

    CheckpointError for a folder and for a file that is not there, and for those of resolve.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"a file is named by a str or a path, not {type(name_or_path).__name__}")
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name and path.is_dir():
        raise CheckpointError(f"{name} is a folder, not a single file; load it with from_pretrained")
    there = None if isinstance(name_or_path, os.PathLike) or path.parent.is_dir() else _on_hub(name)
    if there is None:
        raise CheckpointError(f"there is no file {name}, and that is no address of one on the hub")
    repository, named_revision, inner = there
    subfolder, _, filename = inner.rpartition("/")
    [path] = resolve(
        repository,
        lambda names, where: [one_of(names, where, filename)],
        subfolder or None,
        revision=revision or named_revision,
        **source,
    )
    return path


def _on_hub(name):
    """(repository, revision or None, file), of "owner/repository/file" or an address on the hub; or None."""
    if "://" in name:
        # imported here, as below; the hub may have another address (HF_ENDPOINT)
        from huggingface_hub import constants

        homes = {constants.ENDPOINT.rstrip("/"), constants.HUGGINGFACE_CO_URL_HOME.rstrip("/")}
        home = next((home for home in homes if name.startswith(f"{home}/")), None)
        if home is None:
            return None
        name = unquote(name.removeprefix(f"{home}/").partition("?")[0])
    pattern = r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(?:blob|resolve)/([^/]+))?/([^:]*[^/:])"
    found = re.fullmatch(pattern, name)
    return found and found.groups()


def _local_folder(name_or_path):
    """The folder of a built-in name or a path; None for a repository id."""
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"a checkpoint is named by a str or a path, not {type(name_or_path).__name__}")
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and name in BUILT_IN_NAMES:
        return BUILT_IN / name
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(
            f"{name} is a file; give the folder that holds the config and the weights, or load the file with "
            "from_single_file, or make a folder of it with minidiff convert"
        )
    if isinstance(name_or_path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return None
    ship = ", ".join(BUILT_IN_NAMES)
    raise CheckpointError(
        f"there is no checkpoint {name!r}: it is no folder, no repository id (owner/name), and not {ship}"
    )


def _chosen(folder, choose, subfolder, note=""):
    """The paths of what choose picks in folder/subfolder; none of them leads out of folder."""
    if not folder.is_dir():
        raise CheckpointError(f"the checkpoint {folder.name!r} is not part of this installation of minidiff")
    directory = layout.inside(folder, subfolder) if subfolder else folder
    if not directory.is_dir():
        raise CheckpointError(f"{folder}{note} has no folder {subfolder!r}")
    try:
        names = {name + "/" * directory.joinpath(name).is_dir() for name in os.listdir(directory)}
    except OSError as error:
        raise CheckpointError(f"{directory} can't be read: {error.strerror}") from error
    picked = choose(names, f"{directory}{note}")
    paths = [layout.inside(folder, f"{subfolder}/{name}" if subfolder else name) for name in picked]
    for path in paths:
        if not path.is_file():  # a pipe, which would be waited for, or a link to nothing
            raise CheckpointError(f"{path} is no file")
    return paths


def _from_hub(repo_id, choose, subfolder, local_files_only, token, place):
    """resolve for a repository id; place is revision and cache_dir."""
    # imported here: half a second that nobody with a local checkpoint needs
    from huggingface_hub import errors, snapshot_download

    note, cause = "local_files_only=True forbids to ask the hub", None
    if not local_files_only:
        try:
            return _fetch(repo_id, choose, subfolder, token, place)
        except errors.HFValidationError as error:
            raise CheckpointError(f"{repo_id!r} is no repository id: {error}") from error
        # huggingface_hub raises its own errors and those of httpx or requests, whichever it is built on
        except (OSError, *errors.HfHubHTTPError.__bases__) as error:
            note, cause = _explain(error, repo_id, place["revision"]), error
    try:
        snapshot = snapshot_download(repo_id, allow_patterns=[], local_files_only=True, **place)
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(f"{repo_id} is not in the cache, and {note}") from cause or error
    paths = _chosen(Path(snapshot), choose, subfolder, f" (as cached; {note})")
    if cause is not None and not isinstance(cause, errors.OfflineModeIsEnabled):
        logger.warning("%s: %s; using the copy in the cache", repo_id, note)
    return paths


def _fetch(repo_id, choose, subfolder, token, place):
    """Asks the hub for the repository's file names; fetches those that choose picks and the cache lacks."""
    from huggingface_hub import HfApi, snapshot_download

    where, prefix = f"{repo_id} on the hub", f"{subfolder}/" if subfolder else ""
    info = HfApi(token=token).model_info(repo_id, revision=place["revision"])
    below = [f.rfilename.removeprefix(prefix) for f in info.siblings if f.rfilename.startswith(prefix)]
    if not below:
        raise CheckpointError(f"{where} has no folder {subfolder!r}")
    names = {name.partition("/")[0] + "/" * ("/" in name) for name in below}
    wanted = [glob.escape(prefix + name) for name in choose(names, where)]
    if not wanted:
        return []
    snapshot = snapshot_download(repo_id, allow_patterns=wanted, token=token, **place)
    return _chosen(Path(snapshot), choose, subfolder, " (as fetched)")


def _explain(error, repo_id, revision) -> str:
    """Why the hub gave nothing, in words that say what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "it is gated: accept its conditions on its page of the hub, then pass token= or log in with hf"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or it is private: check the name, or pass token="
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {revision!r}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to ask the hub"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub answered with HTTP status {error.response.status_code}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk of the cache is full; make room, or pass cache_dir="
    if isinstance(error, OSError) and error.filename is not None:
        return f"the cache can't be written: {error}"
    first_line = str(error).partition("\n")[0]
    return f"the hub can't be reached ({type(error).__name__}: {first_line})"
