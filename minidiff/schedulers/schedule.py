"""Noise schedules, and what all schedulers have in common; the update rules are in the files beside this one.

A model is trained on N timesteps t, at each of which a sample is x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps: a_t
is `alphas_cumprod[t]`, the share of the data's variance that is left, eps standard normal (Ho et al. 2020,
arXiv:2006.11239, eq. 4). Read first the tables (`make_betas`), then the timesteps that sampling visits
(`space_timesteps`), then what a model's output says about x0 and eps (`predicted_x0`, `predicted_eps`), then
`Scheduler`, whose `_step` is the frame of every step.

Numbers are diffusers' to the last bit wherever that is possible: tables are float32, their scalars stay NumPy
float32 scalars, and formulas keep the order of operations that they have there, because 1 - a_t near t = 0
turns a last bit into 1e-4.
"""

import math

import numpy as np

from minidiff.arguments import one_for_each, share
from minidiff.boundary import Output, draw_like, floats, like, number_list, table_index, whole_number
from minidiff.config import Configured

MOST_TIMESTEPS = 1_000_000  # far above every model; more is a mistake in a config, met before memory is

# The classes that from_config may switch between: all that sample the same kind of model.
COMPATIBLE = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "EDMEulerScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
)  # fmt: skip


def linspace(start: float, end: float, n: int) -> np.ndarray:
    """n float32 numbers from start to end, rounded as torch does: from both ends, product and sum at once."""
    if n == 1:
        return np.float32([start])
    start, end = np.float32(start), np.float32(end)
    step = np.float64((end - start) / np.float32(n - 1))
    up, down = np.arange(n // 2), np.arange(n - n // 2)[::-1]
    return np.concatenate([start + step * up, end - step * down]).astype(np.float32)


def make_betas(schedule: str, beta_start: float, beta_end: float, n: int) -> np.ndarray:
    """The variance that each of n training timesteps adds, float32 (n,); schedule is a beta_schedule."""
    if schedule == "linear":  # Ho et al. 2020
        return linspace(beta_start, beta_end, n)
    if schedule == "scaled_linear":  # latent diffusion: linear in the standard deviation
        return linspace(beta_start**0.5, beta_end**0.5, n) ** 2
    if schedule == "sigmoid":  # GeoDiff, arXiv:2203.02923
        rise = np.exp(-linspace(-6, 6, n).astype(np.float64)).astype(np.float32)
        return 1 / (1 + rise) * (beta_end - beta_start) + beta_start
    alpha_bar = {"squaredcos_cap_v2": _cosine, "laplace": _laplace, "exp": _exponential}[schedule]
    kept = [alpha_bar(i / n) for i in range(n + 1)]
    return np.array([min(1 - kept[i + 1] / kept[i], 0.999) for i in range(n)], np.float32)


def _cosine(t):
    """alpha_bar of Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17, for t in [0, 1]."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t):
    """Hang et al. 2024 (arXiv:2407.03297): log SNR with a Laplace distribution of scale 0.5; t in [0, 1]."""
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def _exponential(t):
    """An exponential decay, to e^-12 at t = 1."""
    return math.exp(-12 * t)


def cumulative_product(alphas: np.ndarray) -> np.ndarray:
    """alphas_cumprod, float32: summed up in float64, as torch does; in float32 most entries would differ."""
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """betas that leave no data at the last timestep (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""
    root = np.sqrt(cumulative_product(1 - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))  # the first value stays, the last becomes 0
    kept = root * root
    return 1 - np.concatenate([kept[:1], kept[1:] / kept[:-1]])


def space_timesteps(spacing: str, n_train: int, n: int, steps_offset: int, skip_last=False, end=None,
                    whole=True) -> np.ndarray:  # fmt: skip
    """n of the timesteps 0 … n_train - 1, falling, int64, in one of three ways (Lin et al. 2023, table 2).

    skip_last: linspace and leading lay out n + 1 and leave out the last one, t = 0 (multistep solvers do).
    end: they stay below it (n_train if None); trailing then gives fewer, because its step stays n_train / n.
    whole: whether those of linspace are rounded; if not, they are float64.
    Where n_train / n is rounded down, as 1000 / 61 is, trailing gives one more, -1, as it does in diffusers.
    """
    points, end = n + skip_last, n_train if end is None else end
    if spacing == "linspace":
        timesteps = np.linspace(0, end - 1, points)[::-1]
        if not whole:
            return timesteps[:n]
        timesteps = timesteps.round()
    elif spacing == "leading":
        if points > end and n > 1:  # all would be the same: no step would lead anywhere
            most = f"timestep_spacing 'leading' takes at most {end - skip_last}"
            raise ValueError(f"num_inference_steps is {n}; {most}")
        timesteps = np.arange(points)[::-1] * (end // points) + steps_offset
    elif spacing == "trailing":
        return np.arange(end, 0, -n_train / n).round().astype(np.int64) - 1
    else:
        raise ValueError(f"timestep_spacing is {spacing!r}; it must be linspace, leading or trailing")
    return timesteps[:n].astype(np.int64)


def predicted_x0(model_output, sample, alpha, sigma, prediction_type: str) -> np.ndarray:
    """x0 in sample = alpha x0 + sigma eps, (B, C, …), from whatever the model was trained to predict.

    prediction_type: epsilon, sample (x0 itself) or v_prediction: v = alpha eps - sigma x0 (Salimans & Ho
    2022, arXiv:2202.00512, appendix D).
    """
    if prediction_type == "epsilon":
        x0 = sigma * model_output
        np.subtract(sample, x0, out=x0)  # in place: a third of the time goes into new arrays
        if alpha != 1:
            x0 /= alpha
        return x0
    if prediction_type == "sample":
        return model_output
    return alpha * sample - sigma * model_output


def predicted_eps(model_output, sample, alpha, sigma, prediction_type: str) -> np.ndarray:
    """eps in sample = alpha x0 + sigma eps; see `predicted_x0`."""
    if prediction_type == "epsilon":
        return model_output
    if prediction_type == "sample":
        return (sample - alpha * model_output) / sigma
    return alpha * model_output + sigma * sample


def posterior_variance(a_t, a_prev):
    """The variance of a less noisy x_prev given x_t and x0 (Ho et al. 2020, eq. 7): what DDPM's noise has."""
    return (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)


def log(x) -> np.float32:
    """The logarithm of float32 numbers, rounded once: NumPy's own is off by a bit more often than torch's."""
    return np.log(x, dtype=np.float64).astype(np.float32)


def exp(x) -> np.float32:
    """e^x for a float32 number, rounded once, like `log`."""
    return np.float32(math.exp(x))


def combine(weights, arrays) -> np.ndarray:
    """The sum of weights times arrays, all of one shape: a new array with the dtype of the first."""
    total = weights[0] * arrays[0]
    term = np.empty_like(total)  # one for all: a third of the time would go into new arrays
    for weight, array in zip(weights[1:], arrays[1:], strict=True):
        total += np.multiply(array, weight, out=term)
    return total


def threshold(x0: np.ndarray, ratio: float, largest: float) -> np.ndarray:
    """Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3): scales instead of clipping.

    In each row of x0 (B, …): s is the ratio-quantile of |x0|, kept within [1, largest]; x0 is clipped to
    [-s, s] and divided by s.
    """
    share(ratio, "dynamic_thresholding_ratio")
    size = np.abs(x0).reshape(len(x0), -1)  # (B, n)
    number = x0.dtype.type
    rank = number(ratio) * number(size.shape[1] - 1)  # rounded in x0's dtype, as torch.quantile does
    low = int(rank)
    high, weight = min(low + 1, size.shape[1] - 1), rank - low
    ordered = np.partition(size, (low, high), axis=1)
    a, b = ordered[:, low], ordered[:, high]  # (B,)
    s = a + weight * (b - a) if weight < 0.5 else b - (b - a) * (1 - weight)
    s = np.minimum(np.maximum(s, 1), number(largest)).reshape(-1, *[1] * (x0.ndim - 1))  # (B, 1, …)
    return np.clip(x0, -s, s) / s


class Scheduler(Configured):
    """Base of all schedulers: config, tables, and the frame of a step.

    A class writes out its constructor, `set_timesteps` and, where it takes more, `step`, because people and
    pipelines read their signatures, and one `update` with its mathematics. NumPy in gives NumPy out, torch in
    gives torch out, in the sample's dtype and on its device. In between all is float32 (float64 for float64
    samples), rounded once at the end.
    """

    config_name = "scheduler_config.json"
    _compatibles: tuple[str, ...] = COMPATIBLE
    second_result = "pred_original_sample"  # what step returns beside prev_sample
    order = 1
    init_noise_sigma = 1.0
    num_inference_steps: int | None = None  # until set_timesteps
    final_alpha_cumprod = np.float32(1)  # a_t where a step goes below timestep 0
    beta_schedules: tuple[str, ...] = ("linear", "scaled_linear", "squaredcos_cap_v2")
    predictions: tuple[str, ...] = ("epsilon", "sample", "v_prediction")  # see `predicted_x0`
    needs_timesteps = True  # whether step works only after set_timesteps
    wide_x0 = False  # whether the x0 that step returns stays float32 for samples of fewer bits

    def __len__(self):
        return self.config.num_train_timesteps

    # -- tables and timesteps

    def _one_of(self, option, known, error=ValueError):
        """The config's value of option, one of known; or an error that lists these."""
        value = self.config[option]
        if value not in known:
            raise error(f"{option} is {value!r}; {type(self).__name__} takes {', '.join(known)}")
        return value

    def _train_timesteps(self):
        return whole_number(self.config.num_train_timesteps, "num_train_timesteps", MOST_TIMESTEPS)

    def _make_tables(self):
        """betas, alphas, alphas_cumprod, all float32 (N,), out of the config; timesteps N-1 … 0."""
        c, n = self.config, self._train_timesteps()
        if c.trained_betas is not None:
            self.betas = number_list(c.trained_betas, "trained_betas").astype(np.float32)
        else:
            schedule = self._one_of("beta_schedule", self.beta_schedules, NotImplementedError)
            self.betas = make_betas(schedule, c.beta_start, c.beta_end, n)
        if c.get("rescale_betas_zero_snr"):
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas = 1 - self.betas
        self.alphas_cumprod = cumulative_product(self.alphas)
        self.timesteps = np.arange(n, dtype=np.int64)[::-1].copy()

    def _check_steps(self, num_inference_steps, most=None):
        return whole_number(num_inference_steps, "num_inference_steps", most)

    def _spaced(self, n, skip_last=False, end=None):
        c = self.config
        return space_timesteps(c.timestep_spacing, c.num_train_timesteps, n, c.steps_offset, skip_last, end)

    def _table_index(self, timestep):
        return table_index(timestep, len(self.alphas_cumprod))

    def _alpha_bar(self, t):
        """a_t where a step leads to, a float32 scalar; final_alpha_cumprod below timestep 0."""
        return self.alphas_cumprod[t] if t >= 0 else self.final_alpha_cumprod

    # -- the frame of a step

    def step(self, model_output, timestep, sample, return_dict: bool = True):
        """From timestep to the next; model_output, sample (B, C, …), prev_sample like sample."""
        return self._step(model_output, timestep, sample, return_dict)

    def _step(self, model_output, timestep, sample, return_dict, *options, update=None, noise=None):
        """Around every update rule: update(model_output, i, sample, *options) on arrays, results like sample.

        i is what `_position` makes of the timestep. noise: the arguments of `_noise`, for rules that draw:
        what that returns is their last option. update, self.update if None, returns (prev_sample, x0), where
        x0 is None if there is none.
        """
        if self.needs_timesteps and self.num_inference_steps is None:
            raise ValueError(f"{type(self).__name__} has no timesteps yet: call set_timesteps(n) before step")
        x, update = floats(sample, "sample"), update or self.update
        output = self._fitting(floats(model_output, "model_output"), x)
        if noise is not None:
            options = *options, self._noise(model_output, sample, *noise)
        with np.errstate(all="ignore"):  # zero-SNR tables divide by zero; inf and NaN stay, as in diffusers
            prev_sample, x0 = update(output, self._position(timestep), x, *options)
        self._advance()
        result = Output(prev_sample=like(prev_sample, sample))
        if x0 is not None:
            result[self.second_result] = like(x0, sample, keep_dtype=self.wide_x0)
        return result if return_dict else result.to_tuple()

    def _position(self, timestep):
        """Where update starts: an index into the tables; schedulers that walk over sigmas count instead."""
        return self._table_index(timestep)

    def _advance(self):
        """Where steps are counted, moves on to the next."""

    def _fitting(self, model_output, sample):
        """model_output as update takes it; ValueError if its shape is not that of sample."""
        if model_output.shape != sample.shape or sample.ndim < 2:
            shapes = f"model_output is {model_output.shape}, sample {sample.shape}"
            raise ValueError(f"{shapes}; both must be (B, C, …), alike")
        return model_output

    def _clipped(self, x0):
        c = self.config
        return np.clip(x0, -c.clip_sample_range, c.clip_sample_range) if c.clip_sample else x0

    def _thresholded(self, x0):
        c = self.config
        return threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value) if c.thresholding else x0

    def _limited(self, x0):
        """x0 kept in range as the config asks: by dynamic thresholding, by clipping, or not at all."""
        return self._thresholded(x0) if self.config.thresholding else self._clipped(x0)

    def _noise(self, model_output, sample, generator, given=None, dtype=None):
        """A function for the noise that a step adds; called only if it is needed, so that seeds match.

        dtype: what it is drawn in, if not in model_output's.
        """
        if given is not None:
            return lambda: floats(given, "variance_noise")
        return lambda: floats(draw_like(model_output, sample.shape, generator, dtype))

    # -- between samples, noise and the model

    def scale_model_input(self, sample, timestep=None):
        """What the model gets to see of sample at timestep: here the sample itself."""
        return sample

    def add_noise(self, original_samples, noise, timesteps):
        """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps: original_samples (B, …) moved to B timesteps."""
        alpha, sigma = self._signal_and_noise(original_samples, timesteps)
        x0, eps = floats(original_samples, "original_samples"), floats(noise, "noise")
        return like(alpha * x0 + sigma * eps, original_samples)

    def get_velocity(self, sample, noise, timesteps):
        """v = sqrt(a_t) eps - sqrt(1 - a_t) x0, x0 = sample (B, …): the target of v_prediction models."""
        alpha, sigma = self._signal_and_noise(sample, timesteps)
        return like(alpha * floats(noise, "noise") - sigma * floats(sample, "sample"), sample)

    def _signal_and_noise(self, samples, timesteps):
        """sqrt(a_t), sqrt(1 - a_t), each (B, 1, …); from a table in samples' dtype, as in diffusers."""
        rows = [self._table_index(t) for t in one_for_each(timesteps, samples, "timesteps")]
        a_t = floats(like(self.alphas_cumprod, samples))[rows]
        a_t = a_t.reshape(-1, *[1] * (len(samples.shape) - 1))  # (B, 1, …)
        return np.sqrt(a_t), np.sqrt(1 - a_t)
