"""PNDM, pseudo numerical methods for diffusion models: Liu et al. 2022, arXiv:2202.09778.

DDIM's step is kept as the "transfer" (eq. 9), but the noise that it goes along comes from a classic method
of order 4: Runge-Kutta for the first four timesteps (PRK, eq. 13), then a linear multistep formula over the
last four noises (PLMS, eq. 12). Stable Diffusion leaves the Runge-Kutta part out (skip_prk_steps) and warms
up with formulas of lower order.
"""

import numpy as np

from minidiff.boundary import floats
from minidiff.schedulers.schedule import Scheduler, combine, predicted_eps

RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)  # order 4: weights of its four model calls
RK_TIMESTEPS = 4  # timesteps that the warm-up makes with Runge-Kutta
ADAMS_BASHFORTH = {  # number of noises -> weights, the newest first
    1: (1,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PNDMScheduler(Scheduler):
    """DDIM's steps along a better noise: of the fourth order, because the last noises are remembered.

    skip_prk_steps: go without the Runge-Kutta warm-up (n + 1 model calls for n steps; with it n + 9).
    set_alpha_to_one: whether the last step ends at no noise at all, or at that of timestep 0.
    """

    predictions = ("epsilon", "v_prediction")

    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
                 beta_schedule: str = "linear", trained_betas=None, skip_prk_steps: bool = False,
                 set_alpha_to_one: bool = False, prediction_type: str = "epsilon",
                 timestep_spacing: str = "leading", steps_offset: int = 0):  # fmt: skip
        self._make_tables()
        self.final_alpha_cumprod = np.float32(1) if set_alpha_to_one else self.alphas_cumprod[0]
        self.timesteps = self.prk_timesteps = self.plms_timesteps = None
        self._forget()

    def _forget(self):
        self.ets = []  # the last noises (model outputs), the newest at the end
        self.counter = 0  # calls of step since set_timesteps
        self.cur_model_output = 0  # Runge-Kutta's weighted sum so far
        self.cur_sample = None  # the sample that a step with several model calls starts from

    def set_timesteps(self, num_inference_steps: int, device=None):
        """Chooses the timesteps, in the order of the model's calls: some come twice. device has no effect."""
        c, n = self.config, self._check_steps(num_inference_steps)
        spaced = self._spaced(n)
        if c.skip_prk_steps:
            self.prk_timesteps = np.array([])
            self.plms_timesteps = np.concatenate([spaced[:2], spaced[1:]])  # the second one twice
        else:
            if len(spaced) < RK_TIMESTEPS:
                needed = f"the Runge-Kutta warm-up takes at least {RK_TIMESTEPS}: take more"
                raise ValueError(f"num_inference_steps is {n}; {needed}, or set skip_prk_steps=True")
            halves = spaced[:RK_TIMESTEPS].repeat(2)  # each with the point half a step above it
            halves[::2] += c.num_train_timesteps // n // 2
            self.prk_timesteps = halves[1:].repeat(2)[1:-1]
            self.plms_timesteps = spaced[RK_TIMESTEPS - 1 :]
        self.timesteps = np.concatenate([self.prk_timesteps, self.plms_timesteps]).astype(np.int64)
        self.num_inference_steps = n
        self._forget()

    def step_prk(self, model_output, timestep, sample, return_dict: bool = True):
        """One of the four model calls of a Runge-Kutta step."""
        return self._step(model_output, timestep, sample, return_dict, update=self.update_prk)

    def step_plms(self, model_output, timestep, sample, return_dict: bool = True):
        """One linear multistep step."""
        return self._step(model_output, timestep, sample, return_dict, update=self.update_plms)

    def update(self, model_output, t, sample):
        """By Runge-Kutta for as long as its timesteps last, then by the linear multistep method."""
        warm = self.counter >= len(self.prk_timesteps)
        return (self.update_plms if warm else self.update_prk)(model_output, t, sample)

    def update_prk(self, model_output, t, sample):
        """Liu et al. 2022, eq. 13: three trial steps to see the noise there, then one along a mean."""
        calls = len(self.prk_timesteps)
        if self.counter >= calls:
            raise ValueError(f"all {calls} Runge-Kutta calls are made; go on with step or step_plms")
        call = self.counter % 4
        half = self.config.num_train_timesteps // self.num_inference_steps // 2
        start, prev_t = self.prk_timesteps[self.counter - call], t if call % 2 else t - half
        if call == 0:
            self.ets.append(model_output)
            self.cur_sample = sample
        self.cur_model_output = self.cur_model_output + RUNGE_KUTTA[call] * model_output
        if call == 3:
            model_output, self.cur_model_output = self.cur_model_output, 0
        origin = sample if self.cur_sample is None else floats(self.cur_sample)
        return self._transfer(origin, start, prev_t, model_output)

    def update_plms(self, model_output, t, sample):
        """Liu et al. 2022, eq. 12: along a noise extrapolated from the last four (Adams-Bashforth).

        Without Runge-Kutta the first step is taken twice, the second time along the mean of its ends' noises.
        """
        known = len(self.ets)
        if not self.config.skip_prk_steps and known < 3:
            raise ValueError(f"step_plms needs the noises of 3 Runge-Kutta steps and has {known}; call step")
        jump = self.config.num_train_timesteps // self.num_inference_steps
        prev_t = t - jump
        if self.counter == 1:
            t, prev_t = t + jump, t
        else:
            self.ets = [*self.ets[-3:], model_output]
        ets = [floats(e) for e in self.ets[-1:-5:-1]]  # the newest first
        if self.counter == 0:
            self.cur_sample = sample
        elif self.counter == 1 and len(ets) == 1:
            model_output = (model_output + ets[0]) / 2
            sample, self.cur_sample = self.cur_sample, None
        if len(ets) > 1:
            model_output = combine(ADAMS_BASHFORTH[len(ets)], ets)
        return self._transfer(sample, t, prev_t, model_output)

    def _transfer(self, sample, t, prev_t, model_output):
        """Liu et al. 2022, eq. 9: DDIM's step from t to prev_t along a noise, without a detour over x0."""
        self.counter += 1
        a_t, a_prev = self.alphas_cumprod[self._table_index(t)], self._alpha_bar(prev_t)
        b_t, b_prev = 1 - a_t, 1 - a_prev
        kind = self._one_of("prediction_type", self.predictions)
        eps = predicted_eps(model_output, sample, np.sqrt(a_t), np.sqrt(b_t), kind)
        divisor = a_t * np.sqrt(b_prev) + np.sqrt(a_t * b_t * a_prev)
        return np.sqrt(a_prev / a_t) * sample - (a_prev - a_t) / divisor * eps, None
