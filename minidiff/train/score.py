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
    return tally(zip(scenes, _scorer(scorer).scenes(pictures), strict=True))


def score_checkpoint(args) -> dict[str, float]:
    """Shares that the checkpoint gets right on as many held-out prompts; args as `minidiff score` has them.

    Picture k is drawn with seed args.seed + k. With args.out, pictures and a contact sheet go there.
    """
    pipe = StableDiffusionPipeline.from_pretrained(args.checkpoint)
    scheduler = getattr(minidiff.schedulers, args.scheduler, None)
    if scheduler is None:
        raise ValueError(
            f"unknown scheduler {args.scheduler!r}; there are {', '.join(minidiff.schedulers.__all__)}"
        )
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(args.prompts, args.seed)
    pictures = []
    for start in tqdm(range(0, len(scenes), BATCH), desc="pictures", unit_scale=BATCH):
        prompts = [caption(scene) for scene in scenes[start : start + BATCH]]
        generators = [torch.Generator().manual_seed(args.seed + start + k) for k in range(len(prompts))]
        out = pipe(
            prompts,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=generators,
            output_type="np",
        )
        pictures.append(np.rint(out.images * 255).astype(np.uint8))
    pictures = np.concatenate(pictures)
    seen = _scorer(args.scorer).scenes(pictures)
    if args.out:
        _write_pictures(Path(args.out), pictures)
    return tally(zip(scenes, seen, strict=True))


def _scorer(name):
    return Scorer.from_pretrained(name)


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
