"""Every sampler that suits drives the pipelines to diffusers' picture: each pixel within 1/255 at one seed.

Quickly with tiny random models, whose pixels float32's rounding moves by up to PIXEL; slowly with the
checkpoints that ship. Which samplers suit is `scheduler_names`' rule, and tested here too.
"""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from parity import assert_close
from tiny_pipelines import generator, load_both, write_ddpm, write_stable_diffusion

import minidiff
from minidiff.checkpoints import hub
from minidiff.cli import drawing
from minidiff.scenes import caption
from minidiff.train.scorer import Scorer

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__")  # diffusers' KDPM2 gives NumPy tensors
LEVEL = 1 / 255
PIXEL = 3e-4  # measured: up to 7e-5
DOUBLE = 1e-5  # for models in float64; tables stay float32
PROMPT = "a large red sphere left of a small blue cube"
NAMES = list(drawing.scheduler_names().values())
MISFITS = [name for name in drawing._all_schedulers().values() if name not in NAMES]
TIMESTEPS = [981, 800, 650, 480, 300, 120, 20]
SIGMAS = [12.0, 7.0, 4.0, 2.0, 1.0, 0.4, 0.1, 0.0]


def arguments(function):
    return inspect.signature(function).parameters


def takers(method, argument):
    """The samplers that suit whose method, in diffusers, has the argument."""
    return [name for name in NAMES if argument in arguments(getattr(getattr(diffusers, name), method))]


KARRAS = [(name, {"use_karras_sigmas": True}) for name in takers("__init__", "use_karras_sigmas")]
SPREADS = [(name, {spread: True}) for spread in ("use_exponential_sigmas", "use_beta_sigmas")
           for name in takers("__init__", spread)]  # fmt: skip
SPREAD_SLOWLY = ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
TRAILING = [(name, {"timestep_spacing": "trailing"}) for name in takers("__init__", "timestep_spacing")]
SOLVERS = [
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "euler_at_final": True}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun", "use_lu_lambdas": True}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    ("TCDScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
]
SOLVERS = [(name, config) for name, config in SOLVERS if name in NAMES]
# the schedulers that add noise at every step: with them, each picture of a batch has its generator
STOCHASTIC = [(name, {}) for name in NAMES if "Ancestral" in name or name[:3] in ("DDP", "LCM", "TCD")]
STOCHASTIC += [case for case in SOLVERS if case[1].get("algorithm_type", "").startswith("sde")]
LISTS = [(name, {"timesteps": TIMESTEPS}) for name in takers("set_timesteps", "timesteps")]
LISTS += [(name, {"sigmas": SIGMAS}) for name in takers("set_timesteps", "sigmas") if "UniPC" not in name]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_both(
        "StableDiffusionPipeline", write_stable_diffusion(tmp_path_factory.mktemp("tiny") / "sd")
    )


@pytest.fixture(scope="module")
def tiny_ddpm(tmp_path_factory):
    return load_both("DDPMPipeline", write_ddpm(tmp_path_factory.mktemp("tiny") / "ddpm"))


@pytest.fixture(scope="module")
def scenes():
    return load_both("StableDiffusionPipeline", hub.BUILT_IN / "scenes")


@pytest.fixture(scope="module")
def scenes_ddpm():
    """In float64: samplers that start at t = 999 divide by sqrt(a_t) = 5e-5, so that float32's rounding alone
    moves single pixels by up to 0.005, in diffusers too.
    """
    both = load_both("DDPMPipeline", hub.BUILT_IN / "scenes-ddpm")
    return [pipeline.to(torch.float64) for pipeline in both]


@pytest.fixture(autouse=True)
def own_scheduler(request):
    """Gives the pipelines that a test shares with others the schedulers back that they came with."""
    shared = [request.getfixturevalue(name) for name in ("tiny", "tiny_ddpm", "scenes", "scenes_ddpm")
              if name in request.fixturenames]  # fmt: skip
    before = [(pipeline, pipeline.scheduler) for pipelines in shared for pipeline in pipelines]
    yield
    for pipeline, scheduler in before:
        pipeline.scheduler = scheduler


def switch(pipelines, name, **config):
    for pipeline, library in zip(pipelines, (minidiff, diffusers), strict=True):
        pipeline.scheduler = getattr(library, name).from_config(pipeline.scheduler.config, **config)


def pictures(pipelines, *args, seeds=0, steps=6, **kwargs):
    """(minidiff's, diffusers') pictures, float32 (B, H, W, 3) in [0, 1]. seeds: one, or one for each picture.

    A list of timesteps or sigmas takes the place of the steps.
    """
    if not {"timesteps", "sigmas"} & set(kwargs):
        kwargs["num_inference_steps"] = steps
    drawn = []
    for pipeline in pipelines:
        generators = generator(seeds) if isinstance(seeds, int) else [generator(seed) for seed in seeds]
        drawn.append(pipeline(*args, generator=generators, output_type="np", **kwargs).images)
    return drawn


def assert_same_pictures(pipelines, *args, atol, **kwargs):
    ours, theirs = pictures(pipelines, *args, **kwargs)
    assert_close(ours, theirs, atol=atol)
    assert ours.std() > 0.03  # a picture, not a grey nothing
    return ours


# -- quick: tiny random models


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_draws_diffusers_picture(tiny, name, guidance_scale):
    switch(tiny, name)
    assert_same_pictures(tiny, PROMPT, guidance_scale=guidance_scale, atol=PIXEL)


@pytest.mark.parametrize("name, config", KARRAS + TRAILING + SOLVERS)
@pytest.mark.slow
def test_every_option_draws_diffusers_picture(tiny, name, config):
    switch(tiny, name, **config)
    assert_same_pictures(tiny, PROMPT, atol=PIXEL)


@pytest.mark.parametrize("name, lists", LISTS)
def test_lists_of_timesteps_and_sigmas_draw_diffusers_picture(tiny, name, lists):
    switch(tiny, name)
    assert_same_pictures(tiny, PROMPT, **lists, atol=PIXEL)


@pytest.mark.parametrize("argument", ["timesteps", "sigmas"])
@pytest.mark.parametrize("name", NAMES)
def test_lists_that_a_sampler_does_not_take_are_refused_as_in_diffusers(tiny, name, argument):
    switch(tiny, name)
    accepted = []
    for pipeline in tiny:
        try:
            pipeline(
                PROMPT, **{argument: SIGMAS if argument == "sigmas" else TIMESTEPS}, output_type="latent"
            )
            accepted.append(True)
        except ValueError:
            accepted.append(False)
    assert accepted[0] == accepted[1]


@pytest.mark.parametrize("seeds", [3, (1, 2, 1)])
@pytest.mark.parametrize("name, config", STOCHASTIC)
def test_noise_comes_from_the_generators_as_in_diffusers(tiny, name, config, seeds):
    switch(tiny, name, **config)
    drawn = assert_same_pictures(tiny, PROMPT, num_images_per_prompt=3, seeds=seeds, atol=PIXEL)
    assert not np.allclose(drawn[0], drawn[1], atol=0.01)
    assert (seeds != (1, 2, 1)) or np.allclose(drawn[0], drawn[2], atol=PIXEL)


@pytest.mark.parametrize("name", NAMES)
def test_callbacks_see_the_same_steps_and_may_change_them(tiny, name):
    switch(tiny, name)
    seen = []
    for pipeline in tiny:
        steps = []

        def callback(pipe, i, t, tensors, steps=steps):
            steps.append((i, float(t), tensors["latents"].clone()))
            return {"latents": tensors["latents"] * 0.9} if i == 2 else {}

        pipeline(PROMPT, num_inference_steps=5, generator=generator(), callback_on_step_end=callback)
        seen.append(steps)
        assert pipeline.num_timesteps == len(steps) == len(pipeline.scheduler.timesteps)
    for ours, theirs in zip(*seen, strict=True):
        assert ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], rel=1e-6)
        assert_close(ours[2], theirs[2], rtol=PIXEL, atol=PIXEL * float(theirs[2].abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_does_not_know_of_the_first(tiny, name):
    switch(tiny, name)
    for steps in (5, 4):
        assert_same_pictures(tiny, PROMPT, steps=steps, atol=PIXEL)


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_draws_without_a_text_what_diffusers_parts_draw(tiny_ddpm, name):
    switch(tiny_ddpm, name, clip_sample=False)
    ours, theirs = tiny_ddpm
    assert_close(ours(2, generator(), 6, "np").images, by_hand(theirs, 2, 6), atol=PIXEL)


def by_hand(theirs, count, steps):
    """The pictures that diffusers' U-Net and scheduler draw: noise at the first level, inputs scaled.

    Its DDPMPipeline does neither, and asks for a step that takes a generator.
    """
    own, unet, scheduler = generator(), theirs.unet, theirs.scheduler
    size = unet.config.sample_size
    shape = (count, 3, *([size, size] if isinstance(size, int) else size))
    scheduler.set_timesteps(steps)
    sample = torch.randn(shape, generator=own, dtype=unet.dtype) * scheduler.init_noise_sigma
    options = {"generator": own} if "generator" in arguments(scheduler.step) else {}
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = unet(scheduler.scale_model_input(sample, t), t).sample
        sample = scheduler.step(output, t, sample, **options).prev_sample
    return (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def drawn_by_diffusers_ddpm_pipeline():
    """The samplers that diffusers' DDPMPipeline can draw with: a generator, and noise of unit variance."""
    return [name for name in takers("step", "generator") if getattr(diffusers, name)().init_noise_sigma == 1]


@pytest.mark.parametrize("name", drawn_by_diffusers_ddpm_pipeline())
def test_ddpm_pipeline_draws_diffusers_pictures_with_every_sampler(tiny_ddpm, name):
    switch(tiny_ddpm, name)
    assert_same_pictures(tiny_ddpm, batch_size=2, seeds=(1, 2), atol=PIXEL)


@pytest.mark.parametrize("name", NAMES)
def test_ddim_pipeline_takes_every_scheduler_over(tiny_ddpm, name):
    switch(tiny_ddpm, name, prediction_type="v_prediction")
    pipelines = [
        library.DDIMPipeline(pipeline.unet, pipeline.scheduler)
        for pipeline, library in zip(tiny_ddpm, (minidiff, diffusers), strict=True)
    ]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    assert_same_pictures(pipelines, eta=0.5, atol=PIXEL)


# -- slow: the checkpoints that ship


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_scenes_draws_diffusers_picture_with_every_sampler(scenes, name):
    switch(scenes, name)
    assert_same_pictures(scenes, PROMPT, atol=LEVEL)


@pytest.mark.slow
@pytest.mark.parametrize("name, config", KARRAS + [case for case in SPREADS if case[0] in SPREAD_SLOWLY])
def test_scenes_draws_diffusers_picture_with_spread_sigmas(scenes, name, config):
    switch(scenes, name, **config)
    assert_same_pictures(scenes, PROMPT, atol=LEVEL)


@pytest.mark.slow
@pytest.mark.parametrize("name, lists", LISTS)
def test_scenes_draws_diffusers_picture_from_lists(scenes, name, lists):
    switch(scenes, name)
    assert_same_pictures(scenes, PROMPT, **lists, atol=LEVEL)


@pytest.mark.slow
@pytest.mark.parametrize("name, config", STOCHASTIC)
def test_scenes_draws_diffusers_pictures_with_noise_in_every_step(scenes, name, config):
    switch(scenes, name, **config)
    assert_same_pictures(scenes, PROMPT, num_images_per_prompt=2, seeds=(1, 2), atol=LEVEL)


@pytest.mark.slow
@pytest.mark.parametrize("name", drawn_by_diffusers_ddpm_pipeline())
def test_scenes_ddpm_draws_diffusers_pictures_with_every_sampler(scenes_ddpm, name):
    switch(scenes_ddpm, name)
    assert_same_pictures(scenes_ddpm, batch_size=2, seeds=(1, 2), atol=DOUBLE)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_scenes_ddpm_draws_with_every_sampler_what_diffusers_parts_draw(scenes_ddpm, name):
    switch(scenes_ddpm, name)
    ours, theirs = scenes_ddpm
    drawn = ours(1, generator(), 6, "np").images
    assert_close(drawn, by_hand(theirs, 1, 6), atol=DOUBLE)
    assert drawn.std() > 0.03


# -- which samplers suit


def seen_in(picture):
    """What the classifier sees in a picture (128, 128, 3) in [0, 1], as a prompt."""
    (scene,) = Scorer.from_pretrained("scenes-scorer").scenes(np.rint(picture[None] * 255).astype(np.uint8))
    return caption(scene)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_that_suits_draws_what_the_prompt_says(scenes, name):
    switch(scenes, name)
    image = scenes[0](
        PROMPT, num_inference_steps=20, guidance_scale=3, generator=generator(), output_type="np"
    ).images[0]
    assert seen_in(image).startswith(PROMPT)


@pytest.mark.slow
@pytest.mark.parametrize("name", MISFITS)
def test_with_a_misfit_diffusers_fails_or_draws_something_else(scenes, name):
    _, theirs = scenes
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config)
    try:
        image = theirs(
            PROMPT, num_inference_steps=20, guidance_scale=3, generator=generator(), output_type="np"
        ).images[0]
    except AttributeError as error:  # FlowMatchEulerDiscreteScheduler
        assert "init_noise_sigma" in str(error)
    else:
        assert not seen_in(image).startswith(PROMPT)


def test_every_scheduler_has_a_short_name_of_its_own():
    everything = drawing._all_schedulers()
    assert len(set(everything.values())) == len(everything) == len(NAMES) + len(MISFITS)
    assert set(everything.values()) == {name for name in minidiff.__all__ if name.endswith("Scheduler")}
    assert not set(drawing.scheduler_names()) & set(drawing.misfits())


@pytest.mark.parametrize("name", NAMES)
def test_the_timesteps_of_a_sampler_that_suits_lead_through_those_of_training(name):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(10)
    assert 999 >= scheduler.timesteps.max() == scheduler.timesteps[0] >= 900
    assert 0 <= scheduler.timesteps.min() == scheduler.timesteps[-1] <= 100
