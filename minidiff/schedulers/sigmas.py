"""Schedules by noise level: sigma = sqrt((1 - a_t) / a_t), the noise's share of the data, instead of t.

Solvers of the differential equation dx/dsigma step from one sigma to the next, so they choose sigmas: those
of evenly spread timesteps, or spread by `karras`, `exponential`, `beta` or `flow`; `sigma_to_t` finds the
timestep to tell the model. `SigmaScheduler` holds what all of them share: the choice of sigmas, and noise
added at a step of the schedule.
"""

import math

import numpy as np

from minidiff.arguments import at_most_one, one_for_each, positive
from minidiff.boundary import floats, like
from minidiff.numerics import symmetric_beta_quantile
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
    positive(min(sigmas), "the lowest of exponential sigmas")
    return [math.log(sigma) for sigma in sigmas]


def beta(sigma_min: float, sigma_max: float, n: int) -> np.ndarray:
    """n falling sigmas at quantiles of Beta(0.6, 0.6): dense at both ends (arXiv:2407.12173)."""
    return sigma_min + symmetric_beta_quantile(1 - np.linspace(0, 1, n), 0.6) * (sigma_max - sigma_min)


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
    shift = math.exp(mu) if kind == "exponential" else mu
    with np.errstate(divide="ignore"):  # a sigma of 0 stays 0
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

    unbounded: tuple[str, ...] = ()  # spreads that take no notice of the config's sigma_min and sigma_max

    def _make_tables(self):
        at_most_one(self.config, SPREADS)
        super()._make_tables()
        if self.config.get("rescale_betas_zero_snr"):
            self.alphas_cumprod[-1] = SMALLEST_ALPHA
        self.sigmas = self._table_sigmas()

    def _table_sigmas(self):
        """sigma at each training timestep, float32 (N,), rising."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def _spread(self, lowest, highest, n):
        """n falling sigmas between these, or the config's, bounds; None if it asks for those of timesteps."""
        for key, spread in SPREADS.items():
            if self.config.get(key):
                own = {} if key in self.unbounded else self.config
                low, high = own.get("sigma_min"), own.get("sigma_max")
                low, high = lowest if low is None else low, highest if high is None else high
                return spread(float(low), float(high), n)
        return None

    def _shifted(self, sigmas, shift, mu):
        """Flow sigmas moved by shift or, with use_dynamic_shifting, by mu; then to shift_terminal."""
        c = self.config
        if not c.use_dynamic_shifting:
            sigmas = shift_flow(sigmas, shift)
        elif mu is None:
            raise ValueError("use_dynamic_shifting=True needs mu, the shift: set_timesteps(n, mu=...)")
        else:
            sigmas = time_shift(sigmas, mu, self._one_of("time_shift_type", ("exponential", "linear")))
        return stretch_to_terminal(sigmas, c.shift_terminal) if c.shift_terminal else sigmas

    def _final_sigma(self, sigma_min):
        """Where sampling ends: at no noise, or at that of sigma_min."""
        kind = self._one_of("final_sigmas_type", ("zero", "sigma_min"))
        return sigma_min if kind == "sigma_min" else 0

    def _set_sigmas(self, sigmas, last=0):
        """Stores the sigmas to visit and the one that sampling ends at; counts anew."""
        self.sigmas = np.append(sigmas, last).astype(np.float32)
        self._count_anew()

    def _signal_and_noise(self, samples, timesteps):
        """alpha and sigma_t, each (B, 1, …), at the timesteps' places in the schedule.

        Once a begin_index is set, all are at the current step. Before set_timesteps the timesteps fall while
        the table rises, so that t gets the noise of N - 1 - t, as in diffusers: set timesteps first.
        """
        begin, timesteps = self.begin_index, one_for_each(timesteps, samples, "timesteps")
        current = begin if self.step_index is None else self.step_index
        rows = [self.index_for_timestep(t) if begin is None else current for t in timesteps]
        return self._alpha_sigma(self._sigmas_of(rows, samples))

    def _sigmas_of(self, rows, samples):
        """The sigmas at these places, (B, 1, …); from a table in samples' dtype, as in diffusers."""
        return floats(like(self.sigmas, samples))[rows].reshape(-1, *[1] * (len(samples.shape) - 1))

    def _alpha_sigma(self, sigma):
        """alpha and sigma_t in x = alpha x0 + sigma_t eps, for sigma = sigma_t / alpha."""
        alpha = 1 / np.sqrt(sigma * sigma + 1)
        return alpha, sigma * alpha
