"""What `minidiff generate` and `minidiff sample` share: arguments, settings, the loop over the pictures."""

import argparse
import hashlib
import math
import secrets
import sys

import minidiff
from minidiff.checkpoints import hub
from minidiff.cli.pictures import check_out, out_path, read_settings, versions, write_picture

DTYPES = ("float32", "float16", "bfloat16")
OWN = "own"  # stands for the scheduler that a checkpoint comes with
# the class of a checkpoint's U-Net -> the command that draws with it -> the pipeline
COMMANDS = {"UNet2DConditionModel": "generate", "UNet2DModel": "sample"}
PIPELINES = {"generate": "StableDiffusionPipeline", "sample": "DDPMPipeline"}


def scheduler_names() -> dict[str, str]:
    """All schedulers by short names: {"unipc": "UniPCMultistepScheduler", ...}"""
    names = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
    return {_shorten(name): name for name in names}


def _shorten(name):
    for part in ("Scheduler", "Multistep", "Discrete"):
        name = name.replace(part, "")
    return name.lower()


def add_drawing_arguments(parser: argparse.ArgumentParser, defaults: dict):
    """The arguments that both commands have; those left out are None, so that --like may fill them in."""
    schedulers = [OWN, *scheduler_names()]
    group = parser.add_argument_group("how it is drawn (in brackets: if left out)")

    def add(name, what, default=None, **options):
        default = defaults[name] if default is None else default
        group.add_argument(f"--{name}", metavar="X", help=f"{what} ({default})", **options)

    add("checkpoint", "scenes, scenes-ddpm, a folder, or the id of a repository")
    add("scheduler", f"{', '.join(schedulers)}; own is what the checkpoint comes with", choices=schedulers)
    add("steps", "how many steps from noise to picture", type=whole_number(1))
    add("seed", "of the first picture; the next count on", "by chance", type=whole_number(0, 2**63))
    add("device", "cpu, cuda, cuda:1, mps, ...", "cuda, or cpu where that is missing")
    add("dtype", ", ".join(DTYPES), choices=DTYPES)
    add("threads", "on a CPU; last bits depend on them", "torch's choice", type=whole_number(1, 1024))
    group = parser.add_argument_group("how many pictures, and where")
    where = "a .png, which is replaced, or a folder for new files (the working folder)"
    like = "a picture whose settings count where none are given: alone, it is drawn again"
    group.add_argument("--count", type=whole_number(1), default=1, metavar="X", help="how many (1)")
    group.add_argument("--out", metavar="PATH", help=where)
    group.add_argument("--like", metavar="PNG", help=like)


def whole_number(least, most=10**6, multiple=1):
    """A parser of whole numbers for argparse."""

    def parse(text):
        if not text.isdecimal() or not least <= int(text) <= most or int(text) % multiple:
            kind = f"a multiple of {multiple}" if multiple > 1 else "a whole number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} from {least} to {most}")
        return int(text)

    return parse


def number(text):
    """A parser of numbers from 0 on for argparse."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def settle(args: argparse.Namespace, command: str, defaults: dict) -> dict:
    """The settings of this run: given arguments, else those of --like's picture, else the defaults.

    defaults: {name: value}, of the type that the setting has; None stands for a whole number that is found
    out later. ValueError for a picture without settings of this command.
    """
    remembered = {}
    if args.like is not None:
        texts = read_settings(args.like, command)
        try:
            remembered = {name: _kind(value)(texts[name]) for name, value in defaults.items()}
            (OWN, *scheduler_names()).index(remembered["scheduler"])
            DTYPES.index(remembered["dtype"])
        except (KeyError, ValueError):
            raise ValueError(f"--like {args.like}: the settings in this picture are damaged") from None
        others = [f"{name} {texts[name]}" for name, now in versions().items() if texts.get(name) != now]
        if others:
            print(f"minidiff: made with {', '.join(others)}; it may differ in the last bits", file=sys.stderr)
        if args.checkpoint is None:
            remembered["weights"] = texts.get("weights")
    given = {name: value for name, value in vars(args).items() if name in defaults and value is not None}
    return {"command": command} | defaults | remembered | given


def _kind(default):
    return int if default is None else type(default)


def draw(args: argparse.Namespace, settings: dict, title: str, options: dict):
    """Draws args.count pictures with the settings, each from its own seed, and prints the files' names.

    One at a time: in a batch the last bits of a picture depend on the others, and --like could not repeat it.
    """
    check_out(args.out)
    _check_kind(settings["checkpoint"], settings["command"])
    import torch  # here and not at the top: whatever can be wrong before is told at once

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(settings["threads"] or before)
        settings["threads"] = torch.get_num_threads()
        pipe = _load(settings)
        weights = _fingerprint(pipe)
        if settings.get("weights", weights) != weights:
            print(
                "minidiff: the checkpoint's weights have changed since; the picture will differ",
                file=sys.stderr,
            )
        settings["weights"] = weights
        first = secrets.randbelow(2**32) if settings["seed"] is None else settings["seed"]
        for k in range(args.count):
            image = _draw_one(pipe, settings, first + k, options)
            found = {"seed": first + k, "height": image.height, "width": image.width}
            path = out_path(args.out, title, first + k, k + 1 if args.count > 1 else None)
            write_picture(image, path, settings | {key: found[key] for key in found if key in settings})
            print(path, flush=True)
    finally:
        torch.set_num_threads(before)


def _draw_one(pipe, settings, seed, options):
    import torch

    pipe.set_progress_bar_config(desc=f"seed {seed}", leave=False, disable=None)  # None: only on a terminal
    generator = torch.Generator().manual_seed(seed)  # the CPU's, so that every device gets the same noise
    return pipe(num_inference_steps=settings["steps"], generator=generator, **options).images[0]


def _check_kind(checkpoint, command):
    """Raises ValueError for a checkpoint that this command can't draw with."""
    entry = hub.read_json(checkpoint, "model_index.json").get("unet")
    unet = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    right = COMMANDS.get(str(unet))
    if right != command:
        hint = f"use minidiff {right}" if right else f"its U-Net is a {unet}"
        raise ValueError(f"minidiff {command} can't draw with the checkpoint {checkpoint}: {hint}")


def _load(settings):
    """The pipeline that the settings name, ready to draw."""
    import torch

    settings["device"] = _device(settings["device"])
    dtype = getattr(torch, settings["dtype"])
    pipeline_class = getattr(minidiff, PIPELINES[settings["command"]])
    pipe = pipeline_class.from_pretrained(settings["checkpoint"], torch_dtype=dtype)
    if settings["scheduler"] != OWN:
        scheduler_class = getattr(minidiff, scheduler_names()[settings["scheduler"]])
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    return pipe.to(settings["device"])


def _fingerprint(pipe):
    """A number that changes with the weights: of the first values of every tensor, so that no large file is
    read.
    """
    digest = hashlib.sha256()
    for model in pipe.models:
        for tensor in model.state_dict().values():
            digest.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _device(name):
    """The name of a device that is here, the best one for ""; ValueError for any other."""
    import torch

    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # torch raises either for a device that is missing
        problem = "there is no such device here, or torch was built without it"
        raise ValueError(f"--device {name}: {problem}") from None
    return name
