"""Euler's method, straight steps along the derivative, with and without fresh noise (Karras et al. 2022).

arXiv:2206.00364; "ancestral" is the form that DDPM's noise takes there (Ho et al. 2020, arXiv:2006.11239).
"""

import numpy as np

from minidiff.arguments import exactly_one, refuse_integer
from minidiff.boundary import number_list
from minidiff.schedulers.exploding import ExplodingScheduler, ancestral_levels, derivative, move
from minidiff.schedulers.schedule import log
from minidiff.schedulers.sigmas import sigma_to_t


class EulerDiscreteScheduler(ExplodingScheduler):
    """One straight step for each model call; order 1.

    interpolation_type: sigmas of the timesteps ("linear"), or evenly spread logarithms ("log_linear").
    timestep_type "continuous": v_prediction models are told log(sigma) / 4 in place of a timestep.
    final_sigmas_type: whether the last step ends at no noise ("zero") or at that of timestep 0 ("sigma_min").
    """

    predictions = (*ExplodingScheduler.predictions, "original_sample")  # another word for "sample"
    wide_x0 = True
    without_churn: tuple[str, ...] = ("v_prediction",)  # whose x0 forgets the added noise, as in diffusers

    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
                 beta_schedule: str = "linear", trained_betas=None, prediction_type: str = "epsilon",
                 interpolation_type: str = "linear", use_karras_sigmas: bool = False,
                 use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False, sigma_min=None,
                 sigma_max=None, timestep_spacing: str = "linspace", timestep_type: str = "discrete",
                 steps_offset: int = 0, rescale_betas_zero_snr: bool = False,
                 final_sigmas_type: str = "zero"):  # fmt: skip
        self._make_tables()
        self.continuous = timestep_type == "continuous" and prediction_type == "v_prediction"
        self._tell_logarithms()

    def _tell_logarithms(self):
        if self.continuous:
            self.timesteps = 0.25 * log(self.sigmas[:-1])

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None):
        """Chooses timesteps and sigmas: num_inference_steps of them, or those of a list of either.

        timesteps (n,) may be fractions; sigmas (n + 1,) ends with the one that sampling ends at, mostly 0.
        device has no effect.
        """
        exactly_one(num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        if timesteps is not None and self.continuous:
            raise ValueError("timesteps can't be given with timestep_type 'continuous': pass sigmas")
        if sigmas is None:
            kind = self._one_of("interpolation_type", ("linear", "log_linear"))
            self._lay_out(num_inference_steps, timesteps, interpolation=kind, end_at_table=True)
        else:
            sigmas = number_list(sigmas, "sigmas", least=2)
            self._set_sigmas(sigmas[:-1], sigmas[-1])
            self.timesteps = sigma_to_t(self.sigmas[:-1], np.log(self._table_sigmas())).astype(np.float32)
            self.num_inference_steps = len(self.timesteps)
        self._tell_logarithms()

    def step(self, model_output, timestep, sample, s_churn: float = 0.0, s_tmin: float = 0.0,
             s_tmax: float = float("inf"), s_noise: float = 1.0, generator=None,
             return_dict: bool = True):  # fmt: skip
        """From this step's sigma to the next; model_output, sample (B, C, …), prev_sample like sample.

        s_churn > 0 adds noise first, drawn with generator: where s_tmin <= sigma <= s_tmax, times s_noise.
        pred_original_sample is float32 also for samples of fewer bits. timestep is one of .timesteps; an
        integer, which may be an index, raises ValueError.
        """
        refuse_integer(timestep)
        churn = s_churn, s_tmin, s_tmax, s_noise
        return self._step(model_output, timestep, sample, return_dict, *churn, None, noise=(generator,))

    def update(self, model_output, i, sample, s_churn, s_tmin, s_tmax, s_noise, x0, noise):
        """Karras et al. 2022, algorithm 2 without its correction: more noise, then one straight step."""
        sigma, target = self.sigmas[i], self.sigmas[i + 1]
        churn = min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
        raised = sigma * (churn + 1)
        if churn > 0:
            sample = move(sample, noise(), s_noise * np.sqrt(raised * raised - sigma * sigma))
        if x0 is None:
            level = sigma if self.config.prediction_type in self.without_churn else raised
            x0 = self._predicted_x0(model_output, sample, level)
        return move(sample, derivative(sample, x0, raised), target - raised), x0

    def get_velocity(self, sample, noise, timesteps):
        """v = sqrt(a_t) eps - sqrt(1 - a_t) x0; timesteps are of the schedule, not integers (ValueError)."""
        refuse_integer(timesteps)
        return super().get_velocity(sample, noise, timesteps)


class EulerAncestralDiscreteScheduler(ExplodingScheduler):
    """A straight step to less noise than the next sigma has, then fresh noise up to it: as DDPM does."""

    predictions = ("epsilon", "v_prediction")
    wide_x0 = True

    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
                 beta_schedule: str = "linear", trained_betas=None, prediction_type: str = "epsilon",
                 timestep_spacing: str = "linspace", steps_offset: int = 0,
                 rescale_betas_zero_snr: bool = False):  # fmt: skip
        self._make_tables()

    def set_timesteps(self, num_inference_steps: int, device=None):
        """Chooses num_inference_steps timesteps and their sigmas. device has no effect."""
        self._lay_out(num_inference_steps)

    def _spread(self, lowest, highest, n):
        return None  # what another's config carries along has no effect here

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """From this step's sigma to the next; model_output, sample (B, C, …), prev_sample like sample.

        generator draws the step's noise. pred_original_sample is float32 also for samples of fewer bits.
        timestep is one of .timesteps; an integer, which may be an index, raises ValueError.
        """
        refuse_integer(timestep)
        return self._step(model_output, timestep, sample, return_dict, noise=(generator,))

    def update(self, model_output, i, sample, noise):
        """Ho et al. 2020, eq. 7, in terms of sigma; the last step draws noise too, and adds none of it."""
        sigma = self.sigmas[i]
        down, up = ancestral_levels(sigma, self.sigmas[i + 1])
        x0 = self._predicted_x0(model_output, sample, sigma)
        prev = move(sample, derivative(sample, x0, sigma), down - sigma)
        prev += up * noise()
        return prev, x0
