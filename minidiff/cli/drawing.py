"""What the commands that draw share: arguments, settings, a pipeline that is ready."""

import argparse
import contextlib
import hashlib
import inspect
import math
import secrets
import sys

import minidiff
from minidiff.checkpoints import hub
from minidiff.cli.pictures import check_out, out_path, read_settings, versions, write_picture

DTYPES = ("float32", "float16", "bfloat16")
OWN = "own"  # stands for the scheduler that a checkpoint comes with
FROM_TEXT = ("StableDiffusionPipeline", "UNet2DConditionModel")
# command -> its pipeline, and the class of the U-Net that a checkpoint for it has
PIPELINES = {
    "generate": FROM_TEXT,
    "sample": ("DDPMPipeline", "UNet2DModel"),
    "compare": FROM_TEXT,
    "interpolate": FROM_TEXT,
    "img2img": ("StableDiffusionImg2ImgPipeline", "UNet2DConditionModel"),
    "inpaint": ("StableDiffusionInpaintPipeline", "UNet2DConditionModel"),
}


def scheduler_names() -> dict[str, str]:
    """The schedulers that these commands draw with, by short names: {"unipc": "UniPCMultistepScheduler", ...}

    Those are all that are no `misfits`.
    """
    return {short: name for short, name in _all_schedulers().items() if not _misfit(name)}


def misfits() -> dict[str, str]:
    """The short names of all other schedulers, and what keeps each from drawing with these commands.

    Stable Diffusion and DDPM were trained on a schedule of betas, whose timesteps tell the model how noisy
    its input is, and draw by going from noise to data. diffusers' pipelines do not ask: with other schedulers
    they draw garbage, or fail.
    """
    reasons = {short: _misfit(name) for short, name in _all_schedulers().items()}
    return {short: why for short, why in reasons.items() if why}


def _misfit(name):
    scheduler_class = getattr(minidiff, name)
    if "beta_schedule" not in inspect.signature(scheduler_class).parameters:
        return "made for another kind of model, without the timesteps of a schedule of betas"
    scheduler = scheduler_class()
    scheduler.set_timesteps(10)
    return "made to go from pictures to noise" if scheduler.timesteps[0] < scheduler.timesteps[-1] else ""


def scheduler_name(text: str) -> str:
    """A parser for argparse that says why a scheduler is no choice; unknown names are left to the choices."""
    if text in misfits():
        raise argparse.ArgumentTypeError(f"{text} is {misfits()[text]}")
    return text


def _all_schedulers():
    names = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
    return {_shorten(name): name for name in names}


def _shorten(name):
    for part in ("Scheduler", "Multistep", "Discrete"):
        name = name.replace(part, "")
    return name.lower()


def add_drawing_arguments(parser: argparse.ArgumentParser, defaults: dict):
    """What those have that draw `count` pictures; arguments left out are None, so that --like may fill them
    in.
    """
    group = add_sampler_arguments(parser, defaults)
    add_common_arguments(group, defaults, "of the first picture; the next count on (by chance)")
    group = parser.add_argument_group("how many pictures, and where")
    group.add_argument("--count", type=whole_number(1), default=1, metavar="X", help="how many (1)")
    add_file_arguments(group)


def add_sampler_arguments(parser: argparse.ArgumentParser, defaults: dict):
    """The scheduler and its steps, in a group to which more may be added."""
    schedulers = [OWN, *scheduler_names()]
    group = parser.add_argument_group("how it is drawn (in brackets: if left out)")
    own = f"{', '.join(schedulers)}; own is what the checkpoint comes with ({defaults['scheduler']})"
    group.add_argument("--scheduler", metavar="X", help=own, type=scheduler_name, choices=schedulers)
    steps = f"how many steps from noise to picture ({defaults['steps']})"
    group.add_argument("--steps", metavar="X", help=steps, type=whole_number(1))
    return group


def add_text_arguments(parser: argparse.ArgumentParser, defaults: dict, size: str = "as in training"):
    """What the commands have that draw pictures of a text; size: what theirs is if none is given."""
    if "prompt_b" in defaults:
        parser.add_argument("prompt", nargs="?", metavar="PROMPT_A", help="what to draw first")
        parser.add_argument("prompt_b", nargs="?", metavar="PROMPT_B", help="what to draw last")
    else:
        parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw")
    parser.add_argument("--negative", metavar="TEXT", help="what not to draw")
    guidance = f"how closely to follow the prompt, from 1 on ({defaults['guidance']})"
    parser.add_argument("--guidance", type=number, metavar="X", help=guidance)
    for side in ("height", "width"):
        pixels = whole_number(8, 4096, multiple=8)
        parser.add_argument(
            f"--{side}", type=pixels, metavar="X", help=f"in pixels, a multiple of 8 ({size})"
        )


def add_common_arguments(group, defaults: dict, seed: str | None = None):
    """What all have in common: the checkpoint, the seed (if there is one, with its help), what computes."""

    def add(name, what, **options):
        group.add_argument(f"--{name}", metavar="X", help=what, **options)

    where = "scenes, scenes-ddpm, a folder, or the id of a repository"
    add("checkpoint", f"{where} ({defaults['checkpoint']})")
    if seed is not None:
        add("seed", seed, type=whole_number(0, 2**63))
    add("device", "cpu, cuda, cuda:1, mps, ... (cuda, or cpu where that is missing)")
    add("dtype", f"{', '.join(DTYPES)} ({defaults['dtype']})", choices=DTYPES)
    add("threads", "on a CPU; last bits depend on them (torch's choice)", type=whole_number(1, 1024))


def add_file_arguments(
    group, where="a .png, which is replaced, or a folder for new files (the working folder)"
):
    """Where pictures go, and where settings come from."""
    like = "a picture whose settings count where none are given: alone, it is drawn again"
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


def positive_number(text):
    """A parser of numbers above 0 for argparse."""
    if number(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number(text)


def share(text):
    """A parser of numbers from 0 to 1 for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def check_strength(settings: dict):
    """Raises ValueError, before torch is there, for a strength that leaves no step, or is damaged."""
    strength, steps = settings["strength"], settings["steps"]
    if not 0 <= strength <= 1 or int(steps * strength) < 1:
        raise ValueError(
            f"--strength {strength:g} leaves none of {steps} steps; it must be from {1 / steps:g} to 1, "
            "or --steps larger"
        )


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
            (OWN, *scheduler_names()).index(remembered.get("scheduler", OWN))
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
    with ready(settings) as pipe:
        first = secrets.randbelow(2**32) if settings["seed"] is None else settings["seed"]
        for k in range(args.count):
            image = _draw_one(pipe, settings, first + k, options)
            found = {"seed": first + k, "height": image.height, "width": image.width}
            path = out_path(args.out, title, first + k, k + 1 if args.count > 1 else None)
            write_picture(image, path, settings | {key: found[key] for key in found if key in settings})
            print(path, flush=True)


@contextlib.contextmanager
def ready(settings: dict):
    """The pipeline that the settings name, in a with block; they get the threads, the device and the weights'
    fingerprint. ValueError for a checkpoint of another command.
    """
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
        yield pipe
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
    if unet != PIPELINES[command][1]:
        right = next((name for name, (_, theirs) in PIPELINES.items() if theirs == unet), None)
        hint = f"use minidiff {right}" if right else f"its U-Net is a {unet}"
        raise ValueError(f"minidiff {command} can't draw with the checkpoint {checkpoint}: {hint}")


def _load(settings):
    """The pipeline that the settings name, ready to draw."""
    import torch

    settings["device"] = _device(settings["device"])
    dtype = getattr(torch, settings["dtype"])
    pipeline_class = getattr(minidiff, PIPELINES[settings["command"]][0])
    pipe = pipeline_class.from_pretrained(settings["checkpoint"], torch_dtype=dtype)
    if settings.get("scheduler", OWN) != OWN:
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
