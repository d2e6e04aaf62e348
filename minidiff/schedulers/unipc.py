"""UniPC, a unified predictor-corrector: Zhao et al. 2023, arXiv:2302.04867.

In lambda = log(alpha / sigma_t) the sampling equation is a plain integral over the model's x0 (or eps). The
predictor (UniP) takes x0 as a polynomial through its last values; the corrector (UniC) goes over the last
step once more when the model has seen where it led to: one order better for no more model calls.
"""

import numpy as np

from minidiff.arguments import exactly_one
from minidiff.numerics import solve_vandermonde
from minidiff.schedulers.exponential import ExponentialIntegrator
from minidiff.schedulers.schedule import combine
from minidiff.schedulers.sigmas import flow


class UniPCMultistepScheduler(ExponentialIntegrator):
    """Good pictures in 10 to 25 steps.

    solver_order: points of the polynomial; 2 with guidance, 3 without. solver_type "bh1" or "bh2": the
    paper's B(h) = h or e^h - 1. predict_x0: whether the polynomial is x0's or eps's. disable_corrector: steps
    after which nothing is corrected. solver_p: another scheduler to take the predictor's place.
    use_flow_sigmas, flow_shift, use_dynamic_shifting, time_shift_type, shift_terminal: for rectified-flow
    models.
    """

    repeats_last = True

    def __init__(self, num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
                 trained_betas=None, solver_order=2, prediction_type="epsilon", thresholding=False,
                 dynamic_thresholding_ratio=0.995, sample_max_value=1.0, predict_x0=True, solver_type="bh2",
                 lower_order_final=True, disable_corrector=(), solver_p=None, use_karras_sigmas=False,
                 use_exponential_sigmas=False, use_beta_sigmas=False, use_flow_sigmas=False, flow_shift=1.0,
                 timestep_spacing="linspace", steps_offset=0, final_sigmas_type="zero",
                 rescale_betas_zero_snr=False, use_dynamic_shifting=False, time_shift_type="exponential",
                 sigma_min=None, sigma_max=None, shift_terminal=None):  # fmt: skip
        if shift_terminal is not None and not use_flow_sigmas:
            raise ValueError("shift_terminal works only with use_flow_sigmas=True")
        self._make_tables()
        self._replace("solver_type", ("midpoint", "heun", "logrho"), ("bh2", "bh1"))
        self.predict_x0, self.disable_corrector, self.solver_p = predict_x0, disable_corrector, solver_p

    def _forget(self):
        super()._forget()
        self.this_order = 0  # of the last predictor
        self.last_sample = None  # where it started from

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, sigmas=None, mu=None):
        """Chooses timesteps and sigmas: num_inference_steps of them or, for flow models, a list of sigmas.

        mu: the shift of use_dynamic_shifting. device has no effect.
        """
        c = self.config
        exactly_one(num_inference_steps=num_inference_steps, sigmas=sigmas)
        if sigmas is not None and not c.use_flow_sigmas:
            raise ValueError("sigmas can be given only with use_flow_sigmas=True")
        given = None if sigmas is None else np.array(sigmas)
        n = self._check_steps(num_inference_steps if given is None else len(given))
        even = flow(n, c.num_train_timesteps) if given is None else given
        shifted = self._shifted(even, c.flow_shift, mu)
        shifted[0] -= 1e-6 * (abs(shifted[0] - 1) < 1e-6)  # at 1 lambda is infinite
        self._visit(n, self._spaced(n, skip_last=True), shifted if c.use_flow_sigmas else None, table=given)
        if self.solver_p is not None:
            self.solver_p.set_timesteps(self.num_inference_steps)

    def _at_timesteps(self, spread, table):
        if not (self.config.use_karras_sigmas and self.config.use_flow_sigmas):
            return super()._at_timesteps(spread, table)
        sigmas = spread / (spread + 1)
        return sigmas, sigmas * self.config.num_train_timesteps

    def update(self, model_output, i, sample):
        """Zhao et al. 2023, section 3: corrects the step that led to sample, then predicts the next one."""
        believed = self._convert(model_output, i, sample)
        if i > 0 and i - 1 not in self.disable_corrector and self.last_sample is not None:
            sample = self._solve(i - 1, self.this_order, self.last_sample, [believed])
        self._remember(believed)
        left = len(self.timesteps) - i if self.config.lower_order_final else self.config.solver_order
        self.this_order = min(self.lower_order_nums, left)
        self.last_sample = sample
        if self.solver_p is None:
            prev = self._solve(i, self.this_order, sample)
        else:
            prev = self.solver_p.step(model_output, self.timesteps[i], sample).prev_sample
        return prev, None

    def _solve(self, start, order, sample, at_end=()):
        """From sigmas[start] to the next: UniP (section 3.2), or with the output at its end UniC (3.1)."""
        (h, keep, fall, scale, *b), levels = self._steps[start], self._levels
        first, *outputs = [*self._recent(order), *at_end]  # the newest first
        nodes = [(levels[start - k][2] - levels[start][2]) / h for k in range(1, order)]  # r_k, below 0
        if at_end:
            nodes.append(np.float32(1))
        if len(nodes) == 1:  # a simple form for the lowest order; infinite where h is
            return combine((keep, -fall, -scale * (0.5 / nodes[0])), (sample, first, outputs[0] - first))
        solved = solve_vandermonde(nodes, b[: len(nodes)])
        weights = [-scale * (w / node) for w, node in zip(solved, nodes, strict=True)]
        return combine((keep, -fall - sum(weights), *weights), (sample, first, *outputs))

    def _prepare(self, alpha, sigma, lambdas):
        """Of all steps: h, the factors of sample and newest output, B(h), what the other weights reproduce.

        For eps (predict_x0=False) h has the other sign, and alpha and sigma change places.
        """
        h = np.diff(lambdas)
        kept, share, signed = (sigma, alpha, -h) if self.predict_x0 else (alpha, sigma, h)
        rise = np.expm1(signed, dtype=np.float64).astype(np.float32)  # rounded once, like log
        keep, share = kept[1:] / kept[:-1], share[1:]
        fall = share * rise
        if not self.predict_x0:  # the limit of sigma_t (e^h - 1) at 0; diffusers has 0 * inf, NaN
            fall = np.where(share == 0, alpha[1:] * sigma[:-1] / alpha[:-1], fall)
        scale = rise if self.config.solver_type == "bh2" else signed  # B(h)
        b = moments(signed, rise, scale, self.config.solver_order)
        self._steps = [*zip(h, keep, fall, share * scale, *b, strict=True)]


def moments(h, rise, scale, count):
    """b_k = k! h phi_{k+1}(h) / B(h) for k = 1 … count: what the weights reproduce. rise = e^h - 1.

    h, rise and scale, B(h), are float32 arrays, of one entry for each step, as is each b_k.

    In float32 and in this order, since it cancels: for small h, another order changes the fourth digit.
    """
    b, phi, factorial = [], rise / h - 1, 1.0
    for k in range(1, count + 1):
        b.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / h - 1 / factorial
    return b
