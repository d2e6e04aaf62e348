"""The Gaussian toy: its closed forms against quadrature, a numerical solver and the schedulers' formulas."""

import numpy as np
import pytest
from parity import assert_close
from scipy.integrate import solve_ivp

import minidiff
from minidiff.explain import gaussian
from minidiff.explain.gaussian import CLEAN, Gaussian
from minidiff.schedulers.schedule import predicted_eps, predicted_x0

DATA = Gaussian(mean=np.array([-1.0, 0.2, 2.0]), deviation=np.array([0.3, 1.0, 0.6]))
LEVELS = {"preserving": (0.6, 0.8), "exploding": (1.0, 3.0), "flow": (0.7, 0.3)}
X = np.array([[-2.0, 0.1, 1.0], [0.5, -1.0, 3.0]])
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # measured: 4e-15


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_denoise_is_the_mean_of_the_clean_samples_that_could_have_been(level):
    """By Bayes, summed up over a fine grid of x0."""
    alpha, sigma = level
    u = np.linspace(-9, 9, 4001)[:, None, None]  # in standard deviations of the data
    x0 = DATA.mean + DATA.deviation * u
    weight = np.exp(-(u**2) / 2 - (X - alpha * x0) ** 2 / (2 * sigma**2))
    assert_close(DATA.denoise(X, level), (x0 * weight).sum(0) / weight.sum(0), **EXACT)


@pytest.mark.parametrize("path", ["exploding", "flow"])
def test_solve_is_what_a_numerical_solver_finds(path):
    """dx/dsigma = eps where alpha is 1, eps - x0 where it is 1 - sigma."""
    alpha = {"exploding": lambda sigma: 1.0, "flow": lambda sigma: 1 - sigma}[path]
    start, end = {"exploding": (5.0, 0.1), "flow": (0.95, 0.05)}[path]
    kind = {"exploding": "epsilon", "flow": "flow_prediction"}[path]

    def slope(sigma, x):
        x, level = x.reshape(X.shape), (alpha(sigma), sigma)
        return gaussian.model_output(DATA.denoise(x, level), x, level, kind).ravel()

    found = solve_ivp(slope, (start, end), X.ravel(), method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    exact = DATA.solve(X, (alpha(start), start), (alpha(end), end))
    assert_close(exact, found.reshape(X.shape), rtol=1e-9, atol=1e-9)  # measured: 4e-11


def test_standard_scores_are_standard_normal_at_every_level():
    rng = np.random.default_rng(0)
    x0 = DATA.mean + DATA.deviation * rng.standard_normal((100_000, 3))
    eps = rng.standard_normal((100_000, 3))
    for alpha, sigma in LEVELS.values():
        z = DATA.standard_score(alpha * x0 + sigma * eps, (alpha, sigma))
        assert np.abs(z.mean(0)).max() < 5 / 100_000**0.5  # 5 standard errors
        assert np.abs(z.var(0) - 1).max() < 5 * (2 / 100_000) ** 0.5


def test_place_undoes_standard_score():
    for level in [*LEVELS.values(), CLEAN]:
        assert_close(DATA.place(DATA.standard_score(X, level), level), X, **EXACT)


@pytest.mark.parametrize("end", [CLEAN, (0.9, 0.1)], ids=["to the data", "to a little noise"])
def test_one_step_of_a_consistency_model_is_exact(end):
    alpha, sigma = start = LEVELS["preserving"]
    x0 = DATA.jump(X, start, end)
    eps = (X - alpha * x0) / sigma
    assert_close(end[0] * x0 + end[1] * eps, DATA.solve(X, start, end), **EXACT)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_schedulers_read_the_model_output_as_it_is_meant(prediction_type):
    alpha, sigma = level = LEVELS["preserving"]
    x0 = DATA.denoise(X, level)
    output = gaussian.model_output(x0, X, level, prediction_type)
    assert_close(predicted_x0(output, X, alpha, sigma, prediction_type), x0, **EXACT)
    assert_close(predicted_eps(output, X, alpha, sigma, prediction_type), (X - alpha * x0) / sigma, **EXACT)


def test_a_table_gives_its_own_levels_and_in_between_geometric_ones():
    table = minidiff.DDIMScheduler().alphas_cumprod
    level_at = gaussian.table_level(table)
    for t in (0, 17, np.int64(999)):
        assert_close(np.array(level_at(t)), np.sqrt([table[t], 1 - np.float64(table[t])]), rtol=1e-6)
    (a, b), (c, d), (e, f) = level_at(500), level_at(np.float32(500.5)), level_at(501)
    assert (d / c) ** 2 == pytest.approx(b / a * f / e, rel=1e-12)
    assert a > c > e and c**2 + d**2 == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_preconditioned_model_says_what_the_scheduler_makes_x0_of(prediction_type):
    scheduler = minidiff.EDMEulerScheduler(prediction_type=prediction_type, sigma_data=0.7)
    scheduler.set_timesteps(10)
    t, sigma = scheduler.timesteps[3], float(scheduler.sigmas[3])
    scheduler.set_begin_index(3)
    output = gaussian.edm_predictor(DATA, 0.7, prediction_type)(scheduler.scale_model_input(X, t), t)
    x0 = scheduler.step(output, t, X).pred_original_sample
    assert_close(x0, DATA.denoise(X, (1.0, sigma)), rtol=1e-6, atol=1e-6)


def test_unknown_prediction_types_are_refused():
    with pytest.raises(ValueError, match="prediction_type is 'score'; it must be epsilon, sample, v_pred"):
        gaussian.model_output(X, X, LEVELS["flow"], "score")
    with pytest.raises(ValueError, match="prediction_type is 'sample'; it must be epsilon or v_prediction"):
        gaussian.edm_predictor(DATA, 0.5, "sample")
