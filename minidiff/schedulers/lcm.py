"""LCM, latent consistency models: Luo et al. 2023, arXiv:2310.04378.

A consistency model maps any point of a sampling path to the path's end, the data, in one call. More calls
refine: the guess is noised again, to a lower level, and mapped again (Song et al. 2023, arXiv:2303.01469,
algorithm 1). It was taught on few timesteps, `original_inference_steps`; those of sampling are among them.
"""

import numpy as np

from minidiff.schedulers.counting import CountingScheduler
from minidiff.schedulers.ddpm import DDPMScheduler
from minidiff.schedulers.schedule import combine, predicted_x0

SIGMA_DATA = 0.5  # the standard deviation of the data, in the scalings below


class LCMScheduler(CountingScheduler):
    """Pictures in 1 to 8 steps, from models that were distilled to consistency.

    original_inference_steps: how many timesteps the model was taught on. timestep_scaling: how fast the
    boundary condition, that at timestep 0 a sample is its own end, fades with t.
    """

    _compatibles = ()
    second_result = "denoised"

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear", trained_betas=None, original_inference_steps: int = 50,
        clip_sample: bool = False, clip_sample_range: float = 1.0, set_alpha_to_one: bool = True,
        steps_offset: int = 0, prediction_type: str = "epsilon", thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995, sample_max_value: float = 1.0,
        timestep_spacing: str = "leading", timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ):  # fmt: skip
        self._make_tables()
        self.final_alpha_cumprod = np.float32(1) if set_alpha_to_one else self.alphas_cumprod[0]
        self.custom_timesteps = False

    def set_timesteps(
        self, num_inference_steps: int | None = None, device=None,
        original_inference_steps: int | None = None, timesteps=None, strength: float = 1.0,
    ):  # fmt: skip
        """Chooses num_inference_steps of the timesteps that the model was taught on, or a falling list.

        original_inference_steps replaces the config's. strength in (0, 1]: sampling starts at that share of
        the noise, for image-to-image. device has no effect: timesteps are a NumPy array.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps takes num_inference_steps or timesteps: one of them, not both")
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}; it must be above 0 and at most 1")
        known, most = self._taught(original_inference_steps, strength)
        if timesteps is None:
            n = needed = self._check_steps(num_inference_steps, self.config.num_train_timesteps)
            if n > most:
                raise ValueError(f"num_inference_steps is {n}; the model was taught on {most}: take no more")
        else:
            known, needed = self._custom(timesteps), 1
            n = len(known)
            known = known[n - int(n * strength) :]
        if len(known) < needed:
            raise ValueError(f"strength {strength} leaves {len(known)} timesteps, not {needed}; raise it")
        if timesteps is None:
            known = known[np.linspace(0, len(known), n, endpoint=False).astype(np.int64)]
        self.timesteps, self.num_inference_steps = known, n
        self.custom_timesteps = timesteps is not None
        self._count_anew()

    def _taught(self, original_inference_steps, strength):
        """The timesteps that the model was taught on, falling, up to strength; how many there are in all."""
        given = original_inference_steps
        n_train = self.config.num_train_timesteps
        most = self.config.original_inference_steps if given is None else given
        most = self._check_steps(most, n_train, "original_inference_steps")
        return np.arange(int(most * strength), 0, -1) * (n_train // most) - 1, most

    previous_timestep = DDPMScheduler.previous_timestep  # the next of .timesteps

    def get_scalings_for_boundary_condition_discrete(self, timestep) -> tuple[float, float]:
        """c_skip and c_out: the shares of the sample and of x0 in the path's end; 1 and 0 at timestep 0."""
        scaled = timestep * self.config.timestep_scaling
        square = scaled**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / square, scaled / square**0.5

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """From timestep to the next; model_output, sample (B, C, …), prev_sample and denoised like sample.

        generator draws the step's noise: see `minidiff.boundary.draw_normal`. The last step draws nothing.
        """
        options = self._table_index(timestep), self._noise(model_output, sample, generator)
        return self._step(self.update, model_output, timestep, sample, *options, return_dict=return_dict)

    def update(self, model_output, i, sample, t, noise):
        """Luo et al. 2023, eq. 9: to the end of the path; then noised again, down to the next timestep."""
        a_t = self.alphas_cumprod[t]
        kind = self.config.prediction_type
        x0 = self._limited(predicted_x0(model_output, sample, np.sqrt(a_t), np.sqrt(1 - a_t), kind))
        c_skip, c_out = self.get_scalings_for_boundary_condition_discrete(t)
        prev = denoised = combine((c_out, c_skip), (x0, sample))
        # with strength below 1 and a list of timesteps, noise comes after the last step too, as in diffusers
        if i != self.num_inference_steps - 1:
            a_prev = self._alpha_bar(self.timesteps[i + 1] if i + 1 < len(self.timesteps) else t)
            prev = combine((np.sqrt(a_prev), np.sqrt(1 - a_prev)), (denoised, noise()))
        self._step_index += 1
        return prev, denoised
