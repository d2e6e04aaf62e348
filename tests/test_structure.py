"""Level 0 of the parity pyramid: who imports whom, public names, cheap imports, how much one call runs."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minidiff

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minidiff"
KERNELS = ROOT / "kernels"
SKIPPED_FOLDERS = {".git", ".venv", "runs", "build", "dist", "__pycache__", ".ruff_cache", ".pytest_cache"}

# The core, from the lowest part to the highest: (parts of minidiff, other packages) that a part may import
# at the top of a module, besides itself and the standard library.
MAY_IMPORT = {
    "config": ((), ()),
    "boundary": ((), ("numpy",)),
    "pictures": (("boundary",), ("numpy", "PIL")),
    "arguments": (("boundary",), ("numpy",)),
    "numerics": ((), ("numpy",)),
    "schedulers": (("config", "boundary", "arguments", "numerics"), ("numpy",)),
    "sampling": (("config", "boundary", "schedulers"), ("numpy",)),
    "checkpoints": (("config",), ("torch", "safetensors")),
    "backends": ((), ("torch",)),
    "ops": (("backends",), ("torch",)),
    "models": (("config", "checkpoints", "backends", "ops"), ("torch", "tokenizers")),
    "pipelines": (
        (
            "config",
            "boundary",
            "pictures",
            "schedulers",
            "sampling",
            "checkpoints",
            "backends",
            "ops",
            "models",
        ),
        ("numpy", "torch", "tqdm"),
    ),
}
# Imports inside a function, each with its reason there.
MAY_IMPORT_LATE = {
    "boundary": ("PIL", "torch"),  # schedulers work without both; torch for its global generator
    "config": ("minidiff.checkpoints",),  # only to read one from a name
    "checkpoints": ("huggingface_hub",),  # half a second that nobody with a local folder needs
    "pipelines": ("minidiff.optimization",),  # outside the core; CUDA graphs
    "backends": ("minidiff_kernels",),  # Triton is absent on some systems
}
FEW_FILES_ALONE = {
    "huggingface_hub": ["checkpoints/hub.py"],
    "tokenizers": ["models/clip.py"],
    "PIL": ["boundary.py", "pictures.py"],  # pictures out, which every call makes; pictures in
}
PUBLIC = [
    *("CheckpointError", "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
    *("LCMScheduler", "TCDScheduler", "DDIMInverseScheduler", "IPNDMScheduler"),
    *("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "EDMEulerScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "EDMDPMSolverMultistepScheduler"),
    *("UNet2DModel", "UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection"),
    *("CLIPTokenizer", "DiffusionPipeline", "DDPMPipeline", "DDIMPipeline", "StableDiffusionPipeline"),
    *("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionXLPipeline"),
    *("AutoPipelineForText2Image", "AutoPipelineForImage2Image", "AutoPipelineForInpainting"),
    *("compose", "compose_guidance", "interpolate", "invert", "invert_ddim", "reconstruct", "slerp"),
    "optimize",
]


def modules(folder):
    """{dotted name: path} of all modules below folder, which is a package."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules(PACKAGE)


def imports(path):
    """(name, whether in a function) of each import; `from a import b` is a.b if that is our module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in whole]
        else:
            continue
        yield from ((name, id(node) in late) for name in names)


def part_of(module):
    """minidiff.schedulers.ddim -> schedulers; minidiff itself -> the empty string."""
    return module.split(".")[1] if "." in module else ""


def core_imports():
    """(importing module, its part, imported name, whether inside a function) for all of the core."""
    for module, path in MODULES.items():
        if part_of(module) in MAY_IMPORT:
            yield from ((module, part_of(module), name, late) for name, late in imports(path))


def test_the_core_imports_downwards_only():
    wrong = []
    for module, part, name, late in core_imports():
        inside, outside = MAY_IMPORT[part]
        top = name.split(".")[0]
        if late and name.startswith(MAY_IMPORT_LATE.get(part, ())):
            continue
        if top == "minidiff":
            right = part_of(name) in (
                "",
                part,
                *inside,
            )  # minidiff itself imports nothing when it is imported
        else:
            right = not late and (top in sys.stdlib_module_names or top in outside)
        if not right:
            wrong.append(f"{module} imports {name}{' inside a function' if late else ''}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("package", "files"), FEW_FILES_ALONE.items())
def test_few_files_of_the_core_alone_use(package, files):
    users = {MODULES[module] for module, _, name, _ in core_imports() if name.split(".")[0] == package}
    assert users <= {PACKAGE / file for file in files}


def test_no_module_imports_itself_in_a_circle():
    below = {
        m: {name for name, late in imports(p) if name in MODULES and not late} for m, p in MODULES.items()
    }
    below = {m: names - {m, "minidiff"} for m, names in below.items()}
    while free := [m for m, names in below.items() if not names]:
        below = {m: names.difference(free) for m, names in below.items() if m not in free}
    assert not below, f"these import each other: {', '.join(below)}"


def test_the_package_imports_nothing_when_it_is_imported():
    assert [name for name, _ in imports(PACKAGE / "__init__.py")] == ["importlib"]


@pytest.mark.parametrize("folder", [PACKAGE, KERNELS / "minidiff_kernels"], ids=lambda folder: folder.name)
def test_the_oracles_are_imported_by_tests_and_benchmarks_only(folder):
    for path in folder.rglob("*.py"):
        found = {name.split(".")[0] for name, _ in imports(path)} & {"diffusers", "transformers"}
        assert not found, f"{path} imports {found}"


def test_kernels_import_nothing_from_minidiff():
    for path in (KERNELS / "minidiff_kernels").rglob("*.py"):
        assert "minidiff" not in {name.split(".")[0] for name, _ in imports(path)}, path


@pytest.mark.parametrize(("part", "text"), [("ops", "nn.Module"), ("checkpoints", "strict=False")])
def test_a_part_does_not_do_anothers_work(part, text):
    for module, path in MODULES.items():
        assert part_of(module) != part or text not in path.read_text(encoding="utf-8"), path


def test_the_name_kernels_yields_to_an_installed_package(tmp_path):
    assert not (KERNELS / "__init__.py").exists()
    installed = tmp_path / "kernels"
    installed.mkdir()
    (installed / "__init__.py").write_text("here = 'installed'\n")
    ours = tmp_path / "checkout"  # earlier on the path, as in a checkout's own folder
    (ours / "kernels" / "minidiff_kernels").mkdir(parents=True)
    code = (
        f"import sys; sys.path[:0] = [{str(ours)!r}, {str(tmp_path)!r}]; import kernels; print(kernels.here)"
    )
    assert run_python(code) == "installed"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_comes_from_the_top(name):
    assert name in minidiff.__all__ and name in dir(minidiff)
    assert getattr(minidiff, name).__name__ == name


def test_every_listed_name_is_there():
    for module in ("minidiff", "minidiff.schedulers", "minidiff.models", "minidiff.pipelines"):
        module = importlib.import_module(module)
        for name in module.__all__:
            assert getattr(module, name) is not None


@pytest.mark.parametrize("module", ["minidiff", "minidiff.models"])
def test_an_unknown_name_is_refused_with_the_known_ones(module):
    with pytest.raises(AttributeError, match=r"'NoSuchScheduler'; it exports .*UNet2DModel"):
        importlib.import_module(module).NoSuchScheduler  # noqa: B018


def run_python(code):
    """What a fresh interpreter, started in the root, prints for the code."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WITHOUT_TORCH = """
import sys
for name in ("torch", "PIL", "tokenizers", "safetensors", "huggingface_hub", "tqdm"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np
import minidiff, minidiff.schedulers
from minidiff.sampling import sample
for name in minidiff.schedulers.__all__:
    scheduler = getattr(minidiff, name)(num_train_timesteps=100)
    scheduler.set_timesteps(5)
    start = np.random.default_rng(0).standard_normal((2, 3, 8, 6), np.float32)
    for step in sample(lambda x, t: 0.1 * x, start, scheduler, generator=np.random.default_rng(0)):
        assert step.latents.dtype == np.float32 and np.isfinite(step.latents).all(), name
print("sampled", len(minidiff.schedulers.__all__))
"""


def test_schedulers_sample_where_torch_is_not_installed():
    assert run_python(WITHOUT_TORCH) == f"sampled {len(minidiff.schedulers.__all__)}"


@pytest.mark.parametrize("module", ["minidiff", "minidiff.schedulers", "minidiff.sampling", "minidiff.cli"])
def test_importing_it_imports_nothing_heavy(module):
    heavy = {"torch", "PIL", "tokenizers", "huggingface_hub", "triton", "tqdm"}
    loaded = run_python(f"import sys, {module}; print(*sys.modules)").split()
    assert not heavy & set(loaded)


def test_importing_the_schedulers_takes_a_moment():
    clock = "time.process_time()"  # not the wall clock: others may be using the machine
    code = f"import time; start = {clock}; import minidiff.schedulers; print({clock} - start)"
    fastest = min(float(run_python(code)) for _ in range(3))
    assert fastest <= 0.3, f"{fastest:.2f} s"


def text_files():
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [f for f in subfolders if f not in SKIPPED_FOLDERS and not f.endswith(".egg-info")]
        for path in (Path(folder, name) for name in names):
            if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".ipynb", ".sh", ""):
                yield path


def test_no_file_names_a_place_of_one_machine():
    place = re.compile(r"(?<![\w.~-])/(work|tmp|home|root|Users)/\w|/opt/(venv|wheels)|site-packages/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in text_files()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if place.search(line)
    ]
    assert not found, "\n".join(found)


def test_every_module_says_what_it_is_for():
    for path in MODULES.values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not tree.body or ast.get_docstring(tree), f"{path} has no docstring"


def tiny_pipeline():
    """A StableDiffusionPipeline with all the kinds of blocks that `scenes` has, and random weights."""
    torch.manual_seed(0)
    vae = minidiff.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    unet = minidiff.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    tokenizer = byte_tokenizer()
    text_encoder = minidiff.CLIPTextModel(
        vocab_size=tokenizer.vocab_size,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    return minidiff.StableDiffusionPipeline(
        vae.eval(), text_encoder.eval(), tokenizer, unet.eval(), minidiff.PNDMScheduler(skip_prk_steps=True)
    )


def byte_tokenizer():
    """A CLIPTokenizer without merges: the symbols of the 256 bytes, inside and at the end of a word."""
    printable = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # GPT-2's table; other bytes come behind it
    symbols = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return minidiff.CLIPTokenizer({token: number for number, token in enumerate(tokens)}, [])


def functions_run(call):
    """{(file, first line)} of minidiff's functions that run during call()."""
    seen = set()

    def profile(frame, event, _):
        code = frame.f_code
        if (
            event == "call" and code.co_flags & 0x2 and code.co_filename.startswith(str(PACKAGE))
        ):  # a function's body
            seen.add((code.co_filename, code.co_firstlineno))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def test_one_call_is_read_in_ten_files_and_2500_lines():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    seen = functions_run(lambda: pipe("a red cube", num_inference_steps=2))
    lines = {
        Path(file).relative_to(PACKAGE).as_posix(): len(Path(file).read_text(encoding="utf-8").splitlines())
        for file, _ in seen
    }
    report = f"{len(lines)} files, {sum(lines.values())} lines, {len(seen)} functions: {lines}"
    print(report)
    assert {"pipelines/stable_diffusion.py", "models/unet.py", "sampling.py", "ops.py"} <= set(lines), report
    assert len(lines) <= 10 and sum(lines.values()) <= 2500, report
