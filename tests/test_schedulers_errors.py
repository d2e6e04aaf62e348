"""Every wrong setting and argument of a scheduler gives one error that names it."""

import numpy as np
import pytest
import torch
from scheduler_lists import ADDING_NOISE, COUNTING, DRAWING, NAMES, NEEDS_SETTING, normal, parameters, ready

import minidiff
from minidiff import DDPMScheduler, PNDMScheduler
from minidiff import UniPCMultistepScheduler as UniPC

ERRORS = [
    (lambda: DDPMScheduler(beta_schedule="cubic"), NotImplementedError, "DDPMScheduler takes linear"),
    (lambda: PNDMScheduler(beta_schedule="sigmoid"), NotImplementedError, "beta_schedule is 'sigmoid'"),
    (lambda: DDPMScheduler(num_train_timesteps=10**12), ValueError, "num_train_timesteps is 1000000000000"),
    (lambda: DDPMScheduler(num_train_timesteps=0), ValueError, "num_train_timesteps is 0"),
    (lambda: DDPMScheduler(num_train_timesteps="many"), TypeError, "num_train_timesteps is 'many'"),
    (lambda: DDPMScheduler(variance_type="wide"), ValueError, "variance_type is 'wide'; DDPMScheduler takes"),
    (lambda: UniPC(use_beta_sigmas=True, use_karras_sigmas=True), ValueError, "exclude each other"),
    (lambda: UniPC(solver_type="euler"), NotImplementedError, "solver_type is 'euler'"),
    (lambda: UniPC(solver_order=0), ValueError, "solver_order is 0"),
    (lambda: UniPC(solver_order=10**9), ValueError, "solver_order is 1000000000"),
    (lambda: UniPC(shift_terminal=0.1), ValueError, "only with use_flow_sigmas=True"),
    (lambda: ready("DDIMScheduler", 0), ValueError, "num_inference_steps is 0; it must be a whole"),
    (lambda: ready("PNDMScheduler", -3), ValueError, "num_inference_steps is -3"),
    (lambda: ready("UniPCMultistepScheduler", 2.5), TypeError, "num_inference_steps is 2.5; it must be"),
    (lambda: ready("DDIMScheduler", True), TypeError, "num_inference_steps is True"),
    (lambda: ready("DDIMScheduler", 1001), ValueError, "1001; it must be a whole number from 1 to 1000"),
    (lambda: ready("DDPMScheduler", 1001), ValueError, "num_inference_steps is 1001"),
    (lambda: ready("PNDMScheduler", 3), ValueError, "takes at least 4"),
    (lambda: ready("DDPMScheduler", timestep_spacing="odd"), ValueError, "timestep_spacing is 'odd'"),
    (lambda: UniPC(final_sigmas_type="one").set_timesteps(4), ValueError, "final_sigmas_type is 'one'"),
    (lambda: ready("UniPCMultistepScheduler", use_dynamic_shifting=True), ValueError, "needs mu"),
    (lambda: DDPMScheduler().set_timesteps(), ValueError, "num_inference_steps, timesteps; got none"),
    (lambda: DDPMScheduler().set_timesteps(3, timesteps=[3, 2, 1]), ValueError,
     "got num_inference_steps and timesteps"),
    (lambda: DDPMScheduler().set_timesteps(timesteps=[3, 3, 1]), ValueError, "must fall from each"),
    (lambda: DDPMScheduler().set_timesteps(timesteps=[1000, 1]), ValueError, "within 999 to 0"),
    (lambda: DDPMScheduler().set_timesteps(timesteps=[5, -1]), ValueError, "within 999 to 0"),
    (lambda: DDPMScheduler().set_timesteps(timesteps=[5.5, 1]), ValueError, "list of whole numbers"),
    (lambda: DDPMScheduler().set_timesteps(timesteps=[]), ValueError, "list of whole numbers"),
    (lambda: UniPC().set_timesteps(), ValueError, "num_inference_steps, sigmas; got none"),
    (lambda: UniPC().set_timesteps(sigmas=[1.0, 0.5]), ValueError, "only with use_flow_sigmas"),
    (lambda: UniPC(use_flow_sigmas=True, shift_terminal=0.1).set_timesteps(1), ValueError, "one step"),
    (lambda: UniPC(
        use_flow_sigmas=True, use_dynamic_shifting=True, time_shift_type="cubic"
    ).set_timesteps(4, mu=1.0), ValueError, "time_shift_type is 'cubic'"),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, message", ERRORS, ids=[e[2] for e in ERRORS])
def test_a_wrong_setting_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def drawing(name):
    """What a step needs so that a second one draws the same."""
    return {"generator": torch.Generator().manual_seed(0)} if name in DRAWING else {}


@pytest.mark.parametrize("name", NEEDS_SETTING)
def test_a_step_without_timesteps_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} has no timesteps yet: call set_timesteps"):
        getattr(minidiff, name)().step(normal(1, 2, 3), 5, normal(1, 2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_of_a_step_are_named(name):
    def step(model_output, sample, **config):
        scheduler = ready(name, **config)
        return scheduler.step(model_output, scheduler.timesteps[0], sample)

    x = normal(1, 2, 3)
    with pytest.raises(ValueError, match=r"model_output is \(1, 3, 3\), sample \(1, 2, 3\)"):
        step(normal(1, 3, 3), x)
    with pytest.raises(ValueError, match=r"both must be \(B, C, …\)"):
        step(normal(3), normal(3))
    with pytest.raises(TypeError, match="sample is a list"):
        step(x, [1.0])
    with pytest.raises(TypeError, match="model_output is a array of int64"):
        step(np.ones((1, 2, 3), int), x)
    if "prediction_type" in parameters(name):
        with pytest.raises(ValueError, match="prediction_type is 'noise'"):
            step(x, x, prediction_type="noise")


@pytest.mark.parametrize("name", COUNTING)
def test_a_step_after_the_last_is_refused(name):
    scheduler, x = ready(name, 2), normal(1, 2, 3)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x, **drawing(name))
    with pytest.raises(
        ValueError, match=f"all {len(scheduler.timesteps)} steps are made; call set_timesteps"
    ):
        scheduler.step(x, t, x, **drawing(name))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler"])
def test_a_timestep_outside_the_tables_is_named(name):
    x = normal(1, 2, 3)
    for wrong in (1000, -2, 10**9):
        with pytest.raises(ValueError, match=f"timestep {wrong} is none of the 1000"):
            ready(name).step(x, wrong, x)
    for wrong in (1.5, float("nan"), float("inf"), "5"):
        with pytest.raises(ValueError, match="it must be one whole number"):
            ready(name).step(x, wrong, x)


def test_pndms_parts_out_of_turn_are_refused():
    x = normal(1, 2, 3)
    with pytest.raises(ValueError, match="needs the noises of 3 Runge-Kutta steps and has 0"):
        ready("PNDMScheduler").step_plms(x, 0, x)
    with pytest.raises(ValueError, match="all 0 Runge-Kutta calls are made"):
        ready("PNDMScheduler", skip_prk_steps=True).step_prk(x, 0, x)


def test_contradicting_noise_is_refused():
    x = normal(1, 2, 3)
    both_given = {"generator": torch.Generator(), "variance_noise": x}
    with pytest.raises(ValueError, match="a generator or variance_noise"):
        ready("DDIMScheduler").step(x, 0, x, eta=0.5, **both_given)
    ready("DDIMScheduler").step(x, 0, x, eta=0.0, **both_given)  # nothing is drawn: allowed, as in diffusers
    with pytest.raises(ValueError, match="2 generators for 1 row"):
        ready("DDPMScheduler").step(x, 800, x, generator=[torch.Generator(), torch.Generator()])
    with pytest.raises(TypeError, match="generator is a int"):
        ready("DDPMScheduler").step(x, 800, x, generator=5)


def test_a_learned_variance_needs_a_model_that_predicts_it():
    x = normal(1, 2, 3)
    with pytest.raises(ValueError, match="twice the sample's channels"):
        ready("DDPMScheduler", variance_type="learned").step(x, 800, x)


def test_ddpm_refuses_a_timestep_that_nothing_follows():
    with pytest.raises(ValueError, match="timestep 7 is not one of"):
        ready("DDPMScheduler").previous_timestep(7)


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_a_thresholding_ratio_outside_its_range_is_named(ratio):
    x = normal(1, 2, 3)
    scheduler = ready("DDIMScheduler", thresholding=True, dynamic_thresholding_ratio=ratio)
    with pytest.raises(ValueError, match="dynamic_thresholding_ratio"):
        scheduler.step(x, 0, x)


@pytest.mark.parametrize("name", ADDING_NOISE)
def test_timesteps_that_fit_no_batch_are_named(name):
    scheduler, x = ready(name), normal(3, 2, 4)
    t = scheduler.timesteps[1]
    for wrong in ([t, t], [[t], [t], [t]]):
        with pytest.raises(ValueError, match="pass one, or one for each of the 3 rows"):
            scheduler.add_noise(x, x, wrong)
    assert (scheduler.add_noise(x, x, t) == scheduler.add_noise(x, x, [t, t, t])).all()
