"""Euler's method for rectified flow: Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206.

A sample is x = (1 - sigma) x0 + sigma eps, a straight line from data to noise; the model predicts the line's
direction, v = eps - x0. Timesteps are sigma times num_train_timesteps, float32.
"""

import numpy as np

from minidiff.arguments import at_most_one, refuse_integer
from minidiff.boundary import floats, like, number_list, to_numpy
from minidiff.schedulers.schedule import combine
from minidiff.schedulers.sigmas import SPREADS, SigmaScheduler, shift_flow, stretch_to_terminal, time_shift


class FlowMatchEulerDiscreteScheduler(SigmaScheduler):
    """Steps along the line; sigmas from 1 to 0, moved towards noise for large pictures.

    shift: by how much (1: not at all); or, with use_dynamic_shifting, set_timesteps' mu in the way of
    time_shift_type. base_shift, max_shift, base_image_seq_len, max_image_seq_len: what pipelines make mu
    from. shift_terminal: the last sigma before the end. invert_sigmas: for models that count from noise to
    data. stochastic_sampling: go to x0 and noise it again, at every step.
    """

    _compatibles = ()
    needs_timesteps = False

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0,
                 use_dynamic_shifting: bool = False, base_shift: float | None = 0.5,
                 max_shift: float | None = 1.15, base_image_seq_len: int = 256, max_image_seq_len: int = 4096,
                 invert_sigmas: bool = False, shift_terminal: float | None = None,
                 use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False,
                 use_beta_sigmas: bool = False, time_shift_type: str = "exponential",
                 stochastic_sampling: bool = False):  # fmt: skip
        at_most_one(self.config, SPREADS)
        self._one_of("time_shift_type", ("exponential", "linear"))
        n, self.shift = self._train_timesteps(), shift
        sigmas = np.arange(n, 0, -1, dtype=np.float32) / np.float32(n)
        self.sigmas = sigmas if use_dynamic_shifting else shift_flow(sigmas, shift)
        self.timesteps = self.sigmas * np.float32(n)
        self.sigma_min, self.sigma_max = self.sigmas[-1].item(), self.sigmas[0].item()

    def set_shift(self, shift: float):
        """Changes shift, from the next set_timesteps on, where use_dynamic_shifting is off."""
        self.shift = shift

    def time_shift(self, mu: float, sigma: float, t):
        """Sigmas t moved by mu in the way of time_shift_type: see `sigmas.time_shift`."""
        return time_shift(t, mu, self.config.time_shift_type, sigma)

    def stretch_shift_to_terminal(self, t):
        """Sigmas t stretched so that the last is shift_terminal."""
        return stretch_to_terminal(t, self.config.shift_terminal)

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, sigmas=None,
                      mu: float | None = None, timesteps=None):  # fmt: skip
        """Chooses the steps: num_inference_steps of them, or lists, falling, of sigmas, timesteps or both.

        sigmas that are given are shifted too; timesteps are told to the model as they are, and where there
        are no sigmas, those are timesteps / N, shifted: then the two disagree unless the shift is 1. mu: the
        shift of use_dynamic_shifting. device has no effect.
        """
        c, lists = self.config, {"sigmas": sigmas, "timesteps": timesteps}
        given = {k: number_list(x, k).astype(np.float32) for k, x in lists.items() if x is not None}
        lengths = {num_inference_steps, *map(len, given.values())} - {None}
        if len(lengths) != 1:
            wanted = "num_inference_steps, sigmas or timesteps, of one length"
            raise ValueError(f"pass {wanted}; got {lengths or 'none'}")
        n, n_train = self._check_steps(*lengths), c.num_train_timesteps
        sigmas, timesteps = given.get("sigmas"), given.get("timesteps")
        if sigmas is None:
            ends = self.sigma_max * n_train, self.sigma_min * n_train
            sigmas = (np.linspace(*ends, n) if timesteps is None else timesteps) / n_train
        sigmas = self._shifted(sigmas, self.shift, mu)
        spread = self._spread(sigmas[-1], sigmas[0], n)
        sigmas = (sigmas if spread is None else spread).astype(np.float32)
        if c.invert_sigmas:
            sigmas, timesteps = 1 - sigmas, None
        self.timesteps = sigmas * np.float32(n_train) if timesteps is None else timesteps
        self.sigmas = np.append(sigmas, np.float32(bool(c.invert_sigmas)))
        self.num_inference_steps = n
        self._count_anew()

    def step(self, model_output, timestep, sample, s_churn: float = 0.0, s_tmin: float = 0.0,
             s_tmax: float = float("inf"), s_noise: float = 1.0, generator=None, per_token_timesteps=None,
             return_dict: bool = True):  # fmt: skip
        """From timestep, one of .timesteps, to the next; model_output, sample, prev_sample (B, C, …).

        generator draws the noise of stochastic_sampling. per_token_timesteps (B, T): a timestep for each
        token of samples (B, T, C), which goes to the next sigma of the schedule below it; without
        stochastic_sampling the model_output must then be x0 - eps, as callers of diffusers have it. s_churn,
        s_tmin, s_tmax and s_noise have no effect, as in diffusers.
        """
        refuse_integer(timestep)
        noise = generator, None, np.float32
        return self._step(model_output, timestep, sample, return_dict, per_token_timesteps, noise=noise)

    def update(self, model_output, i, sample, per_token_timesteps, noise):
        """Liu et al. 2022, eq. 1: dx/dsigma = v, one step of Euler's; or x0 = x - sigma v, noised anew."""
        if per_token_timesteps is not None:
            sigma, sigma_next = self._token_sigmas(per_token_timesteps, sample)
            rise = sigma - sigma_next
        elif i + 1 < len(self.sigmas):
            sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
            rise = sigma_next - sigma
        else:
            raise ValueError("no sigma comes after this timestep: call set_timesteps(n) before step")
        if self.config.stochastic_sampling:
            x0 = sample - sigma * model_output
            prev = combine((1 - sigma_next, sigma_next), (x0, noise()))
        else:
            prev = rise * model_output + sample
        return prev, None

    def _token_sigmas(self, timesteps, sample):
        """Each token's sigma and the largest of the schedule below it, 0 if there is none; (B, T, 1)."""
        timesteps = to_numpy(timesteps)
        if sample.ndim != 3 or timesteps.shape not in (sample.shape[:2], (1, sample.shape[1])):
            raise ValueError(f"per_token_timesteps is {timesteps.shape}, not (B, T), for {sample.shape}")
        sigma = (timesteps / np.float32(self.config.num_train_timesteps)).astype(np.float32)[..., None]
        sigmas = self.sigmas[:, None, None, None]  # (n + 1, 1, 1, 1)
        return sigma, np.where(sigmas < sigma - np.float32(1e-6), sigmas, 0).max(axis=0)

    def scale_noise(self, sample, timestep, noise=None):
        """(1 - sigma) sample + sigma noise: sample (B, …) moved to B timesteps of the schedule."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample, noise, timesteps):
        """v = eps - x0, x0 = sample (B, …): what flow models are trained to predict, at any timestep."""
        return like(floats(noise, "noise") - floats(sample, "sample"), sample)

    def _alpha_sigma(self, sigma):
        return 1 - sigma, sigma
