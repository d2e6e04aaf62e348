"""Pictures and masks in every form become the numbers that diffusers' VaeImageProcessor makes, bit by bit.

And one clear error for each thing that is no picture.
"""

import warnings

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from parity import assert_close
from PIL import Image

from minidiff.pictures import crop_region, from_images, from_masks, overlay, resize_nearest, sizes

pytestmark = pytest.mark.filterwarnings(
    "ignore:Passing `image` as"
)  # diffusers' advice on forms that it takes


def theirs(multiple=8):
    return VaeImageProcessor(vae_scale_factor=multiple)


def their_masks(multiple=8):
    return VaeImageProcessor(
        vae_scale_factor=multiple, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )


def pixels(*shape, seed=0, dtype=np.float32):
    values = np.random.default_rng(seed).random(shape)
    return (values * 256).astype(np.uint8) if dtype is np.uint8 else values.astype(dtype)


def pil(height=45, width=52, mode="RGB", seed=0):
    return Image.fromarray(pixels(height, width, 3, seed=seed, dtype=np.uint8)).convert(mode)


def tensor(*shape, **kwargs):
    return torch.from_numpy(pixels(*shape, **kwargs))


IMAGES = {
    "PIL": pil(),
    "grey PIL": pil(mode="L"),
    "PIL of a multiple's size": pil(32, 48),
    "PIL list": [pil(), pil(seed=1)],
    "PIL list of several sizes": [pil(), pil(30, 77, seed=1)],
    "array": pixels(45, 52, 3),
    "arrays": pixels(2, 45, 52, 3),
    "grey array": pixels(45, 52),
    "array of one channel": pixels(45, 52, 1),
    "array list": [pixels(45, 52, 3), pixels(45, 52, 3, seed=1)],
    "list of arrays of several": [pixels(2, 45, 52, 3), pixels(1, 45, 52, 3, seed=1)],
    "array in [-1, 1]": pixels(45, 52, 3) * 2 - 1,
    "float64 array": pixels(45, 52, 3, dtype=np.float64),
    "large float64 array": pixels(145, 152, 3, dtype=np.float64),
    "array of other strides": pixels(3, 52, 45).T,
    "tensor": tensor(3, 45, 52),
    "tensors": tensor(2, 3, 45, 52),
    "tensor list": [tensor(3, 45, 52), tensor(3, 45, 52, seed=1)],
    "list of tensors of several": [tensor(2, 3, 45, 52), tensor(1, 3, 45, 52, seed=1)],
    "tensors in [-1, 1]": tensor(2, 3, 45, 52) * 2 - 1,
    "tensors, one in [-1, 1]": torch.cat([tensor(1, 3, 45, 52), tensor(1, 3, 45, 52) * 2 - 1]),
    "tensor of one channel": tensor(1, 1, 45, 52),
    "float64 tensor": tensor(3, 45, 52, dtype=np.float64),
    "latents": tensor(2, 4, 5, 7) * 6 - 3,
    "latents of one": tensor(4, 5, 7),
    "list of latents": [tensor(4, 5, 7), tensor(4, 5, 7, seed=1)],
}
MASKS = {
    "PIL": pil(mode="L"),
    "coloured PIL": pil(),
    "PIL of bits": pil(mode="1"),
    "PIL with a palette": pil(mode="P"),
    "opaque PIL": pil(mode="RGBA"),
    "PIL list": [pil(mode="L"), pil(seed=1)],
    "array": pixels(45, 52),
    "array with a channel": pixels(45, 52, 1),
    "arrays": pixels(2, 45, 52),
    "arrays with a channel": pixels(2, 45, 52, 1),
    "array list": [pixels(45, 52), pixels(45, 52, seed=1)],
    "list of arrays with a channel": [pixels(45, 52, 1), pixels(45, 52, 1, seed=1)],
    "float64 array": pixels(45, 52, dtype=np.float64),
    "array of 0 and 1": pixels(45, 52, dtype=np.uint8) // 128,
    "array of 0 and 255": pixels(45, 52, dtype=np.uint8) // 128 * np.uint8(255),
    "array in [-1, 1]": pixels(45, 52) * 2 - 1,
    "tensor": tensor(45, 52),
    "tensor with a channel": tensor(1, 45, 52),
    "tensors": tensor(3, 45, 52),
    "tensors with a channel": tensor(3, 1, 45, 52),
    "tensor list": [tensor(45, 52), tensor(45, 52, seed=1)],
    "list of tensors with a channel": [tensor(1, 45, 52), tensor(1, 45, 52, seed=1)],
    "float16 tensor": tensor(1, 1, 45, 52).half(),
}
SIZES = [(None, None), (40, None), (None, 24), (64, 96), (43, 50)]


def expect(processor, given, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lists of batches are deprecated there
        return processor.preprocess(given, *args, **kwargs)


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_of_picture_becomes_diffusers_numbers(kind, height, width):
    ours = from_images(IMAGES[kind], height, width)
    assert ours.dtype == np.float32
    assert_close(ours, expect(theirs(), IMAGES[kind], height, width).float())


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_of_mask_becomes_diffusers_numbers(kind, height, width):
    ours = from_masks(MASKS[kind], height, width)
    assert ours.dtype == np.float32 and ours.shape[1] == 1 and set(np.unique(ours)) <= {0, 1}
    given = MASKS[kind]
    given = given.copy() if isinstance(given, np.ndarray) else given  # diffusers writes into an array
    given = given.clone() if torch.is_tensor(given) else given
    assert_close(ours, expect(their_masks(), given, height, width))


@pytest.mark.parametrize("multiple", [1, 2, 16, 32])
@pytest.mark.parametrize("kind", ["PIL", "arrays", "tensors"])
def test_sizes_are_cut_down_to_a_multiple(kind, multiple):
    ours = from_images(IMAGES[kind], multiple=multiple)
    assert ours.shape[2] % multiple == ours.shape[3] % multiple == 0
    assert_close(ours, expect(theirs(multiple), IMAGES[kind]))


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_half_precision_is_widened_before_it_is_scaled(kind):
    half = IMAGES[kind].half() if kind == "tensor" else IMAGES[kind].astype(np.float16)
    widened = half.float() if kind == "tensor" else half.astype(np.float32)
    assert np.array_equal(from_images(half), from_images(widened))


def test_bfloat16_and_tensors_of_a_graph_are_taken():
    given = IMAGES["tensor"].bfloat16().requires_grad_()
    assert_close(from_images(given), expect(theirs(), given.detach().float()))


def test_masks_of_bool_are_taken():
    bits = MASKS["array"] > 0.3
    assert np.array_equal(from_masks(bits), from_masks(bits.astype(np.float32)))
    assert np.array_equal(from_masks(torch.from_numpy(bits)), from_masks(bits))


def test_what_is_given_stays_as_it_was():
    for make, kinds in ((from_images, IMAGES), (from_masks, MASKS)):
        for given in kinds.values():
            if isinstance(given, np.ndarray):
                before = given.copy()
                make(given)
                assert np.array_equal(given, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_pixel_is_torchs(dtype):
    rng = np.random.default_rng(0)
    for _ in range(400):
        old, new = rng.integers(1, 160, 2).tolist(), rng.integers(1, 160, 2).tolist()
        batch = torch.arange(old[0] * old[1]).reshape(1, 1, *old).to(dtype)
        expected = torch.nn.functional.interpolate(batch, size=new)
        assert np.array_equal(resize_nearest(batch.numpy(), *new), expected.numpy()), (old, new)


# -- a part of a picture


def masked(seed):
    """A picture, a mask with one rectangle, a size to draw at, and a padding, all by chance."""
    rng = np.random.default_rng(seed)
    (h, w), height, width = rng.integers(16, 90, 2), *rng.choice([24, 32, 64], 2).tolist()
    values = np.zeros((h, w), np.uint8)
    top, left = rng.integers(0, h), rng.integers(0, w)
    values[top : rng.integers(top, h) + 1, left : rng.integers(left, w) + 1] = rng.choice([1, 60, 255])
    return pil(h, w, seed=seed), Image.fromarray(values), height, width, int(rng.integers(0, 40))


@pytest.mark.parametrize("seed", range(60))
def test_a_part_is_cut_out_fitted_and_put_back_as_in_diffusers(seed):
    image, mask, height, width, padding = masked(seed)
    region = crop_region(image, mask, width, height, padding)
    assert region == their_masks().get_crop_region(mask, width, height, padding)
    fill = {"resize_mode": "fill", "crops_coords": region}
    assert_close(
        from_images(image, height, width, 8, region), theirs().preprocess(image, height, width, **fill)
    )
    assert_close(
        from_masks(mask, height, width, 8, region), their_masks().preprocess(mask, height, width, **fill)
    )
    painted = pil(height, width, seed=seed + 100)
    ours, expected = (
        overlay(image, painted, mask, region),
        theirs().apply_overlay(mask, image, painted, region),
    )
    assert ours.mode == expected.mode and ours.size == image.size
    assert np.array_equal(np.array(ours), np.array(expected))


def test_a_mask_without_white_has_no_part():
    with pytest.raises(ValueError, match="mask_image is all black"):
        crop_region(pil(), Image.new("L", (52, 45)), 32, 32, 4)


@pytest.mark.parametrize("padding", [-1, 2.5, "8"])
def test_a_padding_that_is_no_number_of_pixels_is_refused(padding):
    with pytest.raises(ValueError, match="padding_mask_crop is"):
        crop_region(pil(), pil(mode="L"), 32, 32, padding)


@pytest.mark.parametrize("name", ["image", "mask_image"])
def test_only_one_pil_image_is_cropped(name):
    pair = {"image": pil(), "mask_image": pil(mode="L")}
    pair[name] = [pair[name]]
    with pytest.raises(ValueError, match=f"one PIL image as {name}, not a list"):
        crop_region(*pair.values(), 32, 32, 4)


def test_sizes_are_height_and_width():
    assert sizes(IMAGES["PIL list of several sizes"]) == {(45, 52), (30, 77)}
    assert sizes(IMAGES["arrays"]) == sizes(IMAGES["tensors"]) == {(45, 52)}
    assert sizes(MASKS["array"], "mask_image") == sizes(MASKS["tensors"], "mask_image") == {(45, 52)}


# -- what is no picture


def with_value(value):
    given = pixels(45, 52, 3)
    given[3, 4, 1] = value
    return given


REFUSED = {
    "nothing": (None, "is or holds a NoneType; pass a PIL image"),
    "a path": ("cat.png", "is or holds a str; pass a PIL image"),
    "an empty list": ([], "is an empty list"),
    "a list of lists": ([[pil()]], "is or holds a list"),
    "a tuple": ((pil(),), "is or holds a tuple"),
    "two kinds": ([pil(), pixels(45, 52, 3)], "a list of NumPy arrays and PIL images"),
    "two shapes": ([pixels(45, 52, 3), pixels(45, 60, 3)], r"shapes \(45, 52, 3\), \(45, 60, 3\)"),
    "two ranks": ([pixels(45, 52, 3), pixels(1, 45, 52, 3)], r"shapes \(1, 45, 52, 3\), \(45, 52, 3\)"),
    "five axes": (pixels(1, 1, 45, 52, 3), r"has the shape \(1, 1, 45, 52, 3\)"),
    "one axis": (pixels(45), r"has the shape \(45,\)"),
    "a flat tensor": (tensor(45, 52), r"has the shape \(45, 52\)"),
    "no rows": (pixels(0, 45, 52, 3), r"has the shape \(0, 45, 52, 3\)"),
    "numbers from 0 to 255": (pixels(45, 52, 3) * 255, r"from \S+ to 25\d\S*; .*divide pixels by 255"),
    "tensors from 0 to 255": (tensor(3, 45, 52) * 255, "divide pixels by 255"),
    "whole numbers": (pixels(45, 52, 3, dtype=np.uint8), "values of uint8; .*divide pixels by 255"),
    "a whole tensor": (tensor(3, 45, 52, dtype=np.uint8), "values of uint8"),
    "text": (np.full((45, 52, 3), "a"), "values of <U1"),
    "NaN": (with_value(np.nan), "NaN or infinity"),
    "infinity": (with_value(-np.inf), "NaN or infinity"),
    "NaN in latents": (tensor(1, 4, 5, 7) / 0 * 0, "NaN or infinity"),
    "alpha": (pil(mode="RGBA"), r"an alpha channel \(mode RGBA\); .*convert\('RGB'\)"),
    "grey with alpha": (pil(mode="LA"), r"an alpha channel \(mode LA\)"),
    "an array with alpha": (pixels(45, 52, 4), r"the shape \(45, 52, 4\), with an alpha channel"),
    "arrays with alpha": ([pixels(45, 52, 4)], r"list of \(45, 52, 4\), with an alpha channel"),
    "a palette": (pil(mode="P"), "has the mode P"),
    "bits": (pil(mode="1"), "has the mode 1"),
    "ink": (pil(mode="CMYK"), "has the mode CMYK"),
    "grey beside coloured": ([pil(), pil(mode="L")], "grey and coloured"),
    "a small picture": (pil(45, 7), "has 45 x 7 pixels; it needs at least 8 x 8"),
    "a small array": (pixels(7, 45, 3), "has 7 x 45 pixels; it needs at least 8 x 8"),
    "channels last in a tensor": (tensor(45, 52, 3), "has 52 x 3 pixels; .*is the order right"),
    "channels first in an array": (pixels(3, 45, 52), "has 3 x 45 pixels; .*is the order right"),
}
REFUSED_MASKS = {
    "nothing": (None, "is or holds a NoneType"),
    "an empty list": ([], "is an empty list"),
    "three channels": (pixels(1, 45, 52, 3), r"the shape \(1, 45, 52, 3\); a mask has one channel"),
    "latents": (tensor(1, 4, 45, 52), r"the shape \(1, 4, 45, 52\); a mask has one channel"),
    "numbers from 0 to 255": (pixels(45, 52, dtype=np.uint8), "from 0 to 255; .*divide pixels by 255"),
    "NaN": (pixels(45, 52) * np.nan, "NaN or infinity"),
    "alpha": (Image.new("RGBA", (52, 45), (0, 0, 0, 9)), r"an alpha channel .*mask.getchannel\('A'\)"),
    "a small mask": (pil(4, 52, "L"), "has 4 x 52 pixels"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_picture_gets_one_clear_error(what):
    given, message = REFUSED[what]
    with pytest.raises(ValueError, match=f"^image .*{message}") as error:
        from_images(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", REFUSED_MASKS)
def test_what_is_no_mask_gets_one_clear_error(what):
    given, message = REFUSED_MASKS[what]
    with pytest.raises(ValueError, match=f"^mask_image .*{message}"):
        from_masks(given)


@pytest.mark.parametrize("format", ["png", "jpeg", "bmp", "gif", "tiff"])
def test_a_damaged_file_is_named(tmp_path, format):
    path = tmp_path / f"cat.{format}"
    pil(60, 60).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    for name, make in (("image", from_images), ("mask_image", from_masks)):
        with pytest.raises(ValueError, match=rf"^{name}: .*cat\.{format} is damaged: "):
            make(Image.open(path))


@pytest.mark.parametrize("height, width", [(4, 64), (64, 0)])
def test_a_size_below_one_latent_is_refused(height, width):
    with pytest.raises(
        ValueError, match=f"height and width are {height} and {width}; they must be at least 8"
    ):
        from_images(pil(), height, width)
