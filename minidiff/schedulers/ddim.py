"""DDIM, denoising diffusion implicit models: Song et al. 2020, arXiv:2010.02502."""

import numpy as np

from minidiff.schedulers.schedule import Scheduler, combine, posterior_variance, predicted_eps, predicted_x0


class DDIMScheduler(Scheduler):
    """Jumps over many training timesteps at once: without noise (eta 0), with DDPM's (eta 1), or in between.

    set_alpha_to_one: whether the last step ends at no noise at all, or at that of timestep 0.
    """

    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
                 beta_schedule: str = "linear", trained_betas=None, clip_sample: bool = True,
                 set_alpha_to_one: bool = True, steps_offset: int = 0, prediction_type: str = "epsilon",
                 thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
                 clip_sample_range: float = 1.0, sample_max_value: float = 1.0,
                 timestep_spacing: str = "leading", rescale_betas_zero_snr: bool = False):  # fmt: skip
        self._make_tables()
        self.final_alpha_cumprod = np.float32(1) if set_alpha_to_one else self.alphas_cumprod[0]

    def set_timesteps(self, num_inference_steps: int, device=None):
        """Chooses num_inference_steps timesteps. device has no effect: they are a NumPy array."""
        self.num_inference_steps = self._check_steps(num_inference_steps, self.config.num_train_timesteps)
        self.timesteps = self._spaced(self.num_inference_steps)

    def step(self, model_output, timestep, sample, eta: float = 0.0, use_clipped_model_output: bool = False,
             generator=None, variance_noise=None, return_dict: bool = True):  # fmt: skip
        """From timestep to N // n below it; model_output and sample (B, C, …), prev_sample like sample.

        eta in [0, 1]: the share of DDPM's noise, drawn with generator or given as variance_noise.
        use_clipped_model_output: whether eps follows an x0 that was clipped.
        """
        if eta > 0 and generator is not None and variance_noise is not None:
            raise ValueError("step takes a generator or variance_noise: one of them, not both")
        options, noise = (eta, use_clipped_model_output), (generator, variance_noise)
        return self._step(model_output, timestep, sample, return_dict, *options, noise=noise)

    def update(self, model_output, t, sample, eta, use_clipped_model_output, noise):
        """Song et al. 2020, eq. 12: to the predicted x0, and back from there along eps to prev_t."""
        a_t, a_prev = self._alphas_bar(t)
        root_a, root_b = np.sqrt(a_t), np.sqrt(1 - a_t)
        kind = self._one_of("prediction_type", self.predictions)
        x0 = self._limited(predicted_x0(model_output, sample, root_a, root_b, kind))
        eps = predicted_eps(model_output, sample, root_a, root_b, kind)
        if use_clipped_model_output:
            eps = (sample - root_a * x0) / root_b
        sigma = eta * np.sqrt(posterior_variance(a_t, a_prev)) if eta else 0  # eq. 16
        prev = combine((np.sqrt(a_prev), np.sqrt(1 - a_prev - sigma * sigma)), (x0, eps))
        return (prev + sigma * noise() if eta > 0 else prev), x0

    def _alphas_bar(self, t):
        """a_t where the step at t starts, and where it leads to: equally far below t in every spacing."""
        jump = self.config.num_train_timesteps // self.num_inference_steps  # as in diffusers
        return self.alphas_cumprod[t], self._alpha_bar(t - jump)

    def _get_variance(self, timestep, prev_timestep):
        """The noise of a step with eta 1, as a variance: eq. 16 squared."""
        a_t = self.alphas_cumprod[self._table_index(timestep)]
        return posterior_variance(a_t, self._alpha_bar(int(prev_timestep)))
