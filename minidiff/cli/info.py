"""`minidiff info`: what a checkpoint holds, read from its configs and the headers of its weight files."""

import math

from safetensors import SafetensorError, safe_open

from minidiff.checkpoints import CheckpointError, hub, layout

LOCAL = {"local_files_only": True}  # a look at a repository must not fetch gigabytes
WEIGHTS_NAMES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
# how the classes of parts without weights end
WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "Extractor")
TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}  # of weights, not of counters
SCHEDULER_KEYS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
TEXT = "Shows a checkpoint's parts and the scheduler's settings; of weight files it reads only the headers."
EXAMPLES = """examples:
  minidiff info scenes
  minidiff info ./my-checkpoint --variant fp16"""


def add_arguments(parser):
    """The arguments of `minidiff info`."""
    parser.description, parser.epilog = TEXT, EXAMPLES
    known = "scenes, scenes-ddpm, a folder, or a repository that was downloaded before"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=known)
    parser.add_argument("--variant", metavar="NAME", help="of the weight files, such as fp16")


def run(args):
    """Prints the parts of a checkpoint, its sizes and the scheduler."""
    name = args.checkpoint
    index = hub.read_json(name, "model_index.json", **LOCAL)
    parts = {part: entry for part, entry in index.items() if _is_part(entry)}
    rows = [_weights_row(name, part, *entry, args.variant) for part, entry in parts.items()]
    print(f"{name}: {index.get('_class_name')}")
    _print_table(rows)
    if "unet" in parts:
        print(f"  draws {_picture_size(name, parts)}")
    if "scheduler" in parts:
        config = _config(name, "scheduler", "scheduler_config.json")
        settings = (f"{key} {config[key]}" for key in SCHEDULER_KEYS if key in config)
        print(f"  {parts['scheduler'][1]}: {', '.join(settings)}")


def _is_part(entry):
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)


def _weights_row(name, part, library, class_name, variant):
    """(part, class, parameters, bytes, types) of one part; zeros for parts without weights."""
    if class_name.endswith(WITHOUT_WEIGHTS) or library not in WEIGHTS_NAMES:
        return part, class_name, 0, 0, ""
    subfolder = hub.part_subfolder(name, part, **LOCAL)
    weights_name = WEIGHTS_NAMES[library]
    paths = hub.resolve(
        name,
        lambda names, where: layout.pick_weights(names, where, weights_name, variant),
        subfolder,
        **LOCAL,
    )
    counts = {}
    for path in paths:
        for dtype, count in _read_header(path).items():
            counts[dtype] = counts.get(dtype, 0) + count
    size = sum(path.stat().st_size for path in paths)
    return part, class_name, sum(counts.values()), size, ", ".join(sorted(counts)) or "pickled: not opened"


def _read_header(path):
    """How many weights of each type a safetensors file has; nothing for an index or a .bin file."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error
    counts = {}
    for tensor in tensors:
        dtype = TYPES.get(tensor.get_dtype())
        if dtype is not None:
            counts[dtype] = counts.get(dtype, 0) + math.prod(tensor.get_shape())
    return counts


def _print_table(rows):
    totals = ("together", "", sum(row[2] for row in rows), sum(row[3] for row in rows), "")
    print(f"  {'part':17}{'class':27}{'parameters':>14}{'bytes':>15}  type")
    for part, class_name, parameters, size, types in [*rows, totals]:
        numbers = f"{parameters:>14,}{size:>15,}  {types}" if size else ""
        print(f"  {part:17}{class_name:27}{numbers}".rstrip())


def _picture_size(name, parts):
    """How large the pictures are that the U-Net was trained on, and what they are made of, in words."""
    size, factor = _config(name, "unet", "config.json").get("sample_size"), 1
    if "vae" in parts:
        factor = 2 ** (len(_config(name, "vae", "config.json").get("block_out_channels", [0])) - 1)
    height, width = size if isinstance(size, list) else (size, size)
    sizes = f"of {width * factor} x {height * factor} pixels" if size else "of any size"
    return f"pictures {sizes}, {'from' if 'text_encoder' in parts else 'without'} a text"


def _config(name, part, filename):
    return hub.read_json(name, filename, hub.part_subfolder(name, part, **LOCAL), **LOCAL)
