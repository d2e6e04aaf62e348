"""Level 1: tables, timesteps and sigmas of the schedulers against diffusers."""

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr as rescale_in_diffusers
from parity import assert_close, both
from scheduler_lists import BETAS, EXPLODING, NAMES, SLOW, SPACED, parameters, quicker, with_option

import minidiff
from minidiff.numerics import symmetric_beta_quantile
from minidiff.schedulers.schedule import linspace, rescale_zero_terminal_snr

SPACINGS = ("linspace", "leading", "trailing")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TABLE = 1e-6  # torch's float32 square root is off by one bit in 0.7 % of the cases: 1.2e-7
STEPS = (1, 2, 3, 4, 5, 7, 10, 20, 25, 30, 50, 61, 77, 100, 103, 250, 333, 500, 600, 999, 1000)
FEW_STEPS = tuple(n for n in STEPS if n <= 100)
MULTISTEP = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler")


def assert_same_schedule(ours, theirs, rtol=TABLE):
    """Timesteps equal (where they are fractions: to float32's precision), sigmas within rtol."""
    if theirs.timesteps is None:
        assert ours.timesteps is None
    elif ours.num_inference_steps is None:  # before set_timesteps; diffusers' are whole floats at times
        assert_close(ours.timesteps, theirs.timesteps, rtol=TABLE)
    elif not theirs.timesteps.is_floating_point():
        assert ours.timesteps.dtype == np.int64
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    else:
        assert ours.timesteps.dtype == np.float32
        if theirs.order == 1 and (theirs.timesteps == theirs.timesteps.round()).all():
            assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        # in units of one timestep; a last bit of log sigma, between whose neighbours they are
        assert_close(ours.timesteps, theirs.timesteps, rtol=TABLE, atol=2e-5)
    if hasattr(theirs, "sigmas"):
        assert ours.sigmas.dtype == np.float32
        assert_close(ours.sigmas, theirs.sigmas, rtol=rtol)
    if hasattr(theirs, "init_noise_sigma"):  # flow matching: 1
        assert_close(ours.init_noise_sigma, theirs.init_noise_sigma, rtol=rtol)
    # ours is never None after set_timesteps, as EDMEuler's is with a caller's sigmas
    if ours.num_inference_steps is not None and theirs.num_inference_steps is not None:
        assert ours.num_inference_steps == theirs.num_inference_steps


def is_spacing_of(name, spacing):
    return spacing != "linspace" or name != "DDIMInverseScheduler"


@pytest.mark.parametrize("start, end", [(1e-4, 0.02), (0.00085**0.5, 0.012**0.5), (-6, 6), (0.3, 0.3)])
def test_linspace_equals_torch_to_the_last_bit(start, end):
    for n in (1, 2, 3, 7, 100, 999, 1000, 1001):
        expected = torch.linspace(start, end, n, dtype=torch.float32).numpy()
        assert (linspace(start, end, n) == expected).all(), n


@pytest.mark.parametrize("schedule", [*SCHEDULES, "laplace", "sigmoid"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "n, start, end", [(1000, 1e-4, 0.02), (1000, 0.00085, 0.012), (100, 0.001, 0.3), (7, 0.1, 0.9)]
)
def test_tables_equal_diffusers(schedule, zero_snr, n, start, end):
    config = {
        "beta_start": start,
        "beta_end": end,
        "num_train_timesteps": n,
        "rescale_betas_zero_snr": zero_snr,
    }
    ours, theirs = both("DDPMScheduler", beta_schedule=schedule, **config)
    tolerance = 5 * TABLE if zero_snr else TABLE  # there, betas are quotients of differences of roots
    for table in ("betas", "alphas", "alphas_cumprod"):
        assert getattr(ours, table).dtype == np.float32
        assert_close(getattr(ours, table), getattr(theirs, table), rtol=tolerance, atol=tolerance * zero_snr)
    if not zero_snr and schedule != "sigmoid":  # their exp and sqrt aren't ours: only those may differ at all
        assert (ours.alphas_cumprod == theirs.alphas_cumprod.numpy()).all()
    assert (ours.timesteps == theirs.timesteps.numpy()).all()
    assert len(ours) == len(theirs) == n


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_scheduler_has_the_tables_of_diffusers(name, schedule):
    n = 100 if name in SLOW else 1000
    ours, theirs = both(name, beta_schedule=schedule, beta_start=0.002, beta_end=0.015, num_train_timesteps=n)
    for table in ("betas", "alphas", "alphas_cumprod"):
        assert (getattr(ours, table) == getattr(theirs, table).numpy()).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_new_scheduler_has_the_schedule_of_the_training(name):
    ours, theirs = both(name)
    assert_same_schedule(ours, theirs)
    assert ours.order == theirs.order and len(ours) == len(theirs) == 1000


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("name", BETAS)
def test_trained_betas_may_be_a_list_an_array_or_a_tensor(name, kind):
    betas = [0.1, 0.2, 0.3]
    ours, theirs = both(name, trained_betas=betas, num_train_timesteps=3)
    assert (ours.alphas_cumprod == theirs.alphas_cumprod.numpy()).all()
    assert (type(ours)(trained_betas=kind(betas), num_train_timesteps=3).betas == ours.betas).all()


def test_zero_terminal_snr_ends_at_zero():
    betas = linspace(1e-4, 0.02, 1000)
    ours = rescale_zero_terminal_snr(betas)
    assert np.cumprod(1 - ours)[-1] == 0
    assert_close(ours, rescale_in_diffusers(torch.from_numpy(betas)), rtol=TABLE, atol=TABLE)


@pytest.mark.parametrize("name", with_option("rescale_betas_zero_snr"))
def test_only_sigma_schedulers_lift_the_last_entry_of_a_zero_snr_table(name):
    ours, theirs = both(name, rescale_betas_zero_snr=True)
    assert ours.alphas_cumprod[-1] == theirs.alphas_cumprod[-1]
    assert ours.alphas_cumprod[-1] == (2**-24 if hasattr(theirs, "sigmas") else 0)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    assert_same_schedule(ours, theirs, rtol=1e-4)  # 1 - a_t of a rounded a_t


@pytest.mark.parametrize("name", SPACED)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_the_schedule_equals_diffusers_for_any_number_of_steps(name, spacing, offset):
    if not is_spacing_of(name, spacing):
        return
    ours, theirs = both(name, **quicker(name, timestep_spacing=spacing, steps_offset=offset))
    for n in FEW_STEPS if name in SLOW else STEPS:
        if n < 4 and name == "PNDMScheduler":
            continue  # too few for Runge-Kutta: refused by both
        if n > 50 and name in ("LCMScheduler", "TCDScheduler"):
            continue  # more than were distilled: refused by both
        if n == len(ours) and spacing == "leading" and name in MULTISTEP:
            continue  # one too many, all timesteps alike: refused here, an error after the last step there
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        assert_same_schedule(ours, theirs)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in SPACED])
def test_the_schedule_without_spacings_equals_diffusers_for_any_number_of_steps(name):
    ours, theirs = both(name)
    for n in STEPS:
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        assert_same_schedule(ours, theirs)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n_train", [10, 37, 100, 1234])
def test_the_schedule_equals_diffusers_for_other_training_lengths(spacing, n_train):
    for name in SPACED:
        if is_spacing_of(name, spacing) and not (name in SLOW and n_train > 100):
            originals = {"original_inference_steps": n_train // 2} if name[:3] in ("LCM", "TCD") else {}
            config = {"timestep_spacing": spacing, "num_train_timesteps": n_train, **originals}
            assert_same_schedule(*both(name, n_train // 2, **config))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("skip", [False, True])
def test_pndm_has_the_runge_kutta_and_multistep_timesteps_of_diffusers(spacing, skip):
    ours, theirs = both("PNDMScheduler", timestep_spacing=spacing, skip_prk_steps=skip, steps_offset=1)
    assert ours.timesteps is None and ours.prk_timesteps is None and ours.plms_timesteps is None
    for n in STEPS[0 if skip else 3 :]:
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist(), n
        assert ours.prk_timesteps.tolist() == theirs.prk_timesteps.tolist()
        assert ours.plms_timesteps.tolist() == theirs.plms_timesteps.tolist()


def test_stable_diffusions_second_timestep_is_doubled():
    ours, _ = both("PNDMScheduler", 5, skip_prk_steps=True, steps_offset=1)
    assert ours.timesteps.tolist() == [801, 601, 601, 401, 201, 1]


@pytest.mark.parametrize("given", [[999, 500, 3], np.array([400, 0]), torch.tensor([7, 6, 5]), [12.0, 3.0]])
@pytest.mark.parametrize("name", [n for n in with_option("timesteps", "set_timesteps") if n in BETAS])
def test_timesteps_of_your_own_may_come_in_any_form(name, given):
    ours, theirs = both(name)
    ours.set_timesteps(timesteps=given)
    theirs.set_timesteps(timesteps=[int(t) for t in given])
    assert_same_schedule(ours, theirs)
    if hasattr(theirs, "custom_timesteps"):
        assert ours.custom_timesteps and theirs.custom_timesteps
        for t in theirs.timesteps:
            assert ours.previous_timestep(t) == int(theirs.previous_timestep(t))


SPREADS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@pytest.mark.parametrize("more", ["", "cosine", "to sigma_min", "bounds"])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", with_option("use_beta_sigmas"))
def test_spread_sigmas_and_their_timesteps_equal_diffusers(name, spread, more):
    takes = parameters(name)
    config = quicker(name, **{spread: True})
    if more == "cosine" and "beta_schedule" in takes and name != "KDPM2AncestralDiscreteScheduler":
        # there, steps are so long that a root of 0 is a root of a negative number in diffusers
        config["beta_schedule"] = "squaredcos_cap_v2"
    if more == "to sigma_min" and "final_sigmas_type" in takes:
        config["final_sigmas_type"] = "sigma_min"
    if more == "bounds":  # a foreign key in most classes, which from_config carries along and diffusers obeys
        config |= {"sigma_min": 0.1, "sigma_max": 0.9 if name.startswith("FlowMatch") else 12.0}
    if more == "" or len(config) > len(quicker(name)) + 1:
        for n in (1, 2, 5, 10, 25, 50):
            ours = getattr(minidiff, name).from_config(config)
            theirs = getattr(diffusers, name).from_config(config)
            ours.set_timesteps(n)
            theirs.set_timesteps(n)
            assert_same_schedule(ours, theirs)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SINGLE = {"lower_order_final": True}
SCHEDULES_OF_THEIR_OWN = [
    ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, {}),
    ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0, "final_sigmas_type": "sigma_min"}, {}),
    ("UniPCMultistepScheduler", {**FLOW, "shift_terminal": 0.1}, {}),
    ("UniPCMultistepScheduler", {**FLOW, "use_karras_sigmas": True}, {}),
    ("UniPCMultistepScheduler", {**FLOW, "use_dynamic_shifting": True}, {"mu": 0.8}),
    (
        "UniPCMultistepScheduler",
        {**FLOW, "use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"mu": 1.7},
    ),
    ("UniPCMultistepScheduler", FLOW, {"sigmas": [1.0, 0.7, 0.4, 0.2]}),
    ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 2.0}, {"sigmas": [1.0, 0.7, 0.4, 0.2]}),
    (
        "UniPCMultistepScheduler",
        {**FLOW, "use_dynamic_shifting": True},
        {"sigmas": [0.9, 0.4, 0.2], "mu": 0.5},
    ),
    ("UniPCMultistepScheduler", {**FLOW, "shift_terminal": 0.2}, {"sigmas": [1.0, 0.7, 0.4, 0.2]}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}, {}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -2.0, "timestep_spacing": "leading"}, {}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -2.0, "timestep_spacing": "trailing"}, {}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, {}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True, "beta_schedule": "squaredcos_cap_v2"}, {}),
    ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}, {}),
    ("DPMSolverMultistepScheduler", {**FLOW, "use_dynamic_shifting": True}, {"mu": 0.8}),
    ("DPMSolverSinglestepScheduler", {**SINGLE, "lambda_min_clipped": -2.0}, {}),
    ("DPMSolverSinglestepScheduler", {**SINGLE, **FLOW, "flow_shift": 3.0}, {}),
    ("DPMSolverSinglestepScheduler", {**SINGLE, **FLOW, "use_dynamic_shifting": True}, {"mu": 0.8}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}, {}),
    ("DEISMultistepScheduler", {**FLOW, "flow_shift": 3.0}, {}),
    ("DEISMultistepScheduler", {**FLOW, "use_dynamic_shifting": True}, {"mu": 0.8}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, {}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, {}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, {}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, {}),
    (
        "EulerDiscreteScheduler",
        {
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
        {},
    ),
    ("EulerDiscreteScheduler", {}, {"sigmas": [14.0, 7.0, 1.0, 0.1, 0.0]}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"sigmas": np.array([11.0, 2.0, 0.1, 0.0])}),
    ("HeunDiscreteScheduler", {}, {"num_train_timesteps": 500}),
    ("KDPM2DiscreteScheduler", {"num_train_timesteps": 100}, {"num_train_timesteps": 70}),
    ("KDPM2AncestralDiscreteScheduler", {"num_train_timesteps": 100}, {"num_train_timesteps": 70}),
    ("LCMScheduler", {}, {"original_inference_steps": 100}),
    ("LCMScheduler", {}, {"strength": 0.5}),
    ("LCMScheduler", {}, {"timesteps": [999, 759, 499, 259], "strength": 0.6}),
    ("TCDScheduler", {}, {"original_inference_steps": 100}),
    ("TCDScheduler", {}, {"strength": 0.5}),
    ("TCDScheduler", {}, {"original_inference_steps": 60, "strength": 0.7}),
    ("TCDScheduler", {}, {"timesteps": [999, 759, 499, 259], "strength": 0.6}),
    ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min", "rho": 5.0}, {}),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential", "sigma_min": 0.03, "sigma_max": 14.0}, {}),
    ("EDMEulerScheduler", {}, {"sigmas": torch.tensor([0.0, 0.2, 0.7, 1.0])}),
    ("EDMDPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "rho": 5.0}, {}),
    ("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential", "sigma_max": 14.0}, {}),
    ("IPNDMScheduler", {"trained_betas": [0.9, 0.6, 0.3, 0.1]}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "invert_sigmas": True}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.1}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"mu": 0.8}),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"mu": 1.7},
    ),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0}, {"sigmas": [1.0, 0.7, 0.4, 0.2]}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0}, {"timesteps": [1000.0, 700.0, 250.0]}),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 2.0},
        {"sigmas": [0.9, 0.4, 0.2], "timesteps": [1000.0, 700.0, 250.0]},
    ),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"use_karras_sigmas": True},
        {"sigmas": [0.9, 0.4, 0.2], "num_inference_steps": 3},
    ),
]


@pytest.mark.parametrize("name, config, arguments", SCHEDULES_OF_THEIR_OWN, ids=str)
def test_a_schedule_that_few_have_equals_diffusers(name, config, arguments):
    ours, theirs = both(name, **config)
    counts = (2, 3, 5, 6, 10, 18, 25, 50)
    if {"sigmas", "timesteps"} & set(arguments):
        counts = (None,)
    if arguments.get("strength") or arguments.get("original_inference_steps"):
        counts = (1, 2, 4, 25) if counts[0] else counts
    if "trained_betas" in config:
        counts = (len(config["trained_betas"]) - 1,)
    for n in counts:
        for scheduler in (ours, theirs):
            given = dict(arguments)
            if n is not None:
                given["num_inference_steps"] = n
            if scheduler is theirs and isinstance(given.get("sigmas"), list):
                given["sigmas"] = np.array(given["sigmas"])  # some of diffusers' take arrays only
            scheduler.set_timesteps(**given)
        assert_same_schedule(ours, theirs)


@pytest.mark.parametrize("name", EXPLODING)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_first_sample_is_as_noisy_as_in_diffusers(name, spacing):
    config = {"timestep_spacing": spacing} if name in SPACED else {}
    ours, theirs = both(name, 7, **quicker(name, **config))
    assert np.isscalar(float(ours.init_noise_sigma))
    assert_close(ours.init_noise_sigma, theirs.init_noise_sigma, rtol=TABLE)


def test_ipndm_has_the_signal_and_noise_of_diffusers():
    for config in ({}, {"trained_betas": [0.9, 0.6, 0.3, 0.1]}):
        ours, theirs = both("IPNDMScheduler", 3, **config)
        assert_close(ours.betas, theirs.betas, rtol=TABLE)
        assert_close(ours.alphas, theirs.alphas, rtol=TABLE, atol=TABLE)


@pytest.mark.parametrize("a", [0.3, 0.6, 1.0, 2.5])
def test_the_beta_quantile_equals_scipy_to_float64(a):
    p = np.concatenate([1 - np.linspace(0, 1, 333), [1e-15, 1e-9, 0.5, 0.4999999, 0.5000001]])
    assert_close(symmetric_beta_quantile(p, a), scipy.stats.beta.ppf(p, a, a), rtol=1e-13)
