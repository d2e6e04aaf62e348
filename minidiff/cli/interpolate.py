"""`minidiff interpolate`: the way from one text and seed to another, as an animation and a strip."""

import secrets

from minidiff.cli.drawing import (
    add_common_arguments,
    add_file_arguments,
    add_sampler_arguments,
    add_text_arguments,
    positive_number,
    ready,
    settle,
    whole_number,
)
from minidiff.cli.generate import DEFAULTS as GENERATE
from minidiff.cli.pictures import ANIMATIONS, check_out, out_path, write_animation, write_picture

DEFAULTS = GENERATE | {"prompt_b": "", "seeds": "", "frames": 16, "seconds": 2.0}
DEFAULTS.pop("seed")
STRIP = 8  # pictures of it, at most
TEXT = """Draws pictures on the way from one text to another, and from one seed to another, and saves them as
an animation, which goes there and back, and as a strip. Both carry all settings.
"""
EXAMPLES = """examples:
  minidiff interpolate "a large red sphere" "a large blue cube"
  minidiff interpolate "a green cone" "a green cone" --seeds 3 7 --frames 24 --out cone.webp
  minidiff interpolate --like cone.webp                the same again, bit for bit
  minidiff interpolate --like cone-strip.png --frames 48 --seconds 6"""


def add_arguments(parser):
    """The arguments of `minidiff interpolate`."""
    parser.description, parser.epilog = TEXT, EXAMPLES
    add_text_arguments(parser, DEFAULTS)
    group = add_sampler_arguments(parser, DEFAULTS)
    add_common_arguments(group, DEFAULTS)
    seeds = "of the first and the last picture (one by chance, for both)"
    group.add_argument("--seeds", nargs=2, metavar=("A", "B"), type=whole_number(0, 2**63), help=seeds)
    group = parser.add_argument_group("the animation, and where")
    frames = f"how many pictures are drawn ({DEFAULTS['frames']})"
    group.add_argument("--frames", type=whole_number(2, 1000), metavar="X", help=frames)
    seconds = f"from the first picture to the last ({DEFAULTS['seconds']:g})"
    group.add_argument("--seconds", type=positive_number, metavar="X", help=seconds)
    kinds = (
        "a .gif or .webp, which is replaced, or a folder for new files (a .gif in the working folder); the "
    )
    add_file_arguments(group, kinds + "strip gets its name, with -strip.png")


def run(args):
    """Draws the way between two prompts, or that of --like again."""
    if args.like is None and None in (args.prompt, args.prompt_b):
        raise ValueError("interpolate needs two texts, or --like PICTURE (see minidiff interpolate --help)")
    if args.seeds is not None:
        args.seeds = "{} {}".format(*args.seeds)
    settings = settle(args, "interpolate", DEFAULTS)
    settings["seeds"] = settings["seeds"] or " ".join(2 * [str(secrets.randbelow(2**32))])
    _parsed(settings["seeds"])
    check_out(args.out, endings=ANIMATIONS)
    with ready(settings) as pipe:
        images = _draw_all(pipe, settings)
        settings |= {"height": images[0].height, "width": images[0].width}
        title = f"{settings['prompt']} to {settings['prompt_b']}"
        path = out_path(args.out, title, settings["seeds"].replace(" ", "-"), None, ANIMATIONS[0])
        milliseconds = round(1000 * settings["seconds"] / (len(images) - 1))
        write_animation(images + images[-2:0:-1], path, settings, milliseconds)
        strip = path.with_name(f"{path.stem}-strip.png")
        write_picture(_strip(images), strip, settings)
        print(path, strip, sep="\n", flush=True)


def _parsed(seeds):
    """The two numbers in "3 7"; ValueError for any other text, which can only come from a damaged picture."""
    words = seeds.split()
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        raise ValueError(f"the seeds are {seeds!r}, not two whole numbers")
    return int(words[0]), int(words[1])


def _draw_all(pipe, settings):
    """The pictures, in order, with a bar that counts them."""
    import numpy as np
    from tqdm import tqdm

    from minidiff.editing import interpolate

    pipe.set_progress_bar_config(disable=True)
    prompts, seeds = (settings["prompt"], settings["prompt_b"]), _parsed(settings["seeds"])
    frames = interpolate(
        pipe, prompts, seeds, np.linspace(0, 1, settings["frames"]).tolist(),
        height=settings["height"], width=settings["width"], num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"], negative_prompt=settings["negative"],
    )  # fmt: skip
    return list(tqdm(frames, total=settings["frames"], unit="picture", leave=False, disable=None))


def _strip(images):
    """Some of the pictures in a row, the first and the last among them."""
    from PIL import Image

    count = min(STRIP, len(images))
    chosen = [images[round(k * (len(images) - 1) / (count - 1))] for k in range(count)]
    strip = Image.new("RGB", (count * chosen[0].width, chosen[0].height))
    for k, image in enumerate(chosen):
        strip.paste(image, (k * image.width, 0))
    return strip
