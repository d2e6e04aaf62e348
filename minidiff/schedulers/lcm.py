"""LCM, latent consistency models, and TCD, which steps along their paths: two ways to sample in 1 to 8 steps.

A consistency model maps any point of a sampling path to the path's end, the data, in one call. More calls
refine: the guess is noised again, to a lower level, and mapped again (Song et al. 2023, arXiv:2303.01469,
algorithm 1). It was taught on few timesteps, `original_inference_steps`; those of sampling are among them.
LCM: Luo et al. 2023, arXiv:2310.04378. TCD, trajectory consistency distillation: Zheng et al. 2024,
arXiv:2402.19159.
"""

import numpy as np

from minidiff.arguments import exactly_one, falling_timesteps, share
from minidiff.boundary import whole_number
from minidiff.schedulers.counting import CountingScheduler
from minidiff.schedulers.ddpm import DDPMScheduler
from minidiff.schedulers.schedule import combine, predicted_eps, predicted_x0

SIGMA_DATA = 0.5  # the standard deviation of the data, in the scalings below


class LCMScheduler(CountingScheduler):
    """Pictures in 1 to 8 steps, from models that were distilled to consistency.

    original_inference_steps: how many timesteps the model was taught on. timestep_scaling: how fast the
    boundary condition, that at timestep 0 a sample is its own end, fades with t.
    """

    _compatibles = ()
    second_result = "denoised"

    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
                 beta_schedule: str = "scaled_linear", trained_betas=None, original_inference_steps: int = 50,
                 clip_sample: bool = False, clip_sample_range: float = 1.0, set_alpha_to_one: bool = True,
                 steps_offset: int = 0, prediction_type: str = "epsilon", thresholding: bool = False,
                 dynamic_thresholding_ratio: float = 0.995, sample_max_value: float = 1.0,
                 timestep_spacing: str = "leading", timestep_scaling: float = 10.0,
                 rescale_betas_zero_snr: bool = False):  # fmt: skip
        self._make_tables()
        self.final_alpha_cumprod = np.float32(1) if set_alpha_to_one else self.alphas_cumprod[0]
        self.custom_timesteps = False

    def set_timesteps(self, num_inference_steps: int | None = None, device=None,
                      original_inference_steps: int | None = None, timesteps=None,
                      strength: float = 1.0):  # fmt: skip
        """Chooses num_inference_steps of the timesteps that the model was taught on, or a falling list.

        original_inference_steps replaces the config's. strength in (0, 1]: sampling starts at that share of
        the noise, for image-to-image. device has no effect: timesteps are a NumPy array.
        """
        exactly_one(num_inference_steps=num_inference_steps, timesteps=timesteps)
        share(strength, "strength")
        known, most = self._taught(original_inference_steps, strength)
        if timesteps is None:
            n = taken = self._check_steps(num_inference_steps, min(most, self.config.num_train_timesteps))
        else:
            known, n = falling_timesteps(timesteps, self.config.num_train_timesteps), len(timesteps)
            known = known[n - int(n * strength) :]
            taken = max(len(known), 1)
        if len(known) < taken:
            raise ValueError(f"strength {strength} leaves {len(known)} timesteps, not {taken}; raise it")
        self.timesteps = known[np.linspace(0, len(known), taken, endpoint=False).astype(np.int64)]
        self.num_inference_steps, self.custom_timesteps = n, timesteps is not None
        self._count_anew()

    def _taught(self, original_inference_steps, strength):
        """The timesteps that the model was taught on, falling, up to strength; how many there are in all."""
        given, n_train = original_inference_steps, self.config.num_train_timesteps
        most = self.config.original_inference_steps if given is None else given
        most = whole_number(most, "original_inference_steps", n_train)
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
        t = self._table_index(timestep)
        return self._step(model_output, timestep, sample, return_dict, t, noise=(generator,))

    def update(self, model_output, i, sample, t, noise):
        """Luo et al. 2023, eq. 9: to the end of the path; then noised again, down to the next timestep."""
        a_t, kind = self.alphas_cumprod[t], self._one_of("prediction_type", self.predictions)
        x0 = self._limited(predicted_x0(model_output, sample, np.sqrt(a_t), np.sqrt(1 - a_t), kind))
        c_skip, c_out = self.get_scalings_for_boundary_condition_discrete(t)
        prev = denoised = combine((c_out, c_skip), (x0, sample))
        # with strength below 1 and a list of timesteps, noise comes after the last step too, as in diffusers
        if i != self.num_inference_steps - 1:
            a_prev = self._alpha_bar(self.timesteps[i + 1] if i + 1 < len(self.timesteps) else t)
            prev = combine((np.sqrt(a_prev), np.sqrt(1 - a_prev)), (denoised, noise()))
        return prev, denoised


class TCDScheduler(LCMScheduler):
    """LCM's timesteps with less or no fresh noise: better pictures where LCM's blur, at more steps.

    Where LCM maps to the end of the path and noises that again, TCD maps to a point of the path a little
    beyond the next timestep and noises it from there: how far beyond is eta's choice. Options are LCM's;
    clipping, thresholding and timestep_scaling have no effect, as in diffusers.
    """

    second_result = "pred_noised_sample"

    def _taught(self, original_inference_steps, strength):
        """As LCM's; original_inference_steps, if given, is only a limit, and every timestep may be chosen."""
        if original_inference_steps is None:
            return super()._taught(None, strength)
        return np.arange(int(self.config.num_train_timesteps * strength))[::-1], original_inference_steps

    def step(self, model_output, timestep, sample, eta: float = 0.3, generator=None,
             return_dict: bool = True):  # fmt: skip
        """From timestep to the next; model_output, sample (B, C, …), prev_sample, pred_noised_sample like it.

        eta in [0, 1], the paper's gamma: 0 adds no noise; 1 goes to timestep 0 and noises all of it again, as
        LCM does. generator draws the noise: see `minidiff.boundary.draw_normal`; the last step draws nothing.
        """
        share(eta, "eta")
        t = self._table_index(timestep)
        return self._step(model_output, timestep, sample, return_dict, t, eta, noise=(generator,))

    def update(self, model_output, i, sample, t, eta, noise):
        """Zheng et al. 2024, section 4.2: along eps to s = (1 - eta) t_next, then noised up to t_next."""
        t_next = int(self.timesteps[i + 1]) if i + 1 < len(self.timesteps) else 0
        s = int(np.float32(1 - eta) * np.float32(t_next))  # rounded down, in float32 as torch does
        a_t, a_s, a_next = (self.alphas_cumprod[k] for k in (t, s, t_next))
        levels = np.sqrt(a_t), np.sqrt(1 - a_t), self._one_of("prediction_type", self.predictions)
        x0, eps = (find(model_output, sample, *levels) for find in (predicted_x0, predicted_eps))
        prev = noised = combine((np.sqrt(a_s), np.sqrt(1 - a_s)), (x0, eps))
        if eta > 0 and i != self.num_inference_steps - 1:
            kept = a_next / a_s
            prev = combine((np.sqrt(kept), np.sqrt(1 - kept)), (noised, noise()))
        return prev, noised
