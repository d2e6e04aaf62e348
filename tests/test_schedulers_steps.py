"""Level 2: one step equals diffusers' over random configurations, within 1e-5 of the largest value.

`scheduler_cases.py` says what is drawn and what holds where diffusers' own answer is ill-conditioned.
"""

import diffusers
import numpy as np
import pytest
import torch
from parity import record, relative
from scheduler_cases import CHOICES, OWN, SPREADS, STEP, Case
from scheduler_lists import NAMES, TWO_CALLS, parameters

import minidiff
from minidiff.numerics import solve_vandermonde
from minidiff.schedulers.exploding import ancestral_levels

BATCHES, PER_BATCH = 4, 22  # for each scheduler: 88, 1,760 configurations in all


def check(case):
    """Asserts that each of our steps leads from diffusers' sample to its next."""
    theirs = case.run_diffusers()
    scheduler = case.scheduler(minidiff)
    for k, ours, expected in case.run(theirs, scheduler):
        assert ours.dtype == expected.dtype == case.dtype, f"{ours.dtype}: {case}"
        if torch.isfinite(ours).all() and not torch.isfinite(expected).all():
            check_limit(case, k, ours, theirs, scheduler)
            continue
        difference = relative(ours, expected)
        allowed = STEP if difference <= STEP else case.allowed(k, theirs)
        assert difference <= allowed, f"step {k} differs by {difference:.2e}, not {allowed:.2e}: {case}"
        record(difference, STEP, allowed)
    _, steps = case.inputs(scheduler.timesteps)
    begun_between = case.name in TWO_CALLS and steps[0][0] % 2  # there diffusers has no last call
    if len(theirs) < len(steps) and not begun_between:
        i, t, model_output = steps[len(theirs)]
        with pytest.raises(ValueError, match=r"steps are made|same noise level"):
            scheduler.step(model_output, t, model_output, **case.random_numbers(i))


def check_limit(case, k, ours, theirs, scheduler):
    """Asserts that our k-th step is the right one where diffusers has infinity or NaN."""
    before, after = scheduler.sigmas[scheduler.step_index - 1 :][:2]
    unipc = case.name == "UniPCMultistepScheduler" and after == 0
    if unipc and (case.config["solver_type"] == "bh1" or not case.config["predict_x0"]):
        return  # 0 times infinity, which is below: test_unipcs_last_step_…
    if case.name == "KDPM2AncestralDiscreteScheduler":
        return  # the root of a difference that is all rounding: test_the_noise_to_step_down_to_…
    if abs(before - after) <= 1e-6 * before:  # a step of no length: the difference, or its root, is rounding
        tolerance = STEP if before == after else 1e-3
        assert relative(ours, theirs[k][0]) <= tolerance, f"step {k} moves: {case}"
        return
    others = list(case.rerounded(k, theirs))  # the root of a 0 that was rounded to less than that
    assert others, f"step {k} is not finite in diffusers, however it is rounded: {case}"
    difference = min(relative(ours, other) for other in others)
    allowed = max(STEP, 10 * max(relative(other, others[0]) for other in others))
    assert difference <= allowed, f"step {k} differs by {difference:.2e}, not {allowed:.2e}: {case}"


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("name", NAMES)
def test_a_step_equals_diffusers_in_random_configurations(name, batch):
    for seed in range(batch * PER_BATCH, (batch + 1) * PER_BATCH):
        check(Case(name, seed))


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_the_constructor_is_drawn(name):
    betas = {"beta_start", "beta_end", "beta_schedule", "trained_betas", "sigma_min", "sigma_max"}
    known = betas | {"prediction_type", *SPREADS, *CHOICES, *OWN.get(name, {})}
    untested = {"solver_p", "kwargs"}  # another scheduler: in the loops; DDIMInverse's old spellings
    assert set(parameters(name)) - untested <= known


@pytest.mark.parametrize("name", NAMES)
def test_a_float16_step_is_as_exact_as_diffusers(name):
    """diffusers rounds after each operation, we at the end: both are held against diffusers in float32."""
    for seed in range(12):
        case = Case(name, seed)
        case.dtype = torch.float16
        half = case.run_diffusers()
        case.dtype = torch.float32
        exact = case.run_diffusers([before.float() for before, _ in half])
        case.dtype = torch.float16
        for (k, ours, theirs), (_, truth) in zip(case.run(half), exact, strict=False):
            assert ours.dtype == torch.float16
            if truth.abs().max() < 1e4 and torch.isfinite(theirs).all():  # float16 ends at 65504
                error, allowed = relative(ours, truth), relative(theirs, truth)
                assert error <= 1.1 * allowed + 2**-10, (
                    f"step {k}: {error:.2e}, diffusers {allowed:.2e}: {case}"
                )


@pytest.mark.parametrize("sigma, target", [(221.46, 0.031638), (2029.2, 0.025133), (5846.3, 0.1), (9.0, 0.0)])
def test_the_noise_to_step_down_to_is_exact_where_rounding_leaves_nothing(sigma, target):
    """diffusers' root of target^2 - up^2 is NaN there, or that of the last bit of a float32 number."""
    sigma, target = np.float32(sigma), np.float32(target)
    down, up = ancestral_levels(sigma, target)
    exact = np.float64(target) ** 2 / np.float64(sigma)
    assert abs(down - exact) <= 1e-6 * exact or down**2 <= np.spacing(target * target)
    assert up <= target * (1 + 1e-6) and np.isfinite(down)


@pytest.mark.parametrize("config", [{"solver_type": "bh1"}, {"predict_x0": False}], ids=str)
def test_unipcs_last_step_to_no_noise_is_the_limit_of_steps_to_little_noise(config):
    """There diffusers multiplies 0 by infinity: NaN. Its steps to smaller sigmas come close to ours."""
    ours = minidiff.UniPCMultistepScheduler(**config)
    theirs = diffusers.UniPCMultistepScheduler(**config)
    ours.set_timesteps(6)
    theirs.set_timesteps(6)
    theirs.sigmas[-1] = 1e-6
    rng = np.random.default_rng(0)
    sample = torch.from_numpy(rng.standard_normal((1, 2, 4, 4), dtype=np.float32))
    for t in ours.timesteps:
        model_output = torch.from_numpy(rng.standard_normal((1, 2, 4, 4), dtype=np.float32))
        after = theirs.step(model_output, t, sample).prev_sample
        assert relative(ours.step(model_output, t, sample).prev_sample, after) < STEP
        sample = after


def test_the_weights_solve_the_vandermonde_system():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 4, 5):
        nodes, b = np.sort(rng.uniform(-3, 1, n)), rng.standard_normal(n)
        expected = np.linalg.solve(nodes[None] ** np.arange(n)[:, None], b)
        np.testing.assert_allclose(solve_vandermonde(nodes, b), expected, rtol=1e-10)
