"""Pictures changed by what leads to them: their noise, and the texts.

Mathematics first, in NumPy: `invert_ddim` (from a picture back to the noise that it comes from), `slerp`
(from one noise to another), `compose_guidance` (several texts at once). Then the same with the parts of a
StableDiffusionPipeline, which stays as it is: `invert` and `reconstruct`, `interpolate`, `compose`.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from minidiff.boundary import like, to_numpy
from minidiff.pictures import from_images
from minidiff.pipelines import StableDiffusionPipeline
from minidiff.sampling import Step, sample
from minidiff.schedulers import DDIMInverseScheduler, DDIMScheduler

MEMORY = 4  # iterations that the next one looks back on
PARALLEL = 1e-6  # radians: closer directions are one, or opposite, in float32


def invert_ddim(
    predict: Callable[[np.ndarray, np.number], np.ndarray],
    latents: np.ndarray,
    scheduler: DDIMScheduler,
    *,
    tolerance: float = 1e-5,
    most: int = 100,
) -> Iterator[Step]:
    """`sampling.sample` backwards: yields a `Step` after each timestep, from clean latents to their noise.

    DDIM's step from x_t to x_prev (Song et al. 2020, arXiv:2010.02502, eq. 12, with eta 0) is solved for x_t,
    at which predict needs x_t itself: the solution is a fixed point of

        x_t = root x_prev + (sqrt(1 - a_t) - root sqrt(1 - a_prev)) eps(x_t, t),  root = sqrt(a_t / a_prev)

    One iteration, from x_t = x_prev, is what DDIMInverseScheduler does (tolerance=np.inf). Here they go on,
    accelerated (Pan et al. 2023, arXiv:2309.04907), until no value of any x_t moves by more than tolerance;
    sample(predict, step.latents, scheduler) then leads back to the latents (B, C, H, W), float32 or float64.

    Raises ValueError where `most` iterations were not enough, and for schedulers whose steps can't be undone.
    """
    _check_invertible(scheduler)
    for index, t in enumerate(scheduler.timesteps[::-1]):
        a_t, a_prev = scheduler._alphas_bar(int(t))
        root, target, tried = np.sqrt(a_t / a_prev), latents, []
        for _ in range(most):
            result = scheduler.step(predict(latents, t), t, latents)
            move = root * (target - result.prev_sample)
            tried = [*tried[-MEMORY:], (latents, move)]
            worst = np.abs(move).max()
            if worst <= tolerance or not np.isfinite(worst):
                latents = latents + move
                break
            latents = _accelerated(tried)
        if not worst <= tolerance:
            raise ValueError(
                f"DDIM's step at timestep {t} could not be undone: after {most} iterations values still move "
                f"by {worst:.2g}, more than {tolerance:g}; take more steps, or guidance nearer to 1"
            )
        step = Step(index, t, latents, result.pred_original_sample)
        yield step
        latents = step.latents


def _accelerated(tried):
    """Where the next iteration starts, for each row alone: Anderson's method (1965).

    tried: the last few pairs (x, move), x + move being the plain iteration. Were the move linear in x, it
    would be the smallest at this point of the plane through all x; it goes on from there.
    """
    x, move = tried[-1]
    if len(tried) == 1:
        return x + move
    rows = [[array.reshape(len(x), -1) for array in arrays] for arrays in zip(*tried, strict=True)]
    change_x, change = (np.diff(np.stack(arrays, axis=1), axis=1) for arrays in rows)  # (B, m, n)
    wide = change.astype(np.float64)
    inverse = np.linalg.pinv(wide @ wide.transpose(0, 2, 1), rcond=1e-10, hermitian=True)  # (B, m, m)
    shares = inverse @ wide @ rows[1][-1][..., None]  # (B, m, 1): least squares
    return x + move - (shares * (change_x + change)).sum(axis=1).reshape(x.shape).astype(x.dtype)


def _check_invertible(scheduler):
    if not isinstance(scheduler, DDIMScheduler) or isinstance(scheduler, DDIMInverseScheduler):
        raise ValueError(f"{type(scheduler).__name__}: only the steps of a DDIMScheduler can be undone here")
    if scheduler.config.clip_sample or scheduler.config.get("thresholding"):
        raise ValueError(
            "the scheduler clips x0, which can't be undone; set clip_sample=False, thresholding=False"
        )
    if scheduler.num_inference_steps is None:
        raise ValueError("the scheduler has no timesteps yet; call scheduler.set_timesteps(steps) first")
    if scheduler.alphas_cumprod[scheduler.timesteps[0]] == 0:
        raise ValueError(
            "the first timestep has no signal at all (zero terminal SNR): its step can't be undone"
        )


def slerp(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """From a to b along a circle: spherical linear interpolation (Shoemake 1985), of each row alone.

    a, b: float arrays (B, …); share 0 gives a, 1 gives b. With a straight line, noise between two seeds would
    be too weak: halfway, it has 0.7 of their standard deviation. Raises ValueError for arrays of different
    shapes, and for rows that point in opposite directions, between which no circle is the shortest.
    """
    if a.shape != b.shape:
        raise ValueError(f"slerp got arrays of the shapes {a.shape} and {b.shape}; they must be equal")
    axes = tuple(range(1, a.ndim))
    length_a, length_b = (np.sqrt((x * x).sum(axes, keepdims=True)) for x in (a, b))  # (B, 1, …)
    unit_a, unit_b = (x / np.where(length == 0, 1, length) for x, length in ((a, length_a), (b, length_b)))
    # not arccos of the dot product, which loses half of the digits where the directions are close
    apart, along = (np.sqrt(((unit_a + sign * unit_b) ** 2).sum(axes, keepdims=True)) for sign in (-1, 1))
    angle = 2 * np.arctan2(apart, along)  # (B, 1, …), 0 to pi
    if (np.pi - angle < PARALLEL).any():
        raise ValueError(
            "slerp got rows that point in opposite directions; the way between them is not unique"
        )
    straight = angle < PARALLEL
    sine = np.where(straight, 1, np.sin(angle))
    weight_a = np.where(straight, 1 - share, np.sin((1 - share) * angle) / sine)
    weight_b = np.where(straight, share, np.sin(share * angle) / sine)
    return (weight_a * a + weight_b * b).astype(a.dtype, copy=False)


def compose_guidance(uncond: np.ndarray, conds: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Guidance by several texts at once: uncond + the sum of weight * (cond - uncond), all (B, C, H, W).

    Liu et al. 2022 (arXiv:2206.01714), section 4: predictions of noise are, up to a factor, gradients of
    log-densities, so this samples from p(x) times the product of (p(x | text) / p(x))^weight. A negative
    weight leads away from its text. With one text it is `sampling.guide`. ValueError for another number of
    weights than of texts.
    """
    if len(conds) != len(weights):
        raise ValueError(f"got {len(weights)} weights for {len(conds)} texts; pass one for each")
    return uncond + sum(weight * (cond - uncond) for cond, weight in zip(conds, weights, strict=True))


# -- with the parts of a pipeline


@torch.no_grad()
def invert(
    pipe: StableDiffusionPipeline,
    image,
    prompt: str | list[str] = "",
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    negative_prompt: str | list[str] | None = None,
    tolerance: float = 1e-5,
) -> torch.Tensor:
    """The noise (N, 4, h, w) from which DDIM draws these pictures in so many steps: see `invert_ddim`.

    image: what `pictures.from_images` takes, N pictures or latents. prompt: a text for all, or one for each.
    `reconstruct` with the same arguments gives the pictures back, but for what the autoencoder loses; with
    another prompt it changes them. Guidance above 1 makes a step harder to undo, or impossible.

    Raises ValueError for what is no picture, for another number of prompts, and where it does not succeed.
    """
    pipe = _with_ddim(pipe, num_inference_steps)
    latents = _encode(pipe, image)
    predict = _predictor(pipe, prompt, negative_prompt, guidance_scale, len(latents))
    steps = invert_ddim(predict, latents, pipe.scheduler, tolerance=tolerance)
    for step in tqdm(steps, total=num_inference_steps, **pipe._progress_bar_config):
        latents = step.latents
    return like(latents, pipe.unet.conv_in.weight, keep_dtype=True)


@torch.no_grad()
def reconstruct(
    pipe: StableDiffusionPipeline,
    noise: torch.Tensor,
    prompt: str | list[str] = "",
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    negative_prompt: str | list[str] | None = None,
    output_type: str = "pil",
):
    """The pictures that DDIM draws from this noise (N, 4, h, w), as a pipeline's call returns them.

    It is that call with a DDIMScheduler, and latents=noise. prompt: a text for all, or one for each.
    """
    pipe, count = _with_ddim(pipe, num_inference_steps), len(noise)
    prompts, negatives = (_for_each(text, count) for text in (prompt, negative_prompt))
    return pipe(
        prompts, latents=noise, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
        negative_prompt=negatives, output_type=output_type,
    ).images  # fmt: skip


@torch.no_grad()
def interpolate(
    pipe: StableDiffusionPipeline,
    prompts: tuple[str, str],
    seeds: tuple[int, int],
    shares: Sequence[float],
    *,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | None = None,
    output_type: str = "pil",
) -> Iterator:
    """Yields a picture for each share, 0 to 1, of the way from one prompt and seed to another.

    The texts' vectors move on a straight line, (1 - share) first + share second, the noise on a circle
    (`slerp`). Share 0 is the picture that pipe(prompts[0]) draws with a torch.Generator of seeds[0]; share 1
    is that of the second ones, but for schedulers that add noise at each step: they take the first seed's.
    """
    pipe = _sharing(pipe)
    size = pipe._latent_size(height, width, None)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    first, second = (pipe.draw_noise((1, pipe.vae.config.latent_channels, *size), g) for g in generators)
    # one at a time: in a batch, last bits would differ from those of a single picture
    texts = [pipe.encode_prompt(text, do_classifier_free_guidance=False)[0] for text in prompts]  # (1, 77, D)
    state = generators[0].get_state()
    for share in shares:
        generators[0].set_state(state)
        yield pipe(
            prompt_embeds=(1 - share) * texts[0] + share * texts[1], latents=slerp(first, second, share),
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            negative_prompt=negative_prompt, generator=generators[0], output_type=output_type,
        ).images[0]  # fmt: skip


@torch.no_grad()
def compose(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    weights: Sequence[float],
    *,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    negative_prompt: str = "",
    num_images: int = 1,
    generator=None,
    output_type: str = "pil",
):
    """num_images pictures that follow all prompts at once: see `compose_guidance`.

    A weight is what guidance_scale is for a single prompt, 7.5 for example; a negative one keeps its prompt
    out. The rest is as for a pipeline's call, and so is what comes back. Each step runs the U-Net with all
    prompts and negative_prompt as one batch. ValueError for another number of weights than of prompts.
    """
    if len(prompts) != len(weights):
        raise ValueError(f"got {len(weights)} weights for {len(prompts)} prompts; pass one for each")
    pipe, count = _sharing(pipe), 1 + len(prompts)
    size = pipe._latent_size(height, width, None)
    pipe._check_call(num_images, generator, output_type, ())
    texts = [text for text in (negative_prompt, *prompts) for _ in range(num_images)]
    predict_all = _predictor(pipe, texts, None, 1.0, len(texts))

    def predict(x, t):
        uncond, *conds = np.split(predict_all(np.concatenate([x] * count), t), count)
        return compose_guidance(uncond, conds, weights)

    pipe.scheduler.set_timesteps(num_inference_steps)
    latents = pipe.prepare_latents((num_images, pipe.vae.config.latent_channels, *size), generator)
    steps = sample(predict, latents, pipe.scheduler, generator=generator)
    for step in tqdm(steps, total=len(pipe.scheduler.timesteps), **pipe._progress_bar_config):
        latents = step.latents
    return pipe.show(latents, output_type)


def _sharing(pipe, **parts):
    """A StableDiffusionPipeline with the parts of pipe, so that pipe itself stays as it is."""
    shared = StableDiffusionPipeline.from_pipe(pipe, **parts)
    shared.set_progress_bar_config(**pipe._progress_bar_config)
    return shared


def _with_ddim(pipe, num_inference_steps):
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    return _sharing(pipe, scheduler=scheduler)


def _encode(pipe, image):
    """Latents (N, 4, h, w) of pictures: what the encoder finds most likely, nothing drawn."""
    channels = pipe.vae.config.latent_channels
    pictures = from_images(image, multiple=pipe.vae_scale_factor, latent_channels=channels)
    if pictures.shape[1] == channels:
        return pictures
    spread = pipe.vae.encode(like(pictures, next(pipe.vae.parameters()))).latent_dist
    return pipe.vae.config.scaling_factor * to_numpy(spread.mode())


def _predictor(pipe, prompt, negative_prompt, guidance_scale, count):
    """predict(x, t), the U-Net with guidance, for count rows that all have the text, or each its own."""
    pipe._guidance_scale, pipe._guidance_rescale = guidance_scale, 0.0
    prompts, negatives = _for_each(prompt, count), _for_each(negative_prompt, count)
    return pipe.predictor(pipe.bind_text(prompts, negatives, 1, None, None, None))


def _for_each(text, count):
    """A text as a list of count; lists and None as they are."""
    texts = [text] * count if isinstance(text, str) else text
    if texts is not None and len(texts) != count:
        raise ValueError(f"got {len(texts)} prompts for {count} pictures; pass one, or one for each")
    return texts
