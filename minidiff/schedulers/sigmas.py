"""Schedules by noise level: sigma = sqrt((1 - a_t) / a_t), the noise's share of the data, instead of t.

Solvers of the differential equation dx/dsigma step from one sigma to the next, so they choose sigmas: those
of evenly spread timesteps, or spread by `karras`, `exponential`, `beta` or `flow`; `sigma_to_t` finds the
timestep to tell the model. `SigmaScheduler` holds what all of them share: the choice of sigmas, and noise
added at a step of the schedule.
"""

import math

import numpy as np

from minidiff.boundary import like
from minidiff.schedulers.counting import CountingScheduler

# Zero-SNR tables end at a_t = 0, where sigma is infinite: the smallest float16 stands in for it.
SMALLEST_ALPHA = np.float32(2**-24)


def karras(sigma_min: float, sigma_max: float, n: int, rho: float = 7, ramp=None) -> np.ndarray:
    """n falling sigmas, dense at little noise (Karras et al. 2022, arXiv:2206.00364, eq. 5).

    rho > 1 is how dense. ramp (n,): the places to take from 0, sigma_max, to 1, sigma_min; evenly if None.
    float64; before the power it is rounded as ramp is.
    """
    ramp = np.linspace(0, 1, n) if ramp is None else ramp
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (ends[0] + ramp * (ends[1] - ends[0])).astype(np.float64) ** rho


def exponential(sigma_min: float, sigma_max: float, n: int) -> np.ndarray:
    """n falling sigmas, evenly spread in their logarithm. ValueError where one of the ends has none."""
    return np.exp(np.linspace(*logarithms(sigma_max, sigma_min), n))


def logarithms(*sigmas: float) -> list[float]:
    """The logarithms of the ends between which sigmas are to be laid out, or ValueError."""
    if not min(sigmas) > 0:
        raise ValueError(f"exponential sigmas must stay above 0; they go from {max(sigmas)} to {min(sigmas)}")
    return [math.log(sigma) for sigma in sigmas]


def beta(sigma_min: float, sigma_max: float, n: int) -> np.ndarray:
    """n falling sigmas at quantiles of Beta(0.6, 0.6): dense at both ends (arXiv:2407.12173)."""
    return sigma_min + symmetric_beta_quantile(1 - np.linspace(0, 1, n), 0.6) * (sigma_max - sigma_min)


def symmetric_beta_quantile(p: np.ndarray, a: float) -> np.ndarray:
    """x with P(X <= x) = p for X ~ Beta(a, a): the inverse regularised incomplete beta function, float64.

    For x <= 1/2 that is x^a / B(a, a) times the sum over k of (1 - a)(2 - a)…(k - a) / k! / (a + k) x^k
    (DLMF 8.17.7); 60 terms are exact to float64 there. The other half is its mirror image.
    """
    lower = np.minimum(p, 1 - p)
    whole = math.gamma(a) ** 2 / math.gamma(2 * a)  # B(a, a)
    k = np.arange(1, 60)
    terms = np.concatenate([[1], np.cumprod((k - a) / k)]) / (a + np.arange(60))
    x = np.minimum((lower * a * whole) ** (1 / a), 0.5)  # from the first term alone; 0 stays 0
    for _ in range(20):  # Newton in x^a, in which the distribution is almost a line
        error = x**a * np.polyval(terms[::-1], x) / whole - lower
        slope = (1 - x) ** (a - 1) / (a * whole)
        x = np.clip(x**a - error / slope, 0, 0.5**a) ** (1 / a)
    return np.where(p <= 0.5, x, 1 - x)


def flow(n: int, n_train: int) -> np.ndarray:
    """n falling sigmas from 1, evenly spread: for x = (1 - sigma) x0 + sigma eps (arXiv:2403.03206)."""
    return np.linspace(1, 1 / n_train, n + 1)[:-1]


def shift_flow(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Flow sigmas with more noise (shift > 1), for large pictures (arXiv:2403.03206, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def time_shift(sigmas: np.ndarray, mu: float, kind: str, power: float = 1.0) -> np.ndarray:
    """`shift_flow` by e^mu (kind "exponential") or by mu ("linear"), where mu follows the picture's size.

    Written as in diffusers, whose whole timesteps depend on the last bit.
    """
    if kind not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type is {kind!r}; it must be exponential or linear")
    shift = math.exp(mu) if kind == "exponential" else mu
    return shift / (shift + (1 / sigmas - 1) ** power)


def stretch_to_terminal(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """Flow sigmas stretched so that the last one is terminal. ValueError where all of them are 1."""
    if sigmas[-1] == 1:
        raise ValueError("shift_terminal can't move a schedule of one step; take at least 2")
    return 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - terminal))


def sigma_to_t(sigmas: np.ndarray, log_sigmas: np.ndarray) -> np.ndarray:
    """The fractional timesteps with these sigmas, float64, looked up in log_sigmas, the table over all t."""
    log_sigma = np.log(np.maximum(sigmas, 1e-10))
    least = np.minimum.accumulate(log_sigmas[::-1])[::-1]  # from each on; a table of odd betas may fall
    low = np.searchsorted(least, log_sigma, side="right") - 1  # the last one not above
    low = low.clip(0, len(log_sigmas) - 2)
    below, above = log_sigmas[low], log_sigmas[low + 1]
    share = np.clip((below - log_sigma) / (below - above), 0, 1)
    return (1 - share) * low + share * (low + 1)


SPREADS = {"use_karras_sigmas": karras, "use_exponential_sigmas": exponential, "use_beta_sigmas": beta}


class SigmaScheduler(CountingScheduler):
    """Base of the schedulers that walk over `sigmas`, float32 (n + 1,), falling; they end at the last."""

    def _check_spreads(self):
        chosen = [key for key in SPREADS if self.config.get(key)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other: choose one")

    def _make_tables(self):
        self._check_spreads()
        super()._make_tables()
        if self.config.get("rescale_betas_zero_snr"):
            self.alphas_cumprod[-1] = SMALLEST_ALPHA
        self.sigmas = self._table_sigmas()

    def _table_sigmas(self):
        """sigma at each training timestep, float32 (N,), rising."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def _spread(self, lowest, highest, n):
        """n falling sigmas between these, or the config's, bounds; None if it asks for those of timesteps."""
        c = self.config
        for key, spread in SPREADS.items():
            if c.get(key):
                low = lowest if c.get("sigma_min") is None else c.sigma_min
                high = highest if c.get("sigma_max") is None else c.sigma_max
                return spread(float(low), float(high), n)
        return None

    def _set_sigmas(self, sigmas, sigma_min=None):
        """Stores the sigmas to visit and the one that sampling ends at, 0 or sigma_min; counts anew.

        sigma_min None: it ends at 0, whatever the config carries along.
        """
        kind = "zero" if sigma_min is None else self.config.final_sigmas_type
        last = {"zero": 0, "sigma_min": sigma_min}.get(kind)
        if last is None:
            raise ValueError(
                f"final_sigmas_type is {self.config.final_sigmas_type!r}; it must be zero or sigma_min"
            )
        self.sigmas = np.append(sigmas, last).astype(np.float32)
        self._count_anew()

    def _signal_and_noise(self, samples, timesteps):
        """alpha and sigma_t, each (B, 1, …), at the timesteps' places in the schedule.

        Once a begin_index is set, all are at the current step. Before set_timesteps the timesteps fall while
        the table rises, so that t gets the noise of N - 1 - t, as in diffusers: set timesteps first.
        """
        timesteps = self._timestep_list(samples, timesteps)
        if self._begin_index is None:
            rows = [self.index_for_timestep(t) for t in timesteps]
        else:
            rows = [self._begin_index if self._step_index is None else self._step_index] * len(timesteps)
        return self._alpha_sigma(self._sigmas_of(rows, samples))

    def _sigmas_of(self, rows, samples):
        """The sigmas at these places, (B, 1, …); from a table in samples' dtype, as in diffusers."""
        return self._array(like(self.sigmas, samples))[rows].reshape(-1, *[1] * (len(samples.shape) - 1))

    def _alpha_sigma(self, sigma):
        """alpha and sigma_t in x = alpha x0 + sigma_t eps, for sigma = sigma_t / alpha."""
        alpha = 1 / np.sqrt(sigma * sigma + 1)
        return alpha, sigma * alpha
