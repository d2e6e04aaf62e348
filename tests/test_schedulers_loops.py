"""Level 3: whole loops on fake models against diffusers."""

import numpy as np
import pytest
import torch
from parity import assert_close, assert_relative, both
from scheduler_lists import ADDING_NOISE, COUNTING, DRAWING, NAMES, TWO_CALLS

LOOP = 1e-5  # of the largest value; measured: 2e-6
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
KARRAS = {"use_karras_sigmas": True}
V = {"prediction_type": "v_prediction"}
CHURN = {"s_churn": 10.0, "s_tmin": 0.05, "s_noise": 1.003}
LOOPS = [
    ("DDPMScheduler", {}, {}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "trailing"}, {}),
    ("DDIMScheduler", {}, {}),
    ("DDIMScheduler", {**STABLE_DIFFUSION, "set_alpha_to_one": False, "steps_offset": 1}, {"eta": 0.7}),
    ("DDIMScheduler", {**ZERO_SNR, "timestep_spacing": "trailing"}, {}),
    ("PNDMScheduler", {}, {}),
    ("PNDMScheduler", {**STABLE_DIFFUSION, "skip_prk_steps": True, "steps_offset": 1}, {}),
    ("UniPCMultistepScheduler", {}, {}),
    ("UniPCMultistepScheduler", {**STABLE_DIFFUSION, "steps_offset": 1, "solver_order": 3}, {}),
    ("UniPCMultistepScheduler", {**STABLE_DIFFUSION, **KARRAS}, {}),
    ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0}, {}),
    ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}, {}),
    ("DPMSolverMultistepScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {**STABLE_DIFFUSION, **KARRAS, "solver_order": 3}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
    ("DPMSolverMultistepScheduler", {**V, "euler_at_final": True, "timestep_spacing": "trailing"}, {}),
    ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}, {}),
    ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, {}),
    ("DPMSolverSinglestepScheduler", {**STABLE_DIFFUSION, "solver_order": 3, "lower_order_final": True}, {}),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True}, {}),
    (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun"},
        {},
    ),
    ("DEISMultistepScheduler", {}, {}),
    ("DEISMultistepScheduler", {**STABLE_DIFFUSION, "solver_order": 3, "steps_offset": 1}, {}),
    ("DEISMultistepScheduler", {**FLOW, "flow_shift": 3.0}, {}),
    ("EDMDPMSolverMultistepScheduler", {}, {}),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3, "sigma_schedule": "exponential"}, {}),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("EulerDiscreteScheduler", {}, {}),
    ("EulerDiscreteScheduler", {**STABLE_DIFFUSION, **KARRAS, "steps_offset": 1}, CHURN),
    ("EulerDiscreteScheduler", {**ZERO_SNR, "timestep_spacing": "trailing"}, {}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("EulerAncestralDiscreteScheduler", {**STABLE_DIFFUSION, **V, "timestep_spacing": "leading"}, {}),
    ("HeunDiscreteScheduler", {}, {}),
    ("HeunDiscreteScheduler", {**STABLE_DIFFUSION, **KARRAS}, {}),
    ("LMSDiscreteScheduler", {}, {}),
    ("LMSDiscreteScheduler", {**STABLE_DIFFUSION, "timestep_spacing": "leading"}, {"order": 3}),
    ("KDPM2DiscreteScheduler", {"num_train_timesteps": 100}, {}),
    ("KDPM2DiscreteScheduler", {**V, **KARRAS, "num_train_timesteps": 100}, {}),
    ("KDPM2AncestralDiscreteScheduler", {"num_train_timesteps": 100}, {}),
    ("KDPM2AncestralDiscreteScheduler", {**V, **KARRAS, "num_train_timesteps": 100}, {}),
    ("EDMEulerScheduler", {}, {}),
    ("EDMEulerScheduler", {**V, "sigma_schedule": "exponential"}, CHURN),
    ("LCMScheduler", {}, {}),
    ("LCMScheduler", {**V, "clip_sample": True, "timestep_scaling": 4.0}, {}),
    ("TCDScheduler", {}, {}),
    ("TCDScheduler", {**V, "set_alpha_to_one": False}, {"eta": 0.8}),
    ("IPNDMScheduler", {}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}, {}),
    ("DDIMInverseScheduler", {}, {}),
    ("DDIMInverseScheduler", {**STABLE_DIFFUSION, "clip_sample": False, "timestep_spacing": "trailing"}, {}),
]


def test_every_scheduler_has_a_loop():
    assert {name for name, _, _ in LOOPS} == set(NAMES)


def fake_model(x, t):
    """A prediction that depends on sample and timestep and is neither linear nor zero; tensors in and out."""
    return 0.8 * torch.tanh(x) + 0.1 * torch.sin(torch.tensor(float(t)) / 100)


def noise(*shape):
    return torch.from_numpy(np.random.default_rng(7).standard_normal(shape, dtype=np.float32))


def start(scheduler, *shape):
    """The first sample of a whole loop; diffusers' flow matching does without the attribute."""
    return noise(*shape) * float(getattr(scheduler, "init_noise_sigma", 1))


def run(scheduler, sample, timesteps=None, as_numpy=False, **options):
    """The tutorials' loop."""
    scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)  # so does it without this
    for t in scheduler.timesteps if timesteps is None else timesteps:
        model_output = fake_model(scale(sample, t), t)
        if as_numpy:
            model_output, sample = model_output.numpy(), sample.numpy()
        sample = torch.as_tensor(scheduler.step(model_output, t, sample, **options).prev_sample)
    return sample


def seeded(name, seed=5):
    """What a loop needs beside the sample: a fresh generator where noise is drawn."""
    return {"generator": torch.Generator().manual_seed(seed)} if name in DRAWING else {}


@pytest.mark.parametrize("steps", [4, 17, 50])
@pytest.mark.parametrize("name, config, options", LOOPS, ids=str)
def test_a_whole_loop_equals_diffusers(name, config, options, steps):
    ours, theirs = both(name, steps, **config)
    expected = run(theirs, start(theirs, 2, 4, 6, 10), **options, **seeded(name))
    for as_numpy in (False, True):
        ours.set_timesteps(steps)
        result = run(ours, start(ours, 2, 4, 6, 10), as_numpy=as_numpy, **options, **seeded(name))
        assert_relative(result, expected, LOOP)
        for number in (torch.sum, torch.mean):  # the two that diffusers' own tests look at
            assert_close(number(result.abs()), number(expected.abs()), rtol=1e-4)


@pytest.mark.parametrize("name, config, options", LOOPS, ids=str)
def test_a_second_run_with_one_scheduler_equals_diffusers(name, config, options):
    ours, theirs = both(name, 9, **config)
    for steps in (9, 6):
        results = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(steps)
            results.append(run(scheduler, start(scheduler, 1, 4, 6, 10), **options, **seeded(name)))
        assert_relative(*results, LOOP)


@pytest.mark.parametrize("name, config, options", LOOPS, ids=str)
def test_an_interrupted_run_leaves_nothing_behind_after_set_timesteps(name, config, options):
    ours, _ = both(name, 8, **config)
    first = run(ours, start(ours, 1, 4, 6, 10), **options, **seeded(name))
    ours.set_timesteps(8)
    run(ours, noise(1, 4, 6, 10) * 3, ours.timesteps[:3], **options, **seeded(name))
    ours.set_timesteps(8)
    assert_close(run(ours, start(ours, 1, 4, 6, 10), **options, **seeded(name)), first)


@pytest.mark.parametrize("begin_index", [False, True])
@pytest.mark.parametrize(
    "name, config, options", [x for x in LOOPS if x[:2] != ("PNDMScheduler", {})], ids=str
)
def test_a_run_from_the_middle_equals_diffusers(name, config, options, begin_index):
    # all but the Runge-Kutta warm-up, which is at the start
    ours, theirs = both(name, 12, **config)
    results = []
    for scheduler in (ours, theirs):
        first = 6 if name in TWO_CALLS else 5
        if begin_index and name in COUNTING:
            scheduler.set_begin_index(first)
        sample, timesteps = noise(2, 4, 6, 10), scheduler.timesteps[first:]
        at = torch.as_tensor(timesteps[[0, 0]])
        if hasattr(scheduler, "scale_noise"):
            sample = scheduler.scale_noise(sample, at, noise(2, 4, 6, 10).flip(0))
        elif name in ADDING_NOISE:
            sample = scheduler.add_noise(sample, noise(2, 4, 6, 10).flip(0), at)
        results.append(run(scheduler, sample, timesteps, **options, **seeded(name)))
    assert_relative(*results, LOOP)


@pytest.mark.parametrize("steps", [11, 14, 15, 16])
@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "DEISMultistepScheduler", "EDMDPMSolverMultistepScheduler"]
)
def test_the_last_of_fewer_than_15_steps_are_of_lower_order(name, steps):
    ours, theirs = both(name, steps, solver_order=3)
    result = run(ours, start(ours, 1, 4, 6, 10))
    assert_relative(result, run(theirs, start(theirs, 1, 4, 6, 10)), LOOP)
    full = type(ours)(solver_order=3, lower_order_final=False)
    full.set_timesteps(steps)
    assert torch.equal(run(full, start(full, 1, 4, 6, 10)), result) == (steps >= 15)


@pytest.mark.parametrize("predictor", ["DDIMScheduler", "PNDMScheduler"])
def test_unipc_corrects_another_schedulers_predictions_as_diffusers_does(predictor):
    config = {"skip_prk_steps": True} if predictor == "PNDMScheduler" else {"clip_sample": False}
    ours, theirs = both("UniPCMultistepScheduler", timestep_spacing="trailing")
    predictors = both(predictor, timestep_spacing="trailing", **config)
    for scheduler, other in zip((ours, theirs), predictors, strict=True):
        scheduler.solver_p = other
        scheduler.set_timesteps(8)
    expected = run(theirs, noise(1, 4, 6, 10))
    assert_relative(run(ours, noise(1, 4, 6, 10)), expected, LOOP)
    assert_relative(run(ours_again(ours), noise(1, 4, 6, 10), as_numpy=True), expected, LOOP)


def ours_again(scheduler):
    scheduler.set_timesteps(8)
    return scheduler
