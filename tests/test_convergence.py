"""Level 3: every sampler against the exact solution on Gaussian data: its order, and what its noise makes."""

import dataclasses
import re
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest

import minidiff
from minidiff.cli import drawing
from minidiff.explain import convergence, gaussian
from minidiff.explain.convergence import DATA, FLOOR, STEPS, curve, measure, slope
from minidiff.explain.samplers import SAMPLERS, Sampler

BAND = 0.25  # around the order, for the slope between the last two errors above rounding; measured: 0.22


def variant(scheduler, order, noise=False, options=None, start=0, **config):
    """A sampler that is not in the table."""
    return Sampler(scheduler, scheduler, order, 1, noise, ("", ""), "", config, options or {}, start)


def spell(sampler):
    return f"{sampler.name}({sampler.settings})"


UNIPC, DPM, DPM1 = "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
EDM_DPM, LMS, DEIS = "EDMDPMSolverMultistepScheduler", "LMSDiscreteScheduler", "DEISMultistepScheduler"
UNCORRECTED = {"disable_corrector": range(999)}
VARIANTS = [
    variant("DDIMScheduler", 1, noise=True, options={"eta": 0.5}),
    variant("DDPMScheduler", 1, noise=True, variance_type="fixed_large"),
    variant("PNDMScheduler", 2, set_alpha_to_one=False),
    variant(LMS, 1, options={"order": 1}),
    variant(LMS, 2, options={"order": 2}, start=1),
    variant(LMS, 3, options={"order": 3}, start=2),
    variant(DEIS, 1, solver_order=1),
    variant(UNIPC, 1, solver_order=1, **UNCORRECTED),
    variant(UNIPC, 2, solver_order=1),
    variant(UNIPC, 2, solver_order=2, start=1, **UNCORRECTED),
    variant(UNIPC, 3, solver_order=2, solver_type="bh1"),
    variant(UNIPC, 3, solver_order=2, predict_x0=False),
    variant(DPM, 1, solver_order=1),
    variant(DPM, 2, solver_type="heun"),
    variant(DPM, 1, algorithm_type="dpmsolver", solver_order=1),
    variant(DPM, 2, algorithm_type="dpmsolver"),
    variant(DPM, 2, algorithm_type="dpmsolver", solver_order=3, start=2),  # the same flaw as in dpmsolver++
    variant(DPM, 1, noise=True, algorithm_type="sde-dpmsolver++", solver_order=1),
    variant(DPM, 2, noise=True, algorithm_type="sde-dpmsolver++", solver_type="heun"),
    variant(DPM, 2, noise=True, algorithm_type="sde-dpmsolver"),
    variant(DPM1, 1, solver_order=1),
    variant(DPM1, 2, solver_type="heun"),
    variant(DPM1, 2, algorithm_type="dpmsolver"),
    variant(EDM_DPM, 1, solver_order=1),
    variant(EDM_DPM, 2, solver_order=3),
    variant(EDM_DPM, 2, noise=True, algorithm_type="sde-dpmsolver++"),
]


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s.order] + VARIANTS, ids=spell)
def test_the_error_falls_with_the_order_of_the_method(sampler):
    measured = curve(sampler)
    errors = np.array(measured.errors)[np.array(measured.steps) <= sampler.most]
    assert (np.diff(errors)[errors[1:] > FLOOR] < 0).all(), errors
    assert abs(measured.order - sampler.order) < BAND, (measured.order, measured.errors)


def test_the_first_order_of_sde_dpmsolver_shows_late():
    """Its error is so much of the second order at first that only many steps show the first."""
    sampler = variant(DPM, 1, noise=True, algorithm_type="sde-dpmsolver", solver_order=1)
    assert abs(slope((256, 512), [measure(sampler, n).error for n in (256, 512)]) - 1) < BAND


def test_ipndm_is_of_order_4_where_its_weights_are_right():
    """With even steps in sigma / alpha, from exact first steps, up to rounding."""
    errors = []
    for steps in (16, 32):
        ratios = np.linspace(1, 0.3, steps + 1)
        scheduler = minidiff.IPNDMScheduler(trained_betas=ratios / np.hypot(1, ratios))
        scheduler.set_timesteps(steps)
        levels = [(float(a), float(s)) for a, s in zip(scheduler.alphas, scheduler.betas, strict=True)]
        predict = gaussian.predictor(DATA, gaussian.angle_level, "v_prediction")
        x = DATA.place(np.ones((1, 6)), levels[0])
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(predict(x, t), t, x).prev_sample
            if i < 3:
                x = DATA.place(np.ones((1, 6)), levels[i + 1])
        errors.append(np.abs(DATA.standard_score(x, levels[-1]) - 1).max())
    assert abs(slope((16, 32), errors) - 4) < BAND, errors


# -- samplers with noise


@pytest.mark.parametrize("steps", [16, 64])
@pytest.mark.parametrize("sampler", [s for s in SAMPLERS + tuple(VARIANTS) if s.noise], ids=spell)
def test_mean_and_variance_of_many_samples_are_right(sampler, steps):
    """Within 4.5 standard errors and, since steps are finite, a bound that falls with the sampler's order."""
    rng, rows = np.random.default_rng(0), 10_000
    course = convergence.set_up(sampler, steps)
    z = final_scores(course, rng.standard_normal((rows, 6)), rng, **sampler.options)
    bound = {None: 0, 1: 6 / steps, 2: 30 / steps**2}[sampler.order]
    assert np.abs(z.mean(0)).max() < 4.5 / rows**0.5 + bound
    assert np.abs(z.std(0) - 1).max() < 4.5 / (2 * rows) ** 0.5 + bound
    # and what the exact rows of `measure` say of this sampler is what it draws, with no bound
    expected = measure(sampler, steps)
    assert (np.abs(z.mean(0) - expected.mean) < 4.5 * expected.deviation / rows**0.5).all()
    assert (np.abs(z.std(0) / expected.deviation - 1) < 4.5 / (2 * rows) ** 0.5).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("eta", [None, 0.0, 0.3, 1.0])
def test_consistency_models_need_no_small_steps(eta, steps):
    """eta None: LCM. TCD with eta 0 adds no noise, with eta 1 it jumps to the end before it does."""
    name, options = ("LCMScheduler", {}) if eta is None else ("TCDScheduler", {"eta": eta})
    outcome = measure(variant(name, None, options=options), steps)
    assert outcome.error < FLOOR and outcome.noise == (eta != 0 and steps > 1)


def test_consistency_samplers_do_not_converge_with_an_ordinary_model():
    course = convergence.set_up(variant("LCMScheduler", None), 128)
    course = dataclasses.replace(course, predict=ordinary(course))
    rng = np.random.default_rng(0)
    z = final_scores(course, rng.standard_normal((2000, 6)), rng)
    assert z.std(0).max() < 0.9  # all too near to the mean


def test_tcd_without_noise_is_ddim_with_an_ordinary_model():
    errors = []
    for steps in (32, 64):
        course = convergence.set_up(variant("TCDScheduler", None, options={"eta": 0.0}), steps)
        course = dataclasses.replace(course, predict=ordinary(course))
        errors.append(np.abs(final_scores(course, np.ones((1, 6)), eta=0.0) - 1).max())
    assert abs(slope((32, 64), errors) - 1) < BAND, errors


def final_scores(course, z, generator=None, **options):
    """The standard scores that the sampler makes of z (B, 6)."""
    x = deque(convergence.walk(course, z, generator, **options), maxlen=1).pop()
    return DATA.standard_score(x, course.levels[-1])


def ordinary(course):
    """A perfect model that is no consistency model."""
    return gaussian.predictor(DATA, gaussian.table_level(course.scheduler.alphas_cumprod))


# -- the table


def test_the_table_has_all_schedulers_under_the_names_of_the_command_line():
    names = drawing.scheduler_names() | dict.fromkeys(drawing.misfits())
    listed = {sampler.name: sampler.scheduler for sampler in SAMPLERS}
    assert set(listed) == set(names)
    assert all(names[name] in (None, scheduler) for name, scheduler in listed.items())
    assert set(listed.values()) == {name for name in minidiff.__all__ if name.endswith("Scheduler")}


@pytest.mark.parametrize("sampler", SAMPLERS, ids=spell)
def test_what_the_table_says_of_calls_and_noise_is_so(sampler):
    steps = 2 * STEPS[0] if sampler.group == 1 else 2 * STEPS[0] * 3 // 4
    outcome = measure(sampler, steps)
    extra = {} if sampler.scheduler != "PNDMScheduler" else {True: 1, False: 9}
    extra = extra.get(sampler.config.get("skip_prk_steps", False), 0)
    assert (outcome.calls, outcome.noise) == (sampler.calls * steps + extra, sampler.noise)
    if not sampler.noise:
        assert (outcome.deviation == np.abs(outcome.slope)).all()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=spell)
def test_the_paper_is_the_one_that_the_code_follows(sampler):
    modules = {sys.modules[c.__module__] for c in getattr(minidiff, sampler.scheduler).__mro__[:-1]}
    text = " ".join(" ".join(Path(module.__file__).read_text().split()) for module in modules)
    who, *_, year = sampler.paper[0].split()
    assert re.search(rf"{who}\b[^.:;]*( al\.)? {year}\b", text) and sampler.paper[1] in text


def test_slope_is_exact_for_powers_and_leaves_rounding_out():
    steps = np.array([8, 16, 32, 64])
    assert slope(steps, 5.0 * steps**-3.0) == pytest.approx(3)
    assert slope(steps, [8e-3, 1e-3, FLOOR / 2, FLOOR / 3]) == pytest.approx(3)
