"""`minidiff img2img`: a picture, partly dissolved in noise and drawn again as a text says."""

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

# Fresh noise at every step lets go of what the picture said: with `scenes`, 8 of 8 red spheres become blue at
# strength 0.6, and 3 of 8 without it.
DEFAULTS = GENERATE | {"picture": "", "picture_pixels": "", "strength": 0.8, "scheduler": "eulerancestral"}
TEXT = """Draws a picture again as a text says, and saves it as a PNG that carries its settings; the picture
that it started from is remembered by its path and a hash of its pixels.
"""
EXAMPLES = """examples:
  minidiff img2img sphere.png "a large blue sphere" --strength 0.6
  minidiff img2img photo.jpg "a red cube" --width 128 --height 128 --count 4 --out pictures/
  minidiff img2img --like picture.png                           the same picture again, bit for bit
  minidiff img2img sphere.png "a cone" --like picture.png       all the same but the picture and the text"""


def add_arguments(parser):
    """The arguments of `minidiff img2img`."""
    parser.description, parser.epilog = TEXT, EXAMPLES
    add_input_argument(parser, "picture", "a file with the picture to start from")
    add_text_arguments(parser, DEFAULTS, size="the picture's")
    add_drawing_arguments(parser, DEFAULTS)
    strength = f"how much is drawn anew, 0 to 1: that part of the steps is taken ({DEFAULTS['strength']})"
    parser.add_argument("--strength", type=share, metavar="X", help=strength)


def run(args):
    """Draws a picture anew, or that of --like again."""
    check_given(args, "img2img", "picture", "prompt")
    settings = settle(args, "img2img", DEFAULTS)
    check_strength(settings)
    image = fitted(read_input(args, settings, "picture"), args, settings)
    options = {"prompt": settings["prompt"], "image": image, "strength": settings["strength"]}
    options |= {"negative_prompt": settings["negative"], "guidance_scale": settings["guidance"]}
    draw(args, settings, settings["prompt"], options)
