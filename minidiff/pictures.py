"""Pictures and masks as people have them, made into arrays for a model: `from_images`, `from_masks`.

Three kinds come in, one at a time or as a list of one kind: PIL images; NumPy arrays (H, W, C) or (N, H, W,
C); torch tensors (C, H, W) or (N, C, H, W). Sizes are cut down to a multiple of what the autoencoder
downsamples by: PIL images with a Lanczos filter, arrays and tensors by taking the nearest pixel. The numbers
are those of diffusers' VaeImageProcessor. Then what painting a part of a picture at its full size needs:
`crop_region`, and `overlay`, which puts the part back. The way out, to_images, is in `boundary.py`.
"""

import math

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from minidiff.boundary import is_tensor, to_numpy

KINDS = "a PIL image, a NumPy array (H, W, C) or (N, H, W, C), a tensor (C, H, W) or (N, C, H, W), or a list"
FURTHEST = 2.0  # from 0: a Lanczos filter shoots over 1, but 0 to 255 or 0 to 65535 are other units
SMALLEST = 8  # pixels, of which Stable Diffusion's autoencoder makes one latent


def from_images(images, height=None, width=None, multiple=8, region=None, latent_channels=4) -> np.ndarray:
    """Pictures as float32 (N, C, H, W) in [-1, 1]; tensors of latents (N, latent_channels, h, w) as they are.

    Arrays and tensors hold values in [0, 1], or, where one of them is negative, in [-1, 1]. height and width:
    the size in pixels, the (first) picture's if None, rounded down to multiples of `multiple`. region (left,
    top, right, bottom): the part of PIL images that is cut out, and fitted into height x width without
    distortion. Raises ValueError for what is no picture, or a damaged one, for an alpha channel, for values
    that are not finite or in other units, and for a picture smaller than 8 (or `multiple`) pixels.
    """
    batch = _gather(images, "image")
    if isinstance(batch, list):
        batch = _pixels(batch, *_target(batch, "image", height, width, multiple), region)
        return 2 * batch - 1
    if is_latents(images, latent_channels):
        return batch.astype(np.float32, copy=False)
    if batch.shape[1] == 4:
        raise ValueError(f"image has the shape {_shape(images)}, with an alpha channel; {_WITHOUT_ALPHA}")
    _check_range(batch, "image")
    batch = resize_nearest(batch, *_target(batch, "image", height, width, multiple))
    batch = batch if batch.min() < 0 else 2 * batch - 1
    return batch.astype(np.float32, copy=False)


def from_masks(masks, height=None, width=None, multiple=8, region=None) -> np.ndarray:
    """Masks as float32 (N, 1, H, W): 1 where a picture is to be painted, where they are at least 0.5, else 0.

    PIL images are made grey; arrays and tensors, which may lack the axis of one channel or be of whole
    numbers or bool, hold values in [0, 1], or 0 and 255. Sizes, region and errors as for from_images.
    """
    batch = _gather(masks, "mask_image")
    if isinstance(batch, list):
        batch = _pixels(batch, *_target(batch, "mask_image", height, width, multiple), region, grey=True)
    else:
        if batch.shape[1] != 1:
            raise ValueError(f"mask_image has the shape {_shape(masks)}; a mask has one channel")
        if not np.isin(batch, (0, 255)).all():
            _check_range(batch, "mask_image")
        batch = resize_nearest(batch, *_target(batch, "mask_image", height, width, multiple))
    return (batch >= 0.5).astype(np.float32)


def is_latents(images, latent_channels=4) -> bool:
    """Whether images, tensors (N, C, h, w) or (C, h, w) or a list of them, have the channels of latents."""
    first = images[0] if isinstance(images, list) and images else images
    return is_tensor(first) and first.ndim in (3, 4) and first.shape[-3] == latent_channels


def sizes(pictures, name="image") -> set[tuple[int, int]]:
    """The (height, width) of every picture or mask, in pixels; name is the argument's, for errors."""
    batch = _gather(pictures, name)
    if isinstance(batch, list):
        return {(picture.height, picture.width) for picture in batch}
    return {batch.shape[2:]}


def resize_nearest(batch: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, C, H, W) -> (N, C, height, width), each pixel the one at its place, rounded down, as in torch."""
    # torch computes places in float32, but in float64 for large pictures of that type
    number = np.float64 if batch.dtype == np.float64 and height + width > 128 else np.float32
    rows, columns = (_nearest(*sides, number) for sides in zip(batch.shape[2:], (height, width), strict=True))
    return batch[:, :, rows[:, None], columns]


def _nearest(old, new, number):
    places = np.arange(new, dtype=number) * (number(old) / number(new))
    return np.minimum(places.astype(np.float32).astype(np.int64), old - 1)  # (new,)


# -- reading what is given


def _gather(pictures, name):
    """pictures as a list of PIL images, or an array (N, C, H, W); ValueError if they are neither."""
    is_mask = name == "mask_image"
    if is_mask and not isinstance(pictures, list):
        pictures = _with_channel(pictures)
    pictures = pictures if isinstance(pictures, list) else [pictures]
    if not pictures:
        raise ValueError(f"{name} is an empty list; pass {KINDS}")
    kinds = {_kind(picture, name) for picture in pictures}
    if len(kinds) > 1:
        raise ValueError(f"{name} is a list of {' and '.join(sorted(kinds))}; pass pictures of one kind")
    if kinds == {"PIL images"}:
        for picture in pictures:
            _check_image(picture, name, is_mask)
        return pictures
    return _stack([to_numpy(picture) for picture in pictures], kinds == {"tensors"}, name, is_mask)


def _with_channel(mask):
    """A single array of masks (N, H, W) or (H, W, 1), or a tensor (N, H, W), with the axis that it lacks."""
    if is_tensor(mask) and mask.ndim == 3:
        return mask[:, None]
    if isinstance(mask, np.ndarray) and mask.ndim == 3:
        return mask[None] if mask.shape[-1] == 1 else mask[..., None]
    return mask


def _kind(picture, name):
    if isinstance(picture, Image.Image):
        return "PIL images"
    if isinstance(picture, np.ndarray) or is_tensor(picture):
        return "tensors" if is_tensor(picture) else "NumPy arrays"
    raise ValueError(f"{name} is or holds a {type(picture).__name__}; pass {KINDS}")


def _stack(arrays, channels_first, name, is_mask):
    """Arrays of 2 to 4 axes as one (N, C, H, W), float32, or float64 if they are."""
    shapes = {array.shape[1:] if array.ndim == 4 else array.shape for array in arrays}
    if len(shapes) > 1 or len({array.ndim for array in arrays}) > 1:
        found = ", ".join(sorted({str(array.shape) for array in arrays}))
        raise ValueError(f"{name} is a list of shapes {found}; make them equal")
    batch = np.concatenate(arrays) if arrays[0].ndim == 4 else np.stack(arrays)
    if batch.ndim == 3 and (is_mask or not channels_first):  # grey, without an axis of channels
        batch = batch[:, None] if channels_first else batch[..., None]
    if batch.ndim != 4 or not batch.size:
        raise ValueError(f"{name} has the shape {arrays[0].shape}; pass {KINDS}")
    if batch.dtype.kind not in ("fbiu" if is_mask else "f"):
        raise ValueError(f"{name} holds values of {batch.dtype}; pass floats in [0, 1]: divide pixels by 255")
    batch = batch.astype(np.float64 if batch.dtype == np.float64 else np.float32, copy=False)
    if not np.isfinite(batch).all():
        raise ValueError(f"{name} holds NaN or infinity; its values must be in [0, 1]")
    return batch if channels_first else batch.transpose(0, 3, 1, 2)


_WITHOUT_ALPHA = "put it on a background first, or drop it: image.convert('RGB')"
_WHICH_MASK = "pass mask.convert('L') to paint what is white, mask.getchannel('A') to paint what is opaque"


def _check_image(image, name, is_mask):
    """Raises ValueError for a PIL image whose file is damaged, or whose mode means something else."""
    try:
        image.load()
    except (OSError, SyntaxError) as error:  # what Pillow's readers raise
        file = getattr(image, "filename", "") or "the picture"
        raise ValueError(f"{name}: {file} is damaged: {error}") from error
    alpha = image.getbands()[-1] in ("A", "a") or (image.mode == "P" and "transparency" in image.info)
    if alpha and not (is_mask and image.convert("RGBA").getchannel("A").getextrema() == (255, 255)):
        what = _WHICH_MASK if is_mask else _WITHOUT_ALPHA
        raise ValueError(f"{name} has an alpha channel (mode {image.mode}); {what}")
    if not is_mask and image.mode not in ("RGB", "L"):
        raise ValueError(f"{name} has the mode {image.mode}; make it a coloured one: image.convert('RGB')")


def _check_range(batch, name):
    low, high = batch.min(), batch.max()
    if max(-low, high) > FURTHEST:
        raise ValueError(
            f"{name} holds values from {low:g} to {high:g}; they must be in [0, 1] or [-1, 1]: divide pixels "
            "by 255"
        )


def _shape(pictures):
    first = pictures[0] if isinstance(pictures, list) else pictures
    return f"{'list of ' if isinstance(pictures, list) else ''}{tuple(first.shape)}"


def _target(batch, name, height, width, multiple):
    """(height, width) to resize to: those given, or the first picture's, as multiples of `multiple`."""
    of_pil, least = isinstance(batch, list), max(multiple, SMALLEST)
    own = (batch[0].height, batch[0].width) if of_pil else batch.shape[2:]
    if min(own) < least:
        order = "" if of_pil else f" (read as (N, C, H, W), it is {batch.shape}: is the order right?)"
        raise ValueError(f"{name} has {own[0]} x {own[1]} pixels; it needs at least {least} x {least}{order}")
    given = (own[0] if height is None else height, own[1] if width is None else width)
    if min(given) < multiple:
        raise ValueError(f"height and width are {given[0]} and {given[1]}; they must be at least {multiple}")
    return tuple(int(side) // multiple * multiple for side in given)


# -- PIL images


def _pixels(images, height, width, region=None, grey=False):
    """PIL images as float32 (N, C, height, width) in [0, 1]; grey: with one channel."""
    if region is None:
        images = [image.resize((width, height), Image.Resampling.LANCZOS) for image in images]
    else:
        images = [_fit(image.crop(region), width, height) for image in images]
    images = [image.convert("L") for image in images] if grey else images
    if len({image.mode for image in images}) > 1:
        raise ValueError(
            "image is a list of grey and coloured pictures; convert all with image.convert('RGB')"
        )
    batch = np.stack([np.asarray(image, np.float32) for image in images]) / 255  # (N, H, W) or (N, H, W, 3)
    return batch[:, None] if batch.ndim == 3 else batch.transpose(0, 3, 1, 2)


def _fit(image, width, height):
    """image in the middle of width x height, without distortion; its edges are spread over what is left."""
    wide = width / height < image.width / image.height  # space is left above and below, not at the sides
    w = width if wide else image.width * height // image.height
    h = image.height * width // image.width if wide else height
    image = image.resize((w, h), Image.Resampling.LANCZOS)
    left, top = width // 2 - w // 2, height // 2 - h // 2
    fitted = Image.new("RGB", (width, height))
    fitted.paste(image, (left, top))
    if wide and top > 0:
        fitted.paste(image.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        fitted.paste(image.resize((width, top), box=(0, h, width, h)), (0, top + h))
    if not wide and left > 0:
        fitted.paste(image.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        fitted.paste(image.resize((left, height), box=(w, 0, w, height)), (left + w, 0))
    return fitted


def _cover(image, width, height):
    """image in the middle of width x height, without distortion; what stands out is cut off."""
    tall = width / height > image.width / image.height
    w = width if tall else image.width * height // image.height
    h = image.height * width // image.width if tall else height
    covering = Image.new("RGB", (width, height))
    resized = image.resize((w, h), Image.Resampling.LANCZOS)
    covering.paste(resized, (width // 2 - w // 2, height // 2 - h // 2))
    return covering


def crop_region(
    image: Image.Image, mask: Image.Image, width: int, height: int, padding: int = 0
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the part of mask that is not black, `padding` pixels wider on all sides.

    It then grows to the proportions of width x height, as far as the mask reaches. Raises ValueError where
    image, which is to be cropped, or mask is no single PIL image, and for a mask that is all black.
    """
    for name, picture in (("image", image), ("mask_image", mask)):
        if not isinstance(picture, Image.Image):
            raise ValueError(
                f"padding_mask_crop needs one PIL image as {name}, not a {type(picture).__name__}"
            )
    if not isinstance(padding, int) or padding < 0:
        raise ValueError(f"padding_mask_crop is {padding!r}; it must be a whole number of pixels, or None")
    painted = np.asarray(mask.convert("L")) != 0  # (H, W)
    rows, columns = painted.any(axis=1).nonzero()[0].tolist(), painted.any(axis=0).nonzero()[0].tolist()
    if not rows:
        raise ValueError(
            "mask_image is all black: nothing is to be painted, so there is no region to crop to"
        )
    left, right = max(columns[0] - padding, 0), min(columns[-1] + 1 + padding, mask.width)
    top, bottom = max(rows[0] - padding, 0), min(rows[-1] + 1 + padding, mask.height)
    ratio = width / height
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _grow(top, bottom, (right - left) / ratio, mask.height)
    else:
        left, right = _grow(left, right, (bottom - top) * ratio, mask.width)
    return left, top, right, bottom


def _grow(start, end, length, limit):
    """start and end, moved apart to that length, both ways alike, and then into 0 … limit."""
    more = math.trunc(length - (end - start))
    start, end = start - more // 2, end + more - more // 2
    beyond = max(end - limit, 0)
    start, end = start - beyond, end - beyond
    return max(start, 0), min(end - min(start, 0), limit)


def overlay(image: Image.Image, painted: Image.Image, mask: Image.Image, region) -> Image.Image:
    """image with a painted picture of its region in it, as far as the mask is white; RGB, of image's size."""
    left, top, right, bottom = region
    below = Image.new("RGB", image.size)
    below.paste(_cover(painted, right - left, bottom - top), (left, top))
    kept = Image.new("RGBa", image.size)
    kept.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    below = below.convert("RGBA")
    below.alpha_composite(kept.convert("RGBA"))
    return below.convert("RGB")


def blur(mask: Image.Image, blur_factor: int = 4) -> Image.Image:
    """mask with soft edges: a Gaussian of blur_factor pixels. Pipelines make masks of 0 and 1 of it again."""
    return mask.filter(ImageFilter.GaussianBlur(blur_factor))
