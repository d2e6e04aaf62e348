"""Methods and attributes that single schedulers have, against diffusers."""

import numpy as np
import pytest
import torch
from parity import assert_close, assert_relative, both
from scheduler_lists import EDM, normal, ready, theirs_ready


@pytest.mark.parametrize(
    "variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"]
)
@pytest.mark.parametrize("steps", [None, 20])
def test_ddpms_variance_equals_diffusers(variance_type, steps):
    ours, theirs = both("DDPMScheduler", steps, variance_type=variance_type)
    predicted = torch.from_numpy(normal(1, 2, 3)) if variance_type == "learned_range" else None
    for t in (0, 450, 950):
        expected = theirs._get_variance(t, predicted)
        array = None if predicted is None else predicted.numpy()
        assert_close(ours._get_variance(t, array), expected, rtol=1e-6)
        large = theirs._get_variance(t, None, "fixed_large")
        assert_close(ours._get_variance(t, variance_type="fixed_large"), large)
        assert ours.previous_timestep(t) == int(theirs.previous_timestep(t))


def test_ddpm_steps_one_by_one_before_timesteps_are_set():
    ours, theirs = both("DDPMScheduler")
    x = torch.from_numpy(normal(1, 2, 3))
    expected = theirs.step(x, 10, x, generator=torch.Generator().manual_seed(0)).prev_sample
    result = ours.step(x, 10, x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert_close(result, expected, atol=1e-6)


def test_ddims_variance_equals_diffusers():
    for alpha_to_one in (True, False):
        ours, theirs = both("DDIMScheduler", 10, set_alpha_to_one=alpha_to_one)
        assert ours.final_alpha_cumprod == theirs.final_alpha_cumprod
        for t, prev_t in ((900, 800), (100, 0), (0, -100)):
            assert_close(ours._get_variance(t, prev_t), theirs._get_variance(t, prev_t), rtol=1e-6)


def test_pndms_methods_and_history_can_be_used_by_hand():
    ours, theirs = both("PNDMScheduler", 10)
    past = [torch.from_numpy(normal(1, 2, 3, seed=i)) for i in range(4)]
    x = torch.from_numpy(normal(1, 2, 3, seed=9))
    for scheduler in (ours, theirs):
        scheduler.ets = past[:]
    for method, t in (("step_prk", ours.prk_timesteps[0]), ("step_plms", ours.plms_timesteps[1])):
        expected = getattr(theirs, method)(past[0], int(t), x).prev_sample
        assert_close(getattr(ours, method)(past[0], t, x).prev_sample, expected, rtol=1e-6, atol=1e-6)


MULTISTEP = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler")


@pytest.mark.parametrize("name", [*MULTISTEP, "EDMDPMSolverMultistepScheduler"])
def test_the_history_of_a_multistep_solver_can_be_set(name):
    ours, theirs = ready(name, 10), theirs_ready(name, 10)
    past = [torch.from_numpy(normal(1, 2, 3, seed=i)) for i in range(2)]
    x = torch.from_numpy(normal(1, 2, 3, seed=9))
    for scheduler in (ours, theirs):
        scheduler.model_outputs = past[:]
        scheduler.lower_order_nums = 2
    result = ours.step(x, ours.timesteps[5], x).prev_sample
    assert_relative(result, theirs.step(x, theirs.timesteps[5], x).prev_sample, 1e-5)
    assert len(ours.model_outputs) == 2


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_the_previous_timestep_equals_diffusers(name):
    ours, theirs = both(name)
    assert ours.previous_timestep(500) == theirs.previous_timestep(500) == 499
    for arguments in ({"num_inference_steps": 4}, {"timesteps": [900, 500, 100]}):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(**arguments)
        for t in theirs.timesteps:
            assert ours.previous_timestep(t) == int(theirs.previous_timestep(t))


def test_lcms_boundary_condition_equals_diffusers():
    ours, theirs = both("LCMScheduler")
    for t in (0, 19, 999):
        expected = theirs.get_scalings_for_boundary_condition_discrete(t)
        assert_close(ours.get_scalings_for_boundary_condition_discrete(t), expected, rtol=1e-12)


def test_lms_weights_equal_those_that_diffusers_integrates_numerically():
    ours, theirs = ready("LMSDiscreteScheduler", 10), theirs_ready("LMSDiscreteScheduler", 10)
    for order, t in ((1, 0), (2, 3), (3, 5), (4, 9)):
        for k in range(order):
            expected = theirs.get_lms_coefficient(order, t, k)
            assert_close(ours.get_lms_coefficient(order, t, k), expected, rtol=1e-5)


@pytest.mark.parametrize("name", EDM)
def test_edms_preconditioning_equals_diffusers(name):
    for prediction_type in ("epsilon", "v_prediction"):
        ours, theirs = both(name, prediction_type=prediction_type, sigma_data=0.7)
        sample, output = (torch.from_numpy(normal(2, 3, 4, seed=i)) for i in (1, 2))
        for sigma in (0.01, 1.5, 70.0):
            expected = theirs.precondition_outputs(sample, output, sigma)
            assert_relative(ours.precondition_outputs(sample, output, sigma), expected, 1e-6)
            arrays = sample.numpy(), output.numpy()
            assert_relative(ours.precondition_outputs(*arrays, sigma), expected, 1e-6)
            expected = theirs.precondition_inputs(sample, sigma)
            assert_relative(ours.precondition_inputs(sample, sigma), expected, 1e-6)
            assert_close(ours.precondition_noise(sigma), theirs.precondition_noise(sigma), rtol=1e-6)
        noise = theirs.precondition_noise(torch.tensor([0.1, 3.0]))
        assert_close(ours.precondition_noise(torch.tensor([0.1, 3.0])), noise, rtol=1e-6)


def test_edms_euler_takes_the_clean_sample_itself():
    ours, theirs = ready("EDMEulerScheduler"), theirs_ready("EDMEulerScheduler")
    output, sample, x0 = (torch.from_numpy(normal(2, 3, 4, seed=i)) for i in range(3))
    expected = theirs.step(output, theirs.timesteps[1], sample, pred_original_sample=x0)
    result = ours.step(output, ours.timesteps[1], sample, pred_original_sample=x0)
    assert_relative(result.prev_sample, expected.prev_sample, 1e-6)
    assert_close(result.pred_original_sample, x0)


@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_matching_takes_a_timestep_for_each_token(stochastic):
    name = "FlowMatchEulerDiscreteScheduler"
    ours = ready(name, 6, shift=3.0, stochastic_sampling=stochastic)
    theirs = theirs_ready(name, 6, shift=3.0, stochastic_sampling=stochastic)
    output, sample = (torch.from_numpy(normal(2, 5, 3, seed=i)) for i in (1, 2))
    tokens = torch.from_numpy(np.random.default_rng(0).uniform(0, 1000, (2, 5)).astype(np.float32))
    for i in (0, 3):
        results = []
        for scheduler in (ours, theirs):
            options = {"per_token_timesteps": tokens, "generator": torch.Generator().manual_seed(0)}
            results.append(scheduler.step(output, scheduler.timesteps[i], sample, **options).prev_sample)
        assert_relative(*results, 1e-6)
    options = {"per_token_timesteps": tokens.numpy(), "generator": torch.Generator().manual_seed(0)}
    again = ours.step(output.numpy(), ours.timesteps[3], sample.numpy(), **options).prev_sample
    assert_relative(again, results[1], 1e-6)


def test_flow_matchings_shift_can_be_changed():
    ours, theirs = both("FlowMatchEulerDiscreteScheduler", shift=1.0)
    for scheduler in (ours, theirs):
        scheduler.set_shift(4.0)
        scheduler.set_timesteps(6)
    assert ours.shift == theirs.shift == 4.0
    assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6)
    assert_close((ours.sigma_min, ours.sigma_max), (theirs.sigma_min, theirs.sigma_max), rtol=1e-6)
    t = np.array([0.3, 0.7, 0.9])
    for kind in ("exponential", "linear"):
        ours, theirs = both("FlowMatchEulerDiscreteScheduler", time_shift_type=kind, shift_terminal=0.1)
        assert_close(ours.time_shift(0.7, 1.0, t), theirs.time_shift(0.7, 1.0, t), rtol=1e-12)
        assert_close(ours.stretch_shift_to_terminal(t), theirs.stretch_shift_to_terminal(t), rtol=1e-12)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_which_of_a_steps_two_calls_is_next_can_be_seen(name):
    ours, theirs = ready(name), theirs_ready(name)
    x = torch.from_numpy(normal(1, 2, 3))
    for t, expected_t in zip(ours.timesteps, theirs.timesteps, strict=True):
        assert ours.state_in_first_order == theirs.state_in_first_order
        ours.step(x, t, x)
        theirs.step(x, expected_t, x)


def test_the_single_step_solvers_orders_equal_diffusers():
    for order in (1, 2, 3):
        for lower in (False, True):
            for n in (6, 7, 8, 9):
                config = {"solver_order": order, "lower_order_final": lower}
                ours = ready("DPMSolverSinglestepScheduler", n, **config)
                theirs = theirs_ready("DPMSolverSinglestepScheduler", n, **config)
                assert list(ours.order_list) == theirs.order_list
                assert ours.config.lower_order_final == theirs.config.lower_order_final
