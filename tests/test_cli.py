"""The command minidiff: what it writes and says, its exit status; help and errors come without torch."""

import errno
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import edit_json, write_ddpm, write_stable_diffusion

import minidiff
from minidiff.cli import _parser, main, pictures

ROOT = Path(minidiff.__file__).parent.parent
PROMPT = "a red ball"
pytestmark = pytest.mark.usefixtures("working_folder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny")
    return write_stable_diffusion(place / "sd"), write_ddpm(place / "ddpm", sample_size=8)


@pytest.fixture
def sd(folders):
    return str(folders[0])


@pytest.fixture
def ddpm(folders):
    return str(folders[1])


def generate(run, sd, *words):
    """Draws quickly with the tiny checkpoint; returns the names of the pictures."""
    status, out, err = run("generate", PROMPT, "--checkpoint", sd, "--steps", 2, *words)
    assert (status, err) == (0, [])
    return out


def _spelled(value):
    return " ".join(value) if isinstance(value, list) else None


def subprocess_run(*words, code=None):
    """Runs the command line, or code with these arguments, in a process of its own."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "minidiff"]), *map(str, words)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)


def test_a_picture_carries_everything_that_made_it(run, sd):
    (name,) = generate(
        run, sd, "--seed", 5, "--negative", "blue", "--guidance", 3, "--height", 24, "--scheduler", "ddim"
    )
    with Image.open(name) as image:
        assert image.size == (16, 24) and image.mode == "RGB"
        texts = image.text
    expected = {
        "command": "generate", "prompt": PROMPT, "negative": "blue", "seed": "5", "steps": "2",
        "guidance": "3.0", "height": "24", "width": "16", "scheduler": "ddim", "checkpoint": sd,
        "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    assert expected.items() <= texts.items()
    assert int(texts["threads"]) >= 1 and len(texts["weights"]) == 16
    assert set(texts) - set(expected) == {"threads", "weights", "minidiff", "torch", "numpy"}


def test_the_picture_is_the_pipelines(run, sd):
    (name,) = generate(run, sd, "--seed", 5, "--scheduler", "own")
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(sd)
    import torch

    image = pipe(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(5)).images[0]
    assert np.array_equal(np.array(Image.open(name)), np.array(image))


@pytest.mark.parametrize(
    "options",
    [
        ["--seed", "5"],
        [],
        ["--negative", "blue", "--guidance", "2.5", "--width", "32"],
        pytest.param(["--threads", "2"], marks=pytest.mark.slow),
        ["--count", "3", "--scheduler", "ddpm"],
        ["--dtype", "bfloat16", "--scheduler", "pndm"],
    ],
)
def test_like_repeats_a_picture_bit_for_bit(run, sd, options):
    name = generate(run, sd, *options)[-1]
    status, (again,), err = run("generate", "--like", name, "--out", "again.png")
    assert (status, again, err) == (0, "again.png", [])
    assert Path(name).read_bytes() == Path(again).read_bytes()


def test_like_takes_what_is_not_given(run, sd):
    (name,) = generate(run, sd, "--seed", 5, "--guidance", 2)
    status, (other,), _ = run("generate", "a cube", "--like", name, "--seed", 6)
    assert status == 0
    with Image.open(other) as image:
        assert (image.text["prompt"], image.text["seed"], image.text["guidance"]) == ("a cube", "6", "2.0")
    assert "a-cube-seed6" in other


def test_pictures_of_one_run_have_their_own_seeds_and_are_each_repeatable(run, sd):
    names = generate(run, sd, "--seed", 8, "--count", 2, "--out", "x.png")
    assert names == ["x-1.png", "x-2.png"]
    (alone,) = generate(run, sd, "--seed", 9)
    assert Path(names[1]).read_bytes() == Path(alone).read_bytes() != Path(names[0]).read_bytes()


def test_a_seed_by_chance_differs_from_run_to_run(run, sd):
    names = [generate(run, sd)[0] for _ in range(2)]
    assert len({Image.open(name).text["seed"] for name in names}) == 2


def test_default_names_overwrite_nothing(run, sd):
    names = [generate(run, sd, "--seed", 1)[0] for _ in range(3)]
    assert names == ["a-red-ball-seed1.png", "a-red-ball-seed1-2.png", "a-red-ball-seed1-3.png"]
    assert sorted(os.listdir()) == sorted(names)  # and no temporary file stays


def test_out_may_be_a_folder_or_a_file_which_is_replaced(run, sd):
    Path("album").mkdir()
    assert generate(run, sd, "--seed", 1, "--out", "album") == ["album/a-red-ball-seed1.png"]
    assert generate(run, sd, "--seed", 1, "--out", "album/") == ["album/a-red-ball-seed1-2.png"]
    Path("mine.PNG").write_text("old")
    assert generate(run, sd, "--seed", 1, "--out", "mine.PNG") == ["mine.PNG"]
    assert generate(run, sd, "--seed", 1, "--out", "new/") == ["new/a-red-ball-seed1.png"]
    assert Image.open("mine.PNG").size == (16, 16)


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("", "picture-seed1.png"),
        ("../../etc/passwd\n", "etc-passwd-seed1.png"),
        ("Eine große Kugel – 50 %!", "eine-große-kugel-50-seed1.png"),
        ("赤" * 300, "赤" * 26 + "-seed1.png"),
    ],
)
@pytest.mark.filterwarnings("ignore:a text has more than")
def test_any_prompt_makes_a_file_name_and_survives_in_the_picture(run, sd, prompt, name):
    status, out, _ = run("generate", prompt, "--checkpoint", sd, "--steps", 1, "--seed", 1)
    assert (status, out) == (0, [name])
    assert Image.open(name).text["prompt"] == prompt


def test_words_that_are_cut_off_are_named_in_one_line(run, sd):
    status, _, err = run("generate", "ball " * 80 + "red", "--checkpoint", sd, "--steps", 1)
    assert status == 0
    assert len(err) == 1 and err[0].startswith("minidiff: ") and err[0].endswith("red")


def test_other_versions_are_told(run, sd, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(pictures.minidiff, "__version__", "0.0.1")
        (name,) = generate(run, sd)
    status, _, err = run("generate", "--like", name)
    assert status == 0
    assert err == ["minidiff: made with minidiff 0.0.1; it may differ in the last bits"]


def test_other_weights_are_told(run, sd, tmp_path):
    copy = Path(shutil.copytree(sd, tmp_path / "copy"))
    (name,) = generate(run, str(copy))
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(copy)
    pipe.vae.decoder.conv_out.bias.data[0] += 0.01
    pipe.vae.save_pretrained(copy / "vae")
    status, _, err = run("generate", "--like", name)
    assert (status, len(err)) == (0, 1) and "weights have changed since" in err[0]
    assert run("generate", "--like", name, "--checkpoint", sd)[2] == []  # asked for, and so no surprise


def test_sample_draws_without_a_text_and_repeats_itself(run, ddpm):
    status, names, err = run("sample", "--checkpoint", ddpm, "--steps", 3, "--seed", 4, "--count", 2)
    assert (status, names, err) == (0, ["ddpm-seed4.png", "ddpm-seed5.png"], [])
    texts = Image.open(names[1]).text
    assert (texts["command"], texts["seed"], texts["scheduler"]) == (
        "sample",
        "5",
        "own",
    ) and "prompt" not in texts
    run("sample", "--like", names[1], "--out", "again.png")
    assert Path(names[1]).read_bytes() == Path("again.png").read_bytes()


def test_sample_switches_schedulers(run, ddpm):
    for scheduler in ("ddim", "pndm", "unipc"):
        status, (name,), _ = run("sample", "--checkpoint", ddpm, "--steps", 5, "--scheduler", scheduler)
        assert status == 0 and Image.open(name).size == (8, 8)


def test_info_shows_every_part(run, sd):
    status, out, err = run("info", sd)
    assert (status, err) == (0, [])
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(sd)
    text = "\n".join(out)
    for part in ("vae", "text_encoder", "unet"):
        count = sum(weight.numel() for weight in getattr(pipe, part).parameters())
        (line,) = [line for line in out if line.split()[0] == part]
        assert (
            f"{count:,}" in line and line.endswith("float32") and type(getattr(pipe, part)).__name__ in line
        )
    assert (
        "CLIPTokenizer" in text
        and "PNDMScheduler: num_train_timesteps 1000, beta_schedule scaled_linear" in text
    )
    assert "pictures of 16 x 16 pixels, from a text" in text
    assert f"{sum(w.numel() for m in pipe.models for w in m.parameters()):,}" in text


def test_info_knows_the_oldest_layout_and_pickled_weights(run, tmp_path):
    import torch

    flat = write_ddpm(tmp_path / "flat", flat=True)
    shutil.rmtree(flat / "unet")
    weights = flat / "diffusion_pytorch_model.safetensors"
    status, out, _ = run("info", flat)
    assert status == 0 and any("177,427" in line for line in out) and "12 x 8 pixels, without" in "".join(out)
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    status, out, _ = run("info", flat)
    assert status == 0 and any("pickled: not opened" in line for line in out)


def test_info_does_not_read_the_weights(run, sd, tmp_path):
    copy = Path(shutil.copytree(sd, tmp_path / "copy"))
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    huge = 40 << 30  # a sparse file: reading it would take minutes
    header = json.dumps({"w": {"dtype": "F16", "shape": [huge // 2], "data_offsets": [0, huge]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + huge)
    status, out, _ = run("info", copy)
    assert status == 0 and any(f"{huge // 2:,}" in line and "float16" in line for line in out)


def test_info_names_a_broken_file(run, sd, tmp_path):
    copy = Path(shutil.copytree(sd, tmp_path / "copy"))
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    status, _, err = run("info", copy)
    assert status == 2 and len(err) == 1 and str(path) in err[0]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the following arguments are required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["generate"], "needs a PROMPT, or --like PICTURE"),
        (["generate", PROMPT, "--steps", "0"], "argument --steps: '0' is not a whole number from 1"),
        (["generate", PROMPT, "--steps", "-3"], "argument --steps: '-3' is not a whole number"),
        (["generate", PROMPT, "--steps", "1.5"], "argument --steps: '1.5'"),
        (["generate", PROMPT, "--count", "0"], "argument --count: '0'"),
        (["generate", PROMPT, "--height", "100"], "argument --height: '100' is not a multiple of 8"),
        (["generate", PROMPT, "--guidance", "nan"], "argument --guidance: 'nan' is not a number"),
        (["generate", PROMPT, "--guidance", "much"], "argument --guidance: invalid number value: 'much'"),
        (["generate", PROMPT, "--seed", "x"], "argument --seed: 'x'"),
        (["generate", PROMPT, "--scheduler", "euler-maruyama"], "invalid choice: 'euler-maruyama'"),
        (["generate", PROMPT, "--dtype", "int8"], "invalid choice: 'int8'"),
        (["generate", PROMPT, "--colour", "red"], "unrecognized arguments: --colour red"),
        (["generate", "a", "red", "cube"], "unrecognized arguments: red cube; a text of several words needs"),
        (["generate", PROMPT, "--checkpoint", "nowhere"], "there is no checkpoint 'nowhere'"),
        (["generate", PROMPT, "--out", "x.jpg"], "end it in .png"),
        (["generate", PROMPT, "--out", "no/x.png"], "there is no folder no; make it first"),
        (["generate", PROMPT, "--out", "no/new/"], "there is no folder no; make it first"),
        (["generate", "--like", "absent.png"], "absent.png: No such file or directory"),
        (["info", "nowhere"], "there is no checkpoint 'nowhere'"),
        (["info"], "the following arguments are required: CHECKPOINT"),
        (["train", "everything"], "unknown stage 'everything'"),
    ],
    ids=_spelled,
)
def test_each_error_is_one_line_and_status_2(run, words, message):
    status, out, err = run(*words)
    assert status == 2 and out == [] and len(err) == 1
    assert err[0].startswith("minidiff") and message in err[0]
    assert os.listdir() == []


def test_checkpoints_of_the_other_kind_are_told_apart(run, sd, ddpm):
    for words, hint in (
        (["generate", PROMPT, "--checkpoint", ddpm], "sample"),
        (["sample", "--checkpoint", sd], "generate"),
    ):
        status, _, err = run(*words)
        assert status == 2 and err[0].endswith(f"use minidiff {hint}")


def test_a_missing_device_is_an_error(run, sd):
    import torch

    missing = ["nonsense"] + ([] if torch.cuda.is_available() else ["cuda"])
    for device in missing:
        status, _, err = run("generate", PROMPT, "--checkpoint", sd, "--device", device)
        assert (status, len(err)) == (2, 1) and f"--device {device}: there is no such device here" in err[0]


def test_broken_weights_are_one_line(run, sd, tmp_path):
    copy = Path(shutil.copytree(sd, tmp_path / "copy"))
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    status, out, err = run("generate", PROMPT, "--checkpoint", copy)
    assert (status, out, len(err)) == (2, [], 1) and "diffusion_pytorch_model.safetensors" in err[0]
    (copy / "unet" / "config.json").unlink()
    status, _, err = run("generate", PROMPT, "--checkpoint", copy)
    assert (status, len(err)) == (2, 1) and "config.json" in err[0]
    edit_json(copy / "model_index.json", unet=[None, None])
    status, _, err = run("generate", PROMPT, "--checkpoint", copy)
    assert (status, len(err)) == (2, 1)


@pytest.mark.parametrize(
    "damage", ["foreign", "text", "command", "number", "scheduler", "dtype", "truncated"]
)
def test_like_refuses_pictures_that_are_not_ours(run, sd, damage):
    (name,) = generate(run, sd)
    messages = {
        "foreign": "no settings of minidiff", "text": "no picture", "command": "made by minidiff sample",
        "truncated": "or a broken one",
    }  # fmt: skip
    changes = {"command": {"command": "sample"}, "number": {"steps": "many"}}
    changes |= {"scheduler": {"scheduler": "x"}, "dtype": {"dtype": "os"}}
    if damage == "foreign":
        Image.new("RGB", (8, 8)).save(name)
    elif damage == "text":
        Path(name).write_text("a letter")
    elif damage == "truncated":
        Path(name).write_bytes(Path(name).read_bytes()[:20])
    else:
        with Image.open(name) as image:
            pictures.write_picture(image, Path(name), dict(image.text) | changes[damage])
    status, out, err = run("generate", "--like", name)
    assert (status, out, len(err)) == (2, [], 1) and messages.get(damage, "are damaged") in err[0]


def test_a_full_disk_is_one_line_and_leaves_nothing(run, sd, monkeypatch):
    def full(self, fp, **options):
        Path(fp).write_bytes(b"half a picture")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(fp))

    Path("old.png").write_text("old")
    monkeypatch.setattr(Image.Image, "save", full)
    status, out, err = run("generate", PROMPT, "--checkpoint", sd, "--steps", 1, "--out", "old.png")
    assert (status, out, len(err)) == (2, [], 1) and err[0].endswith("No space left on device")
    assert os.listdir() == ["old.png"] and Path("old.png").read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into every folder")
def test_a_folder_without_permission_is_told_before_drawing(run, sd):
    Path("locked").mkdir(mode=0o500)
    status, _, err = run("generate", PROMPT, "--checkpoint", sd, "--out", "locked/")
    assert (status, len(err)) == (2, 1) and "nobody may write into the folder locked" in err[0]


def test_an_interruption_is_one_line_and_status_130(run, sd, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(minidiff.StableDiffusionPipeline, "decode", interrupt)
    status, out, err = run("generate", PROMPT, "--checkpoint", sd, "--steps", 1)
    assert (status, out, err) == (130, [], ["minidiff: interrupted; no file was left half-written"])
    assert os.listdir() == []


@pytest.mark.slow
def test_ctrl_c_in_mid_loop_ends_a_real_process_with_130(sd, working_folder):
    code = """
import os, signal, sys
from minidiff.cli import main
from minidiff.models.unet import UNet2DConditionModel
forward, calls = UNet2DConditionModel.forward, []
def signalled(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGINT)
    return forward(self, *args, **kwargs)
UNet2DConditionModel.forward = signalled
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""
    done = subprocess_run("generate", PROMPT, "--checkpoint", sd, "--steps", 50, code=code)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines() == ["minidiff: interrupted; no file was left half-written"]
    assert os.listdir(working_folder) == []


@pytest.mark.parametrize(
    "words, status",
    [
        (["--help"], 0),
        (["generate", "--help"], 0),
        (["sample", "--help"], 0),
        (["info", "--help"], 0),
        (["train", "--help"], 0),
        (["score", "--help"], 0),
        (["compare", "--help"], 0),
        (["compare", PROMPT, "--schedulers", "edmeuler"], 2),
        (["generate", PROMPT, "--steps", "0"], 2),
        (["generate", PROMPT, "--checkpoint", "nowhere"], 2),
        (["info", "SD"], 0),
    ],
    ids=_spelled,
)
def test_help_errors_and_info_come_without_torch(words, status, sd):
    words = [sd if word == "SD" else word for word in words]
    code = """
import sys
from minidiff.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
assert "torch" not in sys.modules
sys.exit(status)
"""
    done = subprocess_run(*words, code=code)
    assert done.returncode == status, done.stderr
    assert (done.stdout if status == 0 else done.stderr) != ""


def test_python_m_minidiff_is_the_command():
    done = subprocess_run("--version")
    assert (done.returncode, done.stdout) == (0, f"minidiff {minidiff.__version__}\n")
    done = subprocess_run("paint")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["generate", "sample", "compare", "info"])
def test_every_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    examples = [
        shlex.split(re.split("   +", line)[0]) for line in lines if line.startswith(f"minidiff {command} ")
    ]
    assert len(examples) >= 2
    for _, *words in examples:
        assert _parser(words).parse_args(words).run


@pytest.mark.parametrize("command", ["train", "score"])
def test_training_commands_reach_their_modules(run, monkeypatch, command):
    seen = []
    module = importlib.import_module(f"minidiff.cli.{command}")
    monkeypatch.setattr(module, "run", seen.append)
    assert run(command) == (0, [], []) and len(seen) == 1
