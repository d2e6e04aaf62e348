"""Inversion, interpolation and composition: against mathematics, where it is known, and against diffusers."""

import diffusers
import numpy as np
import pytest
import torch
from parity import assert_close
from tiny_pipelines import generator, load_both, write_stable_diffusion

import minidiff
from minidiff.boundary import like, to_numpy
from minidiff.editing import compose_guidance, invert_ddim, slerp
from minidiff.explain.gaussian import CLEAN, Gaussian, predictor, table_level
from minidiff.sampling import guide, sample
from minidiff.scenes import held_out_scenes, render

DATA = Gaussian(np.array([1.0, -0.5, 0.2]), np.array([0.4, 0.05, 1.5]))
PROMPT = "a red ball"
LEVEL = 1 / 255


def ddim(steps, **config):
    scheduler = minidiff.DDIMScheduler(**{"clip_sample": False, "set_alpha_to_one": False} | config)
    scheduler.set_timesteps(steps)
    return scheduler


def last(steps):
    *_, step = steps
    return step.latents


def normal(shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return load_both(
        "StableDiffusionPipeline", write_stable_diffusion(tmp_path_factory.mktemp("tiny") / "sd")
    )


@pytest.fixture
def pipe(both):
    return both[0]


# -- inversion


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_inversion_then_sampling_gives_the_data_back(prediction_type, spacing):
    scheduler = ddim(20, prediction_type=prediction_type, timestep_spacing=spacing)
    predict = predictor(DATA, table_level(scheduler.alphas_cumprod), prediction_type)
    x0 = DATA.place(normal((5, 3)), CLEAN)
    noise = last(invert_ddim(predict, x0, scheduler, tolerance=1e-12))
    assert_close(last(sample(predict, noise, scheduler)), x0, atol=1e-9)
    assert np.abs(noise).max() > 0.5 and np.abs(noise - x0).max() > 0.5


def test_inversion_comes_near_the_exact_solution_with_more_steps():
    data, z, errors = Gaussian(DATA.mean, np.array([0.4, 1.0, 1.5])), normal((5, 3)), []
    for steps in (50, 100, 200):
        scheduler = ddim(steps)
        level = table_level(scheduler.alphas_cumprod)
        noise = last(invert_ddim(predictor(data, level), data.place(z, level(0)), scheduler))
        errors.append(np.abs(noise - data.place(z, level(scheduler.timesteps[0]))).max())
    assert errors[0] < 0.2 and errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]


def test_one_iteration_is_diffusers_inverse_scheduler(pipe):
    scheduler = ddim(10, steps_offset=1, beta_schedule="scaled_linear")
    theirs = diffusers.DDIMInverseScheduler.from_config(dict(scheduler.config))
    theirs.set_timesteps(10)
    predict = predictor(DATA, table_level(scheduler.alphas_cumprod))
    x0 = normal((5, 3))
    expected = torch.from_numpy(x0)
    for t in theirs.timesteps:
        eps = torch.from_numpy(predict(expected.numpy(), int(t)))
        expected = theirs.step(eps, int(t), expected).prev_sample
    assert_close(last(invert_ddim(predict, x0, scheduler, tolerance=np.inf)), expected, atol=1e-6)


def test_inversion_steps_rise_and_can_be_steered():
    scheduler = ddim(4)
    predict = predictor(Gaussian(DATA.mean, np.ones(3)), table_level(scheduler.alphas_cumprod))
    seen = []
    for step in invert_ddim(predict, normal((2, 3)), scheduler):
        seen.append((step.index, int(step.t)))
        step.latents = np.zeros_like(step.latents)
    assert seen == [(0, 0), (1, 250), (2, 500), (3, 750)]
    (again,) = invert_ddim(predict, np.zeros((2, 3)), ddim(1))  # a row alone, and one step
    assert again.latents.shape == (2, 3)


def test_rows_of_a_batch_do_not_touch_each_other():
    scheduler = ddim(8)
    predict = predictor(DATA, table_level(scheduler.alphas_cumprod))
    x0 = normal((4, 3))
    together = last(invert_ddim(predict, x0, scheduler, tolerance=1e-12))
    alone = last(invert_ddim(predict, x0[2:3], scheduler, tolerance=1e-12))
    assert_close(together[2:3], alone, atol=1e-10)


def test_inversion_says_where_it_does_not_succeed():
    def predict(x, t):  # the noisier sample determines nothing
        return 1000 * np.sign(np.sin(1e6 * x))

    with pytest.raises(ValueError, match=r"timestep 250 could not be undone: after 100 .*take more steps"):
        last(invert_ddim(predict, normal((2, 3)), ddim(4)))
    with pytest.raises(ValueError, match="after 100 iterations values still move by nan"):
        last(invert_ddim(lambda x, t: x * np.nan, normal((2, 3)), ddim(4)))


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (minidiff.EulerDiscreteScheduler(), "EulerDiscreteScheduler: only the steps of a DDIMScheduler"),
        (minidiff.DDIMInverseScheduler(), "DDIMInverseScheduler: only the steps of a DDIMScheduler"),
        (minidiff.DDIMScheduler(clip_sample=False), "no timesteps yet"),
        (ddim(4, clip_sample=True), "clips x0"),
        (ddim(4, thresholding=True), "clips x0"),
        (ddim(4, rescale_betas_zero_snr=True, timestep_spacing="trailing"), "zero terminal SNR"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_steps_that_can_not_be_undone_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        last(invert_ddim(lambda x, t: x, normal((2, 3)), scheduler))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_pipeline_gives_inverted_latents_back(pipe, guidance):
    latents = torch.from_numpy(normal((2, 4, 8, 8), dtype=np.float32))
    options = {"num_inference_steps": 8, "guidance_scale": guidance, "prompt": [PROMPT, "red"]}
    scheduler = pipe.scheduler
    noise = minidiff.invert(pipe, latents, **options)
    assert noise.shape == latents.shape and (noise - latents).abs().max() > 0.1
    assert_close(minidiff.reconstruct(pipe, noise, output_type="latent", **options), latents, atol=3e-4)
    assert pipe.scheduler is scheduler and type(scheduler).__name__ == "PNDMScheduler"


def test_reconstruction_is_diffusers_ddim(both):
    noise = torch.from_numpy(normal((2, 4, 8, 8), dtype=np.float32))
    theirs = diffusers.StableDiffusionPipeline(**both[1].components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(both[1].scheduler.config, clip_sample=False)
    expected = theirs(
        [PROMPT] * 2, latents=noise, num_inference_steps=6, guidance_scale=1.0, output_type="np"
    ).images
    ours = minidiff.reconstruct(both[0], noise, PROMPT, num_inference_steps=6, output_type="np")
    assert_close(ours, expected, atol=1e-4)


def check_scenes(count, steps, capsys, tolerance=1e-5):
    """Inverts and reconstructs rendered scenes; prints and checks mean errors, as shares of the range."""
    pipe = minidiff.StableDiffusionPipeline.from_pretrained("scenes")
    pipe.set_progress_bar_config(disable=True)
    pictures = np.stack([render(scene) for scene in held_out_scenes(count)]) / np.float32(255)  # (N, H, W, 3)
    noise = minidiff.invert(pipe, pictures, num_inference_steps=steps, tolerance=tolerance)
    back = minidiff.reconstruct(pipe, noise, num_inference_steps=steps, output_type="np")
    x = like(2 * pictures.transpose(0, 3, 1, 2) - 1, noise)
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
    decoded = to_numpy((decoded / 2 + 0.5).clamp(0, 1)).transpose(0, 2, 3, 1)
    of_all, of_vae = np.abs(back - pictures).mean((1, 2, 3)), np.abs(decoded - pictures).mean((1, 2, 3))
    with capsys.disabled():
        print(f"\n{count} scenes, {steps} steps: mean error {of_all.mean():.3%}, at most {of_all.max():.3%}; "
              f"the autoencoder's {of_vae.mean():.3%}, inversion's {np.abs(back - decoded).max():.1e}; "
              f"noise of deviation {noise.std():.3f}")  # fmt: skip
    assert of_all.max() < 0.02
    assert np.abs(back - decoded).max() < LEVEL
    assert 0.7 < noise.std() < 1.2


@pytest.mark.slow
def test_rendered_scenes_come_back(capsys):
    check_scenes(1, 8, capsys, tolerance=1e-3)


@pytest.mark.slow
def test_twenty_rendered_scenes_come_back_in_50_steps(capsys):
    check_scenes(20, 50, capsys)


def test_wrong_numbers_of_prompts_are_refused(pipe):
    with pytest.raises(ValueError, match="got 2 prompts for 1 pictures"):
        minidiff.invert(pipe, torch.zeros(1, 4, 8, 8), ["a", "b"])
    with pytest.raises(ValueError, match="got 3 prompts for 2 pictures"):
        minidiff.reconstruct(pipe, torch.zeros(2, 4, 8, 8), ["a", "b", "c"])
    with pytest.raises(ValueError, match="it needs at least 8 x 8"):
        minidiff.invert(pipe, np.zeros((4, 4, 3), np.float32))


# -- interpolation


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_slerp_turns_at_an_even_pace(share):
    angles, others = np.array([0.3, -2.0, 1.0]), np.array([1.5, -4.9, 1.0 + 1e-9])
    on_circle = [
        np.stack([np.cos(a), np.sin(a)], axis=1) for a in (angles, others, angles + share * (others - angles))
    ]
    assert_close(slerp(*on_circle[:2], share), on_circle[2], atol=1e-12)


def test_slerp_ends_exactly_and_keeps_the_strength_of_noise():
    a, b = (normal((2, 4, 32, 32), seed, np.float32) for seed in (0, 1))
    assert np.array_equal(slerp(a, b, 0), a) and np.array_equal(slerp(a, b, 1.0), b)
    middle = slerp(a, b, 0.5)
    assert middle.dtype == np.float32 and abs(middle.std() - 1) < 0.02 and ((a + b) / 2).std() < 0.72
    assert_close(slerp(a, a, 0.3), a, rtol=1e-6)
    assert_close(slerp(a, 3 * a, 0.5), 2 * a, rtol=1e-6)


def test_slerp_refuses_what_has_no_way():
    a = normal((2, 3))
    with pytest.raises(ValueError, match="opposite directions"):
        slerp(a, -2 * a, 0.5)
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(1, 3\)"):
        slerp(a, a[:1], 0.5)


def test_interpolation_begins_and_ends_with_the_pipelines_pictures(pipe):
    options = {
        "num_inference_steps": 3,
        "output_type": "np",
        "height": 24,
        "width": 16,
        "negative_prompt": "ball",
    }
    frames = list(minidiff.interpolate(pipe, (PROMPT, "red"), (3, 7), [0, 0.5, 1], **options))
    for frame, prompt, seed in ((frames[0], PROMPT, 3), (frames[2], "red", 7)):
        assert np.array_equal(frame, pipe(prompt, generator=generator(seed), **options).images[0])
    assert np.abs(frames[1] - frames[0]).max() > 0.01 < np.abs(frames[2] - frames[1]).max()


def test_interpolation_between_equal_ends_stands_still_even_with_noise_at_each_step(pipe):
    scheduler = pipe.scheduler
    pipe.scheduler = minidiff.EulerAncestralDiscreteScheduler.from_config(scheduler.config)
    ways = minidiff.interpolate(
        pipe, (PROMPT, PROMPT), (3, 3), [0, 1 / 3, 1], num_inference_steps=3, output_type="np"
    )
    first, *others = ways
    expected = pipe(PROMPT, generator=generator(3), num_inference_steps=3, output_type="np").images[0]
    pipe.scheduler = scheduler
    assert np.array_equal(first, expected)
    for other in others:
        assert_close(other, first, atol=1e-5)


# -- composition


def test_guidance_by_one_text_is_classifier_free_guidance():
    uncond, cond = normal((2, 2, 4, 6, 5))
    assert np.array_equal(compose_guidance(uncond, [cond], [7.5]), guide(uncond, cond, 7.5))
    assert_close(compose_guidance(uncond, [cond, cond], [5, 2.5]), guide(uncond, cond, 7.5), atol=1e-12)
    assert_close(compose_guidance(uncond, [cond, cond], [5, -5]), uncond, atol=1e-12)
    with pytest.raises(ValueError, match="got 1 weights for 2 texts"):
        compose_guidance(uncond, [cond, cond], [1.0])


def test_composed_gaussians_are_their_weighted_product():
    """Precisions add up, and precisions times means: the density p0 (p1 / p0)^2 (p2 / p0)^0.5."""
    level = (0.8, 0.6)
    parts = [Gaussian(normal(3, seed), np.exp(normal(3, seed + 9))) for seed in range(3)]
    exponents = np.array([1 - 2 - 0.5, 2, 0.5])[:, None]
    means, deviations = (
        np.stack(values) for values in zip(*(part.marginal(level) for part in parts), strict=True)
    )
    precision = (exponents / deviations**2).sum(0)
    mean = (exponents * means / deviations**2).sum(0) / precision
    x = normal((6, 3), 5)
    eps = [predictor(part, lambda t: level)(x, 0) for part in parts]
    assert_close(compose_guidance(eps[0], eps[1:], [2, 0.5]), level[1] * precision * (x - mean), atol=1e-12)


@pytest.mark.parametrize(
    "name", ["PNDMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_composing_one_prompt_draws_diffusers_picture(both, name):
    ours, theirs = both
    before = ours.scheduler, theirs.scheduler
    for pipeline, library in zip(both, (minidiff, diffusers), strict=True):
        pipeline.scheduler = getattr(library, name).from_config(pipeline.scheduler.config)
    options = {
        "num_inference_steps": 4,
        "output_type": "np",
        "height": 24,
        "width": 16,
        "negative_prompt": "ball",
    }
    expected = theirs(
        PROMPT, generator=generator(5), guidance_scale=6.0, num_images_per_prompt=2, **options
    ).images
    composed = [
        minidiff.compose(ours, *each, generator=generator(5), num_images=2, **options)
        for each in (([PROMPT], [6.0]), ([PROMPT, "red", PROMPT], [4.0, 0.0, 2.0]))
    ]
    other = minidiff.compose(
        ours, [PROMPT, "red"], [6.0, 3.0], generator=generator(5), num_images=2, **options
    )
    ours.scheduler, theirs.scheduler = before
    for pictures in composed:
        assert_close(pictures, expected, atol=1e-4)
    assert np.abs(other - expected).max() > 0.01


def test_composing_refuses_what_does_not_fit(pipe):
    with pytest.raises(ValueError, match="got 1 weights for 2 prompts"):
        minidiff.compose(pipe, [PROMPT, "red"], [7.5])
    with pytest.raises(ValueError, match="multiples of 8"):
        minidiff.compose(pipe, [PROMPT], [7.5], height=12)
    with pytest.raises(ValueError, match="output_type is 'jpg'"):
        minidiff.compose(pipe, [PROMPT], [7.5], output_type="jpg")


def test_other_pipelines_lend_their_parts(both):
    other = minidiff.StableDiffusionImg2ImgPipeline.from_pipe(both[0])
    other.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np"}
    pictures = [
        minidiff.compose(pipe, [PROMPT], [3.0], generator=generator(0), **options)
        for pipe in (both[0], other)
    ]
    assert np.array_equal(*pictures)
