"""Exponential integrators: what UniPC, the DPM-Solvers and DEIS share.

In lambda = log(alpha / sigma_t) the linear part of the sampling equation is solved exactly, and what is left
is an integral over the model's x0 or eps alone (Lu et al. 2022, arXiv:2206.00927, proposition 3.1). The
solvers differ in the polynomial that they take for it. Here are the levels of noise that they visit, with
alpha, sigma_t and lambda at each, what they make of a model's output, and their memory of these outputs.
"""

import math

import numpy as np

from minidiff.boundary import floats, whole_number
from minidiff.schedulers.schedule import Scheduler, log, predicted_eps, predicted_x0
from minidiff.schedulers.sigmas import SigmaScheduler, shift_flow, sigma_to_t


class ExponentialIntegrator(SigmaScheduler):
    """Base of the solvers whose step is a factor times the sample plus weights times the model's outputs."""

    unknown_is_last = True
    predictions = (*Scheduler.predictions, "flow_prediction")
    predict_x0 = True  # whether the integral is over x0, or over eps
    through_x0 = False  # whether eps is that of a thresholded x0, or of a flow's
    repeats_last = False  # whether spread sigmas end at their own last one, if not at 0; or at the table's

    def _make_tables(self):
        super()._make_tables()
        self.rounds = self.config.use_karras_sigmas  # whether a spread's timesteps are rounded, or cut off
        self._forget()

    def _forget(self):
        c = self.config
        order = whole_number(c.solver_order, "solver_order", max(c.num_train_timesteps, 3))
        self.model_outputs = [None] * order  # the last x0 (or eps), the newest at the end
        self.lower_order_nums = 0  # how many of them there are

    def _replace(self, option, aliases, known):
        """The config's option, after another family's word for it has become known[0]; or an error."""
        if self.config[option] in aliases:
            self._change_config(**{option: known[0]})
        return self._one_of(option, known, NotImplementedError)

    # -- the levels of noise to visit

    def _visit(self, n, timesteps, flow=None, table=None):
        """Chooses sigmas: n spread between the ends of table, or those of flow, or those of the timesteps.

        table: the sigma at each training timestep. What the config asks for decides; timesteps give way to
        those of the sigmas.
        """
        table = self._table_sigmas() if table is None else table
        spread, last = self._spread(table[0], table[-1], n), table[0]
        if spread is not None:
            sigmas, timesteps = self._at_timesteps(spread, table)
        elif flow is not None:
            sigmas, timesteps = flow, flow * self.config.num_train_timesteps
        else:
            sigmas = np.interp(timesteps, np.arange(len(table)), table)
        if self.repeats_last and (spread is not None or flow is not None):
            last = sigmas[-1]
        self._set_sigmas(sigmas, self._final_sigma(last))
        self._set_levels(timesteps.astype(np.int64))

    def _at_timesteps(self, spread, table):
        """The spread sigmas as they are used, and the timesteps where they are."""
        timesteps = sigma_to_t(spread, np.log(table))
        return spread, timesteps.round() if self.rounds else timesteps

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

    def _flow_sigmas(self, n, mu):
        """n flow sigmas below 1, where there is no data left and lambda is infinite; None for other models.

        mu: they are e^mu times noisier than evenly spread ones; flow_shift times, if it is None.
        """
        c = self.config
        if mu is not None and not (c.use_dynamic_shifting and c.time_shift_type == "exponential"):
            raise ValueError("mu needs use_dynamic_shifting=True and time_shift_type='exponential'")
        if not c.use_flow_sigmas:
            return None
        even = (1 - np.linspace(1, 1 / c.num_train_timesteps, n + 1))[:0:-1]
        return shift_flow(even, c.flow_shift if mu is None else math.exp(mu))

    # -- what the model says, and said

    def _convert(self, model_output, i, sample):
        """What the integral is over: x0, thresholded where the config asks for it, or eps."""
        needs_x0 = self.predict_x0 or self.through_x0
        kind = self._one_of("prediction_type", self.predictions if needs_x0 else Scheduler.predictions)
        alpha, sigma, _ = self._levels[i]
        if not needs_x0:
            return predicted_eps(model_output, sample, alpha, sigma, kind)
        if kind == "flow_prediction":  # v = eps - x0
            x0 = sample - self.sigmas[i] * model_output
        else:
            x0 = predicted_x0(model_output, sample, alpha, sigma, kind)
        x0 = self._thresholded(x0)
        return x0 if self.predict_x0 else predicted_eps(x0, sample, alpha, sigma, "sample")

    def _remember(self, converted):
        self.model_outputs = [*self.model_outputs[1:], converted]
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)

    def _recent(self, count):
        """The last outputs, the newest first, as arrays: people set them, too."""
        recent = self.model_outputs[: -count - 1 : -1]
        return [m if type(m) is np.ndarray else floats(m, "a model output") for m in recent]

    def _order(self, i):
        """Of the step from sigmas[i]: less than the solver's for the first steps and the last of few."""
        order, steps = min(self.lower_order_nums, 3), len(self.timesteps)
        return min(order, steps - i) if self.config.lower_order_final and steps < 15 else order
