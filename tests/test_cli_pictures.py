"""minidiff img2img, inpaint and interpolate: what they write, how it is repeated, and each one-line error."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import generator, write_stable_diffusion

import minidiff

PROMPT = "a red ball"
pytestmark = pytest.mark.usefixtures("working_folder")
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return str(write_stable_diffusion(tmp_path_factory.mktemp("tiny") / "sd"))


@pytest.fixture
def picture(working_folder):
    Image.fromarray(PIXELS).save("in.png")
    return "in.png"


@pytest.fixture
def mask(working_folder):
    pixels = np.zeros((24, 16), np.uint8)
    pixels[8:20, 4:12] = 255
    Image.fromarray(pixels).save("mask.png")
    return "mask.png"


@pytest.fixture
def draw(run, sd, picture, mask):
    """Draws quickly with the tiny checkpoint; returns the names of the files."""
    words = {
        "img2img": (picture, PROMPT),
        "inpaint": (picture, mask, PROMPT),
        "interpolate": (PROMPT, "red"),
    }

    def draw(command, *more):
        status, out, err = run(command, *words[command], "--checkpoint", sd, "--steps", 4, *more)
        assert (status, err) == (0, [])
        return out

    return draw


ANCESTRAL = ["--scheduler", "eulerancestral"]
BASE = {"prompt": PROMPT, "negative": "", "guidance": "7.5", "steps": "4", "height": "24", "width": "16"}


def texts(name):
    with Image.open(name) as image:
        return image.text


def test_a_picture_drawn_anew_is_the_pipelines_and_carries_everything(draw, sd):
    (name,) = draw("img2img", "--seed", 5, "--strength", 0.6, "--scheduler", "own")
    pipe = minidiff.StableDiffusionImg2ImgPipeline.from_pretrained(sd)
    expected = pipe(
        PROMPT, Image.fromarray(PIXELS), strength=0.6, num_inference_steps=4, generator=generator(5)
    )
    assert np.array_equal(np.asarray(Image.open(name)), np.asarray(expected.images[0]))
    assert name == "a-red-ball-seed5.png"
    found = {"command": "img2img", "picture": "in.png", "strength": "0.6", "seed": "5"}
    assert (BASE | found).items() <= texts(name).items() and len(texts(name)["picture_pixels"]) == 16


def test_a_painted_picture_is_the_pipelines_and_carries_everything(draw, sd):
    (name,) = draw("inpaint", "--seed", 5, "--scheduler", "own")
    pipe = minidiff.StableDiffusionInpaintPipeline.from_pretrained(sd)
    expected = pipe(
        PROMPT, Image.fromarray(PIXELS), Image.open("mask.png"), height=24, width=16,
        num_inference_steps=4, generator=generator(5),
    )  # fmt: skip
    assert np.array_equal(np.asarray(Image.open(name)), np.asarray(expected.images[0]))
    found = {"command": "inpaint", "picture": "in.png", "mask": "mask.png", "strength": "1.0"}
    assert (BASE | found).items() <= texts(name).items()
    assert texts(name)["picture_pixels"] != texts(name)["mask_pixels"]


@pytest.mark.parametrize("ending", [".gif", ".webp"])
def test_an_animation_goes_there_and_back_and_carries_everything(draw, sd, ending):
    size = ("--height", 24, "--width", 16)
    name, strip = draw("interpolate", "--seeds", 3, 7, "--frames", 4, "--out", f"way{ending}", *size)
    assert (name, strip) == (f"way{ending}", "way-strip.png")
    found = {"command": "interpolate", "prompt_b": "red", "seeds": "3 7", "frames": "4", "seconds": "2.0"}
    assert (BASE | found).items() <= texts(strip).items()
    with Image.open(name) as image:
        assert (image.size, image.n_frames, image.info["loop"]) == ((16, 24), 6, 0)
        durations, frames = [], []
        for k in range(6):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB")).astype(float))
            durations.append(image.info["duration"])
    assert set(durations) <= {660, 667, 670}  # GIF counts in hundredths
    row = np.asarray(Image.open(strip)).astype(float)
    assert row.shape == (24, 4 * 16, 3)
    pictures = np.split(row, 4, axis=1)
    nearest = [int(np.argmin([np.abs(frame - each).mean() for each in pictures])) for frame in frames]
    assert nearest == [0, 1, 2, 3, 2, 1]
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(sd)
    pipe.scheduler = minidiff.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    last = pipe("red", 24, 16, num_inference_steps=4, generator=torch.Generator().manual_seed(7)).images[0]
    assert np.array_equal(pictures[-1], np.asarray(last))


def test_a_strip_shows_eight_pictures_and_one_seed_serves_both_ends(draw):
    name, strip = draw("interpolate", "--frames", 10)
    first, last = texts(strip)["seeds"].split()
    assert first == last and name == f"a-red-ball-to-red-seed{first}-{last}.gif"
    with Image.open(strip) as image:
        assert image.size == (8 * 16, 16)


@pytest.mark.parametrize(
    "command, options",
    [
        ("img2img", []),
        ("img2img", ["--count", "2", "--strength", "0.5", "--height", "32", "--scheduler", "ddpm"]),
        ("inpaint", ["--seed", "3"]),
        ("inpaint", ["--count", "2", "--strength", "0.5", "--negative", "blue", "--width", "24"]),
        ("interpolate", ["--frames", "3"]),
        ("interpolate", ["--frames", "2", "--seeds", "1", "2", "--out", "x.webp", *ANCESTRAL]),
    ],
)  # fmt: skip
def test_like_repeats_every_file_byte_for_byte(draw, run, command, options):
    names = draw(command, *options)
    for source in names if command == "interpolate" else names[-1:]:
        again = "again" + Path(names[0]).suffix
        status, repeated, err = run(command, "--like", source, "--out", again)
        assert (status, err) == (0, [])
        originals = names if command == "interpolate" else names[-1:]
        assert len(repeated) == len(originals)
        for one, other in zip(originals, repeated, strict=True):
            assert Path(one).read_bytes() == Path(other).read_bytes()


def test_like_takes_another_picture_and_text_at_its_own_size(draw, run):
    (name,) = draw("img2img", "--seed", 5, "--strength", 0.5)
    Image.fromarray(PIXELS[:17]).save("other.jpg")
    status, (other,), _ = run("img2img", "other.jpg", "red", "--like", name)
    assert status == 0
    found = {"picture": "other.jpg", "prompt": "red", "seed": "5", "strength": "0.5", "height": "16"}
    assert found.items() <= texts(other).items()


@pytest.mark.parametrize(
    "command, gone", [("img2img", "in.png"), ("inpaint", "in.png"), ("inpaint", "mask.png")]
)
def test_like_says_that_a_picture_is_gone_or_has_changed(draw, run, command, gone):
    (name,) = draw(command, "--seed", 1)
    what = "picture" if gone == "in.png" else "mask"
    with Image.open(gone) as image:
        image.load()
    Path(gone).unlink()
    status, out, err = run(command, "--like", name)
    assert (status, out, len(err)) == (2, [], 1)
    assert f"--like {name}: its {what}, {gone}, is gone; put it back, or give a {what.upper()}" in err[0]
    image.putpixel((5, 9), 7 if image.mode == "L" else (1, 2, 3))
    image.save(gone)
    status, out, err = run(command, "--like", name)
    assert (status, len(err)) == (2, 1) and f"its {what}, {gone}, has changed since" in err[0]
    if command == "img2img":
        assert run(command, gone, "--like", name)[0] == 0


def test_the_same_pixels_in_another_file_format_count_as_the_same(draw, run):
    (name,) = draw("img2img", "--seed", 1)
    Image.open("in.png").save("in.bmp")
    os.replace("in.bmp", "in.png")
    status, (again,), err = run("img2img", "--like", name)
    assert (status, err) == (0, []) and Path(again).read_bytes() == Path(name).read_bytes()


def test_pictures_of_other_modes_are_taken_and_photos_turned_upright(run, sd, working_folder):
    image = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    image.save("photo.jpg", exif=exif)
    for mode in ("1", "L", "P", "CMYK"):
        image.convert(mode).save(f"{mode}.tiff")
    sizes = {"photo.jpg": (24, 16)} | {f"{mode}.tiff": (16, 24) for mode in ("1", "L", "P", "CMYK")}
    for name, size in sizes.items():
        status, (drawn,), _ = run("img2img", name, PROMPT, "--checkpoint", sd, "--steps", 2)
        assert status == 0 and Image.open(drawn).size == size


def test_options_may_stand_between_the_words(run, sd, picture):
    status, out, _ = run("img2img", picture, "--steps", 2, PROMPT, "--checkpoint", sd)
    assert status == 0 and texts(out[0])["prompt"] == PROMPT


ANEW, PAINT = ["img2img", "a.png", PROMPT], ["inpaint", "a.png", "m.png", PROMPT]
WAY = ["interpolate", PROMPT, "red"]


def make_inputs():
    Image.new("RGB", (16, 16)).save("a.png")
    Image.new("RGB", (4, 40)).save("small.png")
    Image.new("RGBA", (16, 16)).save("alpha.png")
    Image.new("I;16", (16, 16)).save("deep.png")
    Image.new("L", (16, 16), 255).save("m.png")
    Image.new("L", (16, 24), 255).save("tall.png")
    Image.new("L", (16, 16)).save("black.png")
    Path("text.png").write_text("no picture")
    Image.fromarray(PIXELS).save("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:-400])
    Path("folder").mkdir()


@pytest.mark.parametrize(
    "words, message",
    [
        (["img2img"], "img2img needs PICTURE PROMPT (there is no PICTURE), or --like PICTURE"),
        (["img2img", "a.png"], "img2img needs PICTURE PROMPT (there is no PROMPT)"),
        (["inpaint", "a.png", "m.png"], "inpaint needs PICTURE MASK PROMPT (there is no PROMPT)"),
        (["interpolate", PROMPT], "interpolate needs two texts, or --like PICTURE"),
        (["img2img", "absent.png", PROMPT], "absent.png: No such file or directory"),
        (["img2img", "folder", PROMPT], "folder: Is a directory"),
        (["img2img", "text.png", PROMPT], "text.png: this is no picture, or a damaged one"),
        (["img2img", "cut.png", PROMPT], "cut.png: this is no picture, or a damaged one"),
        (["img2img", "small.png", PROMPT], "small.png has 4 x 40 pixels; it needs at least 8 x 8"),
        (["img2img", "alpha.png", PROMPT], "alpha.png has an alpha channel (mode RGBA); put it on"),
        (["img2img", "deep.png", PROMPT], "deep.png has pixels of mode I;16; save it with 8 bits a channel"),
        (["inpaint", "a.png", "alpha.png", PROMPT], "alpha.png has an alpha channel"),
        (["inpaint", "a.png", "cut.png", PROMPT], "cut.png: this is no picture"),
        (["inpaint", "a.png", "tall.png", PROMPT], "16 x 16 pixels and tall.png has 16 x 24 pixels"),
        (["inpaint", "a.png", "black.png", PROMPT], "black.png has nothing white, so nothing"),
        ([*ANEW, "--strength", "1.1"], "argument --strength: '1.1' is not a number from 0 to 1"),
        ([*ANEW, "--strength", "-1"], "argument --strength: '-1' is not a number from 0 to 1"),
        ([*ANEW, "--strength", "nan"], "argument --strength: 'nan' is not a number from 0 to 1"),
        ([*ANEW, "--strength", "0"], "--strength 0 leaves none of 25 steps"),
        ([*PAINT, "--strength", "0.3", "--steps", "3"],
         "--strength 0.3 leaves none of 3 steps; it must be from 0.333333 to 1, or --steps larger"),
        ([*ANEW, "--out", "x.jpg"], "end it in .png"),
        ([*WAY, "--out", "x.png"], "animations become GIF or WebP files"),
        ([*WAY, "--seeds", "1"], "argument --seeds: expected 2 arguments"),
        ([*WAY, "--frames", "1"], "argument --frames: '1' is not a whole number from 2"),
        ([*WAY, "--seconds", "0"], "argument --seconds: '0' is not a number above 0"),
        ([*WAY, "--colour", "red"], "unrecognized arguments: --colour red"),
        ([*ANEW, "--like", "a.png"], "a.png: this picture carries no settings of minidiff"),
        ([*ANEW, "--checkpoint", "scenes-ddpm"], "use minidiff sample"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_each_error_is_one_line_and_status_2(run, words, message):
    make_inputs()
    before = sorted(os.listdir())
    status, out, err = run(*words)
    assert (status, out, len(err)) == (2, [], 1), err
    assert err[0].startswith("minidiff") and message in err[0], err
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("damage", [{"seeds": "x"}, {"seeds": "1 2 3"}, {"frames": "many"}])
def test_damaged_settings_of_an_animation_are_refused(draw, run, damage):
    from minidiff.cli.pictures import write_picture

    strip = draw("interpolate", "--frames", 2)[1]
    with Image.open(strip) as image:
        write_picture(image, Path(strip), dict(image.text) | damage)
    status, out, err = run("interpolate", "--like", strip)
    assert (status, out, len(err)) == (2, [], 1)


def test_another_commands_animation_is_told_apart(draw, run):
    name, strip = draw("interpolate", "--frames", 2)
    for each in (name, strip):
        status, _, err = run("generate", "--like", each)
        assert status == 2 and "made by minidiff interpolate; use that" in err[0]
    Image.new("RGB", (8, 8)).save("foreign.gif", comment=b"[1]")
    assert "carries no settings" in run("interpolate", "--like", "foreign.gif")[2][0]
