"""DDPM, ancestral sampling: Ho et al. 2020, arXiv:2006.11239.

Learned variances: Nichol & Dhariwal 2021, arXiv:2102.09672.
"""

import numpy as np

from minidiff.arguments import exactly_one, falling_timesteps
from minidiff.schedulers.schedule import Scheduler, log, posterior_variance, predicted_x0

LEARNED = ("learned", "learned_range")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED)


class DDPMScheduler(Scheduler):
    """Steps back through the Markov chain that the model was trained on, with fresh noise at every step.

    variance_type: how much noise. "fixed_small" and "fixed_large" are the lower and upper bound of Ho et al.
    (section 3.2); with "learned" and "learned_range" the model's output has twice the sample's channels, the
    second half says how much.
    """

    beta_schedules = (*Scheduler.beta_schedules, "laplace", "sigmoid")
    needs_timesteps = False

    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
                 beta_schedule: str = "linear", trained_betas=None, variance_type: str = "fixed_small",
                 clip_sample: bool = True, prediction_type: str = "epsilon", thresholding: bool = False,
                 dynamic_thresholding_ratio: float = 0.995, clip_sample_range: float = 1.0,
                 sample_max_value: float = 1.0, timestep_spacing: str = "leading", steps_offset: int = 0,
                 rescale_betas_zero_snr: bool = False):  # fmt: skip
        self.variance_type = self._one_of("variance_type", VARIANCES)
        self._make_tables()
        self.custom_timesteps = False

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, timesteps=None):
        """Chooses the timesteps: num_inference_steps of them, or a falling list of your own.

        device has no effect: timesteps are a NumPy array.
        """
        exactly_one(num_inference_steps=num_inference_steps, timesteps=timesteps)
        if timesteps is None:
            self.num_inference_steps = self._check_steps(num_inference_steps, self.config.num_train_timesteps)
            self.timesteps = self._spaced(self.num_inference_steps)
        else:
            self.timesteps = falling_timesteps(timesteps, self.config.num_train_timesteps)
        self.custom_timesteps = timesteps is not None

    def previous_timestep(self, timestep) -> int:
        """The next of .timesteps, where a step leads to; -1 after the last; t - 1 if none are set."""
        t = self._table_index(timestep)
        if not (self.custom_timesteps or self.num_inference_steps):
            return t - 1
        at = np.flatnonzero(self.timesteps == t)
        if not at.size:
            raise ValueError(f"timestep {t} is not one of .timesteps, so nothing follows it")
        return int(self.timesteps[at[0] + 1]) if at[0] + 1 < len(self.timesteps) else -1

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        """From timestep to the next one; model_output and sample (B, C, …), prev_sample like sample.

        generator draws the step's noise: see `minidiff.boundary.draw_normal`. Nothing is drawn at timestep 0.
        """
        return self._step(model_output, timestep, sample, return_dict, noise=(generator,))

    def update(self, model_output, t, sample, noise):
        """Ho et al. 2020, eq. 7: the mean of x_{t-1} given x_t and the x0 that the model sees, plus noise."""
        model_output, predicted_variance = self._split_variance(model_output, sample)
        a_t, a_prev = self._alphas_bar(t)
        b_t, ratio = 1 - a_t, a_t / a_prev
        kind = self._one_of("prediction_type", self.predictions)
        x0 = self._limited(predicted_x0(model_output, sample, np.sqrt(a_t), np.sqrt(b_t), kind))
        prev = np.sqrt(a_prev) * (1 - ratio) / b_t * x0 + np.sqrt(ratio) * (1 - a_prev) / b_t * sample
        if t > 0:
            prev = prev + self._deviation(t, predicted_variance) * noise()
        return prev, x0

    def _split_variance(self, model_output, sample):
        """The prediction, and what the model says about the variance, if the output's channels hold both."""
        if self.variance_type in LEARNED and model_output.shape[1] == 2 * sample.shape[1]:
            return np.split(model_output, 2, axis=1)
        return model_output, None

    def _fitting(self, model_output, sample):
        prediction = self._split_variance(model_output, sample)[0] if sample.ndim > 1 else model_output
        super()._fitting(prediction, sample)
        return model_output

    def _deviation(self, t, predicted_variance):
        """What the noise of the step at t is multiplied by: a number, or an array like the sample."""
        kind = self.variance_type
        if kind in LEARNED and predicted_variance is None:
            raise ValueError(
                f"{kind} variance needs a model with twice the sample's channels; else take fixed_small"
            )
        variance = self._get_variance(t, predicted_variance, kind)
        if kind == "fixed_small_log":
            return variance
        if kind == "learned_range":
            return np.exp(np.float32(0.5) * variance)
        return np.sqrt(variance)  # fixed_large_log is below 0: NaN, in diffusers too

    def _alphas_bar(self, t):
        """a_t and that of the timestep after it in sampling order: 1 after the last."""
        return self.alphas_cumprod[t], self._alpha_bar(self.previous_timestep(t))

    def _get_variance(self, t, predicted_variance=None, variance_type=None):
        """The variance at t as variance_type has it: itself, its root or its logarithm; see `_deviation`."""
        a_t, a_prev = self._alphas_bar(self._table_index(t))
        beta_t = 1 - a_t / a_prev  # "fixed_large"
        variance = posterior_variance(a_t, a_prev)  # "fixed_small"
        variance = np.maximum(variance, np.float32(1e-20))  # 0 has no logarithm
        kind = variance_type or self.config.variance_type
        if kind == "learned":
            return predicted_variance
        if kind == "learned_range":  # Nichol & Dhariwal 2021, eq. 15: between the bounds, in logarithms
            share = (predicted_variance + 1) / 2
            return share * log(beta_t) + (1 - share) * log(variance)
        if kind.startswith("fixed_large"):
            return log(beta_t) if kind == "fixed_large_log" else beta_t
        return np.exp(np.float32(0.5) * log(variance)) if kind == "fixed_small_log" else variance
