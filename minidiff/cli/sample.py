"""`minidiff sample`: pictures without a text."""

from minidiff.cli.drawing import OWN, add_drawing_arguments, draw, settle

DEFAULTS = {
    "checkpoint": "scenes-ddpm",
    "scheduler": OWN,
    "steps": 250,
    "seed": None,
    "device": "",
    "dtype": "float32",
    "threads": None,
}
TEXT = """Draws pictures with a model that knows no texts, and saves each as a PNG that carries its seed and
settings.
"""
EXAMPLES = """examples:
  minidiff sample --count 4
  minidiff sample --scheduler ddim --steps 50 --seed 3 --out sample.png
  minidiff sample --like sample.png"""


def add_arguments(parser):
    """The arguments of `minidiff sample`."""
    parser.description, parser.epilog = TEXT, EXAMPLES
    add_drawing_arguments(parser, DEFAULTS)


def run(args):
    """Draws pictures with an unconditional checkpoint."""
    settings = settle(args, "sample", DEFAULTS)
    draw(args, settings, settings["checkpoint"].rstrip("/").rpartition("/")[2], {})
