"""The sampling loop against the tutorials' loop, and guidance against diffusers."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from parity import assert_close

import minidiff
from minidiff.sampling import guide, sample

NAMES = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def predict(x, t):
    return np.tanh(x) * np.float32(0.9) + np.float32(t / 5000)


def named(name, steps=6):
    scheduler = getattr(minidiff, name)()
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_is_the_tutorials(name):
    scheduler = named(name)
    x = normal(2, 4, 5, 6)
    generator = {"generator": torch.Generator().manual_seed(0)} if name == "DDPMScheduler" else {}
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x, **generator).prev_sample
    scheduler = named(name)
    steps = list(sample(predict, normal(2, 4, 5, 6), scheduler, generator=torch.Generator().manual_seed(0)))
    assert (steps[-1].latents == x).all() and steps[-1].latents.dtype == np.float32
    assert [s.index for s in steps] == list(range(len(steps)))
    assert [s.t for s in steps] == scheduler.timesteps.tolist()
    assert all((s.x0 is not None) == (name in ("DDPMScheduler", "DDIMScheduler")) for s in steps)


def test_eta_and_clipping_reach_only_the_schedulers_that_take_them():
    options = {"eta": 1.0, "use_clipped_model_output": True, "generator": np.random.default_rng(0)}
    results = {
        name: [s.latents for s in sample(predict, normal(1, 3, 4, 4), named(name), **options)][-1]
        for name in NAMES
    }
    plain = {
        name: [s.latents for s in sample(predict, normal(1, 3, 4, 4), named(name))][-1] for name in NAMES
    }
    assert (results["PNDMScheduler"] == plain["PNDMScheduler"]).all()
    assert (results["UniPCMultistepScheduler"] == plain["UniPCMultistepScheduler"]).all()
    assert np.abs(results["DDIMScheduler"] - plain["DDIMScheduler"]).max() > 0.1


def test_the_loop_goes_on_from_what_it_is_given():
    seen = []

    def watch(x, t):
        seen.append(x)
        return np.zeros_like(x)

    for step in sample(watch, normal(1, 2, 3, 3), named("DDIMScheduler")):
        step.latents = np.full_like(step.latents, step.index)
    assert [float(x.mean()) for x in seen[1:]] == [0, 1, 2, 3, 4]


def test_the_loop_can_start_late_and_stop_early():
    scheduler = named("DDIMScheduler")
    late = list(sample(predict, normal(1, 2, 3, 3), scheduler, timesteps=scheduler.timesteps[4:]))
    assert [s.t for s in late] == scheduler.timesteps[4:].tolist() and [s.index for s in late] == [0, 1]
    calls = []
    for _ in sample(lambda x, t: calls.append(t) or x, normal(1, 2, 3, 3), named("DDIMScheduler")):
        break
    assert len(calls) == 1


def test_the_model_sees_the_scaled_sample_and_the_step_the_plain_one():
    scheduler, seen = named("DDIMScheduler"), []
    scheduler.scale_model_input = lambda x, t: x * 2
    next(sample(lambda x, t: seen.append(x) or x, normal(1, 2, 3, 3), scheduler))
    assert (seen[0] == normal(1, 2, 3, 3) * 2).all()


@pytest.mark.parametrize("scale", [1.0, 7.5, 0.0])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance_equals_diffusers(scale, rescale):
    uncond, cond = normal(2, 4, 5, 6, seed=1), normal(2, 4, 5, 6, seed=2) + 3
    expected = torch.from_numpy(uncond) + scale * (torch.from_numpy(cond) - torch.from_numpy(uncond))
    if rescale:
        expected = rescale_noise_cfg(expected, torch.from_numpy(cond), rescale)
    result = guide(uncond, cond, scale, rescale)
    assert result.dtype == np.float32
    assert_close(result, expected, rtol=1e-6, atol=2e-6)
