"""How well a checkpoint's pictures follow prompts that it was not trained on, by the scorer's eyes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import minidiff.schedulers
from minidiff.pipelines import StableDiffusionPipeline
from minidiff.scenes import caption, held_out_scenes, render
from minidiff.train.scorer import Scorer, tally

BATCH = 8
SHEET_COLUMNS = 10


def score_scorer(scorer: str, count: int, seed: int) -> dict[str, float]:
    """Shares that the scorer gets right on rendered pictures of held-out scenes."""
    scenes = held_out_scenes(count, seed)
    pictures = np.stack([render(scene) for scene in scenes])
    return tally(zip(scenes, Scorer.from_pretrained(scorer).scenes(pictures), strict=True))


def score_checkpoint(
    checkpoint: str,
    scorer: str,
    *,
    scheduler: str,
    prompts: int,
    steps: int,
    guidance: float,
    seed: int,
    out=None,
) -> dict[str, float]:
    """Shares that the checkpoint gets right on held-out prompts, as many as `prompts` says.

    scheduler: a class name. Picture k is drawn with seed + k. With out, a folder, pictures and a contact
    sheet go there.
    """
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipe.scheduler = getattr(minidiff.schedulers, scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(prompts, seed)
    pictures = []
    for start in tqdm(range(0, len(scenes), BATCH), desc="batches of pictures"):
        texts = [caption(scene) for scene in scenes[start : start + BATCH]]
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(texts))]
        drawn = pipe(
            texts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        )
        pictures.append(np.rint(drawn.images * 255).astype(np.uint8))
    pictures = np.concatenate(pictures)
    seen = Scorer.from_pretrained(scorer).scenes(pictures)
    if out:
        _write_pictures(Path(out), pictures)
    return tally(zip(scenes, seen, strict=True))


def _write_pictures(folder, pictures):
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:04d}.png")
    blank = np.zeros((-len(pictures) % SHEET_COLUMNS, *pictures.shape[1:]), np.uint8)
    rows = np.concatenate([pictures, blank]).reshape(
        -1, SHEET_COLUMNS, *pictures.shape[1:]
    )  # (rows, 10, S, S, 3)
    sheet = rows.transpose(0, 2, 1, 3, 4).reshape(len(rows) * pictures.shape[1], -1, 3)
    Image.fromarray(sheet).save(folder / "sheet.png")
