"""StableDiffusionPipeline draws diffusers' pictures: tiny random models, loaded by both, the same seeds.

Pixels lie in [0, 1]; 1/255 is the promise, and PIXEL what float32 rounding leaves (measured: up to 2e-6).
"""

import diffusers
import numpy as np
import pytest
import torch
from parity import assert_close
from tiny_pipelines import (
    BETAS,
    embeddings,
    generator,
    load_both,
    switch,
    write_stable_diffusion,
)

import minidiff

PIXEL = 1e-5
PROMPT = "a red ball"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("tiny") / "stable-diffusion")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_both("StableDiffusionPipeline", folder)


@pytest.fixture
def both(loaded):
    """(minidiff's pipeline, diffusers'), with the scheduler that the checkpoint names."""
    for pipeline, library in zip(loaded, (minidiff, diffusers), strict=True):
        pipeline.scheduler = library.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS)
    return loaded


def assert_same_pictures(both, *args, seed=0, generators=None, **kwargs):
    """Calls both with generators of the same seeds, and compares the pictures; returns ours."""
    images = []
    for pipeline in both:
        own = [generator(seed) for seed in generators] if generators else generator(seed)
        images.append(
            pipeline(*args, generator=own, output_type="np", **{"num_inference_steps": 5} | kwargs).images
        )
    assert_close(*images, atol=PIXEL)
    assert images[0].std() > 0.05  # a picture, not a grey nothing
    return images[0]


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize(
    "scheduler, config",
    [
        ("PNDMScheduler", {}),
        ("PNDMScheduler", {"skip_prk_steps": False}),
        ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
        ("DDPMScheduler", {"clip_sample": False}),
        ("DDPMScheduler", {"prediction_type": "v_prediction", "variance_type": "fixed_large"}),
        ("UniPCMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_every_scheduler_draws_the_same_picture(both, scheduler, config, guidance_scale):
    switch(both, scheduler, **config)
    assert_same_pictures(both, PROMPT, guidance_scale=guidance_scale)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": PROMPT, "guidance_scale": 0.5},
        {"prompt": ""},
        {"prompt": PROMPT, "num_inference_steps": 1},
        {"prompt": PROMPT, "num_inference_steps": 20, "guidance_scale": 3},
        {"prompt": PROMPT, "height": 24, "width": 16},
        {"prompt": PROMPT, "height": 8, "width": 40},
        {"prompt": PROMPT, "negative_prompt": "blue"},
        {"prompt": PROMPT, "negative_prompt": "blue", "guidance_scale": 1.0},
        {"prompt": PROMPT, "num_images_per_prompt": 3},
        {"prompt": [PROMPT, "a cube"]},
        {"prompt": [PROMPT, "a cube"], "negative_prompt": ["blue", ""], "num_images_per_prompt": 2},
        {"prompt": [PROMPT, "a cube"], "num_images_per_prompt": 2, "generators": [3, 1, 4, 1]},
        {"prompt": PROMPT, "generators": [5]},
        {"prompt": PROMPT, "guidance_rescale": 0.7},
        {"prompt_embeds": embeddings(1)},
        {
            "prompt_embeds": embeddings(2),
            "negative_prompt_embeds": embeddings(2, 1),
            "num_images_per_prompt": 2,
        },
        {"prompt_embeds": embeddings(2), "guidance_scale": 1.0},
        {"prompt_embeds": embeddings(1)[:, :40], "negative_prompt": "blue"},
        {"prompt": PROMPT, "negative_prompt_embeds": embeddings(1)},
        {"prompt": [PROMPT, "a cube"], "latents": torch.randn(2, 4, 8, 8, generator=generator(7))},
    ],
    ids=lambda options: " ".join(
        f"{k}={v}" if isinstance(v, int | float | str) else k for k, v in options.items()
    ),
)
def test_every_argument_means_the_same(both, options):
    assert_same_pictures(both, **options)


@pytest.mark.parametrize("generators", [None, [2, 3]])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddims_noise_is_the_same(both, eta, generators):
    switch(both, "DDIMScheduler")
    assert_same_pictures(both, [PROMPT, "a cube"], eta=eta, generators=generators)


def test_ddpms_noise_comes_from_every_generator_of_a_list(both):
    switch(both, "DDPMScheduler")
    assert_same_pictures(both, PROMPT, num_images_per_prompt=2, generators=[2, 3])


def test_without_a_generator_torchs_global_one_is_used(both):
    switch(both, "DDPMScheduler")
    images = []
    for pipeline in both:
        torch.manual_seed(3)
        images.append(pipeline(PROMPT, num_inference_steps=3, output_type="np").images)
    assert_close(*images, atol=PIXEL)


def test_a_list_of_timesteps_is_followed(both):
    switch(both, "DDPMScheduler")
    assert_same_pictures(both, PROMPT, timesteps=[900, 700, 400, 30])


def test_a_list_of_sigmas_is_followed(both):
    switch(both, "UniPCMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction")
    assert_same_pictures(both, PROMPT, sigmas=np.array([1.0, 0.7, 0.4, 0.1]))


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "UniPCMultistepScheduler"])
def test_a_second_call_starts_afresh(both, scheduler):
    switch(both, scheduler)
    first = assert_same_pictures(both, PROMPT)
    assert_same_pictures(both, "a cube", seed=1, num_inference_steps=4)
    assert np.array_equal(assert_same_pictures(both, PROMPT), first)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_leaves_out_the_last_layers(both, clip_skip):
    ours, theirs = both
    encoder = theirs.text_encoder  # diffusers' own clip_skip looks for an attribute that transformers 5 lacks
    norm = dict(encoder.named_modules())[
        next(n for n, _ in encoder.named_modules() if n.endswith("final_layer_norm"))
    ]
    ids = theirs.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        hidden_states = encoder(ids, output_hidden_states=True).hidden_states
        skipped = norm(hidden_states[-(clip_skip + 1)])
    options = {"num_inference_steps": 5, "output_type": "np"}
    expected = theirs(prompt_embeds=skipped, generator=generator(), **options).images
    assert_close(
        ours(PROMPT, clip_skip=clip_skip, generator=generator(), **options).images, expected, atol=PIXEL
    )


def test_a_distilled_model_gets_the_guidance_as_an_input(tmp_path):
    folder = write_stable_diffusion(tmp_path, diffusers.DDIMScheduler(**BETAS), time_cond_proj_dim=16)
    both = load_both("StableDiffusionPipeline", folder)
    pictures = assert_same_pictures(both, PROMPT, guidance_scale=7.5)
    assert not np.allclose(pictures, both[0](PROMPT, 16, 16, 5, guidance_scale=2, generator=generator(),
                                             output_type="np").images, atol=1e-3)  # fmt: skip


@pytest.mark.parametrize("guidance_scale, rows", [(1.0, 1), (1.1, 2)])
def test_without_guidance_the_unet_is_asked_once(both, monkeypatch, guidance_scale, rows):
    ours, _ = both
    forward, seen = ours.unet.forward, []

    def watched(sample, *args, **kwargs):
        seen.append(len(sample))
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(ours.unet, "forward", watched)
    ours(PROMPT, num_inference_steps=2, guidance_scale=guidance_scale)
    assert seen == [rows] * 3  # PNDM's first step takes two


def test_in_float64_nothing_but_rounding_differs(folder):
    images = []
    for pipeline in load_both("StableDiffusionPipeline", folder):
        pipeline = pipeline.to(torch.float64)
        options = {"num_inference_steps": 5, "output_type": "pt", "generator": generator()}
        images.append(pipeline(PROMPT, **options).images)
    assert images[0].dtype == torch.float64
    assert_close(*images, atol=1e-7)  # measured: 9e-9; the schedulers' tables stay float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_starts_from_the_same_noise_and_ends_near_by(folder, dtype):
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    full = minidiff.StableDiffusionPipeline.from_pretrained(folder)
    pictures = []
    for p in (pipe, full):
        p.set_progress_bar_config(disable=True)
        pictures.append(p(PROMPT, num_inference_steps=5, generator=generator(), output_type="np").images)
    assert pictures[0].dtype == np.float32
    assert_close(*pictures, atol=0.1)


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_tensors_come_back_as_from_diffusers(both, output_type):
    ours, theirs = (
        p(PROMPT, num_inference_steps=3, generator=generator(), output_type=output_type) for p in both
    )
    assert torch.is_tensor(ours.images) and ours.images.dtype == theirs.images.dtype
    assert_close(ours.images, theirs.images, atol=2e-5)


def test_pil_images_differ_by_no_more_than_one_level(both):
    ours, theirs = (p(PROMPT, num_inference_steps=3, generator=generator()).images for p in both)
    assert ours[0].size == theirs[0].size and ours[0].mode == theirs[0].mode
    assert_close(np.array(ours[0], int), np.array(theirs[0], int), atol=1)


def test_results_are_had_by_name_by_number_and_as_a_tuple(both):
    ours, theirs = both
    output = ours(PROMPT, num_inference_steps=1, generator=generator())
    assert output.images is output["images"] is output[0] is output.to_tuple()[0]
    assert output.nsfw_content_detected is None
    for pipeline in (ours, theirs):
        images, flagged = pipeline(PROMPT, num_inference_steps=1, return_dict=False)
        assert len(images) == 1 and flagged is None


def test_one_picture_of_a_batch_equals_its_seed_alone(both):
    ours, _ = both
    options = {"num_inference_steps": 4, "output_type": "np"}
    batch = ours([PROMPT] * 3, generator=[generator(s) for s in (4, 5, 6)], **options).images
    assert_close(batch[1:2], ours(PROMPT, generator=generator(5), **options).images, atol=PIXEL)


def test_a_numpy_generator_draws_too(both):
    ours, _ = both
    first, second, other = (
        ours(PROMPT, num_inference_steps=2, generator=np.random.default_rng(seed), output_type="np").images
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, second) and not np.allclose(first, other, atol=0.01)


def test_latents_of_another_size_set_the_size(both):
    latents = torch.randn(1, 4, 12, 8, generator=generator())
    assert assert_same_pictures(both, PROMPT, latents=latents).shape == (1, 24, 16, 3)


def test_one_side_alone_is_respected(both):
    ours, _ = both
    assert ours(PROMPT, height=24, num_inference_steps=1).images[0].size == (16, 24)


def test_callbacks_see_and_change_the_same_tensors(both):
    seen = []

    def change(pipeline, i, t, tensors):
        seen.append((i, int(t), {name: tensor.clone() for name, tensor in tensors.items()}))
        if i == 1:
            return {"latents": tensors["latents"] * 0.9}
        if i == 2:
            return {"prompt_embeds": tensors["prompt_embeds"].flip(0)}
        return {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    assert_same_pictures(both, PROMPT, **options)
    ours, theirs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [step[:2] for step in ours] == [step[:2] for step in theirs]
    for (_, _, tensors), (_, _, expected) in zip(ours, theirs, strict=True):
        assert list(tensors) == names
        for name in names:
            assert_close(tensors[name], expected[name], atol=1e-4)  # latents; measured: 2.3e-5


def test_guidance_can_be_switched_off_halfway_with_diffusers_own_callback(both):
    callback = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    cut = assert_same_pictures(both, PROMPT, callback_on_step_end=callback)
    assert not np.allclose(cut, assert_same_pictures(both, PROMPT), atol=1e-3)


def test_a_callback_that_returns_nothing_changes_nothing(both):
    ours, _ = both
    options = {"num_inference_steps": 3, "output_type": "np"}
    plain = ours(PROMPT, generator=generator(), **options).images
    watched = ours(PROMPT, generator=generator(), callback_on_step_end=lambda *_: None, **options).images
    assert np.array_equal(plain, watched)


def test_a_callback_stops_the_loop(both):
    def stop(pipeline, i, t, tensors):
        pipeline._interrupt = i == 2
        return {}

    assert_same_pictures(both, PROMPT, callback_on_step_end=stop)


def test_an_interruption_in_mid_loop_comes_out_and_leaves_the_pipeline_usable(both, capsys):
    ours, _ = both
    ours.set_progress_bar_config(disable=False)

    def interrupt(pipeline, i, t, tensors):
        if i == 2:
            raise KeyboardInterrupt

    before = ours(PROMPT, num_inference_steps=5, generator=generator(), output_type="np").images
    with pytest.raises(KeyboardInterrupt):
        ours(PROMPT, num_inference_steps=5, callback_on_step_end=interrupt)
    ours.set_progress_bar_config(disable=True)
    assert capsys.readouterr().err.endswith("\n")  # the bar was closed
    after = ours(PROMPT, num_inference_steps=5, generator=generator(), output_type="np").images
    assert np.array_equal(before, after)


def test_the_progress_bar_counts_the_steps_and_can_be_set(both, capsys):
    ours, _ = both
    ours.set_progress_bar_config(desc="drawing")
    ours(PROMPT, num_inference_steps=5)
    ours.set_progress_bar_config(disable=True)
    err = capsys.readouterr().err
    assert "drawing" in err and "6/6" in err  # PNDM calls the model once more than there are steps


def test_encode_prompt_gives_diffusers_embeddings(both):
    args = ([PROMPT, ""], torch.device("cpu"), 2, True, ["blue", "a cube"])
    for ours, theirs in zip(*(pipeline.encode_prompt(*args) for pipeline in both), strict=True):
        assert ours.shape == (4, 77, 32)
        assert_close(ours, theirs, atol=2e-5)


def test_the_words_that_the_text_encoder_does_not_see_are_named(both):
    ours, theirs = both
    long = " ".join(["ball"] * 75 + ["red", "red"])
    with pytest.warns(UserWarning, match="77 tokens.*red red"):
        picture = ours(long, num_inference_steps=2, generator=generator(), output_type="np").images
    assert_close(
        picture,
        theirs(long, num_inference_steps=2, generator=generator(), output_type="np").images,
        atol=PIXEL,
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "neither prompt and prompt_embeds"),
        ({"prompt": PROMPT, "prompt_embeds": embeddings(1)}, "both prompt and prompt_embeds"),
        ({"prompt": 7}, "prompt is 7; it must be a string"),
        ({"prompt": []}, r"prompt is \[\]"),
        ({"prompt": [PROMPT, None]}, "a list of at least one string"),
        ({"prompt": ["a"] * 1025}, "asks for 1025 pictures; one call makes 1 to 1024"),
        ({"prompt": PROMPT, "num_images_per_prompt": 0}, "asks for 0 pictures"),
        ({"prompt": PROMPT, "height": 20}, "multiples of 8, not 20 and 16"),
        ({"prompt": PROMPT, "width": 0}, "multiples of 8, not 16 and 0"),
        ({"prompt": PROMPT, "height": -8}, "multiples of 8, not -8 and 16"),
        ({"prompt": PROMPT, "height": "16"}, "multiples of 8, not '16' and 16"),
        ({"prompt": PROMPT, "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"prompt": PROMPT, "num_inference_steps": -3}, "num_inference_steps is -3"),
        ({"prompt": PROMPT, "output_type": "jpg"}, "output_type is 'jpg'"),
        (
            {"prompt": PROMPT, "negative_prompt": "b", "negative_prompt_embeds": embeddings(1)},
            "both negative_prompt and",
        ),
        (
            {"prompt_embeds": embeddings(1), "negative_prompt_embeds": embeddings(1)[:, :7]},
            "they must be equal",
        ),
        ({"prompt_embeds": embeddings(1)[0]}, r"\(77, 32\), not \(prompts, tokens, channels\)"),
        ({"prompt": [PROMPT, "b"], "negative_prompt": ["c"]}, "got 1 texts as negative_prompt for 2 prompts"),
        ({"prompt": PROMPT, "generator": [generator(), generator()]}, "got 2 generators for 1 pictures"),
        ({"prompt": [PROMPT, "b"], "generator": [generator()]}, "got 1 generators for 2 pictures"),
        ({"prompt": PROMPT, "latents": torch.zeros(2, 4, 8, 8)}, r"latents have the shape \(2, 4, 8, 8\)"),
        ({"prompt": PROMPT, "timesteps": [3], "sigmas": [1.0]}, "got timesteps and sigmas"),
        ({"prompt": PROMPT, "timesteps": [3]}, "PNDMScheduler takes no list of timesteps"),
        ({"prompt": PROMPT, "sigmas": [1.0]}, "PNDMScheduler takes no list of sigmas"),
        ({"prompt": PROMPT, "clip_skip": 4}, "clip_skip is 4; this text encoder has 3 layers"),
        ({"prompt": PROMPT, "clip_skip": -1}, "clip_skip is -1"),
        (
            {"prompt": PROMPT, "callback_on_step_end_tensor_inputs": ["noise"]},
            "there are latents, prompt_embeds",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_arguments_get_one_clear_sentence(both, options, message):
    with pytest.raises(ValueError, match=message) as error:
        both[0](**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt, negative_prompt", [(PROMPT, ["a"]), ([PROMPT], "a")])
def test_prompts_of_different_types_are_a_type_error(both, prompt, negative_prompt):
    for pipeline in both:
        with pytest.raises(TypeError, match="negative_prompt"):
            pipeline(prompt, negative_prompt=negative_prompt)


def test_without_a_text_encoder_embeddings_are_asked_for(both):
    ours, theirs = both
    parts = ours.components | {"text_encoder": None, "tokenizer": None}
    pipe = minidiff.StableDiffusionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="no text encoder"):
        pipe(PROMPT)
    options = {"num_inference_steps": 2, "output_type": "np", "prompt_embeds": embeddings(1)}
    options["negative_prompt_embeds"] = embeddings(1, 1)
    images = (p(generator=generator(), **options).images for p in (pipe, theirs))
    assert_close(*images, atol=PIXEL)


@pytest.mark.parametrize("part", ["safety_checker", "feature_extractor", "image_encoder"])
def test_parts_without_a_use_are_refused(both, part):
    with pytest.raises(ValueError, match=f"no use for a {part}"):
        minidiff.StableDiffusionPipeline(**both[0].components, **{part: object()})


def test_an_old_schedulers_config_is_repaired_as_in_diffusers(both):
    made = []
    for pipeline, library in zip(both, (minidiff, diffusers), strict=True):
        parts = dict(pipeline.components) | {"scheduler": library.DDIMScheduler(**BETAS)}
        made.append(library.StableDiffusionPipeline(**parts))
        made[-1].set_progress_bar_config(disable=True)
    assert_same_pictures(made, PROMPT)
    for pipeline, library in zip(made, (minidiff, diffusers), strict=True):
        assert pipeline.scheduler.config.steps_offset == 1 and pipeline.scheduler.config.clip_sample is False
        # repaired values still count as defaults, and do not travel: a habit of diffusers that decides
        # pictures
        switched = library.PNDMScheduler.from_config(pipeline.scheduler.config)
        assert switched.config.steps_offset == 0
