"""minidiff convert: the folder that it writes holds what diffusers makes of the file, or is not there."""

import json
import os

import diffusers
import pytest
import safetensors.torch
import torch
from ldm_files import (
    DATA,
    MAPPING,
    PIPELINES,
    original_tensors,
    write_folder,
    write_single_file,
    write_sparse,
)
from parity import assert_close
from tiny_pipelines import generator

import minidiff
from minidiff.checkpoints import CheckpointError, layout
from minidiff.cli import convert, main

KINDS = [pytest.param(kind, marks=pytest.mark.slow) if kind == "sdxl" else kind for kind in MAPPING]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """original(kind, ending) -> (folder in diffusers' layout, single file) of one tiny model."""
    place, made = tmp_path_factory.mktemp("original"), {}

    def make(kind, ending="safetensors"):
        if kind not in made:
            made[kind] = write_folder(place / kind, kind)
        path = place / f"{kind}.{ending}"
        if not path.exists():
            write_single_file(path, original_tensors(made[kind], kind))
        return made[kind], path

    return make


@pytest.fixture
def run(capsys):
    """Runs a command line: run(*words) -> (exit status, stdout, stderr)."""

    def run(*words):
        capsys.readouterr()  # what the oracle printed
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def written(folder):
    """{part/file: tensors} of a folder."""
    paths = sorted(folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): safetensors.torch.load_file(path) for path in paths}


def without_prefix(tensors):
    return {name.removeprefix("text_model."): t for name, t in tensors.items() if "position_ids" not in name}


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_every_tensor_equals_that_of_diffusers_conversion(original, run, tmp_path, kind, ending):
    folder, path = original(kind, ending)
    status, out, err = run("convert", path, tmp_path / "ours", "--config", folder)
    assert (status, err) == (0, "") and "described by" in out
    PIPELINES[kind].from_single_file(str(path), config=str(folder)).save_pretrained(tmp_path / "theirs")
    ours, theirs = written(tmp_path / "ours"), written(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = without_prefix(ours[name]), without_prefix(theirs[name])
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_both_libraries_draw_the_same_from_the_folder(original, run, tmp_path, kind):
    folder, path = original(kind)
    assert run("convert", path, tmp_path / "out", "--config", folder)[0] == 0
    images = []
    for library in (minidiff, diffusers):
        pipeline = library.DiffusionPipeline.from_pretrained(tmp_path / "out")
        assert type(pipeline).__name__ == PIPELINES[kind].__name__
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "output_type": "np", "generator": generator()}
        images.append(pipeline("a red ball", **options).images)
    assert_close(*images, atol=1 / 255)


@pytest.mark.parametrize(("ema", "dtype"), [(False, None), (True, "float16"), (False, "bfloat16")])
def test_averages_and_types_are_those_asked_for(original, run, tmp_path, ema, dtype):
    folder, _ = original("sd1")
    path = write_single_file(tmp_path / "both.ckpt", original_tensors(folder, "sd1", ema=True))
    words = ["--ema"] * ema + (["--dtype", dtype] if dtype else [])
    assert run("convert", path, tmp_path / "out", "--config", folder, *words)[0] == 0
    expected = PIPELINES["sd1"].from_single_file(
        str(path), config=str(folder), extract_ema=ema, torch_dtype=getattr(torch, dtype or "float32")
    )
    ours = written(tmp_path / "out")["unet/diffusion_pytorch_model.safetensors"]
    theirs = expected.unet.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {tensor.dtype for tensor in ours.values()} == {getattr(torch, dtype or "float32")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v2-1_512-ema-pruned", "sd-v1-5-inpainting"])
def test_a_file_in_full_size_becomes_a_folder_that_describes_itself(run, tmp_path, name, monkeypatch):
    # the models' weights would be written as gigabytes of zeros
    monkeypatch.setattr("minidiff.checkpoints.files.save_file", lambda tensors, path, metadata: None)
    path = write_sparse(tmp_path / f"{name}.safetensors", DATA["files"][name]["tensors"])
    words = ["--prediction-type", "epsilon"] if name.startswith("v2") else []
    status, _, err = run("convert", path, tmp_path / "out", *words)
    assert (status, err) == (0, "")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    inpainting = "inpainting" in name
    assert index["_class_name"] == f"StableDiffusion{'Inpaint' * inpainting}Pipeline"
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == ("DDIMScheduler" if inpainting else "PNDMScheduler")
    unet = diffusers.UNet2DConditionModel.load_config(tmp_path / "out" / "unet")
    assert (unet["in_channels"], unet["sample_size"]) == ((9, 64) if inpainting else (4, 64))
    tokenizer = minidiff.CLIPTokenizer.from_pretrained(tmp_path / "out", "tokenizer")
    assert tokenizer.pad_token == ("<|endoftext|>" if inpainting else "!")


def test_a_folder_with_something_in_it_is_left_alone(original, run, tmp_path):
    folder, path = original("sd1")
    (tmp_path / "notes.txt").write_text("mine")
    status, out, err = run("convert", path, tmp_path, "--config", folder)
    assert status == 2 and "exists already; name a folder that does not, or an empty one" in err
    assert os.listdir(tmp_path) == ["notes.txt"] and not out
    assert run("convert", path, tmp_path / "notes.txt", "--config", folder)[0] == 2
    (tmp_path / "empty").mkdir()
    assert run("convert", path, tmp_path / "empty", "--config", folder)[0] == 0
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_nothing_is_left_of_a_conversion_that_fails(original, run, tmp_path):
    folder, path = original("sd1")
    tensors = safetensors.torch.load_file(path)
    del tensors["model.diffusion_model.out.2.bias"]  # the U-Net comes last
    broken = write_single_file(tmp_path / "broken.safetensors", tensors)
    status, _, err = run("convert", broken, tmp_path / "out", "--config", folder)
    assert status == 2 and "1 missing: conv_out.bias" in err and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["broken.safetensors"]


def test_an_interrupted_conversion_leaves_nothing(original, run, tmp_path, monkeypatch):
    folder, path = original("sd1")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_json", interrupted)
    assert run("convert", path, tmp_path / "out", "--config", folder)[0] == 130
    assert os.listdir(tmp_path) == []


def test_a_new_folder_is_complete_or_absent(tmp_path):
    with layout.new_folder(tmp_path / "a" / "b") as temporary:
        (temporary / "file").write_text("all of it")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "all of it"
    with pytest.raises(CheckpointError, match="can't be written"), layout.new_folder(tmp_path / "c"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["b"]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["nothing.ckpt", "out"], "there is no file nothing.ckpt"),
        ([".", "out"], ". is a folder, not a single file; load it with from_pretrained"),
        (["nothing.ckpt"], "the following arguments are required: OUT"),
        (["nothing.ckpt", "out", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_words_are_one_line(run, tmp_path, monkeypatch, words, match):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("convert", *words)
    assert status == 2 and match in err and err.count("\n") == 1 and not out
    assert os.listdir(tmp_path) == []
