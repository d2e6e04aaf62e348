"""How fast samplers converge: each is run on Gaussian data, where the right answer is known.

On such data a step is a straight line in the sample and in the noise that it adds. So a batch of few rows
tells all about a sampler, and chance has no part in it: one row starts from the standard score 0, one from 1,
and in each of the others a single noise is 1 and everything else 0. From what becomes of them follow the
exact mean and deviation of everything that the sampler can draw.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import minidiff
from minidiff.explain import gaussian
from minidiff.explain.gaussian import CLEAN, Gaussian, Level, Predict
from minidiff.explain.samplers import Sampler

DATA = Gaussian(
    mean=np.array([-1.0, -0.4, 0.0, 0.3, 0.8, 1.5]), deviation=np.array([0.3, 1.2, 0.5, 0.9, 0.4, 0.7])
)
STEPS = (8, 16, 32, 64, 128)
# Moderate noise only, evenly spread in its logarithm: where a schedule goes down to no noise at all, the last
# step is so long that no order shows.
MOST, LEAST = 20.0, 0.05  # sigma / alpha
LAST = 3 * 1024  # training timesteps are 0 … LAST, so that 8, 16, … and 6, 12, … steps are whole timesteps
FLOOR = 1e-6  # below it is the rounding of float32 tables and coefficients


@dataclass(frozen=True)
class Course:
    """A sampler that is set up to go from much to little noise."""

    scheduler: object
    timesteps: np.ndarray  # those to visit: one for each model call
    levels: list[Level]  # of the sample at each of them, and where the last step leads
    predict: Predict


@dataclass(frozen=True)
class Outcome:
    """What a sampler made of standard normal scores, in each of C coordinates; exact would be 0, 1 and 1."""

    calls: int
    mean: np.ndarray
    slope: np.ndarray  # how the final score changes with the one at the start
    deviation: np.ndarray
    noise: bool

    @property
    def error(self) -> float:
        """Root mean square over starts and coordinates of the distance from the exact solution, in standard
        deviations; with noise the Wasserstein distance of the distributions.
        """
        width = self.deviation if self.noise else self.slope
        return float(np.sqrt(np.mean(self.mean**2 + (width - 1) ** 2)))


class OneAtATime(np.random.Generator):
    """Draws noise that is 1 in one row and 0 in all others: in row 2 + k the k-th time."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))
        self.draws = 0

    def standard_normal(self, size=None, dtype=np.float64, out=None):
        """An array of that size and dtype."""
        noise = np.zeros(size, dtype)
        noise[2 + self.draws] = 1
        self.draws += 1
        return noise


def measure(sampler: Sampler, steps: int, *, exact_start: bool = False) -> Outcome:
    """Runs the sampler with so many steps; exact_start: its first steps (`start`) lead where they should."""
    course = set_up(sampler, steps, exact_start)
    z = np.zeros((2 + len(course.timesteps), len(DATA.mean)))  # (rows, C)
    z[1] = 1
    noise = OneAtATime()
    for i, x in enumerate(walk(course, z, noise, **sampler.options), 1):
        if exact_start and i <= sampler.start:
            x[:] = DATA.place(z, course.levels[i])
    end = DATA.standard_score(x, course.levels[-1])
    changes = end[1:] - end[0]
    deviation = np.sqrt(np.square(changes).sum(axis=0))
    return Outcome(len(course.timesteps), end[0], changes[0], deviation, noise.draws > 0)


def walk(course: Course, z, generator, **options) -> Iterator[np.ndarray]:
    """The sampling loop from the standard scores z (B, C): yields the samples after each model call."""
    scheduler, x = course.scheduler, DATA.place(z, course.levels[0])
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    for t in course.timesteps:
        model_output = course.predict(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(model_output, t, x, **options).prev_sample
        yield x


@dataclass(frozen=True)
class Curve:
    """How the error of a sampler falls. errors are those of the sampler as it is; order is what they fall
    with, where a start of lower order is left out.
    """

    sampler: Sampler
    steps: list[int]
    calls: list[int]
    errors: list[float]
    order: float | None


def curve(sampler: Sampler) -> Curve:
    """Measures a sampler at each of STEPS, or three quarters of them where steps come in groups of three."""
    steps = [n * 3 // 4 if sampler.group == 3 else n for n in STEPS]
    outcomes = [measure(sampler, n) for n in steps]
    errors = [outcome.error for outcome in outcomes]
    order = None
    if sampler.order is not None:
        exact = [measure(sampler, n, exact_start=True).error for n in steps] if sampler.start else errors
        count = sum(n <= sampler.most for n in steps)
        order = slope(steps[:count], exact[:count])
    return Curve(sampler, steps, [outcome.calls for outcome in outcomes], errors, order)


def slope(steps, errors) -> float:
    """How fast errors fall, as a power of steps: between the last two that are not lost in rounding."""
    kept = np.flatnonzero(np.asarray(errors) > FLOOR)[-2:]
    (few, many), (large, small) = np.log(steps)[kept], np.log(errors)[kept]
    return float((large - small) / (many - few))


# -- setting up: each family of schedulers in its own terms, all on the same way from MOST to LEAST

RATIOS = np.geomspace(LEAST, MOST, LAST + 1)  # sigma / alpha at the training timesteps
ALPHAS_CUMPROD = 1 / (1 + RATIOS**2)
TABLE = {
    "num_train_timesteps": LAST + 1,
    "trained_betas": 1 - ALPHAS_CUMPROD / np.append(1, ALPHAS_CUMPROD[:-1]),
}
EXPLODING = (
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler",
)  # fmt: skip
# What the constructors need so that the order shows, and that the last step ends at LEAST.
WHOLE = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
NEEDED = {
    "DDPMScheduler": {"clip_sample": False},
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
    "DDIMInverseScheduler": {"clip_sample": False, "set_alpha_to_one": False},
    "PNDMScheduler": {"set_alpha_to_one": False},
    "DEISMultistepScheduler": {"lower_order_final": False},
    "UniPCMultistepScheduler": WHOLE,
    "DPMSolverMultistepScheduler": WHOLE,
    "DPMSolverSinglestepScheduler": WHOLE,
    "EDMDPMSolverMultistepScheduler": WHOLE,
    "LCMScheduler": {"timestep_scaling": 1e6},  # the model's output is all, from the smallest timestep on
}


def set_up(sampler: Sampler, steps: int, exact_start: bool = False) -> Course:
    """The sampler with so many steps, which must divide LAST, from MOST to LEAST (or back, where it does)."""
    builders = {
        "IPNDMScheduler": _angles, "FlowMatchEulerDiscreteScheduler": _flow, "EDMEulerScheduler": _edm,
        "EDMDPMSolverMultistepScheduler": _edm, "LCMScheduler": _consistency, "TCDScheduler": _consistency,
    }  # fmt: skip
    config = NEEDED.get(sampler.scheduler, {}) | sampler.config
    if exact_start and sampler.scheduler == "UniPCMultistepScheduler":
        config.setdefault("disable_corrector", list(range(sampler.start)))  # exact steps need no correction
    build = builders.get(sampler.scheduler, _trained)
    return build(getattr(minidiff, sampler.scheduler), steps, config, sampler.options)


def _trained(scheduler_class, steps, config, options):
    """Schedulers for models that were trained on a table of timesteps."""
    name, ratio = scheduler_class.__name__, LAST // steps
    if name in ("DDIMScheduler", "DDIMInverseScheduler", "PNDMScheduler"):
        config = config | {"steps_offset": ratio}  # leading: from LAST to ratio, and from there to 0
    scheduler = scheduler_class(**TABLE, **config)
    if name == "DDPMScheduler":
        scheduler.set_timesteps(timesteps=np.arange(LAST, -1, -ratio))
    elif name in EXPLODING:
        scheduler.set_timesteps(steps + 1)
    else:
        scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    if name in EXPLODING or name == "DDPMScheduler":  # they reach LEAST, and go on to no noise at all
        timesteps = timesteps[:-1]
    level_at = gaussian.table_level(scheduler.alphas_cumprod)
    visited = [*timesteps, 0]
    if name == "DDIMInverseScheduler":  # a sample is asked about where it goes to
        visited = [0, *timesteps]
    levels = [level_at(t) for t in visited]
    if name in EXPLODING:
        levels = [(1.0, sigma / alpha) for alpha, sigma in levels]
    return Course(scheduler, timesteps, levels, gaussian.predictor(DATA, level_at))


def _consistency(scheduler_class, steps, config, options):
    """LCM and TCD, whose models jump to the end of the way, or near to it."""
    scheduler = scheduler_class(**TABLE, **config)
    scheduler.set_timesteps(steps, original_inference_steps=steps)
    level_at = gaussian.table_level(scheduler.alphas_cumprod)
    following = dict(zip(scheduler.timesteps, [*scheduler.timesteps[1:], 0], strict=True))

    def end_of(t):
        return level_at(int((1 - options["eta"]) * following[t])) if "eta" in options else CLEAN

    end = level_at(0) if "eta" in options else CLEAN
    levels = [*map(level_at, scheduler.timesteps), end]
    return Course(scheduler, scheduler.timesteps, levels, gaussian.predictor(DATA, level_at, end_of=end_of))


def _angles(scheduler_class, steps, config, options):
    """IPNDM, whose table has as many entries as there are steps."""
    ratios = RATIOS[:: -(LAST // steps)]
    scheduler = scheduler_class(trained_betas=ratios / np.hypot(1, ratios), **config)
    scheduler.set_timesteps(steps)
    levels = [*zip(1 / np.hypot(1, ratios), ratios / np.hypot(1, ratios), strict=True)]
    predict = gaussian.predictor(DATA, gaussian.angle_level, "v_prediction")
    return Course(scheduler, scheduler.timesteps, levels, predict)


def _flow(scheduler_class, steps, config, options):
    """Rectified flows; with stochastic_sampling their models are taken for consistency models."""
    ratios = RATIOS[:: -(LAST // steps)]
    scheduler = scheduler_class(**config)
    scheduler.set_timesteps(sigmas=ratios / (1 + ratios))
    level_at = gaussian.flow_level(scheduler.config.num_train_timesteps)
    end_of = (lambda t: CLEAN) if config.get("stochastic_sampling") else None
    predict = gaussian.predictor(DATA, level_at, "flow_prediction", end_of)
    levels = [(1 - float(sigma), float(sigma)) for sigma in scheduler.sigmas[:-1]]
    return Course(scheduler, scheduler.timesteps[:-1], levels, predict)


def _edm(scheduler_class, steps, config, options):
    """Schedulers for models with the preconditioning of Karras et al. 2022."""
    ends = {"sigma_min": LEAST, "sigma_max": MOST, "sigma_schedule": "exponential"}
    scheduler = scheduler_class(**ends, **config)
    scheduler.set_timesteps(steps + 1)
    predict = gaussian.edm_predictor(DATA, scheduler.config.sigma_data)
    levels = [(1.0, float(sigma)) for sigma in scheduler.sigmas[:-1]]
    return Course(scheduler, scheduler.timesteps[:-1], levels, predict)
