"""Heun's method: Karras et al. 2022, arXiv:2206.00364, algorithm 1."""

from minidiff.arguments import exactly_one
from minidiff.schedulers.exploding import ExplodingScheduler, derivative, move


class HeunDiscreteScheduler(ExplodingScheduler):
    """A straight step as a trial, then the same one along the mean of the derivatives at both of its ends.

    Order 2 for two model calls, each a call of step: timesteps and sigmas, but for the ends, come twice.
    Between the two `sample`, `prev_derivative` and `dt` hold where the step started, the derivative there,
    its length.
    """

    order = 2
    beta_schedules = (*ExplodingScheduler.beta_schedules, "exp")

    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
                 beta_schedule: str = "linear", trained_betas=None, prediction_type: str = "epsilon",
                 use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False,
                 use_beta_sigmas: bool = False, clip_sample: bool = False, clip_sample_range: float = 1.0,
                 timestep_spacing: str = "linspace", steps_offset: int = 0):  # fmt: skip
        self._make_tables()
        self._lay_out_all()

    def set_timesteps(self, num_inference_steps=None, device=None, num_train_timesteps=None, timesteps=None):
        """Chooses num_inference_steps timesteps, or takes a list of your own, each to come once in it.

        num_train_timesteps: to be used in place of the config's. device has no effect.
        """
        exactly_one(num_inference_steps=num_inference_steps, timesteps=timesteps)
        self._lay_out(num_inference_steps, timesteps, num_train_timesteps)
        self.timesteps = self.timesteps.repeat(2)[1:]  # (2n - 1,)
        self.sigmas = self.sigmas.repeat(2)[1:-1]  # (2n,)
        self.sample = self.prev_derivative = self.dt = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first of a step's two."""
        return self.dt is None

    def update(self, model_output, i, sample):
        """Karras et al. 2022, algorithm 1: its Euler step in the first call, the correction in the second."""
        sigma = self.sigmas[i]
        x0 = self._clipped(self._predicted_x0(model_output, sample, sigma))
        slope = derivative(sample, x0, sigma)
        if self.state_in_first_order:
            self.sample, self.prev_derivative, self.dt = sample, slope, self.sigmas[i + 1] - sigma
            prev = move(sample, slope, self.dt)
        else:
            slope += self.prev_derivative
            slope /= 2
            prev = move(self.sample, slope, self.dt)
            self.sample = self.prev_derivative = self.dt = None
        return prev, x0
