"""`minidiff train`: the stages from rendered pictures to the checkpoints that ship; the work is in
minidiff.train.
"""

import argparse
import os
from pathlib import Path

STAGE_NAMES = ("pictures", "vae", "text", "unet", "ddpm", "scorer")  # in order, as train/stages.py has them
DESCRIPTION = """Trains scenes, scenes-ddpm and the scorer from nothing, on pictures that minidiff renders
itself. Each stage saves its state every minute and goes on from it when it is started again; Ctrl-C loses
nothing.

examples:
  minidiff train                          all stages, less than four hours on two cores
  minidiff train unet --minutes 300       one stage, longer
  minidiff generate "a red cube" --checkpoint runs/scenes/scenes
"""


def add_arguments(parser: argparse.ArgumentParser):
    """The arguments of `minidiff train`."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGE_NAMES)}; all if none is named"
    )
    parser.add_argument(
        "--folder", default="runs/scenes", help="where pictures, states and results go (%(default)s)"
    )
    parser.add_argument(
        "--minutes", type=positive(float), help="the length of each named stage, instead of its own"
    )
    parser.add_argument(
        "--pictures", type=positive(int), default=24_000, help="training pictures (%(default)s)"
    )
    parser.add_argument("--workers", type=positive(int), default=os.cpu_count(), help="processes that render")
    parser.add_argument(
        "--threads", type=positive(int), help="threads that train; torch's choice if left out"
    )


def run(args):
    """Runs the stages named in args, in their order."""
    unknown = [name for name in args.stages if name not in STAGE_NAMES]
    if unknown:
        raise ValueError(f"train: unknown stage {unknown[0]!r}; the stages are {', '.join(STAGE_NAMES)}")
    import torch

    from minidiff.train import stages

    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = args.stages or STAGE_NAMES
    minutes = dict.fromkeys(chosen, args.minutes) if args.minutes else None
    job = stages.Job(Path(args.folder), args.pictures, minutes, args.workers)
    for stage in STAGE_NAMES:
        if stage in chosen:
            stages.run(stage, job)


def positive(kind):
    """A parser of numbers of that kind greater than 0, for argparse."""

    def parse(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
        return value

    parse.__name__ = kind.__name__
    return parse
