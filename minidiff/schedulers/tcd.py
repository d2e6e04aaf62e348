"""TCD, trajectory consistency distillation: Zheng et al. 2024, arXiv:2402.19159.

Where LCM maps to the end of the path and noises that again, TCD maps to a point of the path a little beyond
the next timestep and noises it from there: how far beyond is eta's choice.
"""

import numpy as np

from minidiff.schedulers.lcm import LCMScheduler
from minidiff.schedulers.schedule import combine, predicted_eps, predicted_x0


class TCDScheduler(LCMScheduler):
    """LCM's timesteps with less or no fresh noise: better pictures where LCM's blur, at more steps.

    Options are LCM's; clipping, thresholding and timestep_scaling have no effect, as in diffusers.
    """

    second_result = "pred_noised_sample"

    def _taught(self, original_inference_steps, strength):
        """As LCM's; original_inference_steps, if given, is only a limit, and every timestep may be chosen."""
        if original_inference_steps is None:
            return super()._taught(None, strength)
        return np.arange(int(self.config.num_train_timesteps * strength))[::-1], original_inference_steps

    def step(
        self, model_output, timestep, sample, eta: float = 0.3, generator=None, return_dict: bool = True
    ):
        """From timestep to the next; model_output, sample (B, C, …), prev_sample, pred_noised_sample like it.

        eta in [0, 1], the paper's gamma: 0 adds no noise; 1 goes to timestep 0 and noises all of it again, as
        LCM does. generator draws the noise: see `minidiff.boundary.draw_normal`; the last step draws nothing.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it must be in [0, 1]")
        options = self._table_index(timestep), eta, self._noise(model_output, sample, generator)
        return self._step(self.update, model_output, timestep, sample, *options, return_dict=return_dict)

    def update(self, model_output, i, sample, t, eta, noise):
        """Zheng et al. 2024, section 4.2: along eps to s = (1 - eta) t_next, then noised up to t_next."""
        t_next = int(self.timesteps[i + 1]) if i + 1 < len(self.timesteps) else 0
        s = int(np.float32(1 - eta) * np.float32(t_next))  # rounded down, in float32 as torch does
        a_t, a_s, a_next = (self.alphas_cumprod[k] for k in (t, s, t_next))
        levels = np.sqrt(a_t), np.sqrt(1 - a_t), self.config.prediction_type
        x0, eps = (find(model_output, sample, *levels) for find in (predicted_x0, predicted_eps))
        prev = noised = combine((np.sqrt(a_s), np.sqrt(1 - a_s)), (x0, eps))
        if eta > 0 and i != self.num_inference_steps - 1:
            kept = a_next / a_s
            prev = combine((np.sqrt(kept), np.sqrt(1 - kept)), (noised, noise()))
        self._step_index += 1
        return prev, noised
