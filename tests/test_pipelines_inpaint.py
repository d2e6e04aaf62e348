"""StableDiffusionInpaintPipeline draws diffusers' pictures, with models of 9 channels and of 4: one seed, all
pixels in [0, 1] within PIXEL for tiny random models, 1/255 for `scenes`.
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
TWO = [PROMPT, "a cube"]
NAMES = list(drawing.scheduler_names().values())
RNG = np.random.default_rng(0)
PIXELS = RNG.random((3, 27, 38, 3), np.float32)
IMAGES = [Image.fromarray((picture * 255).astype(np.uint8)) for picture in PIXELS]
IMAGE = IMAGES[0]
TENSORS = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
SPOTS = np.zeros((3, 27, 38), np.float32)
SPOTS[0, 5:17, 9:31] = SPOTS[1, 2:26, 20:] = SPOTS[2, 20:, :12] = 0.9
MASKS = [Image.fromarray((spot * 255).astype(np.uint8)) for spot in SPOTS]
MASK = MASKS[0]
LATENTS = torch.from_numpy(RNG.standard_normal((2, 4, 8, 8), np.float32))
SIZED_MASK = SPOTS[0][:16, 5:21]  # 16 x 16, the size of those latents' pictures


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny")
    return {
        channels: write_stable_diffusion(place / str(channels), in_channels=channels) for channels in (4, 9)
    }


@pytest.fixture(scope="module")
def loaded(folders):
    return {
        channels: load_both("StableDiffusionInpaintPipeline", folder) for channels, folder in folders.items()
    }


@pytest.fixture
def pair(loaded):
    """A function: how many channels -> (minidiff's pipeline, diffusers'), with the checkpoint's scheduler."""

    def with_channels(channels):
        for pipeline, library in zip(loaded[channels], (minidiff, diffusers), strict=True):
            pipeline.scheduler = library.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS)
        return loaded[channels]

    return with_channels


@pytest.fixture(params=[4, 9], ids=["blending", "9 channels"])
def both(request, pair):
    return pair(request.param)


def assert_same_pictures(both, prompt=PROMPT, *, seeds=0, atol=PIXEL, **options):
    """Calls both with generators of the same seeds; compares pictures and where the generators stand."""
    defaults = {"image": IMAGE, "mask_image": MASK, "num_inference_steps": 5, "output_type": "np"}
    return assert_same_draws(both, prompt, seeds, atol, defaults | options)


@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_every_sampler_draws_diffusers_picture_at_every_strength(both, name, strength):
    switch(both, name)
    assert_same_pictures(both, strength=strength)


@pytest.mark.parametrize("steps, strength", [(10, 0.1), (10, 0.3), (7, 0.6), (1, 1), (3, 0.99), (20, 0.05)])
def test_so_many_steps_are_made_as_strength_says(both, steps, strength):
    switch(both, "EulerAncestralDiscreteScheduler")
    assert_same_pictures(both, strength=strength, num_inference_steps=steps)
    assert both[0].num_timesteps == both[1].num_timesteps == int(steps * strength)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize(
    "name, config",
    [
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ],
)
def test_options_of_samplers_mean_the_same(both, name, config, strength):
    switch(both, name, **config)
    assert_same_pictures(both, strength=strength, num_inference_steps=8)


IMAGE_FORMS = {
    "PIL": IMAGE,
    "PIL list": IMAGES[:2],
    "array": PIXELS[0],
    "arrays": PIXELS[:2],
    "array list": [PIXELS[0], PIXELS[1]],
    "tensor": TENSORS[0],
    "tensors": TENSORS[:2],
    "tensors in [-1, 1]": TENSORS[:2] * 2 - 1,
}
MASK_FORMS = {
    "PIL": MASK,
    "coloured PIL": MASK.convert("RGB"),
    "PIL list": MASKS[:2],
    "array": SPOTS[0],
    "array with a channel": SPOTS[0][..., None],
    "arrays": SPOTS[:2],
    "tensor": torch.from_numpy(SPOTS[0]),
    "tensors": torch.from_numpy(SPOTS[:2]),
    "tensors with a channel": torch.from_numpy(SPOTS[:2])[:, None],
    "array of 0 and 1": (SPOTS[0] > 0.5).astype(np.float32),
    "all white": np.ones_like(SPOTS[0]),
    "all black": np.zeros_like(SPOTS[0]),
}


@pytest.mark.parametrize("seeds", [3, (1, 2)])
@pytest.mark.parametrize("form", IMAGE_FORMS)
def test_pictures_come_in_every_form(both, form, seeds):
    assert_same_pictures(both, TWO, image=IMAGE_FORMS[form], strength=0.7, seeds=seeds)


@pytest.mark.parametrize("form", MASK_FORMS)
def test_masks_come_in_every_form(both, form):
    mask = MASK_FORMS[form]
    mask = mask.copy() if isinstance(mask, np.ndarray) else mask  # diffusers writes into an array
    mask = mask.clone() if torch.is_tensor(mask) else mask
    assert_same_pictures(both, TWO, mask_image=mask)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 1.0, "strength": 0.5},
        {"negative_prompt": "blue"},
        {"num_images_per_prompt": 3},
        {"num_images_per_prompt": 3, "seeds": (1, 2, 3)},
        {"num_images_per_prompt": 2, "image": IMAGES[:2], "mask_image": MASKS[:2], "strength": 0.5},
        {"prompt": TWO, "num_images_per_prompt": 2, "image": IMAGES[:2], "seeds": (3, 1, 4, 1)},
        {"prompt": TWO, "num_images_per_prompt": 2, "mask_image": MASKS[:2], "strength": 0.5},
        {"prompt": TWO, "mask_image": MASKS[:2], "seeds": (3, 1), "strength": 0.8},
        {"prompt": TWO, "negative_prompt": ["blue", ""], "image": IMAGES[:2], "mask_image": MASKS[:2]},
        {"height": 24, "width": 40},
        {"height": 32, "width": 16, "strength": 0.6},
        {"latents": LATENTS[:1]},
        {"latents": LATENTS[:1], "strength": 0.6},
        {"prompt": TWO, "latents": LATENTS, "seeds": (1, 2)},
        {"masked_image_latents": LATENTS[:1]},
        {"prompt": TWO, "masked_image_latents": LATENTS, "strength": 0.5},
        {"image": LATENTS[:1], "mask_image": SIZED_MASK, "masked_image_latents": LATENTS[1:]},
        {"image": LATENTS[0], "mask_image": SIZED_MASK, "masked_image_latents": LATENTS[1:], "strength": 0.5},
        {"prompt": None, "prompt_embeds": embeddings(1)},
        {"prompt": None, "prompt_embeds": embeddings(2), "negative_prompt_embeds": embeddings(2, 1)},
        {"seeds": (5,)},
    ],
    ids=lambda options: " ".join(
        f"{k}={v}" if isinstance(v, int | float | str) else k for k, v in options.items()
    ),
)
def test_every_argument_means_the_same(both, options):
    assert_same_pictures(both, **options)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddims_noise_is_the_same(both, eta):
    switch(both, "DDIMScheduler")
    assert_same_pictures(both, TWO, eta=eta, strength=0.8, seeds=(2, 3))


@pytest.mark.parametrize(
    "name, lists",
    [
        ("DDPMScheduler", {"timesteps": [900, 700, 400, 150, 30]}),
        ("EulerDiscreteScheduler", {"timesteps": [900, 700, 400, 150, 30]}),
        ("EulerDiscreteScheduler", {"sigmas": [12.0, 7.0, 4.0, 1.0, 0.1, 0.0]}),
    ],
)
def test_lists_of_timesteps_and_sigmas_are_followed(both, name, lists):
    switch(both, name)
    assert_same_pictures(both, **lists, strength=0.8)


@pytest.mark.parametrize("padding", [0, 3, 40])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_the_surroundings_of_a_mask_are_drawn_and_put_back(both, padding, strength):
    options = {"padding_mask_crop": padding, "strength": strength, "output_type": "pil"}
    drawn = assert_same_pictures(both, **options)
    assert drawn.shape == (1, 27, 38, 3)
    untouched = np.array(MASK) == 0
    assert_close(drawn[0][untouched], np.array(IMAGE)[untouched] / 255)


def test_surroundings_are_drawn_at_any_size_and_more_than_once(both):
    options = {"padding_mask_crop": 4, "height": 24, "width": 32, "num_images_per_prompt": 2}
    assert_same_pictures(both, output_type="pil", mask_image=MASKS[2], **options)


def test_blending_leaves_the_latents_outside_the_mask_as_they_were(pair):
    ours, _ = pair(4)
    options = {"num_inference_steps": 4, "output_type": "latent", "generator": generator()}
    drawn = ours(PROMPT, LATENTS[:1], SIZED_MASK, **options).images
    mask = torch.from_numpy(SIZED_MASK[::2, ::2] >= 0.5)
    assert torch.equal(drawn[:, :, ~mask], LATENTS[:1, :, ~mask])
    assert (drawn[:, :, mask] - LATENTS[:1, :, mask]).abs().mean() > 0.3


def test_a_model_of_9_channels_sees_the_mask_and_what_it_leaves(pair, monkeypatch):
    ours, _ = pair(9)
    forward, seen = ours.unet.forward, []

    def watched(sample, *args, **kwargs):
        seen.append(sample)
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(ours.unet, "forward", watched)
    ours(PROMPT, IMAGE, SPOTS[0], LATENTS[:1], num_inference_steps=2)
    assert {tuple(sample.shape) for sample in seen} == {(2, 9, 8, 8)}
    for sample in seen:
        assert set(sample[:, 4].unique().tolist()) == {0, 1}
        assert torch.equal(sample[:, 5:], LATENTS[:1].repeat(2, 1, 1, 1))


def test_without_a_generator_torchs_global_one_is_used(both):
    switch(both, "DDPMScheduler")
    images = []
    for pipeline in both:
        torch.manual_seed(3)
        images.append(pipeline(PROMPT, IMAGE, MASK, num_inference_steps=4, output_type="np").images)
    assert_close(*images, atol=PIXEL)


def test_numpy_generators_draw_too(both):
    ours, _ = both
    options = {"num_inference_steps": 2, "output_type": "np", "strength": 0.6}
    first, second, other = (
        ours(PROMPT, IMAGE, MASK, generator=np.random.default_rng(seed), **options).images
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, second) and not np.allclose(first, other, atol=0.01)


def test_in_float64_nothing_but_rounding_differs(folders):
    for folder in folders.values():
        both = [p.to(torch.float64) for p in load_both("StableDiffusionInpaintPipeline", folder)]
        images = assert_same_pictures(both, image=TENSORS[0], strength=0.6, output_type="pt", atol=1e-6)
        assert images.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_starts_from_the_same_noise_and_ends_near_by(folders, dtype):
    for folder in folders.values():
        pictures = []
        for torch_dtype in (dtype, None):
            pipe = minidiff.StableDiffusionInpaintPipeline.from_pretrained(folder, torch_dtype=torch_dtype)
            pipe.set_progress_bar_config(disable=True)
            options = {"num_inference_steps": 4, "output_type": "np", "strength": 0.8}
            pictures.append(pipe(PROMPT, IMAGE, MASK, generator=generator(), **options).images)
        assert pictures[0].dtype == np.float32
        assert_close(*pictures, atol=0.1)


def test_callbacks_see_and_change_the_same_tensors(both):
    seen = []

    def change(pipeline, i, t, tensors):
        seen.append((i, int(t), {name: tensor.clone() for name, tensor in tensors.items()}))
        changes = ["latents", "mask", "masked_image_latents", "prompt_embeds"][i : i + 1]
        return {name: tensors[name].flip(-1) for name in changes}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds", "mask", "masked_image_latents"]
    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    assert_same_pictures(both, num_inference_steps=6, **options)
    ours, theirs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [step[:2] for step in ours] == [step[:2] for step in theirs]
    for (_, _, tensors), (_, _, expected) in zip(ours, theirs, strict=True):
        assert list(tensors) == names
        for name in names:
            assert_close(tensors[name], expected[name], atol=1e-3)


def test_guidance_can_be_switched_off_halfway(both):
    ours, _ = both  # with diffusers' pipeline, its own callback fails: the mask keeps both halves
    callback = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    options = {"num_inference_steps": 4, "output_type": "np"}
    cut, whole = (
        ours(PROMPT, IMAGE, MASK, generator=generator(), callback_on_step_end=each, **options).images
        for each in (callback, None)
    )
    assert cut.shape == whole.shape and not np.allclose(cut, whole, atol=1e-3)


def test_an_old_schedulers_config_is_repaired_as_in_diffusers(pair):
    made = []
    for pipeline, library in zip(pair(4), (minidiff, diffusers), strict=True):
        parts = dict(pipeline.components) | {"scheduler": library.PNDMScheduler(**BETAS)}
        made.append(library.StableDiffusionInpaintPipeline(**parts))
        made[-1].set_progress_bar_config(disable=True)
        config = made[-1].scheduler.config
        assert config.steps_offset == 1 and config.skip_prk_steps is True
        parts["scheduler"] = library.DDIMScheduler(**BETAS)
        assert (
            library.StableDiffusionInpaintPipeline(**parts).scheduler.config.clip_sample is True
        )  # not repaired
    assert_same_pictures(made)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_outside_0_to_1_is_refused(both, strength):
    with pytest.raises(ValueError, match=r"strength is \S+; it must be in \[0, 1\]"):
        both[0](PROMPT, IMAGE, MASK, strength=strength)


@pytest.mark.parametrize("strength, steps", [(0, 50), (0.01, 50), (0.19, 5)])
def test_a_strength_that_leaves_no_step_is_refused_as_in_diffusers(both, strength, steps):
    with pytest.raises(ValueError, match=f"strength {strength} leaves none of {steps} steps"):
        both[0](PROMPT, IMAGE, MASK, strength=strength, num_inference_steps=steps)
    with pytest.raises(ValueError):
        both[1](PROMPT, IMAGE, MASK, strength=strength, num_inference_steps=steps)


REFUSED = [
    ({"image": None}, "image is or holds a NoneType"),
    ({"mask_image": None}, "mask_image is or holds a NoneType"),
    ({"mask_image": []}, "mask_image is an empty list"),
    ({"mask_image": MASK.resize((38, 26))}, "27 x 38 pixels and mask_image 26 x 38; make them equal"),
    ({"mask_image": SPOTS[0].T}, "image has 27 x 38 pixels and mask_image 38 x 27"),
    ({"image": IMAGE.convert("RGBA")}, "image has an alpha channel"),
    ({"mask_image": Image.new("RGBA", IMAGE.size, (0, 0, 0, 0))}, "mask_image has an alpha channel"),
    ({"image": IMAGE.convert("L")}, "image has 1 channels; .*takes pictures of 3"),
    ({"mask_image": np.repeat(SPOTS[:1, ..., None], 3, 3)}, "a mask has one channel"),
    ({"image": PIXELS[0] * 255}, "divide pixels by 255"),
    ({"image": PIXELS[0] * np.nan}, "NaN or infinity"),
    ({"mask_image": SPOTS[0] * np.nan}, "NaN or infinity"),
    ({"image": IMAGE.resize((40, 7)), "mask_image": MASK.resize((40, 7))}, "image has 7 x 40 pixels"),
    ({"image": IMAGES[:2]}, "got 2 of image for 1 pictures"),
    ({"mask_image": MASKS[:2]}, "got 2 of mask_image for 1 pictures"),
    ({"image": IMAGES[:2], "num_images_per_prompt": 3}, "got 2 of image for 3 pictures"),
    ({"image": IMAGES[:2], "mask_image": MASKS, "num_images_per_prompt": 6}, "2 of image and 3 of mask"),
    ({"image": LATENTS[:1]}, r"image \(4 channels: latents\) has 16 x 16 pixels and mask_image 27 x 38"),
    ({"image": LATENTS[:1], "mask_image": SIZED_MASK, "height": 24}, r"latents of \(8, 8\); .* \(12, 8\)"),
    ({"masked_image_latents": LATENTS}, "got 2 of masked_image_latents for 1 pictures"),
    ({"masked_image_latents": LATENTS[:, :3]}, r"masked_image_latents have the shape \(2, 3, 8, 8\)"),
    ({"masked_image_latents": LATENTS[..., 1:]}, r"masked_image_latents have the shape \(2, 4, 8, 7\)"),
    ({"latents": LATENTS}, r"latents have the shape \(2, 4, 8, 8\); this call needs \(1, 4, 8, 8\)"),
    ({"height": 20}, "height and width must be multiples of 8, not 20"),
    ({"generator": [generator(), generator()]}, "got 2 generators for 1 pictures"),
    ({"padding_mask_crop": 4, "output_type": "np"}, "output_type must be 'pil', not 'np'"),
    ({"padding_mask_crop": 4, "image": PIXELS[0]}, "one PIL image as image, not a ndarray"),
    ({"padding_mask_crop": 4, "mask_image": [MASK]}, "one PIL image as mask_image, not a list"),
    ({"padding_mask_crop": 4, "mask_image": Image.new("L", IMAGE.size)}, "mask_image is all black"),
    ({"prompt": None}, "neither prompt and prompt_embeds"),
    ({"negative_prompt_embeds": embeddings(2)}, "they must be equal"),
    ({"timesteps": [3]}, "PNDMScheduler takes no list of timesteps"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "there are latents, .*mask, masked_image_latents"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", REFUSED, ids=[message for _, message in REFUSED])
def test_wrong_arguments_get_one_clear_sentence(both, options, message):
    with pytest.raises(ValueError, match=message) as error:
        both[0](**{"prompt": PROMPT, "image": IMAGE, "mask_image": MASK, "num_inference_steps": 2} | options)
    assert "\n" not in str(error.value)


def test_latents_alone_can_not_be_masked_for_a_model_of_9_channels(pair):
    with pytest.raises(ValueError, match="pass masked_image_latents, too"):
        pair(9)[0](PROMPT, LATENTS[:1], SIZED_MASK)


def test_other_models_are_refused(tmp_path):
    folder = write_stable_diffusion(tmp_path, in_channels=8)
    for pipeline in load_both("StableDiffusionInpaintPipeline", folder):
        with pytest.raises(ValueError, match=r"takes 8 channels; .* 4 or 9|4 or 9 input channels, not 8"):
            pipeline(PROMPT, IMAGE, MASK, num_inference_steps=2)


# -- slow: the checkpoint that ships


@pytest.fixture(scope="module")
def scenes():
    return load_both("StableDiffusionInpaintPipeline", hub.BUILT_IN / "scenes")


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_scenes_draws_diffusers_picture(scenes, name, strength):
    before = [pipeline.scheduler for pipeline in scenes]
    switch(scenes, name)
    mask = np.zeros((128, 128), np.float32)
    mask[30:90, 20:100] = 1
    options = {"image": Image.fromarray(render(held_out_scenes(1)[0])), "mask_image": mask, "seeds": (1, 2)}
    options |= {"strength": strength, "num_inference_steps": 10}
    assert_same_pictures(scenes, ["a large blue sphere", "a green cone"], atol=LEVEL, **options)
    for pipeline, scheduler in zip(scenes, before, strict=True):
        pipeline.scheduler = scheduler


@pytest.mark.slow
def test_scenes_draws_diffusers_picture_of_a_part(scenes):
    mask = Image.new("L", (128, 128))
    mask.paste(255, (40, 50, 80, 90))
    image = Image.fromarray(render(held_out_scenes(1)[0]))
    options = {"image": image, "mask_image": mask, "padding_mask_crop": 16, "output_type": "pil"}
    assert_same_pictures(scenes, num_inference_steps=10, **options)
