"""iPNDM, PNDM without its warm-up: Zhang & Chen 2022, arXiv:2204.13902.

For models of v with a schedule of their own: at time t from 1 to 0, x = cos(p) x0 + sin(p) eps with
sin(p) = sin(pi t / 2)^2. Timesteps are p as a share of a right angle, float32 from 1 down.
"""

import math

import numpy as np

from minidiff.arguments import one_for_each
from minidiff.boundary import floats, number_list
from minidiff.schedulers.counting import CountingScheduler
from minidiff.schedulers.pndm import ADAMS_BASHFORTH
from minidiff.schedulers.schedule import combine, linspace, predicted_eps, predicted_x0


class IPNDMScheduler(CountingScheduler):
    """DDIM's step along a noise of the fourth order; the first three steps use what is there so far.

    model_output is v. trained_betas: sin(p) at each step and at the end, falling, in place of those above.
    """

    _compatibles = ()

    def __init__(self, num_train_timesteps: int = 1000, trained_betas=None):
        self.pndm_order = 4
        self.set_timesteps(self._train_timesteps())

    def set_timesteps(self, num_inference_steps: int, device=None):
        """Chooses num_inference_steps timesteps, falling from 1, float32. device has no effect."""
        self.num_inference_steps = n = self._check_steps(num_inference_steps)
        if self.config.trained_betas is not None:
            self.betas = number_list(self.config.trained_betas, "trained_betas").astype(
                np.float32
            )  # (n + 1,)
        else:
            angle = linspace(1, 0, n + 1) * np.float32(math.pi) / 2
            # rounded once: near 1 the sine's last bit, where torch's is often off, changes alpha by 3e-4
            self.betas = np.sin(angle, dtype=np.float64).astype(np.float32) ** 2
        self.alphas = np.sqrt(1 - self.betas**2)
        angle = np.arctan2(self.betas, self.alphas, dtype=np.float64).astype(np.float32)
        self.timesteps = (angle / np.float32(math.pi) * 2)[:-1]
        self.ets = []  # the last noises, the newest at the end
        self._count_anew()

    def update(self, model_output, i, sample):
        """Liu et al. 2022 (arXiv:2202.09778), eq. 9 and 12: along a noise extrapolated from the last four."""
        alpha, sigma = self.alphas[i], self.betas[i]
        eps = predicted_eps(model_output, sample, alpha, sigma, "v_prediction")
        self.ets = [*self.ets[-3:], eps]
        ets = [floats(e) for e in self.ets[::-1]]  # the newest first
        eps = combine(ADAMS_BASHFORTH[len(ets)], ets)
        small = np.float32(1e-8)  # alpha is 0 at 1
        x0 = predicted_x0(eps, sample, np.maximum(alpha, small), sigma, "epsilon")
        return combine((self.alphas[i + 1], self.betas[i + 1]), (x0, eps)), None

    def _signal_and_noise(self, samples, timesteps):
        """alpha and sigma, each (B, 1, …), at the timesteps' places in the schedule."""
        rows = [self.index_for_timestep(t) for t in one_for_each(timesteps, samples, "timesteps")]
        shape = -1, *[1] * (len(samples.shape) - 1)
        return self.alphas[rows].reshape(shape), self.betas[rows].reshape(shape)
