"""What diffusers refuses is refused here too, whatever its error is: with one that says what is wrong.

`WRONG` goes through all schedulers that take the wrong value. Ours is a ValueError, TypeError or
NotImplementedError with a sentence; diffusers has assertions, index errors and unbound variables as well.
"""

import logging
import re
import warnings

import diffusers
import numpy as np
import pytest
import torch
from scheduler_lists import (
    ADDING_NOISE,
    BETAS,
    COUNTING,
    EDM,
    NAMES,
    NEEDS_SETTING,
    NO_INTEGERS,
    SPACED,
    TWO_CALLS,
    normal,
    parameters,
    predictions,
    quicker,
    with_option,
)

import minidiff

SPREADS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
LISTS = with_option("timesteps", "set_timesteps")


def tensor(*shape):
    return torch.from_numpy(normal(*shape))


def made(**config):
    """Makes a scheduler with this config."""
    return lambda make: make(**config)


def spaced(*arguments, config=None, **keywords):
    """Makes one and sets its timesteps."""
    return lambda make: make(**(config or {})).set_timesteps(*arguments, **keywords)


def stepped(timestep=None, output=(1, 4, 3), steps=5, config=None, **options):
    """Makes one, sets its timesteps, takes a step from the first or from timestep."""

    def call(make):
        scheduler = make(**(config or {}))
        if steps:
            scheduler.set_timesteps(steps)
        first = scheduler.timesteps[0] if timestep is None else timestep
        scheduler.step(tensor(*output), first, tensor(1, 4, 3), **options)

    return call


def all_steps_and_one(make):
    scheduler, x = make(), tensor(1, 4, 3)
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    scheduler.step(x, t, x)


def third_order_of_noise(algorithm_type):
    def call(make):
        final = {"algorithm_type": algorithm_type, "solver_order": 3, "final_sigmas_type": "sigma_min"}
        scheduler, x = make(**final), tensor(1, 4, 3)
        scheduler.set_timesteps(20)
        for t in scheduler.timesteps[:4]:
            x = scheduler.step(x, t, x).prev_sample

    return call


def noised_at(timestep):
    def call(make):
        scheduler = make()
        scheduler.set_timesteps(5)
        add = getattr(scheduler, "scale_noise", None)
        at = torch.tensor([timestep])
        if add is not None:
            add(tensor(1, 4, 3), at, tensor(1, 4, 3))
        else:
            scheduler.add_noise(tensor(1, 4, 3), tensor(1, 4, 3), at)

    return call


MULTISTEP, SINGLESTEP, FLOWING = (
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "FlowMatchEulerDiscreteScheduler",
)  # fmt: skip
DISTILLED = ("LCMScheduler", "TCDScheduler")
LIMITED = ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", *DISTILLED)
FALLING = ("DDPMScheduler", *DISTILLED)
SHIFTED = ("UniPCMultistepScheduler", MULTISTEP, SINGLESTEP, "DEISMultistepScheduler")
LEADING = tuple(n for n in SPACED if n not in (*LIMITED, SINGLESTEP))
LAST_IF_UNKNOWN = (*SHIFTED, "EDMDPMSolverMultistepScheduler")

WRONG = [  # what is wrong, what our sentence says, the schedulers that take it, how to do it
    ("an unknown beta schedule", "'cubic'", BETAS, made(beta_schedule="cubic")),
    ("two spreads", "use_.*_sigmas", with_option("use_beta_sigmas"),
     made(use_karras_sigmas=True, use_beta_sigmas=True)),
    ("an unknown solver type", "'cubic'", with_option("solver_type"), made(solver_type="cubic")),
    ("an unknown algorithm", "'euler'", with_option("algorithm_type"), made(algorithm_type="euler")),
    ("an unknown option", "no_such_option", NAMES, made(no_such_option=1)),
    ("no training", "0", NAMES, made(num_train_timesteps=0)),
    ("less than no training", "-5", NAMES, made(num_train_timesteps=-5)),
    ("training for text", "'many'", NAMES, made(num_train_timesteps="many")),
    ("training for None", "None", NAMES, made(num_train_timesteps=None)),
    ("betas of text", "a|beta", BETAS, made(trained_betas=["a", "b"])),
    ("noise prediction to none", "sigma_min|zero", (MULTISTEP, SINGLESTEP),
     made(algorithm_type="dpmsolver")),
    ("an order of 4", "4", (SINGLESTEP,), made(solver_order=4)),
    ("an order of 0", "0", with_option("solver_order"), stepped(config={"solver_order": 0})),
    ("no largest sigma", "sigma_max is None", EDM, made(sigma_max=None)),
    ("a largest sigma of text", "sigma_max is 'large'", EDM, made(sigma_max="large")),
    ("an unknown sigma schedule", "'cubic'", EDM, made(sigma_schedule="cubic")),
    ("an unknown time shift", "'cubic'", (FLOWING,), made(time_shift_type="cubic")),
    ("a terminal without flow", "shift_terminal", ("UniPCMultistepScheduler",), made(shift_terminal=0.1)),
    ("neither a count nor a list", "num_inference_steps", NAMES, spaced()),
    ("both a count and timesteps", "timesteps", LISTS, spaced(5, timesteps=[900, 500, 100])),
    ("both a count and sigmas", "sigmas", ("EulerDiscreteScheduler",), spaced(5, sigmas=[9.0, 1.0, 0.0])),
    ("both timesteps and sigmas", "sigmas", ("EulerDiscreteScheduler",),
     spaced(timesteps=[900, 500], sigmas=[9.0, 1.0, 0.0])),
    *[(f"timesteps with {key}", key, tuple(n for n in LISTS if key in parameters(n) and n != FLOWING),
       spaced(timesteps=[900, 500, 100], config={key: True})) for key in (*SPREADS, "use_lu_lambdas")],
    ("timesteps of a continuous model", "continuous", ("EulerDiscreteScheduler",), spaced(
        timesteps=[900, 1], config={"timestep_type": "continuous", "prediction_type": "v_prediction"})),
    ("an unknown spacing", "'odd'", tuple(n for n in SPACED if n not in DISTILLED),
     spaced(5, config={"timestep_spacing": "odd"})),
    ("an unknown end", "'one'", with_option("final_sigmas_type"),
     spaced(5, config={"final_sigmas_type": "one"})),
    ("an unknown interpolation", "'cubic'", ("EulerDiscreteScheduler",),
     spaced(5, config={"interpolation_type": "cubic"})),
    ("no steps", "0", NAMES, spaced(0)),
    ("less than no steps", "-3", NAMES, spaced(-3)),
    ("steps of a half", "2.5", NAMES, spaced(2.5)),
    ("steps of text", "'five'", NAMES, spaced("five")),
    ("more steps than were trained", "1001", LIMITED, spaced(1001)),
    ("more steps than were distilled", "51", DISTILLED, spaced(51)),
    ("more steps than a strength leaves", "0.1", DISTILLED, spaced(10, strength=0.1)),
    ("more original steps than were trained", "2000", ("LCMScheduler",),
     spaced(4, original_inference_steps=2000)),
    ("more leading steps than timesteps", "is 1500; .* at most (100|99|1000|999)$", LEADING,
     spaced(1500, config={"timestep_spacing": "leading"})),
    ("a ramp beyond its ends", "from 0 .* to 1", ("EDMEulerScheduler",), spaced(sigmas=[10.0, 1.0, 0.0])),
    ("rising timesteps", "1, 5", FALLING, spaced(timesteps=[1, 5])),
    ("repeated timesteps", "5, 5", FALLING, spaced(timesteps=[9, 5, 5])),
    ("timesteps past the training", "1000", FALLING, spaced(timesteps=[1000, 5])),
    ("timesteps of text", "'a'|timesteps", LISTS, spaced(timesteps=["a", "b"])),
    ("no shift", "mu", ("UniPCMultistepScheduler",), spaced(5, config=FLOW)),
    ("no shift of flow matching", "mu", (FLOWING,), spaced(5, config={"use_dynamic_shifting": True})),
    ("a shift that is not dynamic", "mu",
     tuple(n for n in SHIFTED if n != "UniPCMultistepScheduler"), spaced(5, mu=0.5)),
    ("sigmas without flow", "sigmas", ("UniPCMultistepScheduler",), spaced(sigmas=np.array([1.0, 0.5]))),
    ("sigmas of another length", "sigmas", (FLOWING,), spaced(5, sigmas=[0.9, 0.5])),
    ("timesteps of another length", "timesteps", (FLOWING,), spaced(5, timesteps=[900.0, 500.0])),
    ("a step before timesteps are set", "set_timesteps", NEEDS_SETTING, stepped(500, steps=None)),
    ("a step after the last", "set_timesteps", COUNTING, all_steps_and_one),
    ("an unknown timestep", "123456", tuple(n for n in NAMES if n not in COUNTING), stepped(123456)),
    ("an unknown timestep, counted", "123456.5", tuple(n for n in COUNTING if n not in LAST_IF_UNKNOWN),
     stepped(123456.5)),
    ("an integer for a timestep", "integer", NO_INTEGERS, stepped(3)),
    ("an integer tensor for a timestep", "integer", NO_INTEGERS, stepped(torch.tensor(3))),
    ("a model output of another shape", r"\(1, 5, 3\)", NAMES, stepped(output=(1, 5, 3))),
    ("an unknown prediction", "'noise'", with_option("prediction_type"),
     stepped(config={"prediction_type": "noise"})),
    ("a prediction that is not taken", "'sample'",
     tuple(n for n in with_option("prediction_type") if "sample" not in predictions(n)),
     stepped(config={"prediction_type": "sample"})),
    ("a generator beside the noise", "variance_noise", ("DDIMScheduler",),
     stepped(eta=0.5, generator=torch.Generator(), variance_noise=tensor(1, 4, 3))),
    ("an eta of 2", "2", ("TCDScheduler",), stepped(eta=2.0)),
    ("an eta below 0", "-1", ("TCDScheduler",), stepped(eta=-1.0)),
    ("too few generators", "generators", ("EulerAncestralDiscreteScheduler", "LCMScheduler"),
     stepped(generator=[])),
    ("a third order with noise", "orders 1 and 2", (MULTISTEP,), third_order_of_noise("sde-dpmsolver")),
    ("a third order of data with noise", "orders 1 and 2", ("EDMDPMSolverMultistepScheduler",),
     third_order_of_noise("sde-dpmsolver++")),
    ("noise at an unknown timestep", "123456",
     (*(n for n in ADDING_NOISE if n not in (*SHIFTED, *EDM)), FLOWING),
     noised_at(123456)),
]  # fmt: skip
ROWS = [(*row[:2], name, row[3]) for row in WRONG for name in row[2]]

# What diffusers lets pass: it goes wrong later, or silently.
OURS_ALONE = {
    "an unknown option": ("DDIMInverseScheduler",),
    "no training": tuple(n for n in NAMES if n not in ("PNDMScheduler", "HeunDiscreteScheduler",
                         "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
                         SINGLESTEP, FLOWING)),
    "no steps": tuple(n for n in NAMES
     if n not in (*LIMITED, "PNDMScheduler", "HeunDiscreteScheduler", SINGLESTEP)),
    "less than no steps": ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler"),
    "steps of a half": ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler"),
    "more leading steps than timesteps": LEADING,
    "a ramp beyond its ends": ("EDMEulerScheduler",),
    "a step after the last": (*(n for n in TWO_CALLS if n in COUNTING), *DISTILLED),
}  # fmt: skip


@pytest.mark.parametrize("what, message, name, call", ROWS, ids=[f"{row[2]}-{row[0]}" for row in ROWS])
def test_what_diffusers_refuses_is_refused_with_a_sentence(what, message, name, call):
    def maker(library):
        return lambda **config: getattr(library, name)(**quicker(name, **config))

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        refused = True
        if name not in OURS_ALONE.get(what, ()):
            refused = is_refused(call, maker(diffusers))
    assert refused, f"diffusers lets pass {what}"
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message) as caught:
        call(maker(minidiff))
    assert re.search(r"\w+ \w+ \w+", str(caught.value))


def is_refused(call, make):
    logging.disable(logging.WARNING)
    try:
        call(make)
    except Exception:  # in diffusers an AssertionError, IndexError, UnboundLocalError, … too
        return True
    finally:
        logging.disable(logging.NOTSET)
    return False
