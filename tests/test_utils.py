"""load_image and make_image_grid against diffusers'."""

import io
import urllib.error
import urllib.request

import diffusers.utils
import numpy as np
import pytest
from PIL import Image

from minidiff.utils import load_image, make_image_grid


def picture(seed=0, size=(7, 5), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(pixels if mode == "RGBA" else pixels[..., :3]).convert(mode)


def same(ours, theirs):
    return (ours.mode, ours.size, ours.tobytes()) == (theirs.mode, theirs.size, theirs.tobytes())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_file_is_read_as_in_diffusers(tmp_path, mode):
    path, original = tmp_path / "picture.png", picture(mode=mode)
    original.save(path)
    expected = diffusers.utils.load_image(str(path))
    for given in (path, str(path), original):
        assert same(load_image(given), expected)
    kept = load_image(str(path), convert_method=lambda image: image.convert("L"))
    assert same(kept, diffusers.utils.load_image(str(path), convert_method=lambda image: image.convert("L")))


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    picture().save(tmp_path / "turned.png", exif=exif)
    image = load_image(tmp_path / "turned.png")
    assert image.size == (5, 7) and same(image, diffusers.utils.load_image(str(tmp_path / "turned.png")))


def test_an_address_is_fetched(monkeypatch):
    stored = io.BytesIO()
    picture().save(stored, "PNG")

    def answer(request, timeout):
        assert (
            request.full_url == "https://example.org/a.png" and request.get_header("User-agent") == "minidiff"
        )
        return io.BytesIO(stored.getvalue())

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert same(load_image("https://example.org/a.png"), picture())


def test_what_is_no_picture_is_refused(monkeypatch, tmp_path):
    def no_answer(request, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", no_answer)
    with pytest.raises(OSError, match=r"https://example\.org/a\.png gives no picture: .*no route.*; save it"):
        load_image("https://example.org/a.png")
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: io.BytesIO(b"<html>"))
    with pytest.raises(OSError, match="gives no picture: cannot identify"):
        load_image("http://example.org/a.png")
    with pytest.raises(FileNotFoundError, match="absent"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(TypeError, match="a path, an address or a PIL image, not a ndarray"):
        load_image(np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize("resize", [None, 6])
def test_a_grid_is_diffusers(resize):
    images = [picture(seed) for seed in range(6)]
    ours, theirs = (grid(images, 2, 3, resize) for grid in (make_image_grid, diffusers.utils.make_image_grid))
    assert same(ours, theirs)
    for rows, cols in ((2, 2), (-2, -3)):
        with pytest.raises(ValueError, match=f"got 6 pictures for {rows} rows of {cols}; pass one for each"):
            make_image_grid(images, rows, cols)
    with pytest.raises(ValueError, match="got 0 pictures"):
        make_image_grid([], 0, 0)
    with pytest.raises(TypeError, match="PIL images, not a ndarray"):
        make_image_grid([np.zeros((4, 4, 3), np.uint8)], 1, 1)
