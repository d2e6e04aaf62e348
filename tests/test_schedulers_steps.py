"""Level 2: one step equals diffusers' over random configurations, within 1e-5 of the largest value.

Some configurations are ill-conditioned: there diffusers' own answer depends on how its square roots and
logarithms are rounded. Where a difference is above the tolerance, diffusers runs again with the last bit of
those changed at random, and ours has to be within ten times the movement that this makes.
"""

import random
import warnings

import diffusers
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import minidiff
from minidiff.schedulers.unipc import solve_vandermonde

STEP = 1e-5
BATCHES, PER_BATCH = 8, 20  # for each of the four schedulers: 640 configurations
ROOTS = (torch.sqrt, torch.Tensor.sqrt, torch.log, torch.exp, torch.expm1, torch.sigmoid)
POWERS = (torch.pow, torch.Tensor.pow, torch.Tensor.__pow__)


class OtherRounding(TorchFunctionMode):
    """Moves each float32 root, logarithm and exponential of a table or a scalar to a neighbour, at random."""

    def __init__(self, seed):
        super().__init__()
        self.random = random.Random(seed)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_root = func in ROOTS or (func in POWERS and args[1] == 0.5)
        if is_root and result.dtype == torch.float32 and result.ndim < 2:
            away = [self.random.choice((-np.inf, np.inf)) for _ in range(max(1, result.numel()))]
            result = torch.nextafter(result, torch.tensor(away).reshape(result.shape))
        return result


def random_betas(draw):
    if draw.random() < 0.1:
        rng = np.random.default_rng(draw.randrange(10**6))
        return {"trained_betas": rng.uniform(1e-4, 0.02, 1000).tolist()}
    start, end = draw.choice([(1e-4, 0.02), (0.00085, 0.012), (0.001, 0.03)])
    return {
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": draw.choice(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    }


def random_spacing(draw):
    return {
        "timestep_spacing": draw.choice(["linspace", "leading", "trailing"]),
        "steps_offset": draw.choice([0, 0, 1]),
    }


def random_thresholding(draw):
    return {
        "thresholding": draw.random() < 0.2,
        "dynamic_thresholding_ratio": draw.choice([0.995, 0.9, 0.5]),
        "sample_max_value": draw.choice([1.0, 1.5, 4.0]),
    }


def random_ddpm(draw):
    variance_type = draw.choice(
        ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
    )
    return {
        "variance_type": variance_type, "clip_sample": draw.random() < 0.5,
        "clip_sample_range": draw.choice([1.0, 2.5]), "rescale_betas_zero_snr": draw.random() < 0.2,
        "prediction_type": draw.choice(["epsilon", "sample", "v_prediction"]),
        **random_betas(draw), **draw.choice([{}, {}, {"beta_schedule": draw.choice(["laplace", "sigmoid"])}]),
        **random_spacing(draw), **random_thresholding(draw),
    }  # fmt: skip


def random_ddim(draw):
    return {
        "clip_sample": draw.random() < 0.5, "clip_sample_range": draw.choice([1.0, 2.5]),
        "set_alpha_to_one": draw.random() < 0.5, "rescale_betas_zero_snr": draw.random() < 0.2,
        "prediction_type": draw.choice(["epsilon", "sample", "v_prediction"]),
        **random_betas(draw), **random_spacing(draw), **random_thresholding(draw),
    }  # fmt: skip


def random_pndm(draw):
    return {
        "skip_prk_steps": draw.random() < 0.5, "set_alpha_to_one": draw.random() < 0.5,
        "prediction_type": draw.choice(["epsilon", "v_prediction"]),
        **random_betas(draw), **random_spacing(draw),
    }  # fmt: skip


def random_unipc(draw):
    config = {
        "solver_order": draw.choice([1, 2, 2, 3, 3, 4]), "predict_x0": draw.random() < 0.8,
        "solver_type": draw.choice(["bh1", "bh2", "midpoint"]), "lower_order_final": draw.random() < 0.8,
        "disable_corrector": draw.choice([[], [0], [0, 1, 2]]), "rescale_betas_zero_snr": draw.random() < 0.1,
        "prediction_type": draw.choice(["epsilon", "sample", "v_prediction"]),
        "final_sigmas_type": draw.choice(["zero", "sigma_min"]),
        **random_betas(draw), **random_spacing(draw), **random_thresholding(draw),
    }  # fmt: skip
    kind = draw.choice([None, None, "karras", "exponential", "beta", "flow"])
    if kind is not None:
        config[f"use_{kind}_sigmas"] = True
    if kind == "flow":
        config |= {
            "flow_shift": draw.choice([1.0, 3.0]),
            "predict_x0": True,
            "prediction_type": "flow_prediction",
        }
    return config


RANDOM = {
    "DDPMScheduler": random_ddpm,
    "DDIMScheduler": random_ddim,
    "PNDMScheduler": random_pndm,
    "UniPCMultistepScheduler": random_unipc,
}


class Case:
    """One random configuration: a scheduler, where in its schedule it runs, and on what kind of samples."""

    def __init__(self, name, seed):
        draw = random.Random(f"{name} {seed}")
        self.name, self.seed, self.config = name, seed, RANDOM[name](draw)
        self.steps = draw.choice([4, 5, 8, 10, 20, 25, 50, 60, 150])
        self.start = draw.choice([0, 0, draw.random()])  # the place in the schedule, as a share of it
        self.dtype = draw.choice([torch.float32, torch.float32, torch.float64])
        self.numpy = draw.random() < 0.5
        self.shape = draw.choice([(2, 3, 4, 6), (1, 4, 8, 8), (2, 3, 7), (3, 5)])
        if self.config.get("thresholding") and len(self.shape) == 2:
            self.shape = (3, 5, 1)  # diffusers can't threshold two axes
        self.strided = draw.random() < 0.3
        self.options = {}
        if name == "DDIMScheduler":
            self.options = {
                "eta": draw.choice([0.0, 0.0, 0.4, 1.0]),
                "use_clipped_model_output": draw.random() < 0.3,
            }

    def __repr__(self):
        kind = f"{'numpy' if self.numpy else 'torch'} {self.dtype} {self.shape}{' strided' * self.strided}"
        return (
            f"{self.name}(**{self.config}), {self.steps} steps from {self.start:.2f}, {kind}, {self.options}"
        )

    def scheduler(self, library):
        scheduler = getattr(library, self.name)(**self.config)
        scheduler.set_timesteps(self.steps)
        return scheduler

    def generator(self, i):
        """One for each step; PNDM and UniPC draw nothing."""
        drawn = self.name in ("DDPMScheduler", "DDIMScheduler")
        return {"generator": torch.Generator().manual_seed(self.seed * 1000 + i)} if drawn else {}

    def normal(self, rng, shape):
        values = torch.from_numpy(rng.standard_normal(shape)).to(self.dtype)
        if self.strided:  # the same values, with the batch as the fastest axis
            values = values.movedim(0, -1).contiguous().movedim(-1, 0)
        return values

    def inputs(self, timesteps):
        """(index, timestep, model output) of up to six steps, those at the end included for a late start."""
        rng = np.random.default_rng(self.seed)
        begin = (
            int(self.start * len(timesteps)) if self.name != "PNDMScheduler" else 0
        )  # its counter starts at 0
        count = 14 if self.name == "PNDMScheduler" else 6
        learned = self.config.get("variance_type", "").startswith("learned")
        shape = (self.shape[0], self.shape[1] * (2 if learned else 1), *self.shape[2:])
        sample = self.normal(rng, self.shape)
        return sample, [
            (i, timesteps[i], self.normal(rng, shape)) for i in range(begin, len(timesteps))[:count]
        ]

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
                    after = scheduler.step(
                        model_output, t, sample, **self.generator(i), **self.options
                    ).prev_sample
                except (
                    IndexError,
                    AssertionError,
                    torch.linalg.LinAlgError,
                ):  # a repeated timestep; the same sigma twice
                    break
                made.append((sample, after))
                finite = torch.isfinite(after).all()
                sample = after if finite else self.normal(np.random.default_rng(i), self.shape)
        return made

    def check(self):
        """Asserts that each of our steps leads from diffusers' sample to its next; the worst difference."""
        theirs = self.run_diffusers()
        scheduler = self.scheduler(minidiff)
        _, steps = self.inputs(scheduler.timesteps)
        worst = 0.0
        as_given = (lambda x: x.numpy()) if self.numpy else (lambda x: x)
        for k, ((i, t, model_output), (sample, expected)) in enumerate(zip(steps, theirs, strict=False)):
            result = scheduler.step(
                as_given(model_output), t, as_given(sample), **self.generator(i), **self.options
            )
            ours = torch.as_tensor(result.prev_sample)
            assert ours.dtype == self.dtype and isinstance(result.prev_sample, np.ndarray) == self.numpy
            if not torch.isfinite(expected).all() and torch.isfinite(ours).all() and self.is_fixed(scheduler):
                continue
            difference = relative(ours, expected)
            allowed = STEP if difference <= STEP else max(STEP, 10 * self.movement(k, theirs))
            assert difference <= allowed, f"step {i} differs by {difference:.2e}, not {allowed:.2e}: {self}"
            worst = max(worst, difference)
        if len(theirs) < len(steps):
            i, t, model_output = steps[len(theirs)]
            with pytest.raises(ValueError, match=r"steps are made|same noise level"):
                scheduler.step(model_output, t, model_output, **self.generator(i))
        return worst

    def movement(self, k, theirs):
        """How far diffusers' k-th step from the same samples moves if its roots are rounded otherwise."""
        moved = []
        for seed in range(4):
            with OtherRounding(seed):
                again = self.run_diffusers([sample for sample, _ in theirs])
            moved.append(relative(again[k][1], theirs[k][1]))
        return max(moved)

    def is_fixed(self, scheduler):
        """Whether that was a step in which diffusers multiplies 0 by infinity and we take the limit."""
        to_zero = self.name == "UniPCMultistepScheduler" and scheduler.sigmas[scheduler.step_index] == 0
        return to_zero and (self.config["solver_type"] == "bh1" or not self.config["predict_x0"])


def relative(ours, expected):
    """The largest difference over the largest expected value; infinite where only one is finite."""
    ours, expected = ours.double(), expected.double()
    same = (ours == expected) | (ours.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, (ours - expected).abs()).nan_to_num(nan=np.inf)
    scale = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else 1.0
    return float(difference.max() / max(float(scale), 1e-30))


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("name", RANDOM)
def test_a_step_equals_diffusers_in_random_configurations(name, batch):
    for seed in range(batch * PER_BATCH, (batch + 1) * PER_BATCH):
        Case(name, seed).check()


@pytest.mark.parametrize("name", RANDOM)
def test_a_float16_step_is_as_exact_as_diffusers(name):
    """diffusers rounds after each operation, we at the end: both are held against diffusers in float32."""
    for seed in range(25):
        case = Case(name, seed)
        case.dtype = torch.float16
        half = case.run_diffusers()
        case.dtype = torch.float32
        exact = case.run_diffusers([before.float() for before, _ in half])
        case.dtype = torch.float16
        scheduler = case.scheduler(minidiff)
        _, steps = case.inputs(scheduler.timesteps)
        for (i, t, model_output), (before, theirs), (_, truth) in zip(steps, half, exact, strict=False):
            ours = scheduler.step(model_output, t, before, **case.generator(i), **case.options).prev_sample
            assert ours.dtype == torch.float16
            if truth.abs().max() < 1e4 and torch.isfinite(theirs).all():  # float16 ends at 65504
                error, allowed = relative(ours, truth), relative(theirs, truth)
                assert error <= 1.1 * allowed + 2**-10, (
                    f"step {i}: {error:.2e}, diffusers {allowed:.2e}: {case}"
                )


@pytest.mark.parametrize("config", [{"solver_type": "bh1"}, {"predict_x0": False}], ids=str)
def test_unipcs_last_step_to_no_noise_is_the_limit_of_steps_to_little_noise(config):
    """There diffusers multiplies 0 by infinity: NaN. Its steps to smaller sigmas come close to ours."""
    ours = minidiff.UniPCMultistepScheduler(**config)
    theirs = diffusers.UniPCMultistepScheduler(**config)
    ours.set_timesteps(6)
    theirs.set_timesteps(6)
    theirs.sigmas[-1] = 1e-6
    rng = np.random.default_rng(0)
    sample = torch.from_numpy(rng.standard_normal((1, 2, 4, 4), dtype=np.float32))
    for t in ours.timesteps:
        model_output = torch.from_numpy(rng.standard_normal((1, 2, 4, 4), dtype=np.float32))
        after = theirs.step(model_output, t, sample).prev_sample
        assert relative(ours.step(model_output, t, sample).prev_sample, after) < STEP
        sample = after


def test_the_weights_solve_the_vandermonde_system():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 4, 5):
        nodes, b = np.sort(rng.uniform(-3, 1, n)), rng.standard_normal(n)
        expected = np.linalg.solve(nodes[None] ** np.arange(n)[:, None], b)
        np.testing.assert_allclose(solve_vandermonde(nodes, b), expected, rtol=1e-10)
