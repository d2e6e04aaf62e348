"""EDM's own models and schedule: Karras et al. 2022, arXiv:2206.00364, section 5 and table 1.

A network is told c_noise(sigma), sees c_in x, and its output F means x0 = c_skip x + c_out F: so what goes in
and what is to be learned have variance 1 at every sigma.
"""

import numpy as np

from minidiff.arguments import exactly_one, positive, refuse_integer
from minidiff.boundary import floats, like, number_list, to_numpy
from minidiff.schedulers.dpmsolver import DPMSolver, DPMSolverMultistepScheduler
from minidiff.schedulers.euler import EulerDiscreteScheduler
from minidiff.schedulers.exploding import ExplodingScheduler
from minidiff.schedulers.schedule import linspace, log
from minidiff.schedulers.sigmas import karras, logarithms


class PreconditionedScheduler(ExplodingScheduler):
    """Base of the schedulers for EDM's models: no betas; sigmas lie between sigma_min and sigma_max.

    sigma_data: the standard deviation of the training data. sigma_schedule: "karras", bent by rho, or
    "exponential".
    """

    _compatibles = ()
    predictions = ("epsilon", "v_prediction")

    def _make_tables(self):
        c = self.config
        self._one_of("sigma_schedule", ("karras", "exponential"))
        for key in ("sigma_min", "sigma_max", "sigma_data", "rho"):
            positive(c[key], key)
        self.data_variance = c.sigma_data**2
        self._set_ramp(np.linspace(0, 1, self._train_timesteps() + 1))

    def _set_ramp(self, ramp):
        """Sets the sigmas, and timesteps for them, at ramp (n,): 0 is sigma_max, 1 sigma_min (eq. 5)."""
        c = self.config
        if c.sigma_schedule == "karras":
            sigmas = karras(c.sigma_min, c.sigma_max, len(ramp), c.rho, ramp)
        else:  # laid out upwards, so that a single one is sigma_min, and in float32, as in diffusers
            logs = linspace(*logarithms(c.sigma_min, c.sigma_max), len(ramp))
            sigmas = np.exp(logs, dtype=np.float64)[::-1]
        self._set_sigmas(sigmas, self._final_sigma(sigmas[-1]))
        self.timesteps = self.precondition_noise(self.sigmas[:-1])

    @property
    def init_noise_sigma(self) -> float:
        """What to multiply standard normal noise with: it becomes the sample that sampling starts from."""
        return (self.config.sigma_max**2 + 1) ** 0.5

    def precondition_inputs(self, sample, sigma):
        """c_in x: what the network sees of sample at sigma."""
        return sample * (1 / (sigma**2 + self.data_variance) ** 0.5)

    def precondition_noise(self, sigma):
        """c_noise: what the network is told in place of sigma, an array or tensor; (1,) for a number."""
        c_noise = np.asarray(0.25 * log(np.asarray(to_numpy(sigma), np.float32)))
        return like(c_noise, sigma) if hasattr(sigma, "dtype") else c_noise.reshape(1)

    def precondition_outputs(self, sample, model_output, sigma):
        """x0 = c_skip x + c_out F, F the network's output. "v_prediction" models have c_out's other sign."""
        kind = self._one_of("prediction_type", self.predictions)
        total = sigma**2 + self.data_variance
        c_skip, c_out = self.data_variance / total, sigma * self.data_variance**0.5 / total**0.5
        return c_skip * sample + (c_out if kind == "epsilon" else -c_out) * model_output

    def _predicted_x0(self, model_output, sample, sigma):
        return self.precondition_outputs(sample, model_output, sigma)


class EDMEulerScheduler(PreconditionedScheduler, EulerDiscreteScheduler):
    """Euler's method for EDM's models; order 1."""

    without_churn = ()

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5,
                 sigma_schedule: str = "karras", num_train_timesteps: int = 1000,
                 prediction_type: str = "epsilon", rho: float = 7.0,
                 final_sigmas_type: str = "zero"):  # fmt: skip
        self._make_tables()

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None):
        """Chooses num_inference_steps sigmas, or, as in diffusers, those at a ramp: sigmas (n,), from 0 to 1.

        0 stands for sigma_max, 1 for sigma_min. device has no effect.
        """
        exactly_one(num_inference_steps=num_inference_steps, sigmas=sigmas)
        n = num_inference_steps
        ramp = number_list(sigmas, "sigmas") if n is None else np.linspace(0, 1, self._check_steps(n))
        if ramp.min() < 0 or ramp.max() > 1:
            raise ValueError(f"sigmas is {sigmas!r}; it must be a ramp from 0 (sigma_max) to 1 (sigma_min)")
        self._set_ramp(ramp)
        self.num_inference_steps = len(ramp)

    def step(self, model_output, timestep, sample, s_churn: float = 0.0, s_tmin: float = 0.0,
             s_tmax: float = float("inf"), s_noise: float = 1.0, generator=None, return_dict: bool = True,
             pred_original_sample=None):  # fmt: skip
        """As `EulerDiscreteScheduler.step`; pred_original_sample: x0, if it is known already."""
        refuse_integer(timestep)
        x0 = pred_original_sample
        options = s_churn, s_tmin, s_tmax, s_noise, x0 if x0 is None else floats(x0, "pred_original_sample")
        return self._step(model_output, timestep, sample, return_dict, *options, noise=(generator,))


class EDMDPMSolverMultistepScheduler(PreconditionedScheduler, DPMSolverMultistepScheduler):
    """The multistep DPM-Solver++ of order 1 to 3, or sde-dpmsolver++ of order 1 and 2: its steps at alpha 1.

    The options are those of `DPMSolverMultistepScheduler`, and of `PreconditionedScheduler`.
    """

    algorithms = ("dpmsolver++", "sde-dpmsolver++")
    no_third_order = ("sde-dpmsolver++",)
    needs_timesteps = True

    def __init__(self, sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras",
                 num_train_timesteps=1000, prediction_type="epsilon", rho=7.0, solver_order=2,
                 thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0,
                 algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=True,
                 euler_at_final=False, final_sigmas_type="zero"):  # fmt: skip
        self._make_tables()
        self._choose_algorithm()
        self._forget()

    def _make_tables(self):
        super()._make_tables()
        self._set_ramp(linspace(0, 1, self.config.num_train_timesteps))
        self.sigmas[-1] = 0  # before set_timesteps, whatever final_sigmas_type says

    def _final_sigma(self, sigma_min):
        return super()._final_sigma(self.config.sigma_min)  # whatever the last sigma is

    def set_timesteps(self, num_inference_steps: int | None = None, device=None):
        """Chooses num_inference_steps sigmas, and timesteps for them. device has no effect."""
        self._set_ramp(linspace(0, 1, self._check_steps(num_inference_steps)))
        self._set_levels(self.timesteps)

    step = DPMSolver.step  # no variance_noise

    def _convert(self, model_output, i, sample):
        return self._thresholded(self.precondition_outputs(sample, model_output, self.sigmas[i]))
