"""Schedulers' configs: between classes, to and from files, and between minidiff and diffusers."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
from parity import both

import minidiff
from minidiff import CheckpointError, DDIMScheduler, PNDMScheduler, UniPCMultistepScheduler

NAMES = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler")
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


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("repository", PUBLISHED)
def test_configs_travel_between_classes_as_in_diffusers(source, target, repository):
    ours = getattr(minidiff, source).from_config(PUBLISHED[repository])
    theirs = getattr(diffusers, source).from_config(PUBLISHED[repository])
    there, expected = (
        getattr(lib, target).from_config(x.config) for lib, x in ((minidiff, ours), (diffusers, theirs))
    )
    assert plain(there.config) == plain(expected.config)
    back = type(ours).from_config(there.config)
    assert plain(back.config) == plain(ours.config)


def plain(config):
    """The values without where they come from, and with lists for tuples."""
    private = ("_class_name", "_diffusers_version", "_use_default_values", "_name_or_path")
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if k not in private}


@pytest.mark.parametrize("repository", PUBLISHED)
@pytest.mark.parametrize("name", NAMES)
def test_published_files_load_as_in_diffusers(name, repository, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(PUBLISHED[repository]))
    ours = getattr(minidiff, name).from_pretrained(tmp_path, subfolder="scheduler", steps_offset=0)
    theirs = getattr(diffusers, name).from_pretrained(tmp_path, subfolder="scheduler", steps_offset=0)
    assert plain(ours.config) == plain(theirs.config)
    assert (ours.alphas_cumprod == theirs.alphas_cumprod.numpy()).all()


@pytest.mark.parametrize("name", NAMES)
def test_saved_schedulers_load_in_diffusers_and_the_other_way_round(name, tmp_path):
    config = {"beta_start": 0.002, "trained_betas": np.array([0.1, 0.3]), "num_train_timesteps": 2}
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
    assert (back.betas == ours.betas).all() and plain(back.config) == plain(in_diffusers.config)


def test_only_explicit_values_travel():
    assert UniPCMultistepScheduler.from_config(PNDMScheduler().config).config.timestep_spacing == "linspace"
    explicit = PNDMScheduler(timestep_spacing="leading").config
    assert UniPCMultistepScheduler.from_config(explicit).config.timestep_spacing == "leading"


def test_other_solvers_names_become_bh2():
    for alias in ("midpoint", "heun", "logrho"):
        ours, theirs = both("UniPCMultistepScheduler", solver_type=alias)
        assert ours.config.solver_type == theirs.config.solver_type == "bh2"


@pytest.mark.parametrize("name", NAMES)
def test_compatibles_are_the_classes_that_diffusers_names(name):
    ours, theirs = both(name)
    expected = {c.__name__ for c in theirs.compatibles} & set(minidiff.__all__)
    assert {c.__name__ for c in ours.compatibles} == expected >= set(NAMES)


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
