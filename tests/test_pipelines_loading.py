"""Pipelines from folders and back: what both libraries read and write, and one clear error for each fault."""

import json
import logging
import shutil

import diffusers
import numpy as np
import pytest
import torch
from parity import assert_close
from tiny_pipelines import edit_json, generator, load_both, write_ddpm, write_stable_diffusion

import minidiff

OPTIONS = {"num_inference_steps": 4, "output_type": "np"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("tiny") / "stable-diffusion")


@pytest.fixture(scope="module")
def ddpm_folder(tmp_path_factory):
    return write_ddpm(tmp_path_factory.mktemp("tiny") / "ddpm")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def pipe(folder):
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a red ball", generator=generator(), **OPTIONS).images


def test_the_class_that_the_checkpoint_names_is_picked(folder, ddpm_folder):
    assert type(minidiff.DiffusionPipeline.from_pretrained(folder)) is minidiff.StableDiffusionPipeline
    assert type(minidiff.DiffusionPipeline.from_pretrained(str(ddpm_folder))) is minidiff.DDPMPipeline
    assert type(minidiff.DDIMPipeline.from_pretrained(ddpm_folder)) is minidiff.DDIMPipeline


def test_what_minidiff_saves_diffusers_loads_and_draws(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(theirs) is diffusers.StableDiffusionPipeline
    assert_close(draw(pipe), draw(theirs), atol=1e-5)


def test_a_saved_pipeline_comes_back_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "a" / "b")
    again = minidiff.StableDiffusionPipeline.from_pretrained(tmp_path / "a" / "b")
    assert np.array_equal(draw(pipe), draw(again))
    assert dict(again.scheduler.config) == dict(pipe.scheduler.config)


@pytest.mark.slow
def test_variants_and_shards_travel_between_the_libraries(folder, tmp_path):
    options = {"safe_serialization": True, "variant": "fp16", "max_shard_size": "20KB"}
    for saver, pipe in zip(("ours", "theirs"), load_both("StableDiffusionPipeline", folder), strict=True):
        place = tmp_path / saver
        pipe.save_pretrained(place, **options)
        if saver == "theirs":
            pipe = minidiff.StableDiffusionPipeline.from_pretrained(folder)
            pipe.tokenizer.save_pretrained(place / "tokenizer")
        assert (place / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").exists()
        assert (place / "text_encoder" / "model.safetensors.index.fp16.json").exists()
        for library in (minidiff, diffusers):
            again = library.StableDiffusionPipeline.from_pretrained(place, variant="fp16")
            assert_close(draw(again), draw(pipe), atol=1e-5)


def test_weights_are_written_as_safetensors_alone(pipe, tmp_path):
    for saved in (pipe, pipe.unet, pipe.text_encoder):
        with pytest.raises(ValueError, match="safetensors alone; leave safe_serialization=True"):
            saved.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())
    pipe.unet.save_pretrained(tmp_path, safe_serialization=True)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()


def test_a_saved_ddpm_is_loaded_by_diffusers(ddpm_folder, tmp_path):
    ours, _ = load_both("DDPMPipeline", ddpm_folder)
    ours.save_pretrained(tmp_path)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    images = [p(2, generator=generator(), **OPTIONS).images for p in (ours, theirs)]
    assert_close(*images, atol=1e-5)


def test_the_oldest_layout_with_all_files_in_the_root_is_read(tmp_path):
    nested, flat = write_ddpm(tmp_path / "nested"), write_ddpm(tmp_path / "flat", flat=True)
    for part in ("unet", "scheduler"):
        shutil.rmtree(flat / part)
    ours = [minidiff.DDPMPipeline.from_pretrained(place) for place in (nested, flat)]
    images = [p(generator=generator(), **OPTIONS).images for p in ours]
    assert np.array_equal(*images)


def test_half_precision_files_are_float32_unless_asked(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path)
    for options, dtype in (
        ({}, "float32"),
        ({"torch_dtype": torch.bfloat16}, "bfloat16"),
        ({"dtype": torch.float16}, "float16"),
    ):
        loaded = minidiff.StableDiffusionPipeline.from_pretrained(tmp_path, **options)
        assert {model.dtype for model in loaded.models} == {getattr(torch, dtype)}
        assert loaded.dtype == getattr(torch, dtype)
    with pytest.raises(ValueError, match="two names of one thing"):
        minidiff.StableDiffusionPipeline.from_pretrained(
            tmp_path, dtype=torch.float16, torch_dtype=torch.float16
        )


def test_half_precision_files_draw_what_diffusers_draws(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path)
    ours, theirs = load_both("StableDiffusionPipeline", tmp_path)
    assert_close(draw(ours), draw(theirs), atol=1e-5)


def test_parts_can_be_given_instead_of_read(folder, copy, pipe):
    shutil.rmtree(copy / "vae")
    scheduler = minidiff.DDIMScheduler(clip_sample=False, steps_offset=1)
    made = minidiff.StableDiffusionPipeline.from_pretrained(
        copy, vae=pipe.vae, scheduler=scheduler, safety_checker=None
    )
    assert made.vae is pipe.vae and made.scheduler is scheduler
    without = minidiff.StableDiffusionPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    assert without.text_encoder is None and len(without.models) == 2


def test_parts_are_shared_through_components(pipe):
    other = minidiff.StableDiffusionPipeline(**pipe.components)
    assert other.unet is pipe.unet and list(pipe.components) == [
        "vae",
        "text_encoder",
        "tokenizer",
        "unet",
        "scheduler",
    ]
    assert repr(other) == (
        "StableDiffusionPipeline(vae=AutoencoderKL, text_encoder=CLIPTextModel, tokenizer=CLIPTokenizer, "
        "unet=UNet2DConditionModel, scheduler=PNDMScheduler)"
    )


def test_to_moves_every_model_in_any_order(pipe):
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert {model.dtype for model in pipe.models} == {torch.bfloat16} and pipe.device == torch.device("cpu")
    pipe.to(torch.float64).to(device="cpu")
    assert pipe.dtype == torch.float64
    pipe.to(dtype=torch.float32, device=torch.device("cpu"))
    assert {model.dtype for model in pipe.models} == {torch.float32}
    with pytest.raises(ValueError, match=r"can't have the type torch\.int8"):
        pipe.to(torch.int8)


def test_backend_says_what_the_models_run(pipe):
    assert pipe.backend == "torch"
    minidiff.ops.use_backend(pipe.unet, attention="reference")
    assert pipe.backend == "reference, torch"
    with pytest.raises(AttributeError, match=r"choose with .*use_backend\(pipe\.unet, attention='triton'\)"):
        pipe.backend = "triton"


def test_a_safety_checker_is_left_out_with_one_line(copy, caplog):
    edit_json(copy / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    with caplog.at_level(logging.WARNING):
        minidiff.StableDiffusionPipeline.from_pretrained(copy)
        minidiff.StableDiffusionPipeline.from_pretrained(copy, safety_checker=None)
    assert [record.getMessage() for record in caplog.records] == [
        f"{copy}: its safety checker is left out; minidiff has none"
    ]


@pytest.mark.parametrize("name", ["v1-1", "v1-4", "v1-5", "v1-4@2022-08-20"])
def test_nothing_else_in_published_indexes_disturbs(copy, caplog, name):
    extra = {"feature_extractor": ["transformers", "CLIPFeatureExtractor"], "safety_checker": [None, None]}
    extra |= {"image_encoder": None, "force_zeros_for_empty_prompt": True, "_name_or_path": name}
    edit_json(copy / "model_index.json", tokenizer=["transformers", "CLIPTokenizerFast"], **extra)
    assert type(minidiff.DiffusionPipeline.from_pretrained(copy).tokenizer) is minidiff.CLIPTokenizer
    assert not caplog.records


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "StableDiffusion3Pipeline"}, "a StableDiffusion3Pipeline; minidiff has DDPM"),
        ({"_class_name": "DiffusionPipeline"}, "asks for a DiffusionPipeline; minidiff has"),
        ({"vae": [None, None]}, "model_index.json names no vae, which a StableDiffusionPipeline needs"),
        ({"vae": "AutoencoderKL"}, "names no vae"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "vae AutoencoderTiny; minidiff has AutoencoderKL"),
        ({"vae": ["diffusers", "UNet2DModel"]}, "asks for the vae UNet2DModel"),
        ({"scheduler": ["diffusers", "RePaintScheduler"]}, "scheduler RePaintScheduler; minidiff has DDPM"),
        ({"scheduler": ["os", "system"]}, "asks for the scheduler system"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_is_refused_by_name(copy, changes, message):
    edit_json(copy / "model_index.json", **changes)
    with pytest.raises(minidiff.CheckpointError, match=message):
        minidiff.DiffusionPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    "broken, message",
    [
        ("model_index.json", "model_index.json"),
        ("unet/config.json", "config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "no diffusion_pytorch_model.safetensors"),
        ("scheduler/scheduler_config.json", "scheduler_config.json"),
        ("tokenizer/vocab.json", "vocab.json"),
    ],
)
def test_a_missing_file_is_named(copy, broken, message):
    (copy / broken).unlink()
    with pytest.raises(minidiff.CheckpointError, match=message):
        minidiff.DiffusionPipeline.from_pretrained(copy)


def test_truncated_weights_are_refused(copy):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(minidiff.CheckpointError, match="diffusion_pytorch_model"):
        minidiff.DiffusionPipeline.from_pretrained(copy)


def test_unknown_checkpoints_and_arguments_are_refused(folder):
    with pytest.raises(minidiff.CheckpointError, match="no checkpoint 'nowhere'"):
        minidiff.StableDiffusionPipeline.from_pretrained("nowhere")
    with pytest.raises(TypeError, match="no argument custom_pipeline; the parts that can be given are vae"):
        minidiff.StableDiffusionPipeline.from_pretrained(folder, custom_pipeline="lpw")


def test_a_device_map_is_one_device(folder):
    pipe = minidiff.DiffusionPipeline.from_pretrained(folder, device_map="meta", low_cpu_mem_usage=True)
    assert {model.device.type for model in pipe.models} == {"meta"}
    for several in ("auto", {"unet": 0}):
        with pytest.raises(ValueError, match=r"device_map is .*so name one device, such as \"cuda\""):
            minidiff.StableDiffusionPipeline.from_pretrained(folder, device_map=several)


def test_an_interrupted_save_has_no_index(pipe, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe.unet, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "model_index.json").exists()


def test_the_saved_index_is_diffusers(folder, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    ours, theirs = (json.loads((place / "model_index.json").read_text()) for place in (tmp_path, folder))
    absent = {"safety_checker", "feature_extractor", "image_encoder"}  # null there
    assert ours == {key: value for key, value in theirs.items() if key not in absent}


@pytest.mark.parametrize(
    ("version", "size", "expected"),
    [("0.2.2", 32, 64), ("0.8.1.dev0", 8, 64), ("0.9.0.dev0", 8, 8), ("0.42.0", 8, 8), ("0.6.0", 96, 96)],
)
def test_the_sample_size_that_old_versions_wrote_is_repaired_as_in_diffusers(copy, version, size, expected):
    edit_json(copy / "unet" / "config.json", _diffusers_version=version, sample_size=size)
    ours, theirs = load_both("StableDiffusionPipeline", copy)
    assert ours.unet.config.sample_size == theirs.unet.config.sample_size == expected
    assert ours.unet.config["_diffusers_version"] == version
    ours.unet.save_pretrained(copy / "again")
    again = json.loads((copy / "again" / "config.json").read_text())
    assert (again["_diffusers_version"], again["sample_size"]) == ("0.42.0", expected)
