"""Random configurations of every scheduler, run in diffusers and in minidiff on the same samples.

Some configurations are ill-conditioned: there diffusers' own answer depends on how its square roots and
logarithms are rounded. Where a difference is above the tolerance, diffusers runs again with the last bit of
those changed at random, and ours has to be within ten times the movement that this makes.
"""

import random
import warnings

import diffusers
import numpy as np
import torch
from parity import relative
from scheduler_lists import DRAWING, parameters, predictions
from torch.overrides import TorchFunctionMode

import minidiff

STEP = 1e-5  # of the largest value
ROOTS = (
    torch.sqrt, torch.Tensor.sqrt, torch.log, torch.Tensor.log, torch.exp, torch.Tensor.exp, torch.expm1,
    torch.sigmoid, torch.sin, torch.atan2,
)  # fmt: skip
POWERS = (torch.pow, torch.Tensor.pow, torch.Tensor.__pow__)
SPREADS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# What diffusers raises where a schedule is used up, or can't be walked on.
ENDS = (IndexError, AssertionError, torch.linalg.LinAlgError)


class OtherRounding(TorchFunctionMode):
    """Moves each float32 root, logarithm and exponential of a table or a scalar to a neighbour, at random."""

    def __init__(self, seed):
        super().__init__()
        self.random = random.Random(seed)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_root = func in ROOTS or (func in POWERS and args[1] not in (1, 2))
        if is_root and result.dtype == torch.float32 and result.ndim < 2:
            away = [self.random.choice((-np.inf, np.inf)) for _ in range(max(1, result.numel()))]
            result = torch.nextafter(result, torch.tensor(away).reshape(result.shape))
        return result


CHOICES = {  # constructor argument -> what it may be; beside these: betas, spreads and prediction types
    "num_train_timesteps": [1000, 1000, 1000, 200],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 0, 1],
    "rescale_betas_zero_snr": [False] * 7 + [True],
    "thresholding": [False] * 4 + [True],
    "dynamic_thresholding_ratio": [0.995, 0.9, 0.5],
    "sample_max_value": [1.0, 1.5, 4.0],
    "clip_sample": [False, True],
    "clip_sample_range": [1.0, 2.5],
    "set_alpha_to_one": [False, True],
    "variance_type": [None, None, None, "learned", "learned_range"],  # of the DPM-Solvers
    "skip_prk_steps": [False, True],
    "solver_order": [1, 2, 2, 3, 3],
    "predict_x0": [True] * 4 + [False],
    "lower_order_final": [True, True, False],
    "euler_at_final": [False, False, True],
    "disable_corrector": [[], [0], [0, 1, 2]],
    "final_sigmas_type": ["zero", "sigma_min"],
    "lambda_min_clipped": [-float("inf"), -float("inf"), -5.1, -2.0],
    "use_flow_sigmas": [False] * 5 + [True],
    "flow_shift": [1.0, 3.0],
    "use_dynamic_shifting": [False, False, True],
    "time_shift_type": ["exponential"],
    "shift_terminal": [None, None, 0.1],
    "interpolation_type": ["linear", "linear", "linear", "log_linear"],
    "timestep_type": ["discrete", "discrete", "continuous"],
    "original_inference_steps": [50, 50, 100],
    "timestep_scaling": [10.0, 4.0],
    "sigma_data": [0.5, 1.0],
    "sigma_schedule": ["karras", "exponential"],
    "rho": [7.0, 5.0],
    "shift": [1.0, 3.0],
    "base_shift": [0.5],
    "max_shift": [1.15],
    "base_image_seq_len": [256],
    "max_image_seq_len": [4096],
    "invert_sigmas": [False, False, True],
    "stochastic_sampling": [False, True],
}
OWN = {  # where a class differs
    "DDPMScheduler": {
        "variance_type": [
            "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range",
        ],
        "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"],
    },
    "DDIMInverseScheduler": {"timestep_spacing": ["leading", "trailing"]},
    "UniPCMultistepScheduler": {
        "solver_type": ["bh1", "bh2", "midpoint"], "solver_order": [1, 2, 2, 3, 3, 4],
        "time_shift_type": ["exponential", "linear"],
    },
    "DPMSolverMultistepScheduler": {
        "algorithm_type": [
            "dpmsolver", "dpmsolver++", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis",
        ],
        "solver_type": ["midpoint", "heun", "bh2"],
    },
    "DPMSolverSinglestepScheduler": {
        "algorithm_type": ["dpmsolver", "dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "deis"],
        "solver_type": ["midpoint", "heun", "logrho"],
    },
    "EDMDPMSolverMultistepScheduler": {
        "algorithm_type": ["dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "deis"],
        "solver_type": ["midpoint", "heun", "bh1"],
    },
    "DEISMultistepScheduler": {
        "algorithm_type": ["deis", "deis", "dpmsolver++"], "solver_type": ["logrho", "logrho", "heun"],
    },
    "FlowMatchEulerDiscreteScheduler": {"time_shift_type": ["exponential", "linear"]},
    # their constructors lay out all training timesteps, one by one: 0.1 s for 1000
    "KDPM2DiscreteScheduler": {"num_train_timesteps": [100, 40, 40]},
    "KDPM2AncestralDiscreteScheduler": {"num_train_timesteps": [100, 40, 40]},
    "LMSDiscreteScheduler": {"num_train_timesteps": [100, 100, 40]},
    "HeunDiscreteScheduler": {"num_train_timesteps": [100, 100, 40]},
}  # fmt: skip


def random_config(name, draw):
    """A value for every argument of the constructor of diffusers' class."""
    config = {}
    takes, own = parameters(name), OWN.get(name, {})
    for key in takes:
        if key in own or key in CHOICES:
            config[key] = draw.choice(own.get(key) or CHOICES[key])
    if "beta_schedule" in takes:
        config |= random_betas(draw, config)
    elif "trained_betas" in takes and draw.random() < 0.2:  # IPNDM: sines of angles, which fall
        config["trained_betas"] = sorted((draw.uniform(0.01, 0.99) for _ in range(12)), reverse=True)
    if predictions(name):
        config["prediction_type"] = draw.choice(predictions(name))
    spreads = [key for key in SPREADS if key in takes]
    if spreads and draw.random() < 0.5:
        config[draw.choice(spreads)] = True
    if "sigma_min" in takes and draw.random() < (1 if name.startswith("EDM") else 0.3):
        config |= {"sigma_min": draw.choice([0.002, 0.03]), "sigma_max": draw.choice([80.0, 14.0])}
    return possible(name, config, draw)


def random_betas(draw, config):
    n = config["num_train_timesteps"]
    if draw.random() < 0.1:
        rng = np.random.default_rng(draw.randrange(10**6))
        return {"trained_betas": rng.uniform(1e-4, 20 / n, n).tolist()}
    start, end = draw.choice([(1e-4, 0.02), (0.00085, 0.012), (0.001, 0.03)])
    drawn = draw.choice(["linear", "scaled_linear", "squaredcos_cap_v2"])
    scale = 1000 / n  # as much noise at the end, whatever n is
    return {
        "beta_start": start * scale,
        "beta_end": end * scale,
        "beta_schedule": config.get("beta_schedule", drawn),
    }


def possible(name, config, draw):
    """config without what diffusers refuses, or leaves out at random."""
    if config.get("use_flow_sigmas"):
        config |= {"prediction_type": "flow_prediction", "predict_x0": True, "rescale_betas_zero_snr": False}
        kept = (
            ("use_karras_sigmas",) if name == "UniPCMultistepScheduler" else ()
        )  # others don't shift theirs
        config |= dict.fromkeys([key for key in SPREADS if key not in kept], False)
        config["algorithm_type"] = draw.choice(
            [a for a in OWN[name].get("algorithm_type", ["++"]) if "++" in a]
        )
    elif name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
                  "DEISMultistepScheduler"):  # fmt: skip
        config |= {"use_dynamic_shifting": False, "shift_terminal": None}
    algorithm = config.get("algorithm_type", "")
    if algorithm in ("dpmsolver", "sde-dpmsolver") or (algorithm == "deis" and not name.startswith("DEIS")):
        config["final_sigmas_type"] = "sigma_min"
    if algorithm == "sde-dpmsolver" or (name.startswith("EDM") and algorithm.startswith("sde")):
        config["solver_order"] = min(2, config["solver_order"])  # there is no third one
    if name == "DPMSolverSinglestepScheduler" and algorithm == "dpmsolver":
        config["thresholding"] = False  # diffusers' own fails there
    if config.get("prediction_type") != "epsilon" and name != "DDPMScheduler":
        config.pop("variance_type", None)
    if name == "FlowMatchEulerDiscreteScheduler" and config["shift_terminal"] and config["invert_sigmas"]:
        config["shift_terminal"] = None
    return {key: value for key, value in config.items() if key in parameters(name)}


def random_schedule(name, draw, config):
    """The arguments of set_timesteps."""
    n_train = config["num_train_timesteps"]
    n = draw.choice([1, 2, 3, 4, 5, 8, 10, 20, 25, 50, 60, 150])
    n = min(n, n_train // 2, 20 if name == "LMSDiscreteScheduler" else n)
    takes, spread = parameters(name, "set_timesteps"), any(config.get(key) for key in SPREADS)
    arguments = {}
    if name in ("LCMScheduler", "TCDScheduler"):
        arguments["strength"] = draw.choice([1.0, 1.0, 0.6])
        arguments["original_inference_steps"] = draw.choice([None, None, 40])
        originals = arguments["original_inference_steps"] or config["original_inference_steps"]
        n = min(n, int(originals * arguments["strength"]))
    if config.get("use_dynamic_shifting"):
        arguments["mu"] = draw.choice([0.5, 1.2])
    if config.get("shift_terminal"):
        n = max(n, 2)
    if config.get("trained_betas") and name == "IPNDMScheduler":
        n = len(config["trained_betas"]) - 1
    if name == "PNDMScheduler" and not config["skip_prk_steps"]:
        n = max(n, 4)
    if "num_train_timesteps" in takes and draw.random() < 0.1:
        arguments["num_train_timesteps"] = n_train // 2
        n = min(n, n_train // 4)
    own = draw.random() < 0.3 and not spread
    if own and arguments.get("strength", 1) < 1:
        n = max(n, 2)  # of one timestep, none would be left
    if own and "timesteps" in takes and not config.get("use_flow_sigmas") and not is_continuous(config):
        whole = sorted(draw.sample(range(n_train), n), reverse=True)
        return arguments | {"timesteps": whole}
    if own and "sigmas" in takes:
        return arguments | own_sigmas(name, draw, n, config, arguments)
    return arguments | {"num_inference_steps": n}


def own_sigmas(name, draw, n, config, arguments):
    if name == "EulerDiscreteScheduler":
        return {"sigmas": [*sorted((draw.uniform(0.03, 14) for _ in range(n)), reverse=True), 0.0]}
    if name == "EDMEulerScheduler":  # from 0, sigma_max, to 1, sigma_min
        return {"sigmas": torch.tensor(sorted(draw.random() for _ in range(n)), dtype=torch.float64)}
    flow = sorted((draw.uniform(0.01, 0.99) for _ in range(n)), reverse=True)
    if name == "FlowMatchEulerDiscreteScheduler" or config["use_flow_sigmas"]:
        return {"sigmas": np.array(flow)}
    return {"num_inference_steps": n}


def is_continuous(config):
    return config.get("timestep_type") == "continuous" and config["prediction_type"] == "v_prediction"


def random_options(name, draw, config):
    """What step takes beside the sample, without random numbers."""
    if "use_clipped_model_output" in parameters(name, "step"):  # DDIM
        return {"eta": draw.choice([0.0, 0.0, 0.4, 1.0]), "use_clipped_model_output": draw.random() < 0.3}
    if name == "TCDScheduler":
        return {"eta": draw.choice([0.3, 0.0, 0.7, 1.0])}
    if name == "LMSDiscreteScheduler":
        return {"order": draw.choice([4, 4, 1, 2, 3, 6])}
    if "s_churn" in parameters(name, "step"):
        return {
            "s_churn": draw.choice([0.0, 0.0, 5.0, 40.0]), "s_tmin": draw.choice([0.0, 0.5]),
            "s_tmax": draw.choice([float("inf"), 10.0]), "s_noise": draw.choice([1.0, 1.003]),
        }  # fmt: skip
    return {}


class Case:
    """One random configuration: a scheduler, where in its schedule it runs, and on what kind of samples."""

    def __init__(self, name, seed):
        draw = random.Random(f"{name} {seed}")
        self.name, self.seed, self.config = name, seed, random_config(name, draw)
        self.schedule = random_schedule(name, draw, self.config)
        self.start = draw.choice(
            [0, 0, 0, draw.random(), "end"]
        )  # the place in the schedule, as a share of it
        self.begin_index = draw.random() < 0.3
        self.dtype = draw.choice([torch.float32, torch.float32, torch.float64])
        self.numpy = draw.random() < 0.5
        self.shape = draw.choice([(2, 3, 4, 6), (1, 4, 8, 8), (2, 3, 7), (3, 5)])
        self.learned = str(self.config.get("variance_type")).startswith("learned")
        if self.config.get("thresholding") and len(self.shape) == 2:
            self.shape = (3, 5, 1)  # diffusers can't threshold two axes
        if self.learned:
            self.shape = (2, 3, 4, 6)  # the DPM-Solvers of diffusers know three channels only
        self.strided = draw.random() < 0.3
        self.options = random_options(name, draw, self.config)
        self.given_noise = draw.random() < 0.2 and "variance_noise" in parameters(name, "step")
        self.generators = draw.choice([1, 1, self.shape[0]])  # one for all rows, or one for each

    def __repr__(self):
        kind = f"{'numpy' if self.numpy else 'torch'} {self.dtype} {self.shape}{' strided' * self.strided}"
        config = {k: "…" if k == "trained_betas" else v for k, v in self.config.items()}
        return (
            f"{self.name}(**{config}).set_timesteps(**{self.schedule}), from {self.start}"
            f"{' by begin_index' * self.begin_index}, {kind}, {self.options}"
        )

    def scheduler(self, library):
        scheduler = getattr(library, self.name)(**self.config)
        scheduler.set_timesteps(**self.schedule)
        if self.begin_index and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.begin(scheduler.timesteps))
        return scheduler

    def begin(self, timesteps):
        """The index of the first step, which may be the second of a step's two calls."""
        if self.name == "PNDMScheduler":
            return 0  # it counts its calls
        if self.start == "end":
            return max(0, len(timesteps) - self.count())
        return int(self.start * len(timesteps))

    def count(self):
        """How many calls of step are compared at most."""
        return 14 if self.name == "PNDMScheduler" else 6

    def inputs(self, timesteps):
        """The first sample, and (index, timestep, model output) of each step."""
        rng = np.random.default_rng(self.seed)
        shape = (self.shape[0], self.shape[1] * (2 if self.learned else 1), *self.shape[2:])
        sample, begin = self.normal(rng, self.shape), self.begin(timesteps)
        indices = range(begin, len(timesteps))[: self.count()]
        return sample, [(i, timesteps[i], self.normal(rng, shape)) for i in indices]

    def normal(self, rng, shape):
        values = torch.from_numpy(rng.standard_normal(shape)).to(self.dtype)
        if self.strided:  # the same values, with the batch as the fastest axis
            values = values.movedim(0, -1).contiguous().movedim(-1, 0)
        return values

    def random_numbers(self, i, as_given=lambda x: x):
        """The options of the i-th step that hold or draw its noise."""
        if self.given_noise:
            return {"variance_noise": as_given(self.normal(np.random.default_rng(9 + i), self.shape))}
        if self.name not in DRAWING:
            return {}
        made = [torch.Generator().manual_seed(self.seed * 1000 + 10 * i + k) for k in range(self.generators)]
        return {"generator": made if self.generators > 1 else made[0]}

    def run_diffusers(self, samples=()):
        """[(sample before, after)] of each step, as tensors; each goes on from the last, or from samples."""
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            scheduler = self.scheduler(diffusers)
            sample, steps = self.inputs(scheduler.timesteps)
            made = []
            for k, (i, t, model_output) in enumerate(steps):
                if samples and k == len(samples):
                    break
                sample = samples[k] if samples else sample
                try:
                    options = self.options | self.random_numbers(i)
                    after = scheduler.step(model_output, t, sample, **options).prev_sample
                except ENDS:
                    break
                made.append((sample, after))
                finite = torch.isfinite(after).all()
                sample = after if finite else self.normal(np.random.default_rng(i), self.shape)
        return made

    def run(self, theirs, scheduler=None):
        """Yields (k, ours, expected), tensors, for each of our steps from diffusers' samples."""
        scheduler = scheduler or self.scheduler(minidiff)
        _, steps = self.inputs(scheduler.timesteps)
        as_given = (lambda x: x.numpy()) if self.numpy else (lambda x: x)
        for k, ((i, t, model_output), (sample, expected)) in enumerate(zip(steps, theirs, strict=False)):
            options = self.options | self.random_numbers(i, as_given)
            if getattr(scheduler, "step_index", None) == len(scheduler.timesteps):
                break  # a repeated timestep at the start was found at its second place
            ours = scheduler.step(as_given(model_output), t, as_given(sample), **options).prev_sample
            assert isinstance(ours, np.ndarray) == self.numpy, f"{type(ours)}: {self}"
            yield k, torch.as_tensor(ours), expected

    def rerounded(self, k, theirs):
        """diffusers' k-th step from the same samples with its roots rounded otherwise, if it has numbers."""
        samples = [sample for sample, _ in theirs[: k + 1]]
        for seed in range(6):
            with OtherRounding(seed):
                after = self.run_diffusers(samples)[k][1]
            if torch.isfinite(after).all():
                yield after

    def allowed(self, k, theirs):
        """How far our k-th step may be from diffusers': ten times what rounding moves diffusers itself."""
        moved = (relative(after, theirs[k][1]) for after in self.rerounded(k, theirs))
        return max(STEP, 10 * max(moved, default=0))
