"""DDIM backwards, from data to noise: Song et al. 2020, arXiv:2010.02502, section 4.3.

Without noise DDIM's step follows a differential equation, which can be walked in both directions: the noise
that it finds gives the picture back, for editing (Mokady et al. 2022, arXiv:2211.09794).
"""

from minidiff.config import Config
from minidiff.schedulers.ddim import DDIMScheduler


class DDIMInverseScheduler(DDIMScheduler):
    """DDIM's step from less noise to more; timesteps rise.

    set_alpha_to_one: whether the first step starts at no noise at all, or at that of timestep 0;
    set_alpha_to_zero is its old name, and wins where it is given.
    """

    _compatibles = ()

    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
                 beta_schedule: str = "linear", trained_betas=None, clip_sample: bool = True,
                 set_alpha_to_one: bool = True, steps_offset: int = 0, prediction_type: str = "epsilon",
                 clip_sample_range: float = 1.0, timestep_spacing: str = "leading",
                 rescale_betas_zero_snr: bool = False, set_alpha_to_zero: bool | None = None):  # fmt: skip
        if set_alpha_to_zero is None:  # then the config says nothing of it, as in diffusers
            self._set_config(Config({k: v for k, v in self.config.items() if k != "set_alpha_to_zero"}))
        else:
            set_alpha_to_one = set_alpha_to_zero
        super().__init__(set_alpha_to_one=set_alpha_to_one)
        self.timesteps = self.timesteps[::-1].copy()
        self.initial_alpha_cumprod = self.final_alpha_cumprod

    def set_timesteps(self, num_inference_steps: int, device=None):
        """Chooses num_inference_steps rising timesteps. device has no effect: they are a NumPy array."""
        if self.config.timestep_spacing == "linspace":
            raise ValueError("timestep_spacing is 'linspace'; backwards it must be leading or trailing")
        super().set_timesteps(num_inference_steps)
        self.timesteps = self.timesteps[::-1].copy()

    def step(self, model_output, timestep, sample, return_dict: bool = True):
        """To timestep from N // n below it; model_output and sample (B, C, …), prev_sample like sample."""
        return super().step(model_output, timestep, sample, return_dict=return_dict)

    def _alphas_bar(self, t):
        """DDIM's, the other way round: the model was told t, but the sample is taken to be a step below."""
        return super()._alphas_bar(t)[::-1]

    _limited = DDIMScheduler._clipped  # thresholding in a config from another class doesn't count
