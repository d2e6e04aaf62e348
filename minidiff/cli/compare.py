"""`minidiff compare`: one contact sheet of a prompt, drawn by many samplers in different numbers of steps."""

import inspect
import time

import minidiff
from minidiff.cli import drawing
from minidiff.cli.drawing import add_common_arguments, add_file_arguments, add_text_arguments, ready, settle
from minidiff.cli.pictures import check_out, out_path, write_picture
from minidiff.cli.sheet import Cell, draw_sheet

DEFAULTS = {
    "prompt": "",
    "negative": "",
    "checkpoint": "scenes",
    "schedulers": "",
    "steps": "5,10,20,40",
    "guidance": 7.5,
    "seed": 0,
    "height": None,
    "width": None,
    "device": "",
    "dtype": "float32",
    "threads": None,
}
TEXT = """Draws one prompt with many samplers, each in several numbers of steps, all from the same noise, and
saves one contact sheet: a row for each sampler, a column for each number of steps. Under each picture stand
the seconds that it took, from the text to the picture, and how often it called the U-Net: some samplers call
it twice a step; with guidance, one call has the prompt and the negative prompt in one batch.
"""
EXAMPLES = """examples:
  minidiff compare "a large red sphere left of a small blue cube"
  minidiff compare "a green cone on a gray floor" --schedulers ddim,unipc --steps 5,10,25 --seed 7
  minidiff compare "a small white cube" --guidance 5 --out sheet.png
  minidiff compare --like sheet.png                    the same pictures again, with new times"""


def add_arguments(parser):
    """The arguments of `minidiff compare`."""
    parser.description, parser.epilog = TEXT, EXAMPLES
    add_text_arguments(parser, DEFAULTS)
    group = parser.add_argument_group("what is compared (in brackets: if left out)")
    group.add_argument("--schedulers", metavar="X,Y", help=_help_on_schedulers())
    steps = f"numbers of steps from noise to picture ({DEFAULTS['steps']}, which takes scenes a minute)"
    group.add_argument("--steps", metavar="N,N", help=steps)
    group = parser.add_argument_group("how it is drawn")
    add_common_arguments(group, DEFAULTS, f"of every picture ({DEFAULTS['seed']})")
    add_file_arguments(parser.add_argument_group("files"))


def _help_on_schedulers():
    names, misfits = drawing.scheduler_names(), drawing.misfits()
    distilled = " and ".join(name for name in names if name not in default_schedulers())
    reasons = [
        f"{', '.join(name for name in misfits if misfits[name] == why)}: {why}"
        for why in dict.fromkeys(misfits.values())
    ]
    return (
        f"any of {', '.join(names)} (all but {distilled}, which are for models distilled to need a few "
        f"steps). Not {'; nor '.join(reasons)}"
    )


def default_schedulers() -> list[str]:
    """The short names of the schedulers that are compared if none are named.

    Left out are those of consistency models, which jump between timesteps of the model that they were
    distilled from (its original_inference_steps); with other models they run, but badly.
    """
    return [short for short, name in drawing.scheduler_names().items() if not _is_for_distilled(name)]


def _is_for_distilled(name):
    set_timesteps = getattr(minidiff, name).set_timesteps
    return "original_inference_steps" in inspect.signature(set_timesteps).parameters


def run(args):
    """Draws the contact sheet of a prompt, or that of --like again."""
    if args.prompt is None and args.like is None:
        raise ValueError("compare needs a PROMPT, or --like SHEET (see minidiff compare --help)")
    settings = settle(args, "compare", DEFAULTS)
    names = parse_schedulers(settings["schedulers"]) or default_schedulers()
    steps = parse_steps(settings["steps"])
    settings |= {"schedulers": ",".join(names), "steps": ",".join(map(str, steps))}
    check_out(args.out)
    with ready(settings) as pipe:
        rows = _draw_rows(pipe, settings, names, steps)
        image = rows[names[0]][0].image
        settings |= {"height": image.height, "width": image.width}
        heads = [f"{n} step{'s' if n > 1 else ''}" for n in steps]
        sheet = draw_sheet(settings["prompt"] or "(no prompt)", _facts(settings), heads, rows)
        path = out_path(args.out, f"compare {settings['prompt']}", settings["seed"], None)
        write_picture(sheet, path, settings)
        print(path, flush=True)


def parse_schedulers(text: str) -> list[str]:
    """The short names in "ddim,unipc", in this order; ValueError for one that can't be compared."""
    known = drawing.scheduler_names()
    names = [word.strip() for word in text.split(",") if word.strip()]
    for name in names:
        why = drawing.misfits().get(name, "unknown")
        if name not in known:
            raise ValueError(f"--schedulers: {name} is {why}; choose from {', '.join(known)}")
    return _different(names, "--schedulers")


def parse_steps(text: str) -> list[int]:
    """The numbers in "5,10,25", in this order; ValueError for anything else."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not word.isdecimal() or not 1 <= int(word) <= 1000:
            raise ValueError(f"--steps: {word!r} is not a whole number from 1 to 1000")
    return _different([int(word) for word in words], "--steps")


def _different(values, option):
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{option} has {value} twice")
    return values


def _facts(settings):
    """What holds for all pictures, in one sentence."""
    negative = f", away from “{settings['negative']}”" if settings["negative"] else ""
    machine = f"{settings['device']}, {settings['dtype']}"
    if settings["device"] == "cpu":
        machine += f", {settings['threads']} thread{'s' if settings['threads'] > 1 else ''}"
    return (
        f"checkpoint {settings['checkpoint']}, seed {settings['seed']}, guidance {settings['guidance']:g}"
        f"{negative}; {machine}; seconds and calls of the U-Net for each picture"
    )


def _draw_rows(pipe, settings, names, steps):
    """{short name: a cell for each number of steps}, with a bar that counts calls of the U-Net."""
    from tqdm import tqdm

    plan = {(name, n): _scheduler(pipe, name, n) for name in names for n in steps}
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = plan[names[0], min(steps)]
    _draw_one(pipe, settings, min(steps))  # not measured: the first call pays for what later ones find
    cells = {}
    total = sum(len(scheduler.timesteps) for scheduler in plan.values())
    with tqdm(total=total, unit="call", leave=False, disable=None) as bar:  # None: only on a terminal
        for (name, n), scheduler in plan.items():
            bar.set_description(f"{name}, {n} steps")
            pipe.scheduler = scheduler
            cells[name, n] = _measure(pipe, settings, name, n, bar)
    return {name: [cells[name, n] for n in steps] for name in names}


def _scheduler(pipe, name, n):
    """The scheduler with this short name, for the pipeline's model; ValueError if it can't make n steps."""
    scheduler_class = getattr(minidiff, drawing.scheduler_names()[name])
    scheduler = scheduler_class.from_config(pipe.scheduler.config)
    try:
        scheduler.set_timesteps(n)
    except ValueError as error:
        raise ValueError(f"{name} in {n} steps: {error}") from None
    return scheduler


def _measure(pipe, settings, name, n, bar):
    """A cell: the picture, its seconds and how often it called the U-Net."""
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(bar.update()))
    try:
        start = time.perf_counter()
        image = _draw_one(pipe, settings, n)
        seconds = time.perf_counter() - start
    except ValueError as error:
        raise ValueError(f"{name} in {n} steps: {error}") from None
    finally:
        hook.remove()
    return Cell(image, f"{seconds:.2f} s, {len(calls)} calls")


def _draw_one(pipe, settings, n):
    import torch

    generator = torch.Generator().manual_seed(settings["seed"])
    return pipe(
        settings["prompt"], settings["height"], settings["width"], n, generator=generator,
        guidance_scale=settings["guidance"], negative_prompt=settings["negative"],
    ).images[0]  # fmt: skip
