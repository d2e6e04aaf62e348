"""StableDiffusionImg2ImgPipeline draws diffusers' pictures: tiny random models, loaded by both, one seed.

Pixels lie in [0, 1]; PIXEL is what float32 leaves of tiny random models, 1/255 the promise for `scenes`.
"""

import diffusers
import numpy as np
import pytest
import torch
from parity import assert_close
from PIL import Image
from tiny_pipelines import (
    BETAS,
    assert_same_draws,
    embeddings,
    generator,
    load_both,
    switch,
    write_stable_diffusion,
)

import minidiff
from minidiff.checkpoints import hub
from minidiff.cli import drawing
from minidiff.scenes import held_out_scenes, render

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__"),  # diffusers' KDPM2 gives NumPy tensors
    pytest.mark.filterwarnings("ignore:Passing `image` as"),  # diffusers' advice on forms that it takes
]
PIXEL = 1e-4
LEVEL = 1 / 255
PROMPT = "a red ball"
NAMES = list(drawing.scheduler_names().values())
RNG = np.random.default_rng(0)
PIXELS = RNG.random((3, 19, 26, 3), np.float32)
IMAGE = Image.fromarray((PIXELS[0] * 255).astype(np.uint8))
IMAGES = [Image.fromarray((picture * 255).astype(np.uint8)) for picture in PIXELS]
TENSORS = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
LATENTS = torch.from_numpy(RNG.standard_normal((2, 4, 6, 9), np.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("tiny") / "stable-diffusion")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_both("StableDiffusionImg2ImgPipeline", folder)


@pytest.fixture
def both(loaded):
    """(minidiff's pipeline, diffusers'), with the scheduler that the checkpoint names."""
    for pipeline, library in zip(loaded, (minidiff, diffusers), strict=True):
        pipeline.scheduler = library.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS)
    return loaded


def assert_same_pictures(both, prompt=PROMPT, *, seeds=0, atol=PIXEL, **options):
    """Calls both with generators of the same seeds; compares pictures and where the generators stand."""
    defaults = {"image": IMAGE, "num_inference_steps": 6, "output_type": "np"}
    return assert_same_draws(both, prompt, seeds, atol, defaults | options)


@pytest.mark.parametrize("strength", [0.17, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_every_sampler_draws_diffusers_picture_at_every_strength(both, name, strength):
    switch(both, name)
    assert_same_pictures(both, strength=strength)


@pytest.mark.parametrize("steps, strength", [(10, 0.1), (10, 0.3), (7, 0.6), (1, 1), (3, 0.99), (20, 0.05)])
def test_so_many_steps_are_made_as_strength_says(both, steps, strength):
    switch(both, "DDIMScheduler")
    assert_same_pictures(both, strength=strength, num_inference_steps=steps)
    assert both[0].num_timesteps == both[1].num_timesteps == int(steps * strength)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_steps_of_two_timesteps_are_counted_once(both, name):
    switch(both, name)
    assert_same_pictures(both, strength=0.5, num_inference_steps=8)
    assert both[0].num_timesteps == both[1].num_timesteps == 7


@pytest.mark.parametrize(
    "name, config",
    [
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "euler_at_final": True}),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
        ("UniPCMultistepScheduler", {"solver_order": 3}),
        ("PNDMScheduler", {"skip_prk_steps": False}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
                           "prediction_type": "v_prediction"}),
        ("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "linspace"}),
    ],
)  # fmt: skip
def test_options_of_samplers_mean_the_same(both, name, config):
    switch(both, name, **config)
    assert_same_pictures(both, strength=0.6, num_inference_steps=10)


FORMS = {
    "PIL": IMAGE,
    "PIL list": IMAGES[:2],
    "array": PIXELS[0],
    "arrays": PIXELS[:2],
    "array list": [PIXELS[0], PIXELS[1]],
    "tensor": TENSORS[0],
    "tensors": TENSORS[:2],
    "tensor list": [TENSORS[0], TENSORS[1]],
    "tensors in [-1, 1]": TENSORS[:2] * 2 - 1,
    "float64 array": PIXELS[0].astype(np.float64),
    "latents": LATENTS,
    "latents of one": LATENTS[0],
}


@pytest.mark.parametrize("seeds", [3, (1, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_pictures_come_in_every_form(both, form, seeds):
    switch(both, "DDIMScheduler")
    images = assert_same_pictures(both, [PROMPT, "a cube"], image=FORMS[form], seeds=seeds)
    assert images.shape == ((2, 12, 18, 3) if "latents" in form else (2, 18, 26, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.5},
        {"negative_prompt": "blue"},
        {"num_images_per_prompt": 3},
        {"num_images_per_prompt": 2, "image": IMAGES[:2]},
        {"prompt": [PROMPT, "a cube"], "num_images_per_prompt": 2, "image": IMAGES[:2]},
        {
            "prompt": [PROMPT, "a cube"],
            "num_images_per_prompt": 2,
            "image": IMAGES[:2],
            "seeds": (3, 1, 4, 1),
        },
        {"prompt": [PROMPT, "a cube"], "negative_prompt": ["blue", ""], "image": IMAGE},
        {"prompt": PROMPT, "num_images_per_prompt": 3, "image": IMAGES, "seeds": (5, 6, 7)},
        {"prompt": PROMPT, "seeds": (5,)},
        {"prompt": None, "prompt_embeds": embeddings(1)},
        {"prompt": None, "prompt_embeds": embeddings(2), "negative_prompt_embeds": embeddings(2, 1)},
        {"negative_prompt_embeds": embeddings(1)},
        {"image": Image.fromarray(np.zeros((8, 9, 3), np.uint8))},
    ],
    ids=lambda options: " ".join(
        f"{k}={v}" if isinstance(v, int | float | str) else k for k, v in options.items()
    ),
)
def test_every_argument_means_the_same(both, options):
    assert_same_pictures(both, **{"strength": 0.7} | options)


@pytest.mark.parametrize("seeds", [0, (2, 3)])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddims_noise_is_the_same(both, eta, seeds):
    switch(both, "DDIMScheduler")
    assert_same_pictures(both, [PROMPT, "a cube"], eta=eta, seeds=seeds)


@pytest.mark.parametrize("name, lists", [
    ("DDPMScheduler", {"timesteps": [900, 700, 400, 150, 30]}),
    ("EulerDiscreteScheduler", {"timesteps": [900, 700, 400, 150, 30]}),
    ("DPMSolverMultistepScheduler", {"timesteps": [900, 700, 400, 150, 30]}),
    ("HeunDiscreteScheduler", {"timesteps": [900, 700, 400, 150, 30]}),
    ("EulerDiscreteScheduler", {"sigmas": [12.0, 7.0, 4.0, 1.0, 0.1, 0.0]}),
])  # fmt: skip
def test_lists_of_timesteps_and_sigmas_are_followed(both, name, lists):
    switch(both, name)
    assert_same_pictures(both, **lists, strength=0.8)


def test_without_a_generator_torchs_global_one_is_used(both):
    switch(both, "DDPMScheduler")
    images = []
    for pipeline in both:
        torch.manual_seed(3)
        images.append(pipeline(PROMPT, IMAGE, num_inference_steps=4, output_type="np").images)
    assert_close(*images, atol=PIXEL)


def test_a_numpy_generator_draws_too(both):
    ours, _ = both
    first, second, other = (
        ours(
            PROMPT, IMAGE, num_inference_steps=2, generator=np.random.default_rng(s), output_type="np"
        ).images
        for s in (0, 0, 1)
    )
    assert np.array_equal(first, second) and not np.allclose(first, other, atol=0.01)


def test_one_picture_of_a_batch_equals_its_seed_alone(both):
    ours, _ = both
    options = {"num_inference_steps": 5, "output_type": "np"}
    batch = ours([PROMPT] * 3, IMAGES, generator=[generator(s) for s in (4, 5, 6)], **options).images
    assert_close(batch[1:2], ours(PROMPT, IMAGES[1], generator=generator(5), **options).images, atol=PIXEL)


def test_a_weak_strength_leaves_the_picture_nearly_as_it_was(both):
    switch(both, "DDIMScheduler", clip_sample=False)
    ours, _ = both
    options = {"num_inference_steps": 20, "output_type": "latent", "guidance_scale": 1.0}
    near, far = (
        ours(PROMPT, LATENTS[:1], strength, generator=generator(), **options).images
        for strength in (0.05, 0.9)
    )
    assert (near - LATENTS[:1]).abs().mean() < 0.2 < (far - LATENTS[:1]).abs().mean()


def test_in_float64_nothing_but_rounding_differs(folder):
    both = [p.to(torch.float64) for p in load_both("StableDiffusionImg2ImgPipeline", folder)]
    images = assert_same_pictures(both, image=TENSORS[0], output_type="pt", atol=1e-6)
    assert images.dtype == torch.float64  # measured: 1e-7; the schedulers' tables stay float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_starts_from_the_same_noise_and_ends_near_by(folder, dtype):
    pictures = []
    for torch_dtype in (dtype, None):
        pipe = minidiff.StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch_dtype)
        pipe.set_progress_bar_config(disable=True)
        pictures.append(pipe(PROMPT, IMAGE, 0.6, 5, generator=generator(), output_type="np").images)
    assert pictures[0].dtype == np.float32
    assert_close(*pictures, atol=0.1)


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_tensors_come_back_as_from_diffusers(both, output_type):
    ours, theirs = (
        p(PROMPT, IMAGE, 0.5, 6, generator=generator(), output_type=output_type).images for p in both
    )
    assert torch.is_tensor(ours) and ours.dtype == theirs.dtype
    assert_close(ours, theirs, atol=PIXEL * (1 if output_type == "pt" else 10))


def test_pil_images_and_tuples_come_back_as_from_diffusers(both):
    (ours, flagged), (theirs, _) = (
        p(PROMPT, IMAGE, num_inference_steps=3, generator=generator(), return_dict=False) for p in both
    )
    assert flagged is None and ours[0].size == theirs[0].size == (26, 18)
    assert_close(np.array(ours[0], int), np.array(theirs[0], int), atol=1)


def test_callbacks_see_and_change_the_same_tensors(both):
    seen = []

    def change(pipeline, i, t, tensors):
        seen.append((i, int(t), {name: tensor.clone() for name, tensor in tensors.items()}))
        return {
            1: {"latents": tensors["latents"] * 0.9},
            2: {"prompt_embeds": tensors["prompt_embeds"].flip(0)},
        }.get(i, {})

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    assert_same_pictures(both, **options)
    ours, theirs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [step[:2] for step in ours] == [step[:2] for step in theirs]
    for (_, _, tensors), (_, _, expected) in zip(ours, theirs, strict=True):
        for name in names:
            assert_close(tensors[name], expected[name], atol=1e-3)


def test_guidance_can_be_switched_off_halfway_with_diffusers_own_callback(both):
    callback = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    assert_same_pictures(both, callback_on_step_end=callback)


def test_a_text_to_image_call_after_it_with_the_same_scheduler_starts_afresh(both):
    for name in ("EulerDiscreteScheduler", "PNDMScheduler"):
        switch(both, name)
        ours, _ = both
        text = minidiff.StableDiffusionPipeline(**ours.components)
        text.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 4, "output_type": "np"}
        before = text(PROMPT, generator=generator(), **options).images
        ours(PROMPT, IMAGE, 0.5, generator=generator(), **options)
        assert np.array_equal(text(PROMPT, generator=generator(), **options).images, before)


def test_get_timesteps_is_diffusers(both):
    for name in NAMES:
        switch(both, name)
        for pipeline in both:
            pipeline.scheduler.set_timesteps(9)
        ours, theirs = (pipeline.get_timesteps(9, 0.4, "cpu") for pipeline in both)
        assert ours[1] == theirs[1] == 3
        assert_close(ours[0], theirs[0], rtol=1e-6)
        begin = [getattr(pipeline.scheduler, "begin_index", None) for pipeline in both]
        assert begin[0] == begin[1]


def test_an_old_schedulers_config_is_repaired_as_in_diffusers(both):
    for pipeline, library in zip(both, (minidiff, diffusers), strict=True):
        parts = dict(pipeline.components) | {"scheduler": library.DDIMScheduler(**BETAS)}
        repaired = library.StableDiffusionImg2ImgPipeline(**parts).scheduler.config
        assert repaired.steps_offset == 1 and repaired.clip_sample is False


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf"), "0.5", None])
def test_a_strength_outside_0_to_1_is_refused(both, strength):
    with pytest.raises(ValueError, match=r"strength is \S+; it must be in \[0, 1\]"):
        both[0](PROMPT, IMAGE, strength)


@pytest.mark.parametrize("strength, steps", [(0, 50), (0.0, 50), (0.01, 50), (0.19, 5), (0.5, 1)])
@pytest.mark.parametrize("name", ["PNDMScheduler", "HeunDiscreteScheduler", "DDIMScheduler"])
def test_a_strength_that_leaves_no_step_is_refused(both, name, strength, steps):
    switch(both, name)
    with pytest.raises(ValueError, match=f"strength {strength} leaves none of {steps} steps"):
        both[0](PROMPT, IMAGE, strength, num_inference_steps=steps)


REFUSED = [
    ({"image": None}, "image is or holds a NoneType"),
    ({"image": []}, "image is an empty list"),
    ({"image": IMAGE.convert("RGBA")}, "image has an alpha channel"),
    ({"image": IMAGE.convert("L")}, r"image has 1 channels; .*takes pictures of 3 .*or latents of 4"),
    ({"image": TENSORS[:1, :2]}, "image has 2 channels"),
    ({"image": PIXELS[0] * 255}, "divide pixels by 255"),
    ({"image": PIXELS[0] * np.nan}, "NaN or infinity"),
    ({"image": IMAGE.resize((40, 7))}, "image has 7 x 40 pixels; it needs at least 8 x 8"),
    ({"image": IMAGES[:2]}, "got 2 of image for 1 pictures"),
    ({"image": IMAGES[:2], "num_images_per_prompt": 3}, "got 2 of image for 3 pictures"),
    ({"image": LATENTS}, "got 2 of image for 1 pictures"),
    ({"generator": [generator(), generator()]}, "got 2 generators for 1 pictures"),
    ({"prompt": None}, "neither prompt and prompt_embeds"),
    ({"prompt_embeds": embeddings(1)}, "both prompt and prompt_embeds"),
    ({"prompt": 3}, "prompt is 3"),
    ({"prompt": []}, r"prompt is \[\]"),
    ({"negative_prompt": "a", "negative_prompt_embeds": embeddings(1)}, "both negative_prompt and"),
    ({"negative_prompt_embeds": embeddings(2)}, "they must be equal"),
    ({"output_type": "jpg"}, "output_type is 'jpg'"),
    ({"num_images_per_prompt": 0}, "asks for 0 pictures"),
    ({"timesteps": [3]}, "PNDMScheduler takes no list of timesteps"),
    ({"timesteps": [3], "sigmas": [1.0]}, "got timesteps and sigmas"),
    ({"callback_on_step_end_tensor_inputs": ["mask"]}, "there are latents, prompt_embeds"),
    ({"clip_skip": 4}, "clip_skip is 4"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", REFUSED, ids=[message for _, message in REFUSED])
def test_wrong_arguments_get_one_clear_sentence(both, options, message):
    with pytest.raises(ValueError, match=message) as error:
        both[0](**{"prompt": PROMPT, "image": IMAGE} | options)
    assert "\n" not in str(error.value)


def test_prompts_of_different_types_are_a_type_error(both):
    for pipeline in both:
        with pytest.raises(TypeError, match="negative_prompt"):
            pipeline(PROMPT, IMAGE, negative_prompt=["a"])


def test_a_model_for_inpainting_is_refused(tmp_path):
    pipe = minidiff.StableDiffusionImg2ImgPipeline.from_pretrained(
        write_stable_diffusion(tmp_path, in_channels=9)
    )
    with pytest.raises(ValueError, match="takes 9 channels; StableDiffusionImg2ImgPipeline needs one of 4"):
        pipe(PROMPT, IMAGE)


# -- slow: the checkpoint that ships


@pytest.fixture(scope="module")
def scenes():
    return load_both("StableDiffusionImg2ImgPipeline", hub.BUILT_IN / "scenes")


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_scenes_draws_diffusers_picture(scenes, name, strength):
    scene = Image.fromarray(render(held_out_scenes(1)[0]))
    before = [pipeline.scheduler for pipeline in scenes]
    switch(scenes, name)
    options = {"image": scene, "strength": strength, "num_inference_steps": 10, "seeds": (1, 2)}
    assert_same_pictures(scenes, ["a large blue sphere", "a green cone"], atol=LEVEL, **options)
    for pipeline, scheduler in zip(scenes, before, strict=True):
        pipeline.scheduler = scheduler
