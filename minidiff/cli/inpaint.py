"""`minidiff inpaint`: what a mask covers of a picture is painted anew."""

from minidiff.cli.drawing import (
    add_drawing_arguments,
    add_text_arguments,
    check_strength,
    draw,
    settle,
    share,
)
from minidiff.cli.generate import DEFAULTS as GENERATE
from minidiff.cli.inputs import add_input_argument, check_given, fitted, read_input

INPUTS = {"picture": "", "picture_pixels": "", "mask": "", "mask_pixels": ""}
DEFAULTS = GENERATE | INPUTS | {"strength": 1.0}
TEXT = """Paints anew, as a text says, what a mask covers of a picture, and saves it as a PNG that carries its
settings; picture and mask are remembered by their paths and hashes of their pixels. Models for inpainting are
made for this; others do it, too.
"""
EXAMPLES = """examples:
  minidiff inpaint floor.png mask.png "a small red sphere on a gray floor"
  minidiff inpaint floor.png mask.png "a cone" --strength 0.8 --seed 7 --count 4 --out pictures/
  minidiff inpaint --like picture.png                           the same picture again, bit for bit
  minidiff inpaint --like picture.png --steps 50                all the same but the steps"""


def add_arguments(parser):
    """The arguments of `minidiff inpaint`."""
    parser.description, parser.epilog = TEXT, EXAMPLES
    add_input_argument(parser, "picture", "a file with the picture")
    add_input_argument(parser, "mask", "one of the same size: what is white is painted, what is black stays")
    add_text_arguments(parser, DEFAULTS, size="the picture's")
    add_drawing_arguments(parser, DEFAULTS)
    strength = f"1 starts from noise alone, less from what is covered ({DEFAULTS['strength']})"
    parser.add_argument("--strength", type=share, metavar="X", help=strength)


def run(args):
    """Paints a part of a picture, or that of --like again."""
    check_given(args, "inpaint", "picture", "mask", "prompt")
    settings = settle(args, "inpaint", DEFAULTS)
    check_strength(settings)
    picture, mask = (read_input(args, settings, name) for name in ("picture", "mask"))
    if picture.size != mask.size:
        sizes = [f"{settings[name]} has {image.width} x {image.height} pixels"
                 for name, image in (("picture", picture), ("mask", mask))]  # fmt: skip
        raise ValueError(f"{' and '.join(sizes)}; make them equal")
    if mask.getextrema()[1] < 128:
        raise ValueError(
            f"{settings['mask']} has nothing white, so nothing would be painted; make white what should be"
        )
    options = {"image": fitted(picture, args, settings), "mask_image": fitted(mask, args, settings)}
    options |= {name: settings[name] for name in ("prompt", "height", "width", "strength")}
    options |= {"negative_prompt": settings["negative"], "guidance_scale": settings["guidance"]}
    draw(args, settings, settings["prompt"], options)
