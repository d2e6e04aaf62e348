"""Schedulers' configs: between classes, to and from files, and between minidiff and diffusers."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
from parity import assert_close, both
from scheduler_lists import BETAS, EDM, NAMES, parameters

import minidiff
from minidiff import CheckpointError, DDIMScheduler, PNDMScheduler, UniPCMultistepScheduler

KDPM2 = {"KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
PUBLISHED = {  # scheduler_config.json as it stands in repositories
    "stable-diffusion-v1-1": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
        "clip_sample": False,
    },
    "stable-diffusion-2-1": {
        "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
        "num_train_timesteps": 1000, "prediction_type": "v_prediction", "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    },
    "ddpm-ema-bedroom-256": {
        "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02,
        "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000,
        "trained_betas": None, "variance_type": "fixed_small",
    },
    "stable-diffusion-xl-base-1.0": {
        "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
        "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
        "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
    },
    "sd-turbo": {
        "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.24.0.dev0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
        "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
        "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "timestep_spacing": "trailing", "timestep_type": "discrete", "use_karras_sigmas": False,
        "sigma_max": None, "sigma_min": None,
    },
}  # fmt: skip


EXPLICIT = {  # a value that is no class's default for most options that classes share
    "num_train_timesteps": 200, "beta_start": 0.002, "beta_end": 0.03, "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction", "timestep_spacing": "trailing", "steps_offset": 2,
    "clip_sample": False, "set_alpha_to_one": False, "solver_order": 3, "solver_type": "heun",
    "algorithm_type": "dpmsolver++", "use_exponential_sigmas": True, "sigma_min": 0.05, "sigma_max": 0.8,
    "final_sigmas_type": "sigma_min", "lower_order_final": True, "thresholding": True,
    "original_inference_steps": 25, "shift": 2.0,
    "a_key_that_nobody_knows": [1, 2],
}  # fmt: skip
CONFIGS = {**PUBLISHED, "explicit": EXPLICIT, "defaults": {}}


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", NAMES)
def test_configs_travel_between_classes_as_in_diffusers(source, target):
    # one config for each pair: each class is the source, and the target, of each config several times
    kind = list(CONFIGS)[(NAMES.index(source) + 3 * NAMES.index(target)) % len(CONFIGS)]
    given = CONFIGS[kind]
    if {source, target} & set(EDM):  # their bounds are numbers; others say None for "no bound"
        given = {key: value for key, value in given.items() if value is not None}
    given = {**given, "num_train_timesteps": given.get("num_train_timesteps", 200)}
    if KDPM2 & {source, target}:
        given["num_train_timesteps"] = 60  # diffusers lays them out one by one
    ours = getattr(minidiff, source).from_config(given)
    theirs = getattr(diffusers, source).from_config(given)
    there, expected = (
        getattr(lib, target).from_config(x.config) for lib, x in ((minidiff, ours), (diffusers, theirs))
    )
    assert plain(there.config) == plain(expected.config)
    for scheduler in (there, expected):
        scheduler.set_timesteps(6, **({"mu": 1.0} if there.config.get("use_dynamic_shifting") else {}))
    assert_close(there.timesteps, expected.timesteps, rtol=1e-6, atol=2e-5)
    if hasattr(expected, "sigmas"):
        assert_close(there.sigmas, expected.sigmas, rtol=1e-6)
    back = type(ours).from_config(there.config)
    assert plain(back.config) == plain(type(theirs).from_config(expected.config).config)


def plain(config):
    """The values without where they come from, and with lists for tuples."""
    private = ("_class_name", "_diffusers_version", "_use_default_values", "_name_or_path")
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if k not in private}


@pytest.mark.parametrize("repository", PUBLISHED)
@pytest.mark.parametrize("name", NAMES)
def test_published_files_load_as_in_diffusers(name, repository, tmp_path):
    (tmp_path / "scheduler").mkdir()
    config = PUBLISHED[repository]
    if name in EDM:  # their bounds are numbers; others say None for "no bound"
        config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    ours = getattr(minidiff, name).from_pretrained(tmp_path, subfolder="scheduler", num_train_timesteps=60)
    theirs = getattr(diffusers, name).from_pretrained(tmp_path, subfolder="scheduler", num_train_timesteps=60)
    assert plain(ours.config) == plain(theirs.config)
    if name in BETAS:
        assert (ours.alphas_cumprod == theirs.alphas_cumprod.numpy()).all()


@pytest.mark.parametrize("name", NAMES)
def test_saved_schedulers_load_in_diffusers_and_the_other_way_round(name, tmp_path):
    config = {"num_train_timesteps": 3}
    if name in BETAS:
        config |= {"beta_start": 0.002, "trained_betas": np.array([0.1, 0.2, 0.3]), "solver_order": 2}
    if name in ("LCMScheduler", "TCDScheduler"):
        config["original_inference_steps"] = 3
    config = {key: value for key, value in config.items() if key in parameters(name)}
    ours, theirs = both(name, **config)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    written, expected = (
        json.loads((tmp_path / d / "scheduler_config.json").read_text()) for d in ("ours", "theirs")
    )
    assert written == expected
    in_diffusers = getattr(diffusers, name).from_pretrained(tmp_path / "ours")
    assert plain(in_diffusers.config) == plain(theirs.from_pretrained(tmp_path / "theirs").config)
    back = type(ours).from_pretrained(tmp_path / "theirs")
    assert plain(back.config) == plain(in_diffusers.config)
    if name in BETAS:
        assert (back.betas == ours.betas).all()


def test_only_explicit_values_travel():
    assert UniPCMultistepScheduler.from_config(PNDMScheduler().config).config.timestep_spacing == "linspace"
    explicit = PNDMScheduler(timestep_spacing="leading").config
    assert UniPCMultistepScheduler.from_config(explicit).config.timestep_spacing == "leading"


ALIASES = [
    *[("UniPCMultistepScheduler", {"solver_type": alias}) for alias in ("midpoint", "heun", "logrho")],
    *[("DPMSolverMultistepScheduler", {"solver_type": alias}) for alias in ("logrho", "bh1", "bh2")],
    *[("DPMSolverSinglestepScheduler", {"solver_type": alias}) for alias in ("logrho", "bh1", "bh2")],
    *[("EDMDPMSolverMultistepScheduler", {"solver_type": alias}) for alias in ("logrho", "bh1", "bh2")],
    *[("DEISMultistepScheduler", {"solver_type": alias}) for alias in ("midpoint", "heun", "bh1", "bh2")],
    *[("DEISMultistepScheduler", {"algorithm_type": alias}) for alias in ("dpmsolver", "dpmsolver++")],
    *[(f"{name}Scheduler", {"algorithm_type": "deis", "final_sigmas_type": "sigma_min"})
      for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "EDMDPMSolverMultistep")],
]  # fmt: skip


@pytest.mark.parametrize("name, config", ALIASES, ids=str)
def test_other_solvers_names_become_this_ones(name, config):
    ours, theirs = both(name, **config)
    assert plain(ours.config) == plain(theirs.config)
    assert all(ours.config[key] != value for key, value in config.items() if key != "final_sigmas_type")


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_a_config_of_deis_is_taken_by_the_dpm_solvers(name):
    """diffusers takes "deis" for "dpmsolver++" too, and then refuses it where the last sigma is 0."""
    deis = minidiff.DEISMultistepScheduler(algorithm_type="deis", solver_type="logrho")
    config = getattr(minidiff, name).from_config(deis.config).config
    assert (config.algorithm_type, config.solver_type, config.final_sigmas_type) == (
        "dpmsolver++", "midpoint", "zero",
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_compatibles_are_the_classes_that_diffusers_names(name):
    ours, theirs = both(name)
    expected = {c.__name__ for c in theirs.compatibles} & set(NAMES)
    assert {c.__name__ for c in ours.compatibles} == expected


BROKEN = ["", "{", "[]", "null", '{"beta_schedule": "cubic"}', '{"num_train_timesteps": 1e15}',
          '{"beta_start": "small"}', '{"num_train_timesteps": null}']  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_is_named(text, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
        DDIMScheduler.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
        DDIMScheduler.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="scheduler"):
        DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")


def test_loading_and_sampling_need_no_torch(tmp_path):
    UniPCMultistepScheduler(solver_order=3).save_pretrained(tmp_path)
    code = f"""
import sys
for name in ("torch", "PIL", "diffusers"):
    sys.modules[name] = None
import numpy as np
from minidiff import UniPCMultistepScheduler, DDPMScheduler
scheduler = UniPCMultistepScheduler.from_pretrained({str(tmp_path)!r})
scheduler.set_timesteps(4)
x = np.ones((1, 2, 3), np.float32)
for t in scheduler.timesteps:
    x = scheduler.step(0.1 * x, t, x).prev_sample
ddpm = DDPMScheduler.from_config(scheduler.config)
ddpm.step(x, 5, x, generator=np.random.default_rng(0))
try:
    ddpm.step(x, 5, x)
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "pass generator=numpy.random.default_rng(seed)" in result.stdout
