"""The schedulers that the tests go through, in groups by what diffusers' classes of that name can do."""

import inspect
from functools import partial

import diffusers
import numpy as np

import minidiff

NAMES = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "LCMScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "IPNDMScheduler",
    "TCDScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler",
    "DDIMInverseScheduler",
)  # fmt: skip


def parameters(name, method="__init__", library=diffusers):
    """The parameters of a scheduler's method: {name: inspect.Parameter}, without self."""
    found = inspect.signature(getattr(getattr(library, name), method)).parameters
    return {k: p for k, p in found.items() if k != "self"}


def with_option(key, method="__init__"):
    """The schedulers whose method takes key."""
    return tuple(name for name in NAMES if key in parameters(name, method))


def with_method(method):
    return tuple(name for name in NAMES if hasattr(getattr(diffusers, name), method))


BETAS = with_option("beta_schedule")  # the tables are betas', not sigmas' or the flow's
SPACED = with_option("timestep_spacing")
DRAWING = with_option("generator", "step")
COUNTING = with_method("set_begin_index")  # steps are counted, not looked up
ADDING_NOISE = with_method("add_noise")
EDM = tuple(name for name in NAMES if name.startswith("EDM"))
TWO_CALLS = tuple(name for name in NAMES if getattr(diffusers, name).order == 2)
# x = x0 + sigma eps: the model sees it scaled down, and timesteps may be fractions
EXPLODING = tuple(
    name
    for name in NAMES
    if name.startswith(("Euler", "Heun", "LMS", "KDPM2", "EDM"))
)  # fmt: skip
# diffusers takes an integer there for an index and refuses it
NO_INTEGERS = tuple(name for name in NAMES if "Euler" in name)
# step raises before set_timesteps, even with a timestep that there is
NEEDS_SETTING = (
    "DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "EDMDPMSolverMultistepScheduler",
    "LCMScheduler", "TCDScheduler", "DDIMInverseScheduler",
)  # fmt: skip
SECOND_FIELD = {  # what step returns beside prev_sample
    **dict.fromkeys(("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler"), "pred_original_sample"),
    **dict.fromkeys((n for n in EXPLODING if n != "EDMDPMSolverMultistepScheduler"), "pred_original_sample"),
    "LCMScheduler": "denoised",
    "TCDScheduler": "pred_noised_sample",
}


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def predictions(name):
    """The prediction types that diffusers' class takes; none where it has no such option."""
    if "prediction_type" not in parameters(name):
        return ()
    no_sample = name.startswith(("EDM", "EulerAncestral", "KDPM2", "PNDM"))
    return ("epsilon", "v_prediction") if no_sample else ("epsilon", "sample", "v_prediction")


# diffusers lays out the timesteps of these, or their beta sigmas, one by one and already in the constructor,
# all 1000: 0.1 s
SLOW = tuple(name for name in NAMES if name.startswith(("KDPM2", "LMS", "Heun")))


def quicker(name, **config):
    """config, with fewer training timesteps for those whose constructor is slow in diffusers."""
    return {"num_train_timesteps": 100, **config} if name in SLOW else config


def ready(name, steps=5, library=minidiff, **config):
    """A scheduler with its timesteps set; of `quicker` training."""
    scheduler = getattr(library, name)(**quicker(name, **config))
    scheduler.set_timesteps(steps)
    return scheduler


theirs_ready = partial(ready, library=diffusers)
