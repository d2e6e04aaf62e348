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
import sys
from pathlib import Path

import numpy as np

from minidiff.boundary import draw_normal, is_tensor, like, to_numpy
from minidiff.config import Config, Configured

SPACINGS = "linspace, leading or trailing"
PREDICTIONS = "epsilon, sample or v_prediction"
MOST_TIMESTEPS = 1_000_000  # far above every model; more is a mistake in a config, met before memory is

# The classes that from_config may switch between: all that sample the same kind of model.
COMPATIBLE = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "EDMEulerScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler",
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
    cosine, laplace, exp = _alpha_bar_cosine, _alpha_bar_laplace, _alpha_bar_exp
    alpha_bar = {"squaredcos_cap_v2": cosine, "laplace": laplace, "exp": exp}[schedule]
    kept = [alpha_bar(i / n) for i in range(n + 1)]
    return np.array([min(1 - kept[i + 1] / kept[i], 0.999) for i in range(n)], np.float32)


def _alpha_bar_cosine(t):
    """Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17, for t in [0, 1]."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _alpha_bar_laplace(t):
    """Hang et al. 2024 (arXiv:2407.03297): log SNR with a Laplace distribution of scale 0.5; t in [0, 1]."""
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def _alpha_bar_exp(t):
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


def space_timesteps(
    spacing: str, n_train: int, n: int, steps_offset: int, skip_last=False, end=None, whole=True
) -> np.ndarray:
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
        timesteps = np.arange(points)[::-1] * (end // points) + steps_offset
    elif spacing == "trailing":
        return np.arange(end, 0, -n_train / n).round().astype(np.int64) - 1
    else:
        raise ValueError(f"timestep_spacing is {spacing!r}; it must be {SPACINGS}")
    return timesteps[:n].astype(np.int64)


def predicted_x0(model_output, sample, alpha, sigma, prediction_type: str) -> np.ndarray:
    """x0 in sample = alpha x0 + sigma eps, (B, C, …), from whatever the model was trained to predict.

    v_prediction: v = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D).
    """
    if prediction_type == "epsilon":
        x0 = sigma * model_output
        np.subtract(sample, x0, out=x0)  # in place: a third of the time goes into new arrays
        if alpha != 1:
            x0 /= alpha
        return x0
    if prediction_type == "sample":
        return model_output
    if prediction_type == "v_prediction":
        return alpha * sample - sigma * model_output
    raise ValueError(f"prediction_type is {prediction_type!r}; it must be {PREDICTIONS}")


def predicted_eps(model_output, sample, alpha, sigma, prediction_type: str) -> np.ndarray:
    """eps in sample = alpha x0 + sigma eps; see `predicted_x0`."""
    if prediction_type == "epsilon":
        return model_output
    if prediction_type == "sample":
        return (sample - alpha * model_output) / sigma
    if prediction_type == "v_prediction":
        return alpha * model_output + sigma * sample
    raise ValueError(f"prediction_type is {prediction_type!r}; it must be {PREDICTIONS}")


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
    if not 0 <= ratio <= 1:
        raise ValueError(f"dynamic_thresholding_ratio is {ratio}; it must be in [0, 1]")
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


class StepOutput(dict):
    """What step returns: prev_sample and mostly pred_original_sample; as attributes, keys or a tuple."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this step has no {name!r}; it has {', '.join(self)}") from None

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self):
        """The values without their names, as with return_dict=False."""
        return tuple(self.values())


class Scheduler(Configured):
    """Base of all schedulers: config, tables, loading and saving, and the frame of a step.

    A class writes out its constructor, `set_timesteps` and `step`, because people and pipelines read their
    signatures, and one `update` with its mathematics. NumPy in gives NumPy out, torch in gives torch out, in
    the sample's dtype and on its device. In between all is float32 (float64 for float64 samples), rounded
    once at the end.
    """

    config_name = "scheduler_config.json"
    _compatibles: tuple[str, ...] = COMPATIBLE
    second_result = "pred_original_sample"  # what step returns beside prev_sample
    order = 1
    init_noise_sigma = 1.0
    final_alpha_cumprod = np.float32(1)  # a_t where a step goes below timestep 0
    beta_schedules: tuple[str, ...] = ("linear", "scaled_linear", "squaredcos_cap_v2")
    needs_timesteps = True  # whether step works only after set_timesteps
    wide_x0 = False  # whether the x0 that step returns stays float32 for samples of fewer bits

    def __len__(self):
        return self.config.num_train_timesteps

    @property
    def compatibles(self) -> list[type]:
        """The classes that `from_config` may switch to."""
        package = sys.modules[__package__]
        others = [getattr(package, name) for name in self._compatibles if hasattr(package, name)]
        return others if type(self) in others else [type(self), *others]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, *, variant=None, torch_dtype=None,
                        use_safetensors=None, revision=None, cache_dir=None, local_files_only=False,
                        token=None, **overrides):  # fmt: skip
        """The scheduler of a built-in checkpoint, a folder or a hub id; the file may be another scheduler's.

        overrides replace values of the file. variant, torch_dtype and use_safetensors are models' and have no
        meaning here. Raises CheckpointError for a missing or broken file, naming it.
        """
        from minidiff.checkpoints import CheckpointError, hub  # inside: most users of schedulers load nothing

        config = hub.read_json(
            pretrained_model_name_or_path, cls.config_name, subfolder,
            revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token,
        )  # fmt: skip
        try:
            return cls.from_config(config, **overrides)
        except (TypeError, ValueError, NotImplementedError) as error:
            file = Path(str(pretrained_model_name_or_path), subfolder or "", cls.config_name)
            raise CheckpointError(f"{file}: {error}") from error

    def save_pretrained(self, save_directory):
        """Writes scheduler_config.json into save_directory; diffusers reads it too."""
        self.save_config(save_directory)

    def _change_config(self, **values):
        """Corrects what the config says, where a constructor takes one value for another."""
        self._set_config(Config(self.config | values))

    # -- tables and timesteps

    def _train_timesteps(self):
        """N, or an error that says what it must be."""
        n = self.config.num_train_timesteps
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 0 < n <= MOST_TIMESTEPS:
            raise ValueError(
                f"num_train_timesteps is {n!r}; it must be a whole number from 1 to {MOST_TIMESTEPS}"
            )
        return n

    def _make_tables(self):
        """betas, alphas, alphas_cumprod, all float32 (N,), out of the config; timesteps N-1 … 0."""
        c = self.config
        n = self._train_timesteps()
        if c.trained_betas is not None:
            self.betas = np.array(to_numpy(c.trained_betas), np.float32)
        elif c.beta_schedule in self.beta_schedules:
            self.betas = make_betas(c.beta_schedule, c.beta_start, c.beta_end, n)
        else:
            known = ", ".join(self.beta_schedules)
            raise NotImplementedError(
                f"{type(self).__name__} has no beta_schedule {c.beta_schedule!r}; it has {known}"
            )
        if c.get("rescale_betas_zero_snr"):
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas = 1 - self.betas
        self.alphas_cumprod = cumulative_product(self.alphas)
        self.num_inference_steps = None
        self.timesteps = np.arange(n, dtype=np.int64)[::-1].copy()

    def _check_steps(self, n, at_most=None, name="num_inference_steps"):
        """n as an int, or an error that says what a number of steps must be."""
        if isinstance(n, bool) or not isinstance(n, int | np.integer):
            raise TypeError(f"{name} is {n!r}; it must be a whole number")
        if n < 1:
            raise ValueError(f"{name} is {n}; it must be at least 1")
        if at_most is not None and n > at_most:
            raise ValueError(f"{name} is {n}; the model was trained on {at_most} timesteps: take no more")
        return int(n)

    def _spaced(self, n, skip_last=False):
        c = self.config
        return space_timesteps(c.timestep_spacing, c.num_train_timesteps, n, c.steps_offset, skip_last)

    def _whole(self, timesteps):
        """A caller's own timesteps, a list, array or tensor of whole numbers, as int64."""
        given = np.asarray(to_numpy(timesteps))
        chosen = given.astype(np.int64) if given.dtype.kind in "iuf" else given
        if chosen.ndim != 1 or not chosen.size or chosen.dtype != np.int64 or (chosen != given).any():
            raise ValueError(f"timesteps is {timesteps!r}; it must be a list of whole numbers")
        return chosen

    def _custom(self, timesteps):
        """As `_whole`; they must fall from each to the next, and from below N."""
        chosen, n = self._whole(timesteps), self.config.num_train_timesteps
        if (np.diff(chosen) >= 0).any():
            raise ValueError(f"timesteps must fall from each to the next; {timesteps!r} does not")
        if chosen[0] >= n or chosen[-1] < 0:
            raise ValueError(
                f"timesteps go from {chosen[0]} to {chosen[-1]}; they must be within {n - 1} to 0"
            )
        return chosen

    def _table_index(self, timestep):
        """timestep, in any form that people pass, as an index into the tables; -1 means their last entry."""
        t = timestep.item() if hasattr(timestep, "item") else timestep
        if not isinstance(t, int | float) or t != t // 1:
            raise ValueError(f"timestep is {timestep!r}; {type(self).__name__} needs one whole number")
        n = len(self.alphas_cumprod)
        if not -1 <= t < n:
            raise ValueError(f"timestep {t} is none of the {n} that the tables have; take it from .timesteps")
        return int(t)

    def _alpha_bar(self, t):
        """a_t where a step leads to, a float32 scalar; final_alpha_cumprod below timestep 0."""
        return self.alphas_cumprod[t] if t >= 0 else self.final_alpha_cumprod

    # -- the frame of a step

    def _step(self, update, model_output, timestep, sample, *options, return_dict=True):
        """Around every update rule: update(model_output, i, sample, *options) on arrays, results like sample.

        i is what `_position` makes of the timestep. update returns (prev_sample, x0), x0 None if it has none.
        """
        if self.needs_timesteps and self.num_inference_steps is None:
            raise ValueError(f"{type(self).__name__} has no timesteps yet: call set_timesteps(n) before step")
        x, output = self._array(sample, "sample"), self._array(model_output, "model_output")
        self._check_shapes(output, x)
        with np.errstate(all="ignore"):  # zero-SNR tables divide by zero; inf and NaN stay, as in diffusers
            prev_sample, x0 = update(output, self._position(timestep), x, *options)
        result = StepOutput(prev_sample=like(prev_sample, sample))
        if x0 is not None:
            result[self.second_result] = like(x0, sample, keep_dtype=self.wide_x0)
        return result if return_dict else result.to_tuple()

    def _position(self, timestep):
        """Where update starts: an index into the tables; schedulers that walk over sigmas count instead."""
        return self._table_index(timestep)

    def _array(self, x, name="array"):
        """x as an array to compute with: float64 stays, all other floats become float32."""
        array = to_numpy(x) if is_tensor(x) else x
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            kind = f"array of {array.dtype}" if isinstance(array, np.ndarray) else type(x).__name__
            raise TypeError(f"{name} is a {kind}; it must be a floating point array or tensor")
        return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)

    def _check_shapes(self, model_output, sample):
        if model_output.shape != sample.shape or sample.ndim < 2:
            raise ValueError(
                f"model_output is {model_output.shape}, sample {sample.shape}; both must be (B, C, …), alike"
            )

    def _limited(self, x0):
        """x0 kept in range as the config asks: by dynamic thresholding, by clipping, or not at all."""
        c = self.config
        if c.thresholding:
            return threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value)
        return np.clip(x0, -c.clip_sample_range, c.clip_sample_range) if c.clip_sample else x0

    def _noise(self, model_output, sample, generator, given=None, dtype=None):
        """A function for the noise that a step adds; called only if it is needed, so that seeds match.

        dtype: what it is drawn in, if not in model_output's.
        """
        if given is not None:
            return lambda: self._array(given, "variance_noise")
        device = model_output.device if is_tensor(model_output) else None
        dtype = model_output.dtype if dtype is None else dtype
        return lambda: self._array(draw_normal(sample.shape, generator, dtype, device))

    # -- between samples, noise and the model

    def scale_model_input(self, sample, timestep=None):
        """What the model gets to see of sample at timestep: here the sample itself."""
        return sample

    def add_noise(self, original_samples, noise, timesteps):
        """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps: original_samples (B, …) moved to B timesteps."""
        alpha, sigma = self._signal_and_noise(original_samples, timesteps)
        x0, eps = self._array(original_samples, "original_samples"), self._array(noise, "noise")
        return like(alpha * x0 + sigma * eps, original_samples)

    def get_velocity(self, sample, noise, timesteps):
        """v = sqrt(a_t) eps - sqrt(1 - a_t) x0, x0 = sample (B, …): the target of v_prediction models."""
        alpha, sigma = self._signal_and_noise(sample, timesteps)
        return like(alpha * self._array(noise, "noise") - sigma * self._array(sample, "sample"), sample)

    def _timestep_list(self, samples, timesteps):
        """timesteps in any form as an array of one, or of one for each row of samples."""
        timesteps = np.atleast_1d(to_numpy(timesteps))
        if timesteps.shape not in ((1,), (len(samples),)):
            raise ValueError(
                f"timesteps is {timesteps.shape}; pass one, or one for each of the {len(samples)} rows"
            )
        return timesteps

    def _signal_and_noise(self, samples, timesteps):
        """sqrt(a_t), sqrt(1 - a_t), each (B, 1, …); from a table in samples' dtype, as in diffusers."""
        rows = [self._table_index(t) for t in self._timestep_list(samples, timesteps)]
        a_t = self._array(like(self.alphas_cumprod, samples))[rows]
        a_t = a_t.reshape(-1, *[1] * (len(samples.shape) - 1))  # (B, 1, …)
        return np.sqrt(a_t), np.sqrt(1 - a_t)
