"""Random numbers of a step, and noise that people add themselves: the same as in diffusers, for any kind."""

import numpy as np
import pytest
import torch
from parity import assert_close, assert_relative, both
from scheduler_lists import (
    ADDING_NOISE,
    COUNTING,
    DRAWING,
    EDM,
    TWO_CALLS,
    normal,
    ready,
    theirs_ready,
)

SDE = {"algorithm_type": "sde-dpmsolver++"}
NOISY = {  # name: the config and the options with which its steps draw noise
    "DDPMScheduler": ({}, {}),
    "DDIMScheduler": ({}, {"eta": 1.0}),
    "DPMSolverMultistepScheduler": (SDE, {}),
    "DPMSolverSinglestepScheduler": ({**SDE, "lower_order_final": True}, {}),
    "EDMDPMSolverMultistepScheduler": (SDE, {}),
    "EulerDiscreteScheduler": ({}, {"s_churn": 10.0}),
    "EulerAncestralDiscreteScheduler": ({}, {}),
    "KDPM2AncestralDiscreteScheduler": ({}, {}),
    "EDMEulerScheduler": ({}, {"s_churn": 10.0}),
    "LCMScheduler": ({}, {}),
    "TCDScheduler": ({}, {}),
    "FlowMatchEulerDiscreteScheduler": ({"stochastic_sampling": True}, {}),
}
QUIET = {  # the config and the options with which the same classes draw nothing
    "DDIMScheduler": ({}, {}),
    "DPMSolverMultistepScheduler": ({}, {}),
    "DPMSolverSinglestepScheduler": ({"lower_order_final": True}, {}),
    "EDMDPMSolverMultistepScheduler": ({}, {}),
    "EulerDiscreteScheduler": ({}, {}),
    "EDMEulerScheduler": ({}, {"s_churn": 9.0, "s_tmin": 1e6}),
    "TCDScheduler": ({}, {"eta": 0.0}),
    "FlowMatchEulerDiscreteScheduler": ({}, {}),
}


def walk(scheduler, sample, calls=3, **options):
    """The sample after some steps with a model output that is a share of the sample."""
    for t in scheduler.timesteps[:calls]:
        sample = scheduler.step(0.3 * sample, t, sample, **options).prev_sample
    return sample


def generators(given):
    made = [torch.Generator().manual_seed(seed) for seed in np.atleast_1d(given).tolist()]
    return made if isinstance(given, list) else made[0]


def test_every_scheduler_that_takes_a_generator_is_tested():
    assert set(NOISY) == set(DRAWING)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", NOISY)
def test_the_noise_is_torchs_for_tensors_and_for_arrays(name, dtype):
    config, options = NOISY[name]
    array = normal(2, 3, 4, dtype=dtype)
    tolerance = 1e-2 if dtype == "float16" else 1e-5
    for given in (7, [7], [7, 8]):  # one generator; a list of one; one for each row
        theirs = theirs_ready(name, **config)
        expected = walk(theirs, torch.from_numpy(array), generator=generators(given), **options)
        for sample in (array, torch.from_numpy(array)):
            ours = walk(ready(name, **config), sample, generator=generators(given), **options)
            assert_relative(ours, expected, tolerance)
    torch.manual_seed(3)  # without a generator: torch's global one
    expected = walk(theirs_ready(name, **config), torch.from_numpy(array), **options)
    torch.manual_seed(3)
    assert_relative(walk(ready(name, **config), array, **options), expected, tolerance)


@pytest.mark.parametrize("name", NOISY)
def test_a_whole_loop_draws_as_often_as_in_diffusers(name):
    config, options = NOISY[name]
    states = []
    for make in (ready, theirs_ready):
        generator, scheduler = torch.Generator().manual_seed(0), make(name, **config)
        walk(
            scheduler,
            torch.from_numpy(normal(1, 3, 4)),
            len(scheduler.timesteps),
            generator=generator,
            **options,
        )
        states.append(generator.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", QUIET)
def test_nothing_is_drawn_where_nothing_is_added(name):
    config, options = QUIET[name]
    for make in (ready, theirs_ready):
        generator, scheduler = torch.Generator().manual_seed(0), make(name, **config)
        before = generator.get_state()
        walk(
            scheduler,
            torch.from_numpy(normal(1, 3, 4)),
            len(scheduler.timesteps),
            generator=generator,
            **options,
        )
        assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("name", NOISY)
def test_a_row_of_a_batch_equals_its_seed_alone(name):
    config, options = NOISY[name]
    x = normal(3, 4, 5)
    batch = walk(ready(name, **config), x, generator=[np.random.default_rng(i) for i in range(3)], **options)
    for i in range(3):
        alone = walk(ready(name, **config), x[i : i + 1], generator=np.random.default_rng(i), **options)
        assert (batch[i : i + 1] == alone).all()


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_step_takes_the_noise_itself(name):
    config, options = NOISY[name]
    ours, theirs = ready(name, **config), theirs_ready(name, **config)
    model_output, sample, noise = (torch.from_numpy(normal(2, 3, 4, seed=i)) for i in range(3))
    options = options | {"variance_noise": noise}
    expected = theirs.step(model_output, theirs.timesteps[1], sample, **options).prev_sample
    result = ours.step(model_output, ours.timesteps[1], sample, **options).prev_sample
    assert_relative(result, expected, 1e-6)
    again = ready(name, **config)
    options["variance_noise"] = noise.numpy()
    assert (again.step(model_output.numpy(), again.timesteps[1], sample.numpy(), **options).prev_sample
            == result.numpy()).all()  # fmt: skip


def added(scheduler, samples, noise, timesteps):
    """samples noised; flow matching has another name for it, and another order."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(samples, timesteps, noise)
    return scheduler.add_noise(samples, noise, timesteps)


FLOW = ("FlowMatchEulerDiscreteScheduler",)


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-6), ("float64", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2)]
)
@pytest.mark.parametrize("name", [*ADDING_NOISE, *FLOW])
def test_adding_noise_equals_diffusers(name, dtype, tolerance):
    ours, theirs = both(name)
    samples, noise = (torch.from_numpy(normal(4, 3, 5, 6, seed=i)).to(getattr(torch, dtype)) for i in (1, 2))
    for steps in (None, 10):
        if steps:
            ours.set_timesteps(steps)
            theirs.set_timesteps(steps)
        at = [0, 3, 5, 9] if steps else [999, 0, 500, 3]
        if theirs.timesteps is None:  # PNDM
            mine, others = np.array(at), torch.tensor(at)
        else:
            mine, others = ours.timesteps[at], theirs.timesteps[at]
        expected = added(theirs, samples, noise, others)
        result = added(ours, samples, noise, mine)
        assert result.dtype == samples.dtype
        assert_relative(result, expected, tolerance)
        if dtype != "bfloat16":
            assert_relative(added(ours, samples.numpy(), noise.numpy(), mine), expected, tolerance)
        assert_close(added(ours, samples, noise, torch.from_numpy(mine.copy())), result)
        assert_close(added(ours, samples, noise, mine.tolist()), result)


@pytest.mark.parametrize("name", [n for n in (*ADDING_NOISE, *FLOW) if n in COUNTING])
def test_adding_noise_follows_the_step_that_sampling_has_come_to(name):
    ours, theirs = ready(name, 10), theirs_ready(name, 10)
    samples, noise = (torch.from_numpy(normal(2, 3, 4, seed=i)) for i in (1, 2))
    begin = 4 if name in TWO_CALLS else 5
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(begin)
    generator = {"generator": torch.Generator()} if name in DRAWING else {}
    at = ours.timesteps[[begin, begin]], theirs.timesteps[[begin, begin]]
    assert_relative(added(ours, samples, noise, at[0]), added(theirs, samples, noise, at[1]), 1e-6)
    for scheduler, timesteps in ((ours, at[0]), (theirs, at[1])):
        scheduler.step(noise, timesteps[0], samples, **generator)
    assert_relative(added(ours, samples, noise, at[0]), added(theirs, samples, noise, at[1]), 1e-6)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "LCMScheduler", "TCDScheduler"])
def test_the_velocity_equals_diffusers(name):
    ours, theirs = both(name, rescale_betas_zero_snr=True)
    samples, noise = (torch.from_numpy(normal(3, 4, 5, seed=i)) for i in (1, 2))
    timesteps = torch.tensor([0, 999, 123])
    expected = theirs.get_velocity(samples, noise, timesteps)
    assert_relative(ours.get_velocity(samples, noise, timesteps), expected, 1e-6)
    arrays = samples.numpy(), noise.numpy(), timesteps.numpy()
    assert_relative(ours.get_velocity(*arrays), expected, 1e-6)


@pytest.mark.parametrize("name", [n for n in ADDING_NOISE if n not in EDM])
def test_the_velocity_is_what_leads_from_the_noised_sample_to_the_clean_one(name):
    """x0 = alpha x_t - sigma_t v, with add_noise's signal and noise. In diffusers Euler has another v."""
    scheduler = ready(name, 10)
    x0, noise = normal(3, 4, 5, seed=1), normal(3, 4, 5, seed=2)
    t = scheduler.timesteps[[2, 4, 6]]
    ones, zeros = np.ones_like(x0), np.zeros_like(x0)
    alpha, sigma = scheduler.add_noise(ones, zeros, t), scheduler.add_noise(zeros, ones, t)
    size = np.sqrt(alpha**2 + sigma**2)  # of samples that keep the data's size: above 1
    alpha, sigma = alpha / size, sigma / size
    x_t = alpha * x0 + sigma * noise
    assert_close(alpha * x_t - sigma * scheduler.get_velocity(x0, noise, t), x0, atol=1e-5)
