"""DPM-Solver and DPM-Solver++: Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095.

A step multiplies the sample, and adds to it the integral over a polynomial in lambda: that of eps (dpmsolver)
or of x0 (dpmsolver++, stable under guidance), by its value and derivatives at one point. Each exists for the
ordinary and for the stochastic differential equation (sde-, with fresh noise in each step). The four are one
rule: what differs is a handful of numbers (`_weights`).
"""

import math

import numpy as np

from minidiff.arguments import exactly_one, refuse_timesteps_beside
from minidiff.boundary import number_list, whole_number
from minidiff.schedulers.exponential import ExponentialIntegrator
from minidiff.schedulers.schedule import combine, exp, log, space_timesteps
from minidiff.schedulers.sigmas import SPREADS


class DPMSolver(ExponentialIntegrator):
    """Base of the multistep and the singlestep solver, which differ in the points of their polynomial."""

    algorithms = ("dpmsolver++", "dpmsolver", "sde-dpmsolver", "sde-dpmsolver++")
    bend = 1  # times the second divided difference is taken for the second derivative; None: a line, no curve
    choosing = (*SPREADS, "use_flow_sigmas")  # options that leave no choice of timesteps

    def _choose_algorithm(self):
        """Takes the algorithm out of the config, with the names that other solvers' configs come with."""
        algorithm = self._replace("algorithm_type", ("deis",), self.algorithms)
        self._replace("solver_type", ("logrho", "bh1", "bh2"), ("midpoint", "heun"))
        self.predict_x0, self.stochastic = algorithm.endswith("++"), algorithm.startswith("sde")
        self.through_x0 = self.config.thresholding
        self.learned = self.config.get("variance_type") in ("learned", "learned_range")
        if not self.predict_x0 and self.config.final_sigmas_type == "zero":
            raise ValueError(f"{algorithm} can't end at sigma 0: set final_sigmas_type='sigma_min'")

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, mu=None, timesteps=None):
        """Chooses timesteps and sigmas: num_inference_steps of them, or those of a list of timesteps.

        mu: the shift of use_dynamic_shifting. device has no effect.
        """
        exactly_one(num_inference_steps=num_inference_steps, timesteps=timesteps)
        if timesteps is None:
            n = self._check_steps(num_inference_steps)
            timesteps = self._spaced(n, skip_last=True, end=self._end())
        else:
            refuse_timesteps_beside(self.config, self.choosing)
            timesteps = number_list(timesteps, "timesteps", whole=True)
            n = len(timesteps)
        self._visit(n, timesteps, self._flow_sigmas(n, mu))

    def _end(self):
        """The timestep below which sampling stays: from there on lambda is under lambda_min_clipped."""
        with np.errstate(divide="ignore"):
            lambdas = log(np.sqrt(self.alphas_cumprod)) - log(np.sqrt(1 - self.alphas_cumprod))
        clipped = np.searchsorted(lambdas[::-1], np.float32(self.config.lambda_min_clipped))
        return self.config.num_train_timesteps - int(clipped)

    def _fitting(self, model_output, sample):
        """The prediction alone, where the model says its variance in further channels."""
        learned = self.learned and self.config.prediction_type == "epsilon" and sample.ndim > 1
        return super()._fitting(model_output[:, : sample.shape[1]] if learned else model_output, sample)

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """From this step's sigma to the next; model_output, sample (B, C, …), prev_sample like sample.

        generator draws the noise of the stochastic algorithms.
        """
        return self._step(model_output, timestep, sample, return_dict, noise=(generator,))

    def update(self, model_output, i, sample, noise):
        """Lu et al. 2022: arXiv:2206.00927, eq. 3.7 and algorithms 1, 2; arXiv:2211.01095, algorithms 1, 2.

        The polynomial goes through the value at sigmas[start], with its slope there and its curve.
        """
        self._remember(self._convert(model_output, i, sample))
        order = self._order(i)
        start, others, sample = self._points(i, order, sample)
        outputs = self._recent(order)  # outputs[i - k] is what the model said at sigmas[k]
        first, lambda_s = outputs[i - start], self._levels[start][2]
        h, kept, noisy, value, slope, curve = self._weights(start, i + 1, order)
        nodes = [(self._levels[k][2] - lambda_s) / h for k in others]
        slopes = [(outputs[i - k] - first) * (1 / node) for k, node in zip(others, nodes, strict=True)]
        weights, parts = [kept, value, slope][: order + 1], [sample, first, *slopes[:1]]
        if order == 3:
            parts.append(slopes[1] - slopes[0])
            line = self.bend is None  # the slope to the last point alone
            weights.append(slope if line else (self.bend * curve - slope * nodes[0]) / (nodes[1] - nodes[0]))
        if self.stochastic:
            weights.append(noisy)
            parts.append(noise())
        return combine(weights, parts), None

    def _weights(self, start, end, order):
        """h, the factors of sample and noise, and those of the output at sigmas[start] and its derivatives.

        In float32 and in diffusers' order, since they cancel: for small h, another changes the third digit.
        """
        (alpha_s, sigma_s, lambda_s), (alpha_t, sigma_t, lambda_t) = self._levels[start], self._levels[end]
        h, noisy, half, x0 = lambda_t - lambda_s, None, 0.5, self.predict_x0
        kept, share, signed = (sigma_t / sigma_s, alpha_t, -h) if x0 else (alpha_t / alpha_s, sigma_t, h)
        if self.stochastic:
            grown = exp(2 * signed) - 1
            noisy = sigma_t * np.sqrt(-grown if x0 else grown)
            if x0:
                # half has diffusers' sign here; 0.5, as everywhere else, is what the integral gives
                kept, signed, half = kept * exp(signed), 2 * signed, -0.5
            else:
                share = 2 * share
        rise = exp(signed) - 1
        value, halved = -(share * rise), order == 2 and self.config.solver_type == "midpoint"
        slope = value / 2 if halved else -(share * (rise / signed - 1))
        return h, kept, noisy, value, slope, -(share * ((rise - signed) / (signed * signed) - half))


class DPMSolverMultistepScheduler(DPMSolver):
    """The most used solver: good pictures in 15 to 25 steps, one model call each.

    solver_order: 2 with guidance, 3 without. algorithm_type "dpmsolver++", "dpmsolver", "sde-dpmsolver++" or
    "sde-dpmsolver" (order 1 and 2). solver_type, of order 2: "midpoint" or "heun". lower_order_final: with
    fewer than 15 steps the last ones are of lower order; euler_at_final: the last one always is.
    use_lu_lambdas: sigmas evenly spread in their logarithm. lambda_min_clipped: sampling starts where lambda
    is no less. variance_type "learned" or "learned_range": the model predicts a variance, too, which is not
    used. use_flow_sigmas, flow_shift, use_dynamic_shifting, time_shift_type: for rectified-flow models.
    """

    choosing = (*DPMSolver.choosing, "use_lu_lambdas")
    no_third_order: tuple[str, ...] = ("sde-dpmsolver",)

    def __init__(self, num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
                 trained_betas=None, solver_order=2, prediction_type="epsilon", thresholding=False,
                 dynamic_thresholding_ratio=0.995, sample_max_value=1.0, algorithm_type="dpmsolver++",
                 solver_type="midpoint", lower_order_final=True, euler_at_final=False,
                 use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False,
                 use_lu_lambdas=False, use_flow_sigmas=False, flow_shift=1.0, final_sigmas_type="zero",
                 lambda_min_clipped=-math.inf, variance_type=None, timestep_spacing="linspace",
                 steps_offset=0, rescale_betas_zero_snr=False, use_dynamic_shifting=False,
                 time_shift_type="exponential"):  # fmt: skip
        self._make_tables()
        self._choose_algorithm()
        self.rounds = (use_karras_sigmas or use_lu_lambdas) and beta_schedule != "squaredcos_cap_v2"

    def _spread(self, lowest, highest, n):
        if not self.config.use_lu_lambdas or self.config.use_karras_sigmas:
            return super()._spread(lowest, highest, n)
        start, end = float(np.log(highest)), float(np.log(lowest))
        return np.exp(start + np.linspace(0, 1, n) * (end - start))  # Lu et al. 2022

    def step(self, model_output, timestep, sample, generator=None, variance_noise=None,
             return_dict: bool = True):  # fmt: skip
        """From this step's sigma to the next; model_output, sample (B, C, …), prev_sample like sample.

        generator draws the noise of the stochastic algorithms, in float32, or variance_noise is it.
        """
        noise = generator, variance_noise, np.float32
        return self._step(model_output, timestep, sample, return_dict, noise=noise)

    def _order(self, i):
        c, order = self.config, super()._order(i)
        if i == len(self.timesteps) - 1 and (c.euler_at_final or c.final_sigmas_type == "zero"):
            return 1
        if self._levels[i][2] == self._levels[i + 1][2]:
            return 1  # a step of no length, as at the end of Karras sigmas; diffusers has 0 / 0 there, NaN
        if order == 3 and c.algorithm_type in self.no_third_order:
            raise ValueError(f"{c.algorithm_type} has orders 1 and 2 here: set solver_order=2")
        return order

    def _points(self, i, order, sample):
        """Where the polynomial starts, its other points, and the sample at its start: from here back."""
        return i, range(i - 1, i - order, -1), sample


class DPMSolverSinglestepScheduler(DPMSolver):
    """Groups of one to solver_order model calls, each of which starts without memory.

    One step of order k takes k model calls, each a call of step: of order 1 and 2 to the points between, then
    of order k, from the sample at which the group started, over all of them.
    solver_order: 1 to 3, of a whole group; solver_type "midpoint" or "heun", of orders 2 and 3.
    algorithm_type "dpmsolver++", "dpmsolver" or "sde-dpmsolver++". lower_order_final: whether the last groups
    are of lower order; it becomes true where steps are left over, and where sampling ends at sigma 0. The
    other options are `DPMSolverMultistepScheduler`'s.
    """

    algorithms = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++")
    sample = None  # at which the group of steps started

    def __init__(self, num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
                 trained_betas=None, solver_order=2, prediction_type="epsilon", thresholding=False,
                 dynamic_thresholding_ratio=0.995, sample_max_value=1.0, algorithm_type="dpmsolver++",
                 solver_type="midpoint", lower_order_final=False, use_karras_sigmas=False,
                 use_exponential_sigmas=False, use_beta_sigmas=False, use_flow_sigmas=False, flow_shift=1.0,
                 final_sigmas_type="zero", lambda_min_clipped=-math.inf, variance_type=None,
                 use_dynamic_shifting=False, time_shift_type="exponential"):  # fmt: skip
        self._make_tables()
        self._choose_algorithm()
        whole_number(solver_order, "solver_order", 3)
        self.bend = None if self.config.solver_type == "midpoint" else 2
        self.order_list = self.get_order_list(num_train_timesteps)

    def get_order_list(self, num_inference_steps: int) -> list[int]:
        """The order of each step: groups 1, 2 … solver_order, in the end with a shorter one."""
        c, n, k = self.config, num_inference_steps, self.config.solver_order
        orders = [*range(1, k + 1)] * (n // k)
        if c.lower_order_final and n % k:
            orders += range(1, n % k + 1)
        elif c.lower_order_final:
            orders[-k:] = [*range(1, k), 1]
        if c.final_sigmas_type == "zero":
            orders[-1:] = [1]
        return orders

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, mu=None, timesteps=None):
        """Chooses timesteps and sigmas: num_inference_steps of them, or those of a list of timesteps.

        mu: the shift of use_dynamic_shifting. device has no effect.
        """
        super().set_timesteps(num_inference_steps, mu=mu, timesteps=timesteps)
        c, n = self.config, len(self.timesteps)
        if not c.lower_order_final and (n % c.solver_order or c.final_sigmas_type == "zero"):
            self._change_config(lower_order_final=True)
        self.order_list = self.get_order_list(n)

    def _spaced(self, n, skip_last=False, end=None):
        return space_timesteps("linspace", self.config.num_train_timesteps, n, 0, skip_last, end)

    def _order(self, i):
        known = sum(m is not None for m in self.model_outputs)  # fewer if sampling starts within a group
        return min(self.order_list[i], known)

    def _points(self, i, order, sample):
        """Where the polynomial starts, its other points, and the sample at its start: that of the group."""
        if order == 1:
            self.sample = sample
        return i - order + 1, range(i - order + 2, i + 1), self.sample
