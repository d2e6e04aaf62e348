"""The arguments of `minidiff train` and `minidiff score`, and what they start."""

import argparse
import os
from pathlib import Path

from minidiff.config import write_json

STAGE_NAMES = ("pictures", "vae", "text", "unet", "ddpm", "scorer")  # in order; stages.py has their work
TRAIN_TEXT = """Trains scenes, scenes-ddpm and the scorer from nothing, on pictures that minidiff renders
itself. Each stage saves its state every minute and goes on from it when it is started again; Ctrl-C loses
nothing.

examples:
  minidiff train                          all stages, less than four hours on two cores
  minidiff train unet --minutes 300       one stage, longer
  minidiff generate "a red cube" --checkpoint runs/scenes/scenes
"""
SCORE_TEXT = """Draws pictures of prompts whose combinations were held out of training, and lets a classifier
say what it sees in them.

example:
  minidiff score --prompts 200 --steps 25 --guidance 5
"""


def add_train_arguments(parser: argparse.ArgumentParser):
    """The arguments of `minidiff train`."""
    parser.description = TRAIN_TEXT
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGE_NAMES)}; all if none is named"
    )
    parser.add_argument(
        "--folder", default="runs/scenes", help="where pictures, states and results go (%(default)s)"
    )
    parser.add_argument(
        "--minutes", type=_positive(float), help="the length of each named stage, instead of its own"
    )
    parser.add_argument(
        "--pictures", type=_positive(int), default=24_000, help="training pictures (%(default)s)"
    )
    parser.add_argument(
        "--workers", type=_positive(int), default=os.cpu_count(), help="processes that render"
    )
    parser.add_argument(
        "--threads", type=_positive(int), help="threads that train; torch's choice if left out"
    )


def run_train(args):
    """Runs the stages named in args, in their order."""
    unknown = [name for name in args.stages if name not in STAGE_NAMES]
    if unknown:
        raise ValueError(f"train: unknown stage {unknown[0]!r}; the stages are {', '.join(STAGE_NAMES)}")
    import torch

    from minidiff.train.stages import Job, run

    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = args.stages or STAGE_NAMES
    minutes = dict.fromkeys(chosen, args.minutes) if args.minutes else None
    job = Job(Path(args.folder), args.pictures, minutes, args.workers)
    for stage in STAGE_NAMES:
        if stage in chosen:
            run(stage, job)


def add_score_arguments(parser: argparse.ArgumentParser):
    """The arguments of `minidiff score`."""
    parser.description = SCORE_TEXT
    parser.add_argument(
        "--checkpoint", default="scenes", help="a built-in name, a folder or a repository (%(default)s)"
    )
    parser.add_argument("--scorer", default="scenes-scorer", help="the classifier (%(default)s)")
    parser.add_argument("--prompts", type=_positive(int), default=200, help="how many (%(default)s)")
    parser.add_argument("--steps", type=_positive(int), default=25, help="(%(default)s)")
    parser.add_argument("--guidance", type=float, default=5.0, help="(%(default)s)")
    parser.add_argument("--scheduler", default="UniPCMultistepScheduler", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and pictures (%(default)s)")
    parser.add_argument("--out", help="a folder for the pictures, a contact sheet and scores.json")


def run_score(args):
    """Prints the shares of attributes that pictures got right, and the scorer's own accuracy on rendered
    pictures.
    """
    from minidiff.train.score import score_checkpoint, score_scorer

    own = score_scorer(args.scorer, args.prompts, args.seed)
    _print_row("rendered pictures (the scorer's own accuracy)", own)
    shares = score_checkpoint(args)
    _print_row(
        f"{args.checkpoint}, {args.prompts} prompts, {args.steps} steps, guidance {args.guidance:g}", shares
    )
    if args.out:
        settings = {k: v for k, v in vars(args).items() if isinstance(v, str | int | float)}
        write_json(Path(args.out) / "scores.json", {"settings": settings, "rendered": own, "drawn": shares})


def _print_row(title, shares):
    print(title)
    print("  " + "  ".join(f"{what} {100 * share:.1f} %" for what, share in shares.items()), flush=True)


def _positive(kind):
    def parse(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
        return value

    parse.__name__ = kind.__name__
    return parse
