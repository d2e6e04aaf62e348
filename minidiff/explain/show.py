"""Pictures in a notebook: rows of pictures with captions, and short animations.

matplotlib, IPython and PIL are needed here alone, so they are imported when something is shown.
"""

import io
import math

import numpy as np


def pictures(images, captions=None, columns=None, size=1.6):
    """Pictures side by side as one, row by row, as what IPython displays: a JPEG, for small notebooks.

    images: PIL images or arrays (H, W) or (H, W, 3), floats in [0, 1] or uint8; grey ones keep their range.
    captions: one text for each, of one line or more. columns: in a row, all if None. size: of a picture, in
    inches of 100 pixels.
    """
    import matplotlib.pyplot as plt
    from IPython.display import Image as Shown

    images = [np.asarray(image) for image in images]
    columns = min(columns or len(images), len(images))
    rows = math.ceil(len(images) / columns)
    lines = max(caption.count("\n") + 1 for caption in captions) if captions else 0
    height = size + (0.14 + 0.16 * lines if captions else 0)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * size, rows * height), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
        axis.set_anchor("S")  # what is left of the height is for the caption
    for k, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        axis.imshow(image.clip(0, 1) if image.dtype.kind == "f" and image.ndim == 3 else image, cmap="gray")
        if captions:
            axis.set_title(captions[k], fontsize=9)
    figure.tight_layout(pad=0.5)
    file = io.BytesIO()
    figure.savefig(file, format="jpeg", dpi=100, pil_kwargs={"quality": 90})
    plt.close(figure)
    return Shown(data=file.getvalue(), format="jpeg")


def animation(frames, seconds=3.0, size=256, last=1.0):
    """A GIF of PIL images, figures or arrays (H, W, 3), as what IPython displays; it plays on code hosts too.

    frames: as for `pictures`. seconds: of the whole; the last frame stays for `last` more. size: of the shown
    picture's width, in pixels; small frames are enlarged without smoothing.
    """
    from IPython.display import Image as Shown
    from PIL import Image

    images = [_pil(frame, Image) for frame in frames]
    scale = max(1, round(size / 2 / images[0].width))  # the browser doubles it, the file stays small
    images = [i.resize((scale * i.width, scale * i.height), Image.Resampling.NEAREST) for i in images]
    images = [i.quantize(96, dither=Image.Dither.NONE) for i in images]
    durations = [round(1000 * seconds / len(images))] * len(images)
    durations[-1] += round(1000 * last)
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    # Called a PNG, because code hosts and nbconvert show no other pictures; browsers look at the bytes.
    return Shown(data=file.getvalue(), format="png", width=size)


def _pil(frame, image_module):
    """A frame as an RGB image; a figure of matplotlib as it would be saved."""
    if hasattr(frame, "savefig"):
        file = io.BytesIO()
        frame.savefig(file, format="png", dpi=80)
        return image_module.open(file).convert("RGB")
    if isinstance(frame, image_module.Image):
        return frame.convert("RGB")
    array = np.asarray(frame)
    if array.dtype.kind == "f":
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return image_module.fromarray(array).convert("RGB")
