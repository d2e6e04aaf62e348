"""minidiff compare: one sheet of a prompt, samplers by steps; its pictures, captions, settings and errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from tiny_pipelines import generator, write_ddpm, write_stable_diffusion

import minidiff
from minidiff.cli import compare, drawing, sheet

PROMPT = "a red ball"
pytestmark = pytest.mark.usefixtures("working_folder")
ALL = sorted(drawing.scheduler_names())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny")
    return str(write_stable_diffusion(place / "sd")), str(write_ddpm(place / "ddpm", sample_size=8))


@pytest.fixture
def sd(folders):
    return folders[0]


@pytest.fixture
def drawn(monkeypatch):
    """What draw_sheet is called with, call by call: (title, facts, heads, rows)."""
    calls = []

    def draw_sheet(*args):
        calls.append(args)
        return sheet.draw_sheet(*args)

    monkeypatch.setattr(compare, "draw_sheet", draw_sheet)
    return calls


def test_every_picture_is_the_pipelines_at_the_same_seed(run, sd, drawn):
    words = ["--schedulers", "ddim,unipc", "--steps", "2,3", "--seed", 5, "--guidance", 3]
    status, out, err = run("compare", PROMPT, "--checkpoint", sd, "--negative", "blue", *words)
    assert (status, out, err) == (0, ["compare-a-red-ball-seed5.png"], [])
    ((title, _, heads, rows),) = drawn
    assert (title, heads, list(rows)) == (PROMPT, ["2 steps", "3 steps"], ["ddim", "unipc"])
    for name, cells in rows.items():
        for steps, cell in zip((2, 3), cells, strict=True):
            pipe = minidiff.StableDiffusionPipeline.from_pretrained(sd)
            scheduler_class = getattr(minidiff, drawing.scheduler_names()[name])
            pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
            image = pipe(
                PROMPT, num_inference_steps=steps, guidance_scale=3, negative_prompt="blue",
                generator=generator(5),
            ).images[0]  # fmt: skip
            assert np.array_equal(np.array(cell.image), np.array(image))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.slow
def test_the_calls_in_a_caption_are_the_unets_own(run, sd, drawn, monkeypatch, name):
    seen = []
    forward = minidiff.UNet2DConditionModel.forward
    monkeypatch.setattr(
        minidiff.UNet2DConditionModel,
        "forward",
        lambda *args, **kw: (seen.append(1), forward(*args, **kw))[1],
    )
    assert run("compare", PROMPT, "--checkpoint", sd, "--schedulers", name, "--steps", "6")[0] == 0
    ((cell,),) = drawn[0][3].values()
    calls = int(re.fullmatch(r"\d+\.\d\d s, (\d+) calls", cell.caption)[1])
    twice = getattr(minidiff, drawing.scheduler_names()[name]).order == 2
    assert calls == (7 if name == "pndm" else 11 if twice else 6)
    assert len(seen) == 2 * calls  # the first picture is drawn once before, not measured


def test_the_settings_are_in_the_sheet_and_like_takes_them(run, sd, drawn):
    words = ["--checkpoint", sd, "--schedulers", "unipc, ddim", "--steps", "2,1", "--seed", 3, "--height", 24]
    assert run("compare", PROMPT, *words, "--out", "sheet.png")[0] == 0
    with Image.open("sheet.png") as image:
        texts = image.text
    expected = {
        "command": "compare", "prompt": PROMPT, "negative": "", "schedulers": "unipc,ddim", "steps": "2,1",
        "seed": "3", "guidance": "7.5", "height": "24", "width": "16", "checkpoint": sd, "device": "cpu",
        "dtype": "float32",
    }  # fmt: skip
    assert expected.items() <= texts.items()
    assert set(texts) - set(expected) == {"threads", "weights", "minidiff", "torch", "numpy"}
    assert run("compare", "--like", "sheet.png", "--out", "again.png") == (0, ["again.png"], [])
    (_, _, heads, first), (_, _, _, second) = drawn
    assert heads == ["2 steps", "1 step"] and list(second) == ["unipc", "ddim"]
    for name in first:
        for before, after in zip(first[name], second[name], strict=True):
            assert np.array_equal(np.array(before.image), np.array(after.image))


@pytest.mark.slow
def test_all_schedulers_that_suit_are_compared_if_none_are_named(run, sd, drawn):
    status, _, err = run("compare", PROMPT, "--checkpoint", sd, "--steps", "8")
    assert (status, err) == (0, [])
    assert list(drawn[0][3]) == compare.default_schedulers()
    assert set(ALL) - set(compare.default_schedulers()) <= {"lcm", "tcd"}


def test_the_facts_name_what_made_the_pictures(run, sd, drawn):
    words = [
        "--schedulers",
        "ddim",
        "--steps",
        "1",
        "--negative",
        "blue",
        "--guidance",
        "2.5",
        "--threads",
        "1",
    ]
    assert run("compare", PROMPT, "--checkpoint", sd, *words, "--dtype", "bfloat16")[0] == 0
    facts = drawn[0][1]
    assert facts.startswith(
        f"checkpoint {sd}, seed 0, guidance 2.5, away from “blue”; cpu, bfloat16, 1 thread;"
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "compare needs a PROMPT, or --like SHEET"),
        ([PROMPT, "--steps", "5,ten"], "--steps: 'ten' is not a whole number from 1 to 1000"),
        ([PROMPT, "--steps", "0"], "--steps: '0' is not a whole number"),
        ([PROMPT, "--steps", ""], "--steps: '' is not a whole number"),
        ([PROMPT, "--steps", "5,5"], "--steps has 5 twice"),
        ([PROMPT, "--schedulers", "ddim,ddim"], "--schedulers has ddim twice"),
        ([PROMPT, "--schedulers", "ddim,heum"], "--schedulers: heum is unknown; choose from"),
        ([PROMPT, "--seed", "-1"], "argument --seed: '-1' is not a whole number"),
        ([PROMPT, "--height", "100"], "argument --height: '100' is not a multiple of 8"),
        ([PROMPT, "--checkpoint", "nowhere"], "there is no checkpoint 'nowhere'"),
        ([PROMPT, "--checkpoint", "scenes-ddpm"], "use minidiff sample"),
        ([PROMPT, "--out", "x.jpg"], "end it in .png"),
        (["--like", "absent.png"], "absent.png: No such file or directory"),
    ],
)
def test_each_error_is_one_line_and_status_2(run, words, message):
    status, out, err = run("compare", *words)
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith("minidiff") and message in err[0]
    assert os.listdir() == []


@pytest.mark.parametrize("name", sorted(drawing.misfits()))
def test_a_scheduler_of_another_kind_of_model_is_refused_with_the_reason(run, sd, name):
    for words in (["compare", PROMPT, "--schedulers", name], ["generate", PROMPT, "--scheduler", name]):
        status, out, err = run(*words, "--checkpoint", sd)
        assert (status, out, len(err)) == (2, [], 1)
        assert f"{name} is {drawing.misfits()[name]}" in err[0]


def test_a_number_of_steps_that_a_sampler_cannot_make_is_told_before_drawing(run, sd, drawn):
    words = ["--schedulers", "ddim", "--steps", "5,1000"]
    edit = minidiff.StableDiffusionPipeline.from_pretrained(sd)
    edit.scheduler = minidiff.DDIMScheduler(num_train_timesteps=100, clip_sample=False, steps_offset=1)
    edit.save_pretrained("short")
    status, _, err = run("compare", PROMPT, "--checkpoint", "short", *words)
    assert (status, len(err), drawn) == (2, 1, [])
    assert err[0].startswith("minidiff: ddim in 1000 steps: ") and "100" in err[0]


def test_a_picture_that_is_not_finite_names_its_sampler(run, sd, monkeypatch):
    decode = minidiff.StableDiffusionPipeline.decode
    monkeypatch.setattr(
        minidiff.StableDiffusionPipeline,
        "decode",
        lambda pipe, x: (
            decode(pipe, x) * (np.nan if type(pipe.scheduler).__name__.startswith("UniPC") else 1)
        ),
    )
    status, _, err = run("compare", PROMPT, "--checkpoint", sd, "--schedulers", "ddim,unipc", "--steps", "2")
    assert (status, len(err)) == (2, 1)
    assert err[0].startswith("minidiff: unipc in 2 steps: the picture has values that are not finite")
    assert os.listdir() == []


def test_help_names_every_sampler_and_comes_without_torch():
    code = """
import sys
from minidiff.cli import main
try:
    main(["compare", "--help"])
except SystemExit:
    assert "torch" not in sys.modules
"""
    env = os.environ | {"PYTHONPATH": str(Path(minidiff.__file__).parent.parent), "COLUMNS": "1000"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(ALL) | set(drawing.misfits()) <= set(re.findall(r"\w+", done.stdout))


@pytest.mark.parametrize("size", [(8, 8), (128, 96), (600, 300)])
def test_a_sheet_holds_every_picture_where_its_head_and_label_are(size):
    colors = {"one": ["#aa0000", "#00aa00"], "another": ["#0000aa", "#aaaa00"]}
    rows = {
        label: [sheet.Cell(Image.new("RGB", size, color), f"{color} 123 calls") for color in row]
        for label, row in colors.items()
    }
    pixels = np.array(sheet.draw_sheet("title " * 90, "facts " * 20, ["5 steps", "10 steps"], rows))
    scale = min(1, sheet.LARGEST / max(size))
    places = []
    for color in [*colors["one"], *colors["another"]]:
        ys, xs = np.nonzero((pixels == [int(color[k : k + 2], 16) for k in (1, 3, 5)]).all(-1))
        assert len(ys) == round(size[0] * scale) * round(size[1] * scale)
        places.append((ys[0], xs[0]))
    (a, b, c, d) = places
    assert a[0] == b[0] < c[0] == d[0] and a[1] == c[1] < b[1] == d[1]


def test_long_texts_are_wrapped_within_the_width_and_cut_where_asked():
    font = ImageFont.load_default(20)
    lines = sheet.wrap("a large red sphere " * 9 + "x" * 200, font, 300)
    assert all(font.getlength(line) <= 300 for line in lines)
    assert "".join(lines).replace(" ", "") == "alargeredsphere" * 9 + "x" * 200
    cut = sheet.wrap("a large red sphere " * 9, font, 300, 2)
    assert len(cut) == 2 and cut[1].endswith("…") and font.getlength(cut[1]) <= 310
    assert sheet.wrap("one line", font, 300, 2) == ["one line"]
    assert ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength("…", font) > 0


def test_progress_counts_calls_on_a_terminal(run, sd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, _, err = run("compare", PROMPT, "--checkpoint", sd, "--schedulers", "ddim", "--steps", "4")
    assert status == 0 and "ddim, 4 steps" in "".join(err) and "/4" in "".join(err)


def test_the_threads_of_the_process_are_restored(run, sd):
    before = torch.get_num_threads()
    run(
        "compare", PROMPT, "--checkpoint", sd, "--schedulers", "ddim", "--steps", "1", "--threads", before + 1
    )
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", ALL)
def test_generate_and_sample_draw_with_every_scheduler_that_they_name(run, folders, name):
    for words, folder in zip((["generate", PROMPT], ["sample"]), folders, strict=True):
        status, out, err = run(*words, "--checkpoint", folder, "--scheduler", name, "--steps", 4, "--seed", 1)
        assert (status, len(out), err) == (0, 1, [])
        with Image.open(out[0]) as image:
            assert image.text["scheduler"] == name and np.array(image).std() > 5
