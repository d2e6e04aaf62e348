"""Pictures that a command starts from: checked as they are read, remembered by path and hash of pixels."""

import argparse
import hashlib
import struct

PLAIN_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV")  # 8 bits a channel or fewer, without alpha
SMALLEST = MULTIPLE = 8  # pixels a side


def add_input_argument(parser: argparse.ArgumentParser, name: str, what: str):
    """A picture's path as a positional argument; it may be left out where --like remembers one."""
    parser.add_argument(name, nargs="?", metavar=name.upper(), help=what)


def check_given(args: argparse.Namespace, command: str, *names: str):
    """Raises ValueError where an argument is missing that --like can't fill in, since there is none."""
    missing = [name.upper() for name in names if getattr(args, name) is None]
    if missing and args.like is None:
        raise ValueError(
            f"{command} needs {' '.join(name.upper() for name in names)} (there is no {missing[0]}), or "
            f"--like PICTURE (see minidiff {command} --help)"
        )


def read_input(args: argparse.Namespace, settings: dict, name: str):
    """The PIL image (RGB; a mask: L) at the path settings[name]; settings[name_pixels] becomes its hash.

    ValueError for what is no picture that can be used, and where the path is --like's and the picture is gone
    or has changed since: it could not be drawn again.
    """
    path, remembered = settings[name], getattr(args, name) is None
    again = f"put it back, or give a {name.upper()} to use that"
    try:
        image = read_picture(path, is_mask=name == "mask")
    except FileNotFoundError:
        if not remembered:
            raise
        raise ValueError(f"--like {args.like}: its {name}, {path}, is gone; {again}") from None
    pixels = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()[:16]
    if remembered and settings[f"{name}_pixels"] != pixels:
        raise ValueError(f"--like {args.like}: its {name}, {path}, has changed since; {again}")
    settings[f"{name}_pixels"] = pixels
    return image


def read_picture(path: str, *, is_mask: bool = False):
    """The PIL image in a file, upright, RGB or, as a mask, L; OSError or ValueError if it can't be used.

    An alpha channel says what is to be seen, which a model can't know: it is refused, but in a mask where it
    says that all is.
    """
    from PIL import Image, ImageOps  # here: PIL only where there is a picture

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)  # cameras store pictures as they held them
            image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:  # what Pillow's readers raise
        if getattr(error, "errno", None):
            raise
        raise ValueError(f"{path}: this is no picture, or a damaged one") from None
    if min(image.size) < SMALLEST:
        least = f"{SMALLEST} x {SMALLEST}"
        raise ValueError(f"{path} has {image.width} x {image.height} pixels; it needs at least {least}")
    if image.has_transparency_data:
        opaque = image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
        if not (is_mask and opaque):
            raise ValueError(
                f"{path} has an alpha channel (mode {image.mode}); put it on a background and save it without"
            )
        image = image.convert("RGBA").convert("RGB")
    if image.mode not in PLAIN_MODES:
        raise ValueError(f"{path} has pixels of mode {image.mode}; save it with 8 bits a channel")
    return image.convert("L" if is_mask else "RGB")


def fitted(image, args: argparse.Namespace, settings: dict):
    """image at the size that is asked for, else that of --like, but for another picture than --like's at its
    own, cut down to multiples of 8. The settings get the size.
    """
    from PIL import Image

    for side, own in (("height", image.height), ("width", image.width)):
        known = getattr(args, side) if args.picture is not None else settings[side]
        settings[side] = known or own // MULTIPLE * MULTIPLE
    size = settings["width"], settings["height"]
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
