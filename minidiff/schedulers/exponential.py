"""Exponential integrators: what UniPC, the DPM-Solvers and DEIS share.

In lambda = log(alpha / sigma_t) the linear part of the sampling equation is solved exactly, and what is left
is an integral over the model's x0 or eps alone (Lu et al. 2022, arXiv:2206.00927, proposition 3.1). The
solvers differ in the polynomial that they take for it. Here are the levels of noise that they visit, with
alpha, sigma_t and lambda at each, what they make of a model's output, and their memory of these outputs.
"""

import math

import numpy as np

from minidiff.schedulers.schedule import log, predicted_eps, predicted_x0, threshold
from minidiff.schedulers.sigmas import SigmaScheduler, shift_flow, sigma_to_t


class ExponentialIntegrator(SigmaScheduler):
    """Base of the solvers whose step is a factor times the sample plus weights times the model's outputs."""

    unknown_is_last = True
    predict_x0 = True  # whether the integral is over x0, or over eps
    repeats_last = False  # whether spread sigmas end at their own last one, if not at 0; or at the table's

    def _forget(self):
        self.model_outputs = [None] * self.config.solver_order  # the last x0 (or eps), the newest at the end
        self.lower_order_nums = 0  # how many of them there are

    def _check_order(self):
        order = self.config.solver_order
        if not 1 <= order <= max(self._train_timesteps(), 3):
            raise ValueError(f"solver_order is {order}; it must be from 1 to num_train_timesteps")

    def _replace(self, option, aliases, known):
        """The config's option, after another family's word for it has become known[0]; or an error."""
        given = self.config[option]
        if given in aliases:
            self._change_config(**{option: known[0]})
        elif given not in known:
            name, words = type(self).__name__, ", ".join(known)
            raise NotImplementedError(f"{name} has no {option} {given!r}; it has {words}")
        return self.config[option]

    # -- the levels of noise to visit

    def _visit(self, n, timesteps, table, flow_sigmas):
        """Chooses sigmas: n spread between the ends of table, or flow_sigmas(n), or those of the timesteps.

        table: the sigma at each training timestep. What the config asks for decides; timesteps give way to
        those of the sigmas.
        """
        c, last = self.config, table[0]
        spread = self._spread(table[0], table[-1], n)
        if spread is not None:
            sigmas, timesteps = self._at_timesteps(spread, table)
        elif c.use_flow_sigmas:
            sigmas = flow_sigmas(n)
            timesteps = sigmas * c.num_train_timesteps
        else:
            sigmas = np.interp(timesteps, np.arange(len(table)), table)
        if self.repeats_last and (spread is not None or c.use_flow_sigmas):
            last = sigmas[-1]
        self._set_sigmas(sigmas, last)
        self._set_levels(timesteps.astype(np.int64))

    def _at_timesteps(self, spread, table):
        """The spread sigmas as they are used, and the timesteps where they are."""
        timesteps = sigma_to_t(spread, np.log(table))
        return spread, timesteps.round() if self._rounds() else timesteps

    def _rounds(self):
        """Whether a spread's timesteps are rounded to the nearest whole one, not down."""
        return self.config.use_karras_sigmas

    def _set_levels(self, timesteps):
        """alpha, sigma_t and lambda at each of the sigmas, float32; the history starts anew."""
        alpha, sigma = self._alpha_sigma(self.sigmas)
        with np.errstate(all="ignore"):  # lambda is infinite at sigma 0
            levels = np.full_like(sigma, alpha), sigma, log(alpha) - log(sigma)
            self._prepare(*levels)
        self._levels = [*zip(*levels, strict=True)]
        self.timesteps, self.num_inference_steps = timesteps, len(timesteps)
        self._forget()

    def _prepare(self, alpha, sigma, lambdas):
        """For what a solver can work out of all levels at once."""

    def _alpha_sigma(self, sigma):
        return (1 - sigma, sigma) if self.config.use_flow_sigmas else super()._alpha_sigma(sigma)

    def _shift(self, mu):
        """How much noisier flow sigmas are than evenly spread ones: flow_shift, or e^mu where mu is given."""
        c = self.config
        if mu is None:
            return c.flow_shift
        if not c.use_dynamic_shifting or c.time_shift_type != "exponential":
            raise ValueError("mu needs use_dynamic_shifting=True and time_shift_type='exponential'")
        return math.exp(mu)

    def _flow_sigmas(self, n, shift):
        """n flow sigmas below 1, where there is no data left and lambda is infinite."""
        return shift_flow((1 - np.linspace(1, 1 / self.config.num_train_timesteps, n + 1))[:0:-1], shift)

    # -- what the model says, and said

    def _convert(self, model_output, i, sample, through_x0=False):
        """What the integral is over: x0, thresholded where the config asks for it, or eps.

        through_x0: whether eps is that of a thresholded x0, or of a flow's.
        """
        c, (alpha, sigma, _) = self.config, self._levels[i]
        if not self.predict_x0 and not through_x0:
            return predicted_eps(model_output, sample, alpha, sigma, c.prediction_type)
        if c.prediction_type == "flow_prediction":  # v = eps - x0
            sigma = self.sigmas[i]
            x0 = sample - sigma * model_output
        else:
            x0 = predicted_x0(model_output, sample, alpha, sigma, c.prediction_type)
        x0 = self._thresholded(x0)
        return x0 if self.predict_x0 else predicted_eps(x0, sample, alpha, sigma, "sample")

    def _thresholded(self, x0):
        c = self.config
        return threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value) if c.thresholding else x0

    def _remember(self, converted):
        self.model_outputs = [*self.model_outputs[1:], converted]

    def _recent(self, count):
        """The last outputs, the newest first, as arrays: people set them, too."""
        recent = self.model_outputs[: -count - 1 : -1]
        return [m if type(m) is np.ndarray else self._array(m, "a model output") for m in recent]

    def _order(self, i):
        """Of the step from sigmas[i]: less than the solver's for the first steps and the last of few."""
        order = min(self.config.solver_order, self.lower_order_nums + 1, 3)
        steps = len(self.timesteps)
        return min(order, steps - i) if self.config.lower_order_final and steps < 15 else order

    def _count(self):
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index += 1
