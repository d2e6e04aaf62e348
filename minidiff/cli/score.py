"""`minidiff score`: how well pictures follow prompts held out of training; the work is in
minidiff.train.score.
"""

import argparse
from pathlib import Path

from minidiff.cli.drawing import number, scheduler_name, scheduler_names, whole_number
from minidiff.cli.train import positive
from minidiff.config import write_json

DESCRIPTION = """Draws pictures of prompts whose combinations were held out of training, and lets a classifier
say what it sees in them.

example:
  minidiff score --prompts 200 --steps 25 --guidance 5
"""


def add_arguments(parser: argparse.ArgumentParser):
    """The arguments of `minidiff score`."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "--checkpoint", default="scenes", help="a built-in name, a folder or a repository (%(default)s)"
    )
    parser.add_argument("--scorer", default="scenes-scorer", help="the classifier (%(default)s)")
    parser.add_argument("--prompts", type=positive(int), default=200, help="how many (%(default)s)")
    parser.add_argument("--steps", type=positive(int), default=25, help="(%(default)s)")
    parser.add_argument("--guidance", type=number, default=5.0, help="(%(default)s)")
    parser.add_argument(
        "--scheduler", default="unipc", type=scheduler_name, choices=scheduler_names(), help="(%(default)s)"
    )
    seed = whole_number(0, 2**63)
    parser.add_argument("--seed", type=seed, default=0, help="of prompts and pictures (%(default)s)")
    parser.add_argument("--out", help="a folder for the pictures, a contact sheet and scores.json")


def run(args):
    """Prints the shares of attributes that pictures got right, and the scorer's own accuracy on rendered
    pictures.
    """
    if args.out and Path(args.out).is_file():
        raise ValueError(f"--out {args.out}: there is a file of that name; the pictures need a folder")
    from minidiff.train.score import score_checkpoint, score_scorer

    own = score_scorer(args.scorer, args.prompts, args.seed)
    _print_row("rendered pictures (the scorer's own accuracy)", own)
    shares = score_checkpoint(
        args.checkpoint,
        args.scorer,
        scheduler=scheduler_names()[args.scheduler],
        prompts=args.prompts,
        steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
        out=args.out,
    )
    _print_row(
        f"{args.checkpoint}, {args.prompts} prompts, {args.steps} steps, guidance {args.guidance:g}", shares
    )
    if args.out:
        settings = {k: v for k, v in vars(args).items() if isinstance(v, str | int | float)}
        write_json(Path(args.out) / "scores.json", {"settings": settings, "rendered": own, "drawn": shares})


def _print_row(title, shares):
    print(title)
    print("  " + "  ".join(f"{what} {100 * share:.1f} %" for what, share in shares.items()), flush=True)
