"""`minidiff info`: what a checkpoint is, what it holds and what is unusual, from configs and headers.

Of weight files it reads the headers alone, so it answers at once for one of many gigabytes. Read `run`, then
`kind_of` (what the checkpoint is) and UNUSUAL, a table of questions to one part.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from minidiff.checkpoints import headers, hub, keys, kinds, layout, ldm

LOCAL = {"local_files_only": True}  # a look at a repository must not fetch gigabytes
WEIGHTS_NAMES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
# how the classes of parts without weights end
WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "Extractor")
NOT_USED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that minidiff leaves out
TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}  # of weights, not of counters
SCHEDULER_KEYS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
TEXT = """Shows what a checkpoint is, its parts, the scheduler's settings, and what is unusual about it.
Of weight files it reads only the headers."""
EXAMPLES = """examples:
  minidiff info scenes
  minidiff info ./my-checkpoint --variant fp16
  minidiff info v1-5-pruned-emaonly.safetensors"""


@dataclass
class Part:
    """A part of a checkpoint: its class, config, files of weights and, where they tell, their tensors."""

    name: str
    class_name: str
    config: dict = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    tensors: dict[str, headers.Entry] = field(default_factory=dict)
    place: str | None = None  # the folder that it lies in; None: the checkpoint's own

    @property
    def counts(self) -> dict[str, int]:
        """How many weights there are of each type."""
        counts = {}
        for entry in self.tensors.values():
            if entry.dtype in TYPES:
                dtype = TYPES[entry.dtype]
                counts[dtype] = counts.get(dtype, 0) + entry.size
        return counts

    @property
    def pickled(self) -> bool:
        """Whether the weights are in a .bin file."""
        return any(path.suffix == ".bin" for path in self.files)


def add_arguments(parser):
    """The arguments of `minidiff info`."""
    parser.description, parser.epilog = TEXT, EXAMPLES
    known = "scenes, scenes-ddpm, a folder, a single file, or a repository that was downloaded before"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=known)
    parser.add_argument("--variant", metavar="NAME", help="of the weight files, such as fp16")


def run(args):
    """Prints the kind of a checkpoint, its parts with their sizes, the scheduler, and what is unusual."""
    if Path(args.checkpoint).expanduser().is_file():
        return _run_single(Path(args.checkpoint).expanduser())
    name = args.checkpoint
    index = hub.read_json(name, "model_index.json", **LOCAL)
    parts = {
        part: _part(name, part, *entry, args.variant) for part, entry in index.items() if _is_part(entry)
    }
    print(f"{name}: {kind_of(parts)} ({index.get('_class_name')})")
    _print_table(parts.values())
    if "unet" in parts:
        print(f"  draws {_picture_size(parts)}")
    if "scheduler" in parts:
        config = parts["scheduler"].config
        settings = (f"{key} {config[key]}" for key in SCHEDULER_KEYS if key in config)
        print(f"  {parts['scheduler'].class_name}: {', '.join(settings)}")
    _print_unusual([sentence for part in parts.values() for sentence in unusual(part)])


def _run_single(path):
    """The same for a file that holds all parts, in the original layout."""
    if path.suffix != ".safetensors":
        with path.open("rb") as file:
            if not file.read(2).startswith((b"PK", b"\x80")):  # torch.save writes zip files; before, pickles
                raise ValueError(f"{path} is neither a .safetensors file nor one of torch.save")
        print(f"{path}: pickled: not opened; minidiff convert reads it, and runs nothing that it may hold")
        return
    tensors = headers.read_header(path)
    kind = kinds.recognise({name: entry.shape for name, entry in tensors.items()}, path)
    parts = {}
    for name, entry in tensors.items():
        part = next((part for prefix, part, _ in ldm.PREFIXES if name.startswith(prefix)), None)
        part = part or ("averages (EMA)" if name.startswith(ldm.EMA) else "the rest")
        parts.setdefault(part, Part(part, "")).tensors[name] = entry
    print(f"{path}: {kind.title}, as a single file")
    _print_table([parts[name] for name in sorted(parts)], path.stat().st_size)
    sentences = [f"{part.name}: {_unaligned(part)}" for part in parts.values() if _unaligned(part)]
    if kind is kinds.SD2_V:
        sentences.append("unet: no tensor says whether it predicts v (768 x 768) or noise (512 x 512, base)")
    if "averages (EMA)" in parts:
        sentences.append("unet: stored twice, as trained and averaged; extract_ema=True takes the averages")
    _print_unusual(sentences)


def kind_of(parts) -> str:
    """What a checkpoint is, in words, from {name: Part}."""
    unet = parts.get("unet")
    if unet is None:
        return "no U-Net, so no pictures"
    if unet.class_name == "UNet2DModel":
        return "DDPM, pictures without a text"
    config, scheduler = unet.config, parts["scheduler"].config if "scheduler" in parts else {}
    sizes = _number(config.get("cross_attention_dim", 1280)), _number(config.get("in_channels", 4))
    base = kinds.KINDS.get(sizes)
    title = base.title if base else kinds.NOT_HERE.get(sizes, f"a U-Net for texts of {sizes[0]} channels")
    if base and _number(config.get("block_out_channels", 320), at=0) != 320:
        title = f"of its own sizes, in the manner of {title}"
    if config.get("time_cond_proj_dim") is not None:
        return f"{title}, a latent consistency model (LCM): about 4 steps; guidance is an input"
    if scheduler.get("timestep_spacing") == "trailing" and base in (kinds.SD2_V, kinds.SDXL):
        return f"{base.title} turbo: 1 to 4 steps, guidance_scale=0"
    if base is kinds.SD2_V:
        of_v = scheduler.get("prediction_type") == "v_prediction"
        return "Stable Diffusion 2, v-prediction" if of_v else kinds.SD2_BASE.title
    return title + (", v-prediction" if scheduler.get("prediction_type") == "v_prediction" else "")


def unusual(part) -> list[str]:
    """What a reader of this part should know, in sentences."""
    found = (ask(part) for asked, ask in UNUSUAL if asked is None or part.name.startswith(asked))
    return [f"{part.name}: {sentence}" for sentence in found if sentence]


def _older_names(part):
    old = [n for n in part.tensors if any(re.fullmatch(p, n) for p, _ in keys.OLD_ATTENTION)]
    return (
        old and f"{len(old)} attention tensors have the names of 2022 (query, key, value, proj_attn): renamed"
    )


def _short_names(part):
    short = part.tensors and not any(name.startswith("text_model.") for name in part.tensors)
    return short and "its tensors lack the prefix text_model. (transformers 5 leaves it out): added"


def _stored_positions(part):
    stored = [name for name in part.tensors if any(re.fullmatch(pattern, name) for pattern in keys.DROPPED)]
    return stored and f"{stored[0]} is stored, a constant: ignored"


def _unaligned(part):
    count = sum(not entry.aligned for entry in part.tensors.values())
    return count and (f"{count} of {len(part.tensors)} tensors lie where their type can't be mapped: "
                      "they are copied when they are loaded")  # fmt: skip


def _pickles(part):
    return part.pickled and (f"{part.files[-1].name} is a pickle: minidiff reads tensors from it and runs "
                             "nothing; others may")  # fmt: skip


def _only_pickled(part):
    """Files of another variant beside a pickle."""
    if not part.pickled:
        return None
    others = [p.name for p in part.files[0].parent.glob("*.safetensors")]
    return others and f"as safetensors there are only {', '.join(sorted(others)[:3])}: see --variant"


def _shards(part):
    return len(part.files) > 1 and f"in {len(part.files) - 1} files behind an index"


def _types(part):
    counts = part.counts
    return len(counts) > 1 and f"several types in one part: {', '.join(sorted(counts))}"


def _other_type(part):
    said = part.config.get("torch_dtype") or part.config.get("dtype")
    return said and part.counts and said not in part.counts and (
        f"its config says {said}, its weights are {', '.join(sorted(part.counts))}, which counts"
    )  # fmt: skip


def _no_scaling_factor(part):
    return "scaling_factor" not in part.config and "its config has no scaling_factor: 0.18215, as in 2022"


def _overflows(part):
    xl = part.config.get("scaling_factor") == 0.13025 and part.config.get("force_upcast", True)
    return xl and "it overflows in float16: decode in float32 (force_upcast)"


def _own_folder(part):
    return (part.files or part.config) and part.place is None and "in the checkpoint's own folder, as in 2022"


def _left_out(part):
    return f"left out; minidiff has no {part.class_name}"


def _steps_offset(part):
    if part.class_name not in ("PNDMScheduler", "DDIMScheduler") or "steps_offset" in part.config:
        return None
    of_latents = part.config.get("beta_schedule") == "scaled_linear"
    return of_latents and "its config has no steps_offset; Stable Diffusion's pipelines take 1"


UNUSUAL = (  # (how the names of parts begin that are asked, None for all; the question)
    (None, _own_folder),
    (None, _pickles),
    (None, _only_pickled),
    (None, _shards),
    (None, _unaligned),
    (None, _types),
    (None, _other_type),
    ("unet", _older_names),
    ("vae", _older_names),
    ("vae", _no_scaling_factor),
    ("vae", _overflows),
    ("text_encoder", _short_names),
    ("text_encoder", _stored_positions),
    ("scheduler", _steps_offset),
    ("safety_checker", _left_out),
    ("image_encoder", _left_out),
)


def _is_part(entry):
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)


def _part(name, part, library, class_name, variant):
    """One part with what its config and the headers of its weight files say."""
    made = Part(part, class_name)
    if part in NOT_USED:
        return made
    made.place = hub.part_subfolder(name, part, **LOCAL)
    if class_name.endswith("Scheduler"):
        made.config = hub.read_json(name, "scheduler_config.json", made.place, **LOCAL)
    if class_name.endswith(WITHOUT_WEIGHTS) or library not in WEIGHTS_NAMES:
        return made
    made.config = hub.read_json(name, "config.json", made.place, **LOCAL)

    def choose(names, where):
        return layout.pick_weights(names, where, WEIGHTS_NAMES[library], variant)

    made.files = hub.resolve(name, choose, made.place, **LOCAL)
    for path in made.files:
        if path.suffix == ".safetensors":
            made.tensors |= headers.read_header(path)
    return made


def _print_table(parts, size=None):
    """One line per part, then all together; size: of the file that holds them all."""
    rows = [(p.name, p.class_name, sum(p.counts.values()), _size(p), _types_of(p)) for p in parts]
    total = sum(row[3] for row in rows) if size is None else size
    print(f"  {'part':19}{'class':27}{'parameters':>14}{'bytes':>15}  type")
    for name, class_name, count, number, types in [
        *rows,
        ("together", "", sum(r[2] for r in rows), total, ""),
    ]:
        numbers = f"{count:>14,}{number:>15,}  {types}" if number else ""
        print(f"  {name:19}{class_name:27}{numbers}".rstrip())


def _size(part):
    """The bytes of a part's files, or of its tensors where it has no file for itself."""
    if part.files:
        return sum(path.stat().st_size for path in part.files)
    return sum(entry.end - entry.start for entry in part.tensors.values())


def _types_of(part):
    return ", ".join(sorted(part.counts)) or ("pickled: not opened" if part.pickled else "")


def _print_unusual(sentences):
    if sentences:
        print("  unusual:")
    for sentence in sentences:
        print(f"    {sentence}")


def _picture_size(parts):
    """How large the pictures are that the U-Net was trained on, and what they are made of, in words."""
    size, factor = parts["unet"].config.get("sample_size"), 1
    if "vae" in parts:
        channels = parts["vae"].config.get("block_out_channels", [0])
        factor = 2 ** (len(channels) - 1) if isinstance(channels, list) else 1
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    known = isinstance(height, int) and isinstance(width, int)
    sizes = f"of {width * factor} x {height * factor} pixels" if known else "of any size"
    return f"pictures {sizes}, {'from' if 'text_encoder' in parts else 'without'} a text"


def _number(value, at=-1):
    """A whole number, or that of a list of one per level; None for anything else."""
    value = value[at] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else None
