"""Where torch, NumPy and PIL meet: conversions, random numbers and pictures, against torch and diffusers."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from minidiff.boundary import draw_normal, is_tensor, like, to_images, to_numpy

DTYPES = ("float16", "float32", "float64")


@pytest.mark.parametrize("dtype", [*DTYPES, "int64"])
def test_arrays_and_tensors_become_arrays_of_their_dtype(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    assert to_numpy(array) is array
    assert to_numpy(torch.from_numpy(array)).dtype == dtype
    assert (to_numpy(torch.from_numpy(array)) == array).all()


def test_bfloat16_graphs_lists_and_strides_come_through():
    x = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    assert to_numpy(x).dtype == np.float32 and (to_numpy(x) == x.detach().float().numpy()).all()
    assert to_numpy([1, 2]).tolist() == [1, 2]
    strided = torch.randn(2, 3, 4).movedim(0, -1)
    assert (to_numpy(strided) == strided.numpy()).all()
    assert is_tensor(x) and not is_tensor(np.ones(2)) and not is_tensor(None)


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
def test_like_gives_the_kind_and_dtype_of_the_reference(dtype):
    array = np.linspace(-2, 2, 7, dtype=np.float32)
    reference = torch.zeros(1, dtype=getattr(torch, dtype))
    result = like(array, reference)
    assert result.dtype == reference.dtype
    assert torch.equal(result, torch.from_numpy(array).to(reference.dtype))
    if dtype != "bfloat16":
        assert like(array, reference.numpy()).dtype == dtype
        assert (like(array, reference.numpy()) == result.numpy()).all()
    assert like(array, array) is array


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 4, 8, 8)])
@pytest.mark.parametrize("seeds", [7, [7], "each"])
def test_normal_numbers_are_diffusers(shape, dtype, seeds):
    seeds = list(range(shape[0])) if seeds == "each" else seeds

    def generators():
        made = [
            torch.Generator().manual_seed(seed) for seed in (seeds if isinstance(seeds, list) else [seeds])
        ]
        return made if isinstance(seeds, list) else made[0]

    expected = randn_tensor(shape, generators(), torch.device("cpu"), getattr(torch, dtype))
    result = draw_normal(shape, generators(), getattr(torch, dtype))
    assert (result == to_numpy(expected)).all() and result.shape == shape
    if dtype != "bfloat16":
        again = draw_normal(shape, generators(), np.dtype(dtype))
        assert again.dtype == dtype and (again == result).all()


def test_without_a_generator_numbers_come_from_torchs_global_one():
    torch.manual_seed(3)
    expected = torch.randn(2, 3)
    torch.manual_seed(3)
    assert (draw_normal((2, 3)) == expected.numpy()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpys_generators_draw_too(dtype):
    result = draw_normal((2, 3), np.random.default_rng(0), dtype)
    expected = np.random.default_rng(0).standard_normal(
        (2, 3), np.float64 if dtype == "float64" else np.float32
    )
    assert result.dtype == dtype and (result == expected.astype(dtype)).all()
    rows = draw_normal((2, 3), [np.random.default_rng(0), torch.Generator().manual_seed(1)], dtype)
    assert (rows[:1] == draw_normal((1, 3), np.random.default_rng(0), dtype)).all()
    assert (rows[1:] == draw_normal((1, 3), torch.Generator().manual_seed(1), dtype)).all()
    assert draw_normal((2, 3), np.random.default_rng(0), torch.bfloat16).dtype == np.float32


def test_wrong_generators_are_named():
    with pytest.raises(ValueError, match="a list of 2 generators for 3 rows; pass one for each row, or one"):
        draw_normal((3, 2), [torch.Generator(), torch.Generator()])
    with pytest.raises(TypeError, match=r"generator is a int; pass a torch\.Generator, a numpy"):
        draw_normal((3, 2), 42)


def pictures(dtype, channels=3, spread=0.7):
    return (torch.randn(2, channels, 5, 6, generator=torch.Generator().manual_seed(0)) * spread).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_equal_diffusers(dtype, output_type, channels):
    x = pictures(dtype, channels)
    expected = VaeImageProcessor().postprocess(x, output_type)
    result = to_images(x, output_type)
    if output_type == "pil":
        assert len(result) == 2 and all(a.mode == b.mode for a, b in zip(result, expected, strict=True))
        result, expected = (
            np.stack([np.asarray(p) for p in result]),
            np.stack([np.asarray(p) for p in expected]),
        )
    assert type(result) is type(expected) and result.dtype == expected.dtype
    assert result.shape == expected.shape and (result == expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_give_the_pictures_of_tensors(dtype):
    x = pictures(getattr(torch, dtype))
    assert (to_images(x.numpy(), "np") == to_images(x, "np")).all()
    assert torch.equal(to_images(x.numpy(), "pt"), to_images(x, "pt"))
    for a, b in zip(to_images(x.numpy()), to_images(x), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()


def test_pixels_are_rounded_half_to_even_and_clipped():
    values = np.float32([-3, -1, 0, 1, 3]).reshape(1, 1, 1, 5)
    assert np.asarray(to_images(values)[0]).tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_picture_that_is_not_finite_is_refused_with_the_remedy(bad, output_type):
    x = pictures(torch.float32)
    x[1, 0, 2, 3] = bad
    with pytest.raises(ValueError, match=r"not finite. In float16 some decoders overflow: use torch_dtype"):
        to_images(x, output_type)


def test_wrong_pictures_are_named():
    with pytest.raises(ValueError, match="output_type is 'jpeg'; it must be 'pil', 'np' or 'pt'"):
        to_images(pictures(torch.float32), "jpeg")
    with pytest.raises(ValueError, match=r"\(B, C, H, W\), not \(3, 5, 6\)"):
        to_images(pictures(torch.float32)[0])
    with pytest.raises(ValueError, match="5 channels has no PIL format"):
        to_images(pictures(torch.float32, 5))
