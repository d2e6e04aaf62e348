"""Level 1: tables, timesteps and sigmas of the schedulers against diffusers."""

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr as rescale_in_diffusers
from parity import assert_close, both

from minidiff.schedulers.schedule import linspace, rescale_zero_terminal_snr
from minidiff.schedulers.sigmas import symmetric_beta_quantile

NAMES = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler")
SPACINGS = ("linspace", "leading", "trailing")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TABLE = 1e-6  # torch's float32 square root is off by one bit in 0.7 % of the cases: 1.2e-7
STEPS = (1, 2, 3, 4, 5, 7, 10, 20, 25, 30, 50, 61, 77, 100, 103, 250, 333, 500, 600, 999, 1000)


@pytest.mark.parametrize("start, end", [(1e-4, 0.02), (0.00085**0.5, 0.012**0.5), (-6, 6), (0.3, 0.3)])
def test_linspace_equals_torch_to_the_last_bit(start, end):
    for n in (1, 2, 3, 7, 100, 999, 1000, 1001):
        assert (
            linspace(start, end, n) == torch.linspace(start, end, n, dtype=torch.float32).numpy()
        ).all(), n


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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_scheduler_has_the_tables_of_diffusers(name, schedule):
    ours, theirs = both(name, beta_schedule=schedule, beta_start=0.002, beta_end=0.015)
    for table in ("betas", "alphas", "alphas_cumprod"):
        assert (getattr(ours, table) == getattr(theirs, table).numpy()).all()
    assert ours.init_noise_sigma == theirs.init_noise_sigma and ours.order == theirs.order


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("name", NAMES)
def test_trained_betas_may_be_a_list_an_array_or_a_tensor(name, kind):
    betas = [0.1, 0.2, 0.3]
    ours, theirs = both(name, trained_betas=betas, num_train_timesteps=3)
    assert (ours.alphas_cumprod == theirs.alphas_cumprod.numpy()).all()
    again, _ = both(name, trained_betas=betas, num_train_timesteps=3)
    assert (type(ours)(trained_betas=kind(betas), num_train_timesteps=3).betas == again.betas).all()


def test_zero_terminal_snr_ends_at_zero():
    betas = linspace(1e-4, 0.02, 1000)
    ours = rescale_zero_terminal_snr(betas)
    assert np.cumprod(1 - ours)[-1] == 0
    assert_close(ours, rescale_in_diffusers(torch.from_numpy(betas)), rtol=TABLE, atol=TABLE)


@pytest.mark.parametrize(
    "name, last", [("DDPMScheduler", 0), ("DDIMScheduler", 0), ("UniPCMultistepScheduler", 2**-24)]
)
def test_only_sigma_schedulers_lift_the_last_entry_of_a_zero_snr_table(name, last):
    ours, theirs = both(name, rescale_betas_zero_snr=True)
    assert ours.alphas_cumprod[-1] == theirs.alphas_cumprod[-1] == last


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_equal_diffusers_for_any_number_of_steps(name, spacing, offset):
    ours, theirs = both(name, timestep_spacing=spacing, steps_offset=offset)
    for n in STEPS:
        if name == "PNDMScheduler" and n < 4:
            continue  # too few for Runge-Kutta, in both
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        assert ours.timesteps.dtype == np.int64
        assert ours.timesteps.tolist() == theirs.timesteps.tolist(), n
        assert ours.num_inference_steps == theirs.num_inference_steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n_train", [10, 37, 1000, 1234])
def test_timesteps_equal_diffusers_for_other_training_lengths(spacing, n_train):
    for name in NAMES:
        ours, theirs = both(name, n_train // 2, timestep_spacing=spacing, num_train_timesteps=n_train)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist(), name


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
def test_ddpm_takes_timesteps_of_your_own(given):
    ours, theirs = both("DDPMScheduler")
    ours.set_timesteps(timesteps=given)
    theirs.set_timesteps(timesteps=[int(t) for t in given])
    assert ours.timesteps.tolist() == theirs.timesteps.tolist() and ours.timesteps.dtype == np.int64
    assert ours.custom_timesteps and theirs.custom_timesteps
    for t in theirs.timesteps:
        assert ours.previous_timestep(t) == int(theirs.previous_timestep(t))


SIGMAS = [
    {},
    {"final_sigmas_type": "sigma_min"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"use_karras_sigmas": True},
    {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "beta_schedule": "squaredcos_cap_v2"},
    {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 20.0},
    {"use_exponential_sigmas": True},
    {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min", "sigma_min": 0.05},
    {"use_beta_sigmas": True},
    {"use_beta_sigmas": True, "final_sigmas_type": "sigma_min", "sigma_max": 12.0},
    {"use_flow_sigmas": True},
    {"use_flow_sigmas": True, "flow_shift": 3.0, "final_sigmas_type": "sigma_min"},
    {"use_flow_sigmas": True, "shift_terminal": 0.1},
    {"use_flow_sigmas": True, "use_karras_sigmas": True},
    {"use_flow_sigmas": True, "use_dynamic_shifting": True, "mu": 0.8},
    {"use_flow_sigmas": True, "use_dynamic_shifting": True, "time_shift_type": "linear", "mu": 1.7},
]


@pytest.mark.parametrize("options", SIGMAS, ids=str)
def test_sigmas_and_their_timesteps_equal_diffusers(options):
    config = {key: value for key, value in options.items() if key != "mu"}
    mu = {key: value for key, value in options.items() if key == "mu"}
    ours, theirs = both("UniPCMultistepScheduler", **config)
    for n in (2, 5, 10, 25, 50, 333) if options.get("shift_terminal") else (1, 2, 5, 10, 25, 50, 333):
        ours.set_timesteps(n, **mu)
        theirs.set_timesteps(n, **mu)
        assert ours.sigmas.dtype == np.float32
        assert_close(ours.sigmas, theirs.sigmas, rtol=TABLE)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist(), n


@pytest.mark.parametrize("kind", [list, np.array])
@pytest.mark.parametrize(
    "options", [{}, {"flow_shift": 2.0}, {"use_dynamic_shifting": True}, {"shift_terminal": 0.2}], ids=str
)
def test_unipc_takes_sigmas_of_your_own_for_flow_models(kind, options):
    ours, theirs = both("UniPCMultistepScheduler", use_flow_sigmas=True, **options)
    mu = 0.5 if options.get("use_dynamic_shifting") else None
    ours.set_timesteps(sigmas=kind([1.0, 0.7, 0.4, 0.2]), mu=mu)
    theirs.set_timesteps(sigmas=np.array([1.0, 0.7, 0.4, 0.2]), mu=mu)
    assert_close(ours.sigmas, theirs.sigmas, rtol=TABLE)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert ours.num_inference_steps == 4


def test_unipc_has_the_sigmas_of_the_training_before_timesteps_are_set():
    for zero_snr in (False, True):
        ours, theirs = both("UniPCMultistepScheduler", rescale_betas_zero_snr=zero_snr)
        assert_close(ours.sigmas, theirs.sigmas, rtol=1e-4 if zero_snr else TABLE)  # 1 - a_t of a rounded a_t


@pytest.mark.parametrize("a", [0.3, 0.6, 1.0, 2.5])
def test_the_beta_quantile_equals_scipy_to_float64(a):
    p = np.concatenate([1 - np.linspace(0, 1, 333), [1e-15, 1e-9, 0.5, 0.4999999, 0.5000001]])
    assert_close(symmetric_beta_quantile(p, a), scipy.stats.beta.ppf(p, a, a), rtol=1e-13)
