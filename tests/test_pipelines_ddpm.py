"""DDPMPipeline and DDIMPipeline draw diffusers' pictures: tiny random models, the same seeds.

Pixels lie in [0, 1]. Each in float32 and in float64, where hardly any rounding is left: random weights
amplify float32's, DDIM's without noise up to 5.5e-5 of the 1/255 that is promised.
"""

import diffusers
import numpy as np
import pytest
import torch
from parity import assert_close
from tiny_pipelines import generator, load_both, write_ddpm

import minidiff

PIXEL = {torch.float32: 2e-4, torch.float64: 1e-7}  # measured: 5.5e-5, and 1.5e-8: tables stay float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ddpm(tmp_path_factory.mktemp("tiny") / "ddpm")


@pytest.fixture(params=PIXEL, ids=str)
def ddpm(folder, request):
    return [pipeline.to(request.param) for pipeline in load_both("DDPMPipeline", folder)]


@pytest.fixture(params=PIXEL, ids=str)
def ddim(folder, request):
    return [pipeline.to(request.param) for pipeline in load_both("DDIMPipeline", folder)]


def assert_same_pictures(both, generators=None, **kwargs):
    images = []
    for pipeline in both:
        own = [generator(seed) for seed in generators] if generators else generator()
        images.append(
            pipeline(generator=own, output_type="pt", **{"num_inference_steps": 10} | kwargs).images
        )
    assert images[0].dtype == images[1].dtype == both[0].dtype
    assert_close(*images, atol=PIXEL[both[0].dtype])
    assert images[0].std() > 0.05  # a picture, not a grey nothing
    return images[0]


@pytest.mark.parametrize(
    "steps, batch_size, generators", [(1, 1, None), (10, 3, None), (10, 3, [1, 2, 1]), (40, 1, None)]
)
def test_ddpm_draws_the_same_pictures(ddpm, steps, batch_size, generators):
    pictures = assert_same_pictures(ddpm, generators, batch_size=batch_size, num_inference_steps=steps)
    assert pictures.shape == (batch_size, 3, 8, 12)


@pytest.mark.slow
def test_ddpm_draws_the_same_picture_in_a_thousand_steps(folder):
    assert_same_pictures(load_both("DDPMPipeline", folder), num_inference_steps=1000)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("options", [{"prediction_type": "v_prediction"}, {"clip_sample": False}])
def test_other_schedulers_draw_the_same_pictures(ddpm, scheduler, options):
    for pipeline, library in zip(ddpm, (minidiff, diffusers), strict=True):
        pipeline.scheduler = getattr(library, scheduler).from_config(pipeline.scheduler.config, **options)
    assert_same_pictures(ddpm, batch_size=2)


def test_a_scheduler_without_randomness_works_too(ddpm):
    ours, _ = ddpm
    ours.scheduler = minidiff.UniPCMultistepScheduler.from_config(ours.scheduler.config)
    assert np.isfinite(ours(num_inference_steps=5, generator=generator(), output_type="np").images).all()


@pytest.mark.parametrize("clipped", [None, True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.slow
def test_ddim_draws_the_same_pictures(ddim, eta, clipped):
    assert_same_pictures(ddim, eta=eta, use_clipped_model_output=clipped, batch_size=2)
    assert_same_pictures(ddim, [5, 6], eta=eta, use_clipped_model_output=clipped, batch_size=2)


def test_use_clipped_model_output_matters(ddim):
    pictures = [assert_same_pictures(ddim, use_clipped_model_output=clipped) for clipped in (False, True)]
    assert not np.allclose(*pictures, atol=1e-3)


def test_ddim_turns_any_scheduler_into_its_own(folder):
    ours, theirs = load_both("DDPMPipeline", folder)
    made = [minidiff.DDIMPipeline(**ours.components), diffusers.DDIMPipeline(**theirs.components)]
    for pipeline in made:
        pipeline.set_progress_bar_config(disable=True)
        assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert_same_pictures(made)


def test_without_a_generator_torchs_global_one_is_used(ddpm):
    images = []
    for pipeline in ddpm:
        torch.manual_seed(3)
        images.append(pipeline(2, num_inference_steps=5, output_type="pt").images)
    assert_close(*images, atol=PIXEL[ddpm[0].dtype])


def test_arrays_pictures_and_tuples_are_diffusers(folder):
    both = load_both("DDPMPipeline", folder)
    ours, theirs = (p(2, generator(), 3, output_type="np").images for p in both)
    assert type(ours) is type(theirs) and ours.dtype == theirs.dtype
    assert_close(ours, theirs, atol=PIXEL[torch.float32])
    ours, theirs = (p(2, generator(), 3).images for p in both)
    assert_close(np.stack(ours).astype(int), np.stack(theirs).astype(int), atol=1)
    (images,) = both[0](num_inference_steps=1, return_dict=False)
    assert len(images) == 1


def test_square_models_and_grey_pictures_work(tmp_path):
    both = load_both("DDPMPipeline", write_ddpm(tmp_path, sample_size=8, in_channels=1, out_channels=1))
    assert assert_same_pictures(both).shape == (1, 1, 8, 8)
    assert both[0](num_inference_steps=1).images[0].mode == "L"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"num_inference_steps": -1}, "num_inference_steps is -1"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ({"output_type": "latent"}, "it must be 'pil', 'np' or 'pt'"),
        ({"batch_size": 3, "generator": [generator()] * 2}, "got 2 generators for 3 pictures"),
    ],
)
def test_wrong_arguments_get_one_clear_sentence(ddpm, options, message):
    with pytest.raises(ValueError, match=message):
        ddpm[0](**options)


def test_an_interruption_in_mid_loop_comes_out(ddpm, monkeypatch):
    ours, _ = ddpm
    forward, calls = ours.unet.forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(ours.unet, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ours(num_inference_steps=10)
    assert len(calls) == 3
