"""DPM-Solver-2 as k-diffusion has it: the midpoint method, with midpoints in log(sigma).

Karras et al. 2022, arXiv:2206.00364 (their Python library's `sample_dpm_2`); Lu et al. 2022,
arXiv:2206.00927, algorithm 1.
"""

import numpy as np

from minidiff.schedulers.exploding import ExplodingScheduler, ancestral_levels, derivative, move
from minidiff.schedulers.schedule import log
from minidiff.schedulers.sigmas import sigma_to_t


class KDPM2DiscreteScheduler(ExplodingScheduler):
    """A straight step to the middle as a trial, then the whole one along the derivative found there.

    Order 2 for two model calls, each a call of step. Between the two `sample` holds where the step started.
    """

    order = 2
    predictions = ("epsilon", "v_prediction")
    _first_leg = 0  # a schedule begun at a step's second call is out of step, as in diffusers

    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
                 beta_schedule: str = "linear", trained_betas=None, use_karras_sigmas: bool = False,
                 use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False,
                 prediction_type: str = "epsilon", timestep_spacing: str = "linspace",
                 steps_offset: int = 0):  # fmt: skip
        self._make_tables()
        self._lay_out_all()

    def set_timesteps(self, num_inference_steps: int, device=None, num_train_timesteps=None):
        """Chooses num_inference_steps timesteps, their sigmas, and the middles between those.

        num_train_timesteps: to be used in place of the config's. device has no effect.
        """
        self._lay_out(num_inference_steps, n_train=num_train_timesteps)
        timesteps, sigmas = self.timesteps, self.sigmas  # (n,), (n + 1,)
        if self.config.use_karras_sigmas:
            timesteps = timesteps.round()
        ends, ups = self._ends(sigmas)
        with np.errstate(divide="ignore"):  # the logarithm of 0: the last step is its trial alone
            middles = np.exp((log(sigmas[:-1]) + log(ends)) / 2, dtype=np.float64).astype(np.float32)  # (n,)
        between = sigma_to_t(middles[:-1], np.log(self._table_sigmas()))
        between = np.stack([between.astype(np.float32), timesteps[1:]], axis=1)  # (n - 1, 2)
        self.timesteps = np.append(timesteps[:1], between)  # (2n - 1,)
        self.sigmas = np.append(sigmas.repeat(2)[1:], sigmas[-1])  # (2n + 2,), as long as diffusers'
        legs = zip(middles, ends, ups, strict=True)
        self._legs = [leg for leg in legs for _ in range(2)][self._first_leg :]  # of each model call
        self.sample = None

    def _ends(self, sigmas):
        """Where each step's derivative is followed to, and how much noise is added then, both (n,)."""
        return sigmas[1:], np.zeros_like(sigmas[1:])

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first of a step's two."""
        return self.sample is None

    def _sigma_seen(self, i):
        return self.sigmas[i] if self.state_in_first_order else self._legs[i - 1][0]

    def update(self, model_output, i, sample, noise=None):
        """Lu et al. 2022, algorithm 1, in sigma: to the middle first, then with its derivative to the end."""
        seen, first = self._sigma_seen(i), self.state_in_first_order
        start = i if first else i - 1
        sigma, (middle, end, up) = self.sigmas[start], self._legs[start]
        x0 = self._predicted_x0(model_output, sample, seen)
        slope = derivative(sample, x0, seen)
        if first:
            self.sample, prev = sample, move(sample, slope, middle - sigma)
        else:
            origin, self.sample = self.sample, None
            prev = move(origin, slope, end - sigma)
            if noise is not None:
                prev += up * noise()
        return prev, x0


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """The midpoint method to less noise than the next sigma has, then fresh noise up to it, as DDPM does."""

    _first_leg = 1

    def _ends(self, sigmas):
        return ancestral_levels(sigmas[:-1], sigmas[1:])

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """One of the two model calls of a step; generator draws the noise that the second one adds."""
        return self._step(model_output, timestep, sample, return_dict, noise=(generator,))
