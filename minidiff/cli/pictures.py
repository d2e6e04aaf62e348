"""Files that remember how they were made, under names that overwrite nothing: PNGs, and animations."""

import json
import os
import re
from pathlib import Path

import minidiff
from minidiff.config import replacing

ANIMATIONS = (".gif", ".webp")  # the first is that of new files
SHORTEST = 20  # milliseconds a frame: for less, browsers take a tenth of a second
DESCRIPTION = 0x010E  # EXIF's ImageDescription


def check_out(out: str | None, option: str = "--out", endings: tuple[str, ...] = (".png",)):
    """Raises ValueError, before any work is done, where no picture could be written to `out`.

    A folder, named with a / at its end, need not be there: it is made with the first picture.
    """
    folder = Path(out or ".") if _is_folder(out) else Path(out).parent
    if _is_folder(out) and not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{option} {out}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {out}: nobody may write into the folder {folder}")
    if not _is_folder(out) and Path(out).suffix.lower() not in endings:
        kind = "pictures become PNG" if endings == (".png",) else "animations become GIF or WebP"
        raise ValueError(
            f"{option} {out}: {kind} files, which carry their settings; end it in {' or '.join(endings)}"
        )


def out_path(out: str | None, title: str, seed, number: int | None, ending: str = ".png") -> Path:
    """Where a picture goes: the file `out`, with -number if it is one of several, or a new file in a folder.

    out: a file's name, a folder, or None for the working folder. The new file is named by the title and the
    seed, and has a number if there is such a file already.
    """
    if not _is_folder(out):
        return Path(out) if number is None else Path(out).with_stem(f"{Path(out).stem}-{number}")
    words = re.sub(r"\W+", "-", title.lower()).strip("-").encode()[:80].decode(errors="ignore").strip("-")
    path = Path(out or ".", f"{words or 'picture'}-seed{seed}{ending}")
    stem, copy = path.stem, 1
    while path.exists():
        copy += 1
        path = path.with_stem(f"{stem}-{copy}")
    return path


def write_picture(image, path: Path, settings: dict[str, object]):
    """Saves a PIL image with its settings and the versions as text chunks; the file is complete or absent."""
    from PIL.PngImagePlugin import PngInfo  # here and below: PIL only where there is a picture

    chunks = PngInfo()
    for name, value in (settings | versions()).items():
        chunks.add_itxt(name, str(value))  # iTXt, because a prompt may be in any script
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def write_animation(images, path: Path, settings: dict[str, object], milliseconds: int):
    """Saves PIL images, each shown that long, as a GIF or WebP that plays for ever and has its settings."""
    texts = {name: str(value) for name, value in (settings | versions()).items()}
    packed = json.dumps(texts)  # in ASCII, as both formats want it
    options = {"save_all": True, "append_images": images[1:], "loop": 0}
    options["duration"] = max(milliseconds, SHORTEST)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix.lower() == ".gif":
            images[0].save(temporary, format="GIF", comment=packed.encode(), **options)
        else:
            exif = images[0].getexif()
            exif[DESCRIPTION] = packed
            images[0].save(temporary, format="WEBP", quality=90, exif=exif, **options)


def read_settings(path: str, command: str) -> dict[str, str]:
    """The texts in a picture that this command of minidiff wrote; ValueError for any other file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            texts = _texts(image)
    except (
        OSError,
        SyntaxError,
    ) as error:  # PIL's errors for a broken picture are these two, without a number
        if getattr(error, "errno", None):
            raise
        raise ValueError(f"--like {path}: this is no picture, or a broken one") from None
    if "minidiff" not in texts or "command" not in texts:
        raise ValueError(f"--like {path}: this picture carries no settings of minidiff")
    if texts["command"] != command:
        raise ValueError(f"--like {path}: this picture was made by minidiff {texts['command']}; use that")
    return texts


def _texts(image):
    """What write_picture or write_animation put into a file; {} for files of others."""
    if image.format == "PNG":
        return dict(image.text)
    packed = image.info.get("comment") if image.format == "GIF" else image.getexif().get(DESCRIPTION)
    try:
        texts = json.loads(packed or "{}")
    except ValueError:  # somebody else's comment
        return {}
    return texts if isinstance(texts, dict) else {}


def versions() -> dict[str, str]:
    """What a picture's last bits depend on beside its settings."""
    import numpy
    import torch

    return {"minidiff": minidiff.__version__, "torch": torch.__version__, "numpy": numpy.__version__}


def _is_folder(out):
    return out is None or out.endswith(("/", os.sep)) or Path(out).is_dir()
