"""UniPC, a unified predictor-corrector: Zhao et al. 2023, arXiv:2302.04867.

In lambda = log(alpha / sigma_t) the sampling equation is a plain integral over the model's x0 (or eps). The
predictor (UniP) takes x0 as a polynomial through its last values; the corrector (UniC) goes over the last
step once more when the model has seen where it led to: one order better for no more model calls.
"""

import math

import numpy as np

from minidiff.schedulers.schedule import log, predicted_eps, predicted_x0, threshold
from minidiff.schedulers.sigmas import SigmaScheduler, flow, sigma_to_t


class UniPCMultistepScheduler(SigmaScheduler):
    """Good pictures in 10 to 25 steps.

    solver_order: points of the polynomial; 2 with guidance, 3 without. solver_type "bh1" or "bh2": the
    paper's B(h) = h or e^h - 1. predict_x0: whether the polynomial is x0's or eps's. disable_corrector: steps
    after which nothing is corrected. solver_p: another scheduler to take the predictor's place.
    use_flow_sigmas, flow_shift, use_dynamic_shifting, time_shift_type, shift_terminal: for rectified-flow
    models.
    """

    unknown_is_last = True

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas=None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        predict_x0: bool = True,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector=(),
        solver_p=None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
    ):
        if shift_terminal is not None and not use_flow_sigmas:
            raise ValueError("shift_terminal works only with use_flow_sigmas=True")
        if not 1 <= solver_order <= num_train_timesteps:
            raise ValueError(f"solver_order is {solver_order}; it must be from 1 to num_train_timesteps")
        if solver_type in ("midpoint", "heun", "logrho"):  # other solvers' names come with their configs
            self._change_config(solver_type="bh2")
        elif solver_type not in ("bh1", "bh2"):
            raise NotImplementedError(
                f"UniPCMultistepScheduler has no solver_type {solver_type!r}; it has bh1 and bh2"
            )
        self._make_tables()
        self.predict_x0, self.disable_corrector, self.solver_p = predict_x0, disable_corrector, solver_p
        self._forget()

    def _forget(self):
        self.model_outputs = [None] * self.config.solver_order  # the last x0 (or eps), the newest at the end
        self.lower_order_nums = 0  # how many of them there are
        self.this_order = 0  # of the last predictor
        self.last_sample = None  # where it started from

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, sigmas=None, mu=None):
        """Chooses timesteps and sigmas: num_inference_steps of them or, for flow models, a list of sigmas.

        mu: the shift of use_dynamic_shifting. device has no effect.
        """
        c = self.config
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError("set_timesteps takes num_inference_steps or sigmas: one of them, not both")
        if sigmas is not None and not c.use_flow_sigmas:
            raise ValueError("sigmas can be given only with use_flow_sigmas=True")
        if c.use_dynamic_shifting and mu is None:
            raise ValueError("use_dynamic_shifting=True needs mu, the shift: set_timesteps(n, mu=...)")
        n = self._check_steps(num_inference_steps if sigmas is None else len(sigmas))
        timesteps = self._spaced(n, skip_last=True)
        table = self._table_sigmas() if sigmas is None else np.array(sigmas)
        spread = self._spread(table[0], table[-1], n)
        if spread is not None:
            sigmas, timesteps = self._at_timesteps(spread, table)
            self._set_sigmas(sigmas, sigmas[-1])
        elif c.use_flow_sigmas:
            sigmas = self._shifted(flow(n, c.num_train_timesteps) if sigmas is None else table, mu)
            timesteps = sigmas * c.num_train_timesteps
            self._set_sigmas(sigmas, sigmas[-1])
        else:
            self._set_sigmas(np.interp(timesteps, np.arange(len(table)), table), table[0])
        alpha, sigma = self._alpha_sigma(self.sigmas)
        with np.errstate(divide="ignore"):  # lambda is infinite at sigma 0
            self._levels = [*zip(alpha, sigma, log(alpha) - log(sigma), strict=True)]
        self.timesteps = timesteps.astype(np.int64)
        self.num_inference_steps = len(timesteps)
        if self.solver_p is not None:
            self.solver_p.set_timesteps(self.num_inference_steps)
        self._forget()

    def _at_timesteps(self, spread, table):
        """The spread sigmas as they are used, and the timesteps where they are."""
        c = self.config
        if c.use_karras_sigmas and c.use_flow_sigmas:
            sigmas = spread / (spread + 1)
            return sigmas, sigmas * c.num_train_timesteps
        timesteps = sigma_to_t(spread, np.log(table))
        return spread, timesteps.round() if c.use_karras_sigmas else timesteps

    def _shifted(self, sigmas, mu):
        """Flow sigmas with more noise for large pictures (Esser et al. 2024, arXiv:2403.03206, eq. 23)."""
        c = self.config
        if not c.use_dynamic_shifting:
            sigmas = c.flow_shift * sigmas / (1 + (c.flow_shift - 1) * sigmas)
        elif c.time_shift_type in ("exponential", "linear"):
            shift = math.exp(mu) if c.time_shift_type == "exponential" else mu
            sigmas = shift / (shift + (1 / sigmas - 1))
        else:
            raise ValueError(f"time_shift_type is {c.time_shift_type!r}; it must be exponential or linear")
        if c.shift_terminal:
            if sigmas[-1] == 1:
                raise ValueError("shift_terminal can't move a schedule of one step; take at least 2")
            stretch = (1 - sigmas[-1]) / (1 - c.shift_terminal)
            sigmas = 1 - (1 - sigmas) / stretch  # the last one lands on shift_terminal
        if abs(sigmas[0] - 1) < 1e-6:
            sigmas[0] -= 1e-6  # at 1 there is no data left and lambda is infinite
        return sigmas

    def step(self, model_output, timestep, sample, return_dict: bool = True):
        """From this step's sigma to the next; model_output, sample (B, C, …), prev_sample like sample."""
        return self._step(self.update, model_output, timestep, sample, return_dict=return_dict)

    def update(self, model_output, i, sample):
        """Zhao et al. 2023, section 3: corrects the step that led to sample, then predicts the next one."""
        c = self.config
        believed = self._convert(model_output, i, sample)
        if i > 0 and i - 1 not in self.disable_corrector and self.last_sample is not None:
            sample = self._solve(i - 1, self.this_order, self.last_sample, corrected=believed)
        self.model_outputs = [*self.model_outputs[1:], believed]
        order = min(c.solver_order, len(self.timesteps) - i) if c.lower_order_final else c.solver_order
        self.this_order = min(order, self.lower_order_nums + 1)
        self.last_sample = sample
        if self.solver_p is None:
            prev = self._solve(i, self.this_order, sample)
        else:
            prev = self.solver_p.step(model_output, self.timesteps[i], sample).prev_sample
        self.lower_order_nums = min(self.lower_order_nums + 1, c.solver_order)
        self._step_index += 1
        return prev, None

    def _convert(self, model_output, i, sample):
        """What the polynomial is made of: x0, or eps with predict_x0=False."""
        c = self.config
        alpha, sigma, _ = self._levels[i]
        if not self.predict_x0:
            return predicted_eps(model_output, sample, alpha, sigma, c.prediction_type)
        if c.prediction_type == "flow_prediction":  # v = eps - x0
            x0 = sample - self.sigmas[i] * model_output
        else:
            x0 = predicted_x0(model_output, sample, alpha, sigma, c.prediction_type)
        return threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value) if c.thresholding else x0

    def _solve(self, start, order, sample, corrected=None):
        """From sigmas[start] to the next: UniP (section 3.2), or with what the model saw there UniC (3.1).

        For eps (predict_x0=False) h has the other sign, and alpha and sigma change places.
        """
        alpha_s, sigma_s, lambda_s = self._levels[start]
        alpha_t, sigma_t, lambda_t = self._levels[start + 1]
        h = lambda_t - lambda_s
        outputs = [self._array(m) for m in self.model_outputs[-order:]][::-1]  # the newest first
        nodes = [(self._levels[start - k][2] - lambda_s) / h for k in range(1, order)]  # r_k, below 0
        signed = -h if self.predict_x0 else h
        rise = np.float32(np.expm1(np.float64(signed)))  # rounded once, like log
        scale = rise if self.config.solver_type == "bh2" else signed  # B(h)
        keep, share = (sigma_t / sigma_s, alpha_t) if self.predict_x0 else (alpha_t / alpha_s, sigma_t)
        fall = share * rise
        if sigma_t == 0 and not self.predict_x0:
            fall = alpha_t * sigma_s / alpha_s  # the limit of sigma_t (e^h - 1); diffusers has 0 * inf, NaN
        result = keep * sample
        result -= fall * outputs[0]
        if corrected is not None:
            nodes, outputs = [*nodes, np.float32(1)], [*outputs, corrected]
        if len(nodes) == 1:
            weights = [0.5]  # a simple form for the lowest order
        else:
            weights = solve_vandermonde(nodes, moments(signed, rise, scale, len(nodes)))
        for weight, node, output in zip(weights, nodes, outputs[1:], strict=True):
            difference = output - outputs[0]
            difference *= share * scale * (weight / node)
            result -= difference
        return result

    def _alpha_sigma(self, sigma):
        return (1 - sigma, sigma) if self.config.use_flow_sigmas else super()._alpha_sigma(sigma)


def moments(h, rise, scale, count):
    """b_k = k! h phi_{k+1}(h) / B(h) for k = 1 … count: what the weights reproduce. rise = e^h - 1.

    In float32 and in this order, since it cancels: for small h, another order changes the fourth digit.
    """
    b, phi, factorial = [], rise / h - 1, 1
    for k in range(1, count + 1):
        b.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / h - 1 / factorial
    return b


def solve_vandermonde(nodes, b) -> list[float]:
    """The weights w with sum_j nodes[j]^i w[j] = b[i] for all i, in float64 (Björck & Pereyra 1970).

    With them a step is exact for polynomials through the nodes. ValueError for a node that comes twice.
    """
    x, w = [float(node) for node in nodes], [float(value) for value in b]
    n = len(x)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            w[i] -= x[k] * w[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            gap = x[i] - x[i - k - 1]
            if gap == 0:
                raise ValueError(
                    "two of the last steps have the same noise level: set lower_order_final=True"
                )
            w[i] /= gap
        for i in range(k, n - 1):
            w[i] -= w[i + 1]
    return w
