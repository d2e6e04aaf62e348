"""Data for which a perfect model needs no training: everything about it is known in closed form.

If each coordinate of the data is normal, then so is each noisy sample x = alpha x0 + sigma eps, and the best
prediction of x0 (or eps, or v) is a straight line in x. The sampling equation (Song et al. 2021,
arXiv:2011.13456, eq. 13) then only shifts and stretches: along each of its solutions the standard score
z = (x - mean) / deviation, with the mean and deviation of all samples that are as noisy, stays what it is.

How noisy is a pair (alpha, sigma): sqrt(a_t), sqrt(1 - a_t) where the variance is preserved (Ho et al. 2020,
arXiv:2006.11239); 1, sigma where it explodes (Karras et al. 2022, arXiv:2206.00364); 1 - sigma, sigma for
rectified flows (Liu et al. 2022, arXiv:2209.03003). Read `Gaussian` (the truth), then `predict_*`: the
networks that would have learned it, each a predict(x, t) for `minidiff.sampling.sample`. All is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Level = tuple[float, float]  # alpha, sigma
Predict = Callable[[np.ndarray, float], np.ndarray]
CLEAN: Level = (1.0, 0.0)  # the data itself
PREDICTIONS = "epsilon, sample, v_prediction or flow_prediction"


@dataclass(frozen=True)
class Gaussian:
    """Data (B, C) whose C coordinates are independent: coordinate c is from N(mean[c], deviation[c]^2)."""

    mean: np.ndarray
    deviation: np.ndarray

    def marginal(self, level: Level) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, each (C,), of alpha x0 + sigma eps."""
        alpha, sigma = level
        return alpha * self.mean, np.hypot(alpha * self.deviation, sigma)

    def place(self, z, level: Level) -> np.ndarray:
        """The samples with the standard scores z (B, C)."""
        mean, deviation = self.marginal(level)
        return mean + deviation * z

    def standard_score(self, x, level: Level) -> np.ndarray:
        """How many standard deviations the samples x (B, C) are above the mean: `place` backwards."""
        mean, deviation = self.marginal(level)
        return (x - mean) / deviation

    def solve(self, x, start: Level, end: Level) -> np.ndarray:
        """The exact solution of the sampling equation: where it leads x (B, C) from start to end."""
        return self.place(self.standard_score(x, start), end)

    def denoise(self, x, level: Level) -> np.ndarray:
        """E[x0 | x], the clean samples (B, C) that a perfect model believes in."""
        mean, deviation = self.marginal(level)
        return self.mean + level[0] * (self.deviation / deviation) ** 2 * (x - mean)

    def jump(self, x, start: Level, end: Level) -> np.ndarray:
        """The x0 (B, C) that a perfect consistency model states, so that one step is exact however long.

        With it and eps = (x - alpha x0) / sigma at start, alpha x0 + sigma eps at end is `solve`; at the end
        (1, 0) that is x0 itself (Song et al. 2023, arXiv:2303.01469; others: Zheng et al. 2024,
        arXiv:2402.19159).
        """
        (alpha, sigma), (alpha_end, sigma_end) = start, end
        return (sigma_end * x - sigma * self.solve(x, start, end)) / (alpha * sigma_end - alpha_end * sigma)


def model_output(x0, x, level: Level, prediction_type: str) -> np.ndarray:
    """What a model with this prediction_type returns that takes x0 (B, C) for the clean samples of x (B, C).

    epsilon, sample and v_prediction as in `minidiff.schedulers.schedule`, flow_prediction: eps - x0.
    """
    alpha, sigma = level
    if prediction_type == "sample":
        return x0
    eps = (x - alpha * x0) / sigma
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        return alpha * eps - sigma * x0
    if prediction_type == "flow_prediction":
        return eps - x0
    raise ValueError(f"prediction_type is {prediction_type!r}; it must be {PREDICTIONS}")


def table_level(alphas_cumprod) -> Callable[[float], Level]:
    """level(t) for a table over training timesteps (N,); between two of them sigma / alpha is geometric."""
    table = np.asarray(alphas_cumprod, np.float64)
    logs, timesteps = np.log(1 / table - 1) / 2, np.arange(len(table))

    def level(t):
        ratio = np.exp(np.interp(float(t), timesteps, logs))  # sigma / alpha
        return 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)

    return level


def flow_level(num_train_timesteps: int) -> Callable[[float], Level]:
    """level(t) for rectified flows, where t = num_train_timesteps * sigma."""
    return lambda t: (1 - float(t) / num_train_timesteps, float(t) / num_train_timesteps)


def angle_level(t: float) -> Level:
    """The level of IPNDM's timesteps: t in [0, 1] is an angle in quarter turns."""
    return np.cos(float(t) * np.pi / 2), np.sin(float(t) * np.pi / 2)


def predictor(data: Gaussian, level_at, prediction_type: str = "epsilon", end_of=None) -> Predict:
    """predict(x, t), the network that has learned data: x (B, C) at the level level_at(t), t a number.

    end_of(t): where a step from t is to lead; with it the network is a consistency model.
    """

    def predict(x, t):
        level = level_at(t)
        x0 = data.denoise(x, level) if end_of is None else data.jump(x, level, end_of(t))
        return model_output(x0, x, level, prediction_type)

    return predict


def edm_predictor(data: Gaussian, sigma_data: float, prediction_type: str = "epsilon") -> Predict:
    """predict(x, t) for models with the preconditioning of Karras et al. 2022, table 1: t is log(sigma) / 4.

    x (B, C) is the sample times c_in, and the output F in x0 = c_skip sample + c_out F. prediction_type is
    epsilon, or v_prediction for the opposite sign of c_out.
    """
    signs = {"epsilon": 1, "v_prediction": -1}
    if prediction_type not in signs:
        raise ValueError(f"prediction_type is {prediction_type!r}; it must be {' or '.join(signs)}")

    def predict(x, t):
        sigma = np.exp(4 * float(t))
        whole = np.hypot(sigma, sigma_data)
        c_skip, c_out = (sigma_data / whole) ** 2, signs[prediction_type] * sigma * sigma_data / whole
        x = x * whole
        return (data.denoise(x, (1.0, sigma)) - c_skip * x) / c_out

    return predict
