"""`minidiff samplers`: the table of all samplers, their orders of convergence as measured, and a plot."""

import json
from pathlib import Path

from minidiff.cli.pictures import check_out
from minidiff.config import replacing
from minidiff.explain import convergence, plot
from minidiff.explain.samplers import SAMPLERS

TEXT = """Shows all samplers: their order of convergence p, which says that twice the steps leave 2^-p of the
error, and what is measured of it now; model calls in a step; whether steps add noise; the paper. Order "any"
is that of samplers for consistency models, where one step is exact.

They are measured on Gaussian data, whose exact solution is known, in 8 to 128 steps between moderate amounts
of noise. The error is a root mean square, in standard deviations of the noisy data: without noise its path's
distance from the exact one, with noise its distribution's.
"""
EXAMPLES = """examples:
  minidiff samplers
  minidiff samplers --plot samplers.png                error over model calls
  minidiff samplers --json                             the measured errors"""


def add_arguments(parser):
    """The arguments of `minidiff samplers`."""
    parser.description, parser.epilog = TEXT, EXAMPLES
    parser.add_argument("--plot", metavar="PNG", help="draw error over model calls; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="print the measured errors as JSON instead")


def run(args):
    """Prints the table, or all that was measured, and draws the plot."""
    if args.plot is not None:
        check_out(args.plot, "--plot")
        if args.plot.endswith("/") or Path(args.plot).is_dir():
            raise ValueError(f"--plot {args.plot}: this is a folder; give the plot a name that ends in .png")
        plot.check_matplotlib()
    curves = [convergence.curve(sampler) for sampler in SAMPLERS]
    if args.plot is not None:
        with replacing(Path(args.plot)) as temporary:
            plot.save(plot.draw(curves), temporary)
    if args.json:
        print(json.dumps([_as_dict(curve) for curve in curves], indent=1))
        return
    _print_table(curves)
    if args.plot is not None:
        print(args.plot)


def _print_table(curves):
    rows = [("name", "order", "measured", "calls", "noise", "paper", "class and settings")]
    notes = []
    for curve in curves:
        s = curve.sampler
        order, measured = str(s.order or "any"), _in_words(curve)
        if s.note:
            if s.note not in notes:
                notes.append(s.note)
            order += f" ({notes.index(s.note) + 1})"
        calls, noise = str(s.calls), "yes" if s.noise else "no"
        made = f"{s.scheduler}({_in_call(s.config)})" if s.config else s.scheduler
        made += f", step({_in_call(s.options)})" if s.options else ""
        paper = ", arXiv:".join(filter(None, s.paper))
        rows.append((s.name, order, measured, calls, noise, paper, made))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    for number, note in enumerate(notes, 1):
        print(f"({number}) {note}")


def _in_words(curve):
    if curve.order is not None:
        return f"{curve.order:.2f}"
    worst = max(curve.errors)
    return "exact" if worst < convergence.FLOOR else f"{worst:.0e} off"


def _in_call(settings):
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


def _as_dict(curve):
    s = curve.sampler
    row = {
        key: getattr(s, key) for key in ("name", "scheduler", "config", "options", "order", "calls", "noise")
    }
    row |= {"paper": s.paper[0], "arxiv": s.paper[1], "note": s.note}
    measured = {
        "steps": curve.steps,
        "model_calls": curve.calls,
        "errors": curve.errors,
        "order": curve.order,
    }
    return row | {"measured": measured}
