"""The sampling loop, and classifier-free guidance. NumPy only; start reading minidiff here.

scheduler.set_timesteps(50)
latents = draw_normal((1, 4, 64, 64), generator) * scheduler.init_noise_sigma
for step in sample(predict, latents, scheduler):
    print(step.index, step.t)                                       # look at or change step.latents
x0 = step.latents
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass
class Step:
    """What one turn of the loop made; the next goes on from `latents`, so assign to it to steer."""

    index: int  # 0, 1, … over the timesteps
    t: np.number  # the timestep that the model saw
    latents: np.ndarray  # after the step, float32 (B, C, H, W)
    x0: np.ndarray | None  # the scheduler's guess of the clean sample at t, where it makes one


def sample(
    predict: Callable[[np.ndarray, np.number], np.ndarray],
    latents: np.ndarray,
    scheduler,
    *,
    timesteps=None,
    generator=None,
    eta: float | None = None,
    use_clipped_model_output: bool = False,
) -> Iterator[Step]:
    """Walks from noise to data and yields a `Step` after each timestep: the whole of sampling.

    predict(x, t) is the model with all but the sample and the timestep bound to it: float32 (B, C, H, W) in
    and out. latents: noise of that shape, already times scheduler.init_noise_sigma. timesteps: a part of
    scheduler.timesteps (image-to-image starts late); all of them if None. generator, eta and
    use_clipped_model_output reach the schedulers whose step takes them: a deterministic one has no use for
    them. eta is the scheduler's own if None: 0 for DDIM, 0.3 for TCD.
    """
    options = {"generator": generator, "eta": eta, "use_clipped_model_output": use_clipped_model_output}
    accepted = inspect.signature(scheduler.step).parameters
    options = {name: options[name] for name in options if name in accepted and options[name] is not None}
    for index, t in enumerate(scheduler.timesteps if timesteps is None else timesteps):
        model_output = predict(scheduler.scale_model_input(latents, t), t)
        result = scheduler.step(model_output, t, latents, **options)
        step = Step(index, t, result.prev_sample, result.get("pred_original_sample"))
        yield step
        latents = step.latents


def guide(
    uncond: np.ndarray, cond: np.ndarray, guidance_scale: float, guidance_rescale: float = 0.0
) -> np.ndarray:
    """Classifier-free guidance: away from the prediction without the prompt, towards the one with it.

    uncond, cond: (B, C, H, W) predictions. guidance_scale 1 is cond itself (Ho & Salimans 2022,
    arXiv:2207.12598; their w is guidance_scale - 1). guidance_rescale in [0, 1] pulls the standard deviation
    of each row back to cond's, against over-exposure (Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16).
    """
    guided = uncond + guidance_scale * (cond - uncond)
    if guidance_rescale == 0:
        return guided
    axes = tuple(range(1, cond.ndim))
    ratio = cond.std(axes, ddof=1, keepdims=True) / guided.std(axes, ddof=1, keepdims=True)  # (B, 1, 1, 1)
    return guidance_rescale * (guided * ratio) + (1 - guidance_rescale) * guided
