"""StableDiffusionXLPipeline draws diffusers' pictures: tiny random models, loaded by both, the same seeds."""

import json

import diffusers
import pytest
import torch
from parity import assert_close
from tiny_pipelines import generator, load_both, write_stable_diffusion_xl

import minidiff

PIXEL = 1e-5
PROMPT = "a red ball"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stable_diffusion_xl(tmp_path_factory.mktemp("tiny") / "xl")


@pytest.fixture(scope="module")
def both(folder):
    return load_both("StableDiffusionXLPipeline", folder)


@pytest.fixture(scope="module")
def refiners(tmp_path_factory):
    folder = write_stable_diffusion_xl(tmp_path_factory.mktemp("tiny") / "refiner", refiner=True)
    return load_both("StableDiffusionXLPipeline", folder)


def assert_same_pictures(both, *args, seed=0, generators=None, **kwargs):
    """Calls both with generators of the same seeds, and compares the pictures; returns ours."""
    images = []
    for pipeline in both:
        own = [generator(seed) for seed in generators] if generators else generator(seed)
        options = {"num_inference_steps": 4, "output_type": "np"} | kwargs
        images.append(pipeline(*args, generator=own, **options).images)
    assert_close(*images, atol=PIXEL)
    assert images[0].std() > 0.05  # a picture, not a grey nothing
    return images[0]


def embeddings(count, seed=0, channels=72):
    shapes = (count, 77, channels), (count, 24)
    return [torch.randn(shape, generator=generator(seed + i)) for i, shape in enumerate(shapes)]


def given(count, negative=None):
    """Arguments with embeddings in place of texts."""
    names = {"prompt_embeds": 0, "pooled_prompt_embeds": 1}
    arguments = {name: embeddings(count)[i] for name, i in names.items()}
    if negative:
        arguments |= {f"negative_{name}": embeddings(negative, 5)[i] for name, i in names.items()}
    return arguments


SIZES = {"original_size": (40, 32), "crops_coords_top_left": (3, 5), "target_size": (24, 16)}
NEGATIVE_SIZES = {f"negative_{name}": (9, 7) for name in SIZES}


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": PROMPT},
        {"prompt": PROMPT, "guidance_scale": 1.0},
        {"prompt": PROMPT, "guidance_scale": 0.0, "num_inference_steps": 1},
        {"prompt": PROMPT, "prompt_2": "a cube"},
        {"prompt": [PROMPT, "a"], "prompt_2": ["a cube", "b"], "num_images_per_prompt": 2},
        {"prompt": PROMPT, "negative_prompt": "blue"},
        {"prompt": PROMPT, "negative_prompt": "blue", "negative_prompt_2": "green"},
        {"prompt": PROMPT, "negative_prompt": ""},
        {"prompt": PROMPT, "negative_prompt_2": "has no effect without negative_prompt"},
        {"prompt": [PROMPT, "a!"], "negative_prompt": ["blue", ""], "generators": [4, 5]},
        {"prompt": PROMPT, "height": 24, "width": 40},
        {"prompt": PROMPT, **SIZES},
        {"prompt": PROMPT, **SIZES, **NEGATIVE_SIZES},
        {"prompt": [PROMPT, "a"], "num_images_per_prompt": 2, **SIZES, **NEGATIVE_SIZES},
        {"prompt": PROMPT, **NEGATIVE_SIZES, "guidance_scale": 1.0},
        {"prompt": PROMPT, "guidance_rescale": 0.7},
        {"prompt": PROMPT, "denoising_end": 0.6, "num_inference_steps": 10},
        {"prompt": PROMPT, "sigmas": [10.0, 5.0, 1.0, 0.0], "num_inference_steps": 3},
        {"prompt": PROMPT, "timesteps": [900, 500, 100], "num_inference_steps": 3},
        {"prompt": [PROMPT, "a"], "latents": torch.randn(2, 4, 8, 8, generator=generator(7))},
        given(2),
        {**given(1), "guidance_scale": 1.0},
        {**given(2, negative=2), "num_images_per_prompt": 2},
        {**given(1), "negative_prompt": "blue"},
    ],
    ids=lambda options: " ".join(
        f"{k}={v}" if isinstance(v, int | float | str) else k for k, v in options.items()
    ),
)
def test_every_argument_means_the_same(both, options):
    assert_same_pictures(both, **options)


def test_the_empty_text_counts_where_zeros_are_not_forced(tmp_path):
    both = load_both("StableDiffusionXLPipeline", write_stable_diffusion_xl(tmp_path, zeros=False))
    ours = assert_same_pictures(both, PROMPT)
    both[0].force_zeros_for_empty_prompt = True
    other = both[0](PROMPT, generator=generator(), num_inference_steps=4, output_type="np").images
    assert abs(ours - other).max() > 1e-3


def test_a_refiner_has_one_text_encoder_and_reads_the_first_prompt(refiners):
    assert refiners[0].text_encoder is None and refiners[0].tokenizer is None
    assert_same_pictures(refiners, PROMPT, prompt_2="not this one", negative_prompt="blue")


def test_layers_are_skipped_from_the_last_but_one(both):
    """diffusers 0.42's clip_skip finds no layers in transformers 5's output where it looks for them."""
    pipe = both[0]
    output = pipe._run_text_encoder(pipe.tokenizer_2, pipe.text_encoder_2, [PROMPT], None, "cpu")
    for skip, layer in ((None, 2), (0, 2), (1, 1), (2, 0)):
        embeds, *_ = pipe.encode_prompt(PROMPT, clip_skip=skip)
        assert_close(embeds[..., 32:], output.hidden_states[layer])
    with pytest.raises(ValueError, match="clip_skip is 3; this text encoder has 3 layers, so take 0 to 2"):
        pipe.encode_prompt(PROMPT, clip_skip=3)


def test_callbacks_see_and_change_the_same_tensors(both):
    seen = []

    def change(pipe, i, t, tensors):
        seen.append(tensors)
        return {"latents": tensors["latents"] * 0.9, "add_text_embeds": tensors["add_text_embeds"] * 1.1}

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    assert_same_pictures(both, PROMPT, **options)
    ours, theirs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for mine, other in zip(ours, theirs, strict=True):
        for name in names:
            assert_close(mine[name], other[name], rtol=1e-4, atol=1e-5)


def test_a_saved_pipeline_loads_in_diffusers(both, folder, tmp_path):
    both[0].save_pretrained(tmp_path)
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    again.set_progress_bar_config(disable=True)
    assert_same_pictures((both[0], again), PROMPT)
    index, original = (json.loads((f / "model_index.json").read_text()) for f in (tmp_path, folder))
    assert index["text_encoder_2"] == original["text_encoder_2"]
    assert type(minidiff.DiffusionPipeline.from_pretrained(tmp_path)) is minidiff.StableDiffusionXLPipeline


def test_latents_are_handed_out_and_taken_up(both):
    options = {"num_inference_steps": 3, "output_type": "latent"}
    ours, theirs = (pipe(PROMPT, generator=generator(), **options).images for pipe in both)
    assert torch.is_tensor(ours) and ours.shape == (1, 4, 8, 8)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_float16_vae_that_would_overflow_decodes_in_float32(folder):
    pipe = minidiff.StableDiffusionXLPipeline.from_pretrained(folder)
    latents = torch.randn(1, 4, 8, 8, generator=generator()).numpy()
    pipe.vae.half()
    exact = pipe.vae.float().decode(torch.from_numpy(latents / pipe.vae.config.scaling_factor)).sample
    pipe.vae.half()
    assert pipe.vae.config.force_upcast
    assert_close(pipe.decode(latents), exact)
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt_embeds": embeddings(1)[0]}, "prompt_embeds need pooled_prompt_embeds"),
        ({**given(1), "negative_prompt_embeds": embeddings(1)[0]}, "negative_prompt_embeds need negative_"),
        ({**given(2), "pooled_prompt_embeds": embeddings(1)[1]}, "must be \\(2, channels\\)"),
        ({**given(1), "prompt_2": "a"}, "both prompt_2 and prompt_embeds"),
        (
            {**given(1, negative=1), "negative_prompt_2": "a"},
            "both negative_prompt_2 and negative_prompt_emb",
        ),
        ({**given(1, negative=2)}, "they must be equal"),
        ({"prompt": PROMPT, "denoising_end": 1.5}, "denoising_end is 1.5"),
        ({"prompt": [PROMPT, "a"], "prompt_2": ["a"]}, "got 1 texts as prompt_2 for 2 prompts"),
        ({"prompt": PROMPT, "height": 20}, "multiples of 8"),
        ({"prompt": PROMPT, "callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"]}, "there are"),
        ({}, "neither prompt and prompt_embeds"),
    ],
)
def test_wrong_arguments_get_one_clear_sentence(both, options, message):
    with pytest.raises(ValueError, match=message):
        both[0](num_inference_steps=1, **options)


def test_a_text_encoder_of_another_width_is_refused(both, refiners):
    parts = both[0].components | {"text_encoder": None, "tokenizer": None}
    parts["unet"] = minidiff.UNet2DConditionModel.from_config(
        both[0].unet.config, projection_class_embeddings_input_dim=23 + 6 * 8
    )
    with pytest.raises(ValueError, match="a text vector of 23; the second text encoder's has 24"):
        minidiff.StableDiffusionXLPipeline(**parts)(PROMPT, num_inference_steps=1)


def test_a_watermark_is_refused(both):
    with pytest.raises(ValueError, match="no invisible watermarks"):
        minidiff.StableDiffusionXLPipeline(**both[0].components, add_watermarker=True)
