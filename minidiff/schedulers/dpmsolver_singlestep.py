"""DPM-Solver and DPM-Solver++ in their singlestep form: see `dpmsolver.py` for the papers and the rule.

One step of order k takes k model calls, each a call of `step`: of order 1 and 2 to the points between, then
of order k, from the sample at which it started, over all of them.
"""

import math

from minidiff.schedulers.dpmsolver import DPMSolver


class DPMSolverSinglestepScheduler(DPMSolver):
    """Groups of one to solver_order model calls, each of which starts without memory.

    solver_order: 1 to 3, of a whole group; solver_type "midpoint" or "heun", of orders 2 and 3.
    algorithm_type "dpmsolver++", "dpmsolver" or "sde-dpmsolver++". lower_order_final: whether the last groups
    are of lower order; it becomes true where steps are left over, and where sampling ends at sigma 0. The
    other options are `DPMSolverMultistepScheduler`'s.
    """

    algorithms = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++")

    def __init__(
        self, num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
        trained_betas=None, solver_order=2, prediction_type="epsilon", thresholding=False,
        dynamic_thresholding_ratio=0.995, sample_max_value=1.0, algorithm_type="dpmsolver++",
        solver_type="midpoint", lower_order_final=False, use_karras_sigmas=False,
        use_exponential_sigmas=False, use_beta_sigmas=False, use_flow_sigmas=False, flow_shift=1.0,
        final_sigmas_type="zero", lambda_min_clipped=-math.inf, variance_type=None,
        use_dynamic_shifting=False, time_shift_type="exponential",
    ):  # fmt: skip
        self._make_tables()
        self._choose_algorithm()
        if solver_order > 3:
            raise ValueError(f"solver_order is {solver_order}; DPMSolverSinglestepScheduler has 1, 2 and 3")
        self.bend = None if self.config.solver_type == "midpoint" else 2
        self.order_list = self.get_order_list(num_train_timesteps)
        self._forget()

    def _forget(self):
        super()._forget()
        self.sample = None  # at which the group of steps started

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
        self._choose_timesteps(num_inference_steps, mu, timesteps)
        c, n = self.config, len(self.timesteps)
        if not c.lower_order_final and (n % c.solver_order or c.final_sigmas_type == "zero"):
            self._change_config(lower_order_final=True)
        self.order_list = self.get_order_list(n)

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """From this step's sigma to the next; model_output, sample (B, C, …), prev_sample like sample.

        generator draws the noise of sde-dpmsolver++.
        """
        noise = self._noise(model_output, sample, generator)
        return self._step(self.update, model_output, timestep, sample, noise, return_dict=return_dict)

    def _order(self, i):
        known = sum(m is not None for m in self.model_outputs)  # fewer if sampling starts within a group
        return min(self.order_list[i], known)

    def _points(self, i, order, sample):
        """Where the polynomial starts, its other points, and the sample at its start: that of the group."""
        if order == 1:
            self.sample = sample
        return i - order + 1, range(i - order + 2, i + 1), self.sample
