"""`minidiff generate`: pictures of a text."""

from minidiff.cli.drawing import add_drawing_arguments, add_text_arguments, draw, settle

DEFAULTS = {
    "prompt": "",
    "negative": "",
    "checkpoint": "scenes",
    "scheduler": "unipc",
    "steps": 25,
    "guidance": 7.5,
    "seed": None,
    "height": None,
    "width": None,
    "device": "",
    "dtype": "float32",
    "threads": None,
}
TEXT = (
    "Draws pictures of a text and saves each as a PNG that carries its prompt, seed, settings and versions."
)
EXAMPLES = """examples:
  minidiff generate "a large red sphere left of a small blue cube"
  minidiff generate "a green cone on a gray floor" --seed 7 --count 4 --out pictures/
  minidiff generate "a small white cube" --negative "a sphere" --guidance 5 --steps 50 --scheduler ddim
  minidiff generate --like picture.png                 the same picture again, bit for bit
  minidiff generate --like picture.png --steps 100     all the same but the steps"""


def add_arguments(parser):
    """The arguments of `minidiff generate`."""
    parser.description, parser.epilog = TEXT, EXAMPLES
    add_text_arguments(parser, DEFAULTS)
    add_drawing_arguments(parser, DEFAULTS)


def run(args):
    """Draws the pictures of a prompt, or those of --like again."""
    if args.prompt is None and args.like is None:
        raise ValueError("generate needs a PROMPT, or --like PICTURE (see minidiff generate --help)")
    settings = settle(args, "generate", DEFAULTS)
    options = {name: settings[name] for name in ("prompt", "height", "width")}
    options |= {"negative_prompt": settings["negative"], "guidance_scale": settings["guidance"]}
    draw(args, settings, settings["prompt"], options)
