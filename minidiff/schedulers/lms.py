"""A linear multistep method for unevenly spread sigmas: Adams-Bashforth (k-diffusion's `sample_lms`)."""

from minidiff.boundary import floats, whole_number
from minidiff.numerics import solve_vandermonde
from minidiff.schedulers.exploding import ExplodingScheduler, derivative
from minidiff.schedulers.schedule import combine


class LMSDiscreteScheduler(ExplodingScheduler):
    """Follows a polynomial through the last derivatives, which `derivatives` keeps: order 4 for one call."""

    unbounded = ("use_karras_sigmas",)  # as in diffusers

    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
                 beta_schedule: str = "linear", trained_betas=None, use_karras_sigmas: bool = False,
                 use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False,
                 prediction_type: str = "epsilon", timestep_spacing: str = "linspace",
                 steps_offset: int = 0):  # fmt: skip
        self._make_tables()
        self._lay_out_all()

    def set_timesteps(self, num_inference_steps: int, device=None):
        """Chooses num_inference_steps timesteps and their sigmas. device has no effect."""
        self._lay_out(num_inference_steps)
        self.derivatives = []  # the newest at the end

    def step(self, model_output, timestep, sample, order: int = 4, return_dict: bool = True):
        """From this step's sigma to the next; model_output, sample (B, C, …), prev_sample like sample.

        order: how many derivatives the polynomial goes through, at least 1; the first steps have fewer.
        """
        order = whole_number(order, "order")
        return self._step(model_output, timestep, sample, return_dict, order)

    def update(self, model_output, i, sample, order):
        """Hairer, Nørsett & Wanner 1993, section III.5: the integral of a polynomial over the step.

        A start in the middle has fewer derivatives than weights; the rest counts as 0, as in diffusers.
        """
        sigma = self.sigmas[i]
        x0 = self._predicted_x0(model_output, sample, sigma)
        self.derivatives = [*self.derivatives, derivative(sample, x0, sigma)][-order:]
        weights = self._weights(min(i + 1, order), i)
        known = [floats(d) for d in self.derivatives[::-1]][: len(weights)]
        prev = combine(weights[: len(known)], known)
        prev += sample
        return prev, x0

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """The weight of the derivative of current_order steps ago in step t, of `order` derivatives."""
        return self._weights(order, t)[current_order]

    def _weights(self, order, i):
        """Integrals from sigma_i to the next of the Lagrange polynomials on the last `order` sigmas.

        They are the weights that integrate 1, x, x^2, … exactly.
        """
        origin = float(self.sigmas[i])
        nodes = [float(sigma) - origin for sigma in self.sigmas[i - order + 1 : i + 1][::-1]]
        length = float(self.sigmas[i + 1]) - origin
        return solve_vandermonde(nodes, [length**k / k for k in range(1, order + 1)])
