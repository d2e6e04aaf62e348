"""DPM-Solver++ for EDM's models: `dpmsolver.py`'s steps at alpha 1, on `edm_euler.py`'s sigmas."""

from minidiff.schedulers.dpmsolver import DPMSolverMultistepScheduler
from minidiff.schedulers.edm_euler import PreconditionedScheduler
from minidiff.schedulers.schedule import linspace


class EDMDPMSolverMultistepScheduler(PreconditionedScheduler, DPMSolverMultistepScheduler):
    """The multistep DPM-Solver++ of order 1 to 3, or sde-dpmsolver++ of order 1 and 2.

    The options are those of `DPMSolverMultistepScheduler`, and of `PreconditionedScheduler`.
    """

    algorithms = ("dpmsolver++", "sde-dpmsolver++")
    no_third_order = ("sde-dpmsolver++",)
    needs_timesteps = True

    def __init__(
        self, sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras",
        num_train_timesteps=1000, prediction_type="epsilon", rho=7.0, solver_order=2, thresholding=False,
        dynamic_thresholding_ratio=0.995, sample_max_value=1.0, algorithm_type="dpmsolver++",
        solver_type="midpoint", lower_order_final=True, euler_at_final=False, final_sigmas_type="zero",
    ):  # fmt: skip
        self._make_tables()
        self._choose_algorithm()
        self._forget()

    def _make_tables(self):
        super()._make_tables()
        self._set_ramp(linspace(0, 1, self.config.num_train_timesteps))
        self.sigmas[-1] = 0  # before set_timesteps, whatever final_sigmas_type says

    def _set_ramp(self, ramp):
        super()._set_ramp(ramp)
        if self.config.final_sigmas_type == "sigma_min":
            self.sigmas[-1] = self.config.sigma_min  # also where one step starts, and ends, at sigma_max

    def set_timesteps(self, num_inference_steps: int | None = None, device=None):
        """Chooses num_inference_steps sigmas, and timesteps for them. device has no effect."""
        self._set_ramp(linspace(0, 1, self._check_steps(num_inference_steps)))
        self._set_levels(self.timesteps)

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """From this step's sigma to the next; model_output, sample (B, C, …), prev_sample like sample.

        generator draws the noise of sde-dpmsolver++.
        """
        noise = self._noise(model_output, sample, generator)
        return self._step(self.update, model_output, timestep, sample, noise, return_dict=return_dict)

    def _convert(self, model_output, i, sample):
        return self._thresholded(self.precondition_outputs(sample, model_output, self.sigmas[i]))
