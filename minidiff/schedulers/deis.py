"""DEIS, the diffusion exponential integrator sampler: Zhang & Chen 2022, arXiv:2204.13902.

In rho = sigma_t / alpha the sampling equation is d(x / alpha) = eps d(rho). Of the paper's multistep variants
this is log(rho): eps is taken as a polynomial in log(rho) through its last values.
"""

import numpy as np

from minidiff.schedulers.exponential import ExponentialIntegrator
from minidiff.schedulers.schedule import combine, exp


class DEISMultistepScheduler(ExponentialIntegrator):
    """Good pictures in 15 to 25 steps, with polynomials of eps.

    solver_order: 1 to 3. algorithm_type is "deis", solver_type "logrho". lower_order_final: whether, with
    fewer than 15 steps, the last ones are of lower order. use_flow_sigmas, flow_shift, use_dynamic_shifting,
    time_shift_type: for rectified-flow models. Sampling ends at the noise of timestep 0, not without any.
    """

    predict_x0 = False
    repeats_last = True

    def __init__(self, num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
                 trained_betas=None, solver_order=2, prediction_type="epsilon", thresholding=False,
                 dynamic_thresholding_ratio=0.995, sample_max_value=1.0, algorithm_type="deis",
                 solver_type="logrho", lower_order_final=True, use_karras_sigmas=False,
                 use_exponential_sigmas=False, use_beta_sigmas=False, use_flow_sigmas=False, flow_shift=1.0,
                 timestep_spacing="linspace", steps_offset=0, use_dynamic_shifting=False,
                 time_shift_type="exponential"):  # fmt: skip
        self._make_tables()
        self._replace("algorithm_type", ("dpmsolver", "dpmsolver++"), ("deis",))
        self._replace("solver_type", ("midpoint", "heun", "bh1", "bh2"), ("logrho",))
        self.through_x0 = prediction_type != "epsilon" or thresholding

    def set_timesteps(self, num_inference_steps: int, device=None, mu=None):
        """Chooses timesteps and sigmas. mu: the shift of use_dynamic_shifting. device has no effect."""
        n = self._check_steps(num_inference_steps)
        self._visit(n, self._spaced(n, skip_last=True), self._flow_sigmas(n, mu))

    def _final_sigma(self, sigma_min):
        return sigma_min  # at sigma 0 log(rho) has no end

    def _prepare(self, alpha, sigma, lambdas):
        rho = sigma / alpha
        self._rho = [*zip(rho, np.log(rho), strict=True)]

    def update(self, model_output, i, sample):
        """Zhang & Chen 2022, eq. 14 and 15, with polynomials in log(rho)."""
        self._remember(self._convert(model_output, i, sample))
        order = self._order(i)
        outputs = self._recent(order)
        (alpha_s, _, lambda_s), (alpha_t, sigma_t, lambda_t) = self._levels[i], self._levels[i + 1]
        if order == 1:  # the integral of 1, written with lambda: near alpha 0 its rounding counts
            weights = alpha_t / alpha_s, -sigma_t * (exp(lambda_t - lambda_s) - 1)
            return combine(weights, [sample, *outputs]), None
        logs, weights = [self._rho[i - k][1] for k in range(order)], [1]
        for k in range(order):
            own, *others = logs[k:] + logs[:k]
            start, end = (lagrange_integral(*self._rho[at], own, others) for at in (i, i + 1))
            weights.append(end - start)
        prev = combine(weights, [sample / alpha_s, *outputs])
        prev *= alpha_t
        return prev, None


def lagrange_integral(rho, log_rho, own, others):
    """The integral up to rho of the polynomial in log(rho) that is 1 at own and 0 at the one or two others.

    In float32 and in diffusers' order, since it cancels.
    """
    if len(others) == 1:
        return rho * (-others[0] + log_rho - 1) / (own - others[0])
    c, d = others
    value = c * (d - log_rho + 1) - d * log_rho + d + log_rho * log_rho - 2 * log_rho + 2
    return rho * value / ((own - c) * (own - d))
