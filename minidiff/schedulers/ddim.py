"""DDIM, denoising diffusion implicit models: Song et al. 2020, arXiv:2010.02502."""

import numpy as np

from minidiff.schedulers.schedule import Scheduler, predicted_eps, predicted_x0, threshold


class DDIMScheduler(Scheduler):
    """Jumps over many training timesteps at once: without noise (eta 0), with DDPM's (eta 1), or in between.

    set_alpha_to_one: whether the last step ends at no noise at all, or at that of timestep 0.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas=None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ):
        self._make_tables()
        self.final_alpha_cumprod = np.float32(1) if set_alpha_to_one else self.alphas_cumprod[0]

    def set_timesteps(self, num_inference_steps: int, device=None):
        """Chooses num_inference_steps timesteps. device has no effect: they are a NumPy array."""
        self.num_inference_steps = self._check_steps(num_inference_steps, self.config.num_train_timesteps)
        self.timesteps = self._spaced(self.num_inference_steps)

    def step(
        self,
        model_output,
        timestep,
        sample,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator=None,
        variance_noise=None,
        return_dict: bool = True,
    ):
        """From timestep to N // n below it; model_output and sample (B, C, …), prev_sample like sample.

        eta in [0, 1]: the share of DDPM's noise, drawn with generator or given as variance_noise.
        use_clipped_model_output: whether eps follows an x0 that was clipped.
        """
        if eta > 0 and generator is not None and variance_noise is not None:
            raise ValueError("step takes a generator or variance_noise: one of them, not both")
        noise = self._noise(model_output, sample, generator, variance_noise)
        options = eta, use_clipped_model_output, noise
        return self._step(self.update, model_output, timestep, sample, *options, return_dict=return_dict)

    def update(self, model_output, t, sample, eta, use_clipped_model_output, noise):
        """Song et al. 2020, eq. 12: to the predicted x0, and back from there along eps to prev_t."""
        c = self.config
        prev_t = t - c.num_train_timesteps // self.num_inference_steps  # in every spacing, as in diffusers
        a_t, a_prev = self.alphas_cumprod[t], self._alpha_bar(prev_t)
        root_a, root_b = np.sqrt(a_t), np.sqrt(1 - a_t)
        x0 = predicted_x0(model_output, sample, root_a, root_b, c.prediction_type)
        eps = predicted_eps(model_output, sample, root_a, root_b, c.prediction_type)
        if c.thresholding:
            x0 = threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value)
        elif c.clip_sample:
            x0 = np.clip(x0, -c.clip_sample_range, c.clip_sample_range)
        if use_clipped_model_output:
            eps = (sample - root_a * x0) / root_b
        sigma = eta * np.sqrt(self._get_variance(t, prev_t))  # eq. 16
        prev = np.sqrt(a_prev) * x0 + np.sqrt(1 - a_prev - sigma * sigma) * eps
        return (prev + sigma * noise() if eta > 0 else prev), x0

    def _get_variance(self, timestep, prev_timestep):
        """The noise of a step with eta 1, as a variance: eq. 16 squared."""
        a_t = self.alphas_cumprod[self._table_index(timestep)]
        a_prev = self._alpha_bar(int(prev_timestep))
        return (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)
