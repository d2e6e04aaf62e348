"""What scripts take from diffusers.utils: a picture of a file or an address, and several pictures as one."""

import io
import os
import urllib.request

from PIL import Image, ImageOps


def load_image(image, convert_method=None) -> Image.Image:
    """A picture, upright and RGB: image is a path, an address (http, https) or a PIL image.

    convert_method(PIL image) -> PIL image, if any, runs in place of the conversion to RGB. OSError where
    there is no such file, no answer or no picture; TypeError for anything else.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        image = _fetched(image)
    elif isinstance(image, str | os.PathLike):
        image = Image.open(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"load_image takes a path, an address or a PIL image, not a {type(image).__name__}")
    image = ImageOps.exif_transpose(image)  # cameras store pictures as they held them
    return image.convert("RGB") if convert_method is None else convert_method(image)


def _fetched(address):
    request = urllib.request.Request(address, headers={"User-Agent": "minidiff"})  # some refuse Python's name
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return Image.open(io.BytesIO(answer.read()))
    except OSError as error:
        raise OSError(f"{address} gives no picture: {error}; save it, and pass the file's path") from error


def make_image_grid(images: list, rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """rows x cols pictures in one, row by row, each as large as the first, or resize x resize pixels.

    ValueError for another number of pictures, TypeError for other things than pictures.
    """
    if len(images) != rows * cols or min(rows, cols) < 1:
        raise ValueError(f"got {len(images)} pictures for {rows} rows of {cols}; pass one for each place")
    for image in images:
        if not isinstance(image, Image.Image):
            raise TypeError(f"make_image_grid takes PIL images, not a {type(image).__name__}")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % cols * width, i // cols * height))
    return grid
