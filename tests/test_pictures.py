"""The checkpoints that ship, `scenes` and `scenes-ddpm`, draw what diffusers draws from the same folders.

Every pixel, in [0, 1], within 1/255.
"""

import diffusers
import numpy as np
import pytest
import torch
from parity import assert_close
from PIL import Image
from tiny_pipelines import generator

import minidiff
from minidiff.checkpoints import hub
from minidiff.cli import main

LEVEL = 1 / 255
PROMPT = "a large red sphere left of a small blue cube"


def both(pipeline_class, name):
    """The pipeline class twice, (minidiff's, diffusers'), from the folder of a checkpoint that ships."""
    folder = hub.BUILT_IN / name
    if not (folder / "model_index.json").exists():
        pytest.fail(f"the checkpoint {name}, which ships, is missing from {folder.parent}")
    loaded = (
        getattr(minidiff, pipeline_class).from_pretrained(name),
        getattr(diffusers, pipeline_class).from_pretrained(folder, dtype=torch.float32),
    )
    for pipeline in loaded:
        pipeline.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def scenes():
    return both("StableDiffusionPipeline", "scenes")


@pytest.fixture(scope="module")
def scenes_ddpm():
    return both("DDPMPipeline", "scenes-ddpm")


def switch(pipelines, scheduler):
    for pipeline, library in zip(pipelines, (minidiff, diffusers), strict=True):
        pipeline.scheduler = getattr(library, scheduler).from_config(pipeline.scheduler.config)


def assert_same_pictures(pipelines, *args, seeds=(0,), **kwargs):
    images = []
    for pipeline in pipelines:
        generators = [generator(seed) for seed in seeds]
        images.append(pipeline(*args, generator=generators, output_type="np", **kwargs).images)
    assert_close(*images, atol=LEVEL)
    assert images[0].std() > 0.05  # a picture, not a grey nothing
    return images[0]


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize(
    "scheduler", ["PNDMScheduler", "UniPCMultistepScheduler", "DDIMScheduler", "DDPMScheduler"]
)
def test_scenes_draws_diffusers_picture(scenes, scheduler, guidance_scale):
    switch(scenes, scheduler)
    assert_same_pictures(scenes, PROMPT, num_inference_steps=6, guidance_scale=guidance_scale)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "UniPCMultistepScheduler"])
def test_scenes_draws_diffusers_pictures_in_25_steps(scenes, scheduler):
    switch(scenes, scheduler)
    prompts = [PROMPT, "a green cone behind a white cylinder on a gray floor"]
    pictures = assert_same_pictures(scenes, prompts, num_inference_steps=25, seeds=(1, 2))
    assert not np.allclose(pictures[0], pictures[1], atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"eta": 0.5}, {"guidance_rescale": 0.7}, {"height": 96, "width": 160}])
def test_scenes_draws_diffusers_picture_with_every_option(scenes, options):
    switch(scenes, "DDIMScheduler")
    assert_same_pictures(scenes, PROMPT, negative_prompt="a cone", num_inference_steps=10, **options)


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_scenes_ddpm_draws_diffusers_pictures(scenes_ddpm, scheduler):
    switch(scenes_ddpm, scheduler)
    assert_same_pictures(scenes_ddpm, batch_size=2, seeds=(1, 2), num_inference_steps=20)


@pytest.mark.slow
def test_scenes_ddpm_draws_diffusers_picture_in_a_hundred_steps(scenes_ddpm):
    switch(scenes_ddpm, "DDPMScheduler")
    assert_same_pictures(scenes_ddpm, num_inference_steps=100)


def test_what_ships_is_small_half_precision_and_nothing_else(scenes, scenes_ddpm):
    files = [path for path in hub.BUILT_IN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors"}
    for name in ("unet", "vae", "text_encoder"):
        model = getattr(minidiff.StableDiffusionPipeline.from_pretrained("scenes", torch_dtype="auto"), name)
        assert model.dtype == torch.float16


def test_the_first_command_of_the_readme_draws(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, "--seed", "0", "--steps", "4"]) == 0
    (name,) = capsys.readouterr().out.splitlines()
    assert Image.open(name).size == (128, 128)
