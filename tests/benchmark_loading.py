"""How long Stable Diffusion 1.5 takes to load, and how much memory, beside diffusers: a Markdown table.

    python tests/benchmark_loading.py FOLDER [--runs 7]

FOLDER is a whole checkpoint in diffusers' layout, such as a clone of stable-diffusion-v1-5; with --make it is
first written at full size with random weights, and a tokenizer of a few words. Every run is a fresh process,
and the libraries take turns; the first run of each warms the disk's cache and does not count. Times are
medians with the smallest and largest. Memory is the peak of what is resident beyond what was after the
imports, and "of which anonymous" what no file stands behind (Linux only): pages of a mapped file count in
the first number as soon as they are touched, although the system takes them back when it needs them. "load"
ends when from_pretrained returns; "use" after every page of every weight was read once. "processor" is the
time that the process's threads worked, which tells more where others use the machine.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

CODE = """
import json, os, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
library, dtype, folder = sys.argv[1:]
module = __import__(library)
if library == "diffusers":
    module.utils.logging.set_verbosity_error()
options = {"safety_checker": None, "requires_safety_checker": False} if library == "diffusers" else {}
pipeline, options["torch_dtype"] = module.StableDiffusionPipeline, getattr(torch, dtype)
# imports of parts are not part of loading them; those of diffusers came with its pipeline
[getattr(module, n) for n in ("UNet2DConditionModel", "AutoencoderKL", "PNDMScheduler")]
if library == "minidiff":
    module.CLIPTextModel, module.CLIPTokenizer
else:
    from transformers import CLIPTextModel, CLIPTokenizer

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

before, start, worked = status("VmRSS"), time.perf_counter(), sum(os.times()[:2])
pipe = pipeline.from_pretrained(folder, **options)
load, load_peak = time.perf_counter() - start, status("VmHWM") - before
worked = sum(os.times()[:2]) - worked
weights = [w for m in (pipe.unet, pipe.vae, pipe.text_encoder) for w in m.parameters()]
checksum = sum(w.detach().view(-1)[::512].double().abs().sum().item() for w in weights)
print(json.dumps({
    "load": load, "processor": worked, "load peak": load_peak, "use": time.perf_counter() - start,
    "use peak": status("VmHWM") - before, "anonymous": status("RssAnon"), "checksum": checksum,
    "weights": sum(w.numel() * w.element_size() for w in weights),
}))
"""


def run(library, dtype, folder):
    """What one fresh process measured."""
    command = [sys.executable, "-c", CODE, library, dtype, str(folder)]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def make(folder):
    """Writes a checkpoint of Stable Diffusion 1.5's size with random weights."""
    import torch
    from test_manifests import DATA
    from tiny_pipelines import write_stable_diffusion

    import minidiff

    write_stable_diffusion(folder)
    for part in ("unet", "vae", "text_encoder"):
        config = DATA["files"][f"stable-diffusion-v1-5.{part}"]["config"]
        name = config.get("_class_name") or config["architectures"][0]
        shutil.rmtree(folder / part)
        torch.manual_seed(0)
        getattr(minidiff, name).from_config(config).save_pretrained(folder / part)


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--make", action="store_true", help="write the folder first (4 GB)")
    args = parser.parse_args()
    if args.make:
        make(args.folder)
    whole = None
    print(
        "| type | library | load (s) | load, processor (s) | load + use (s) "
        "| peak of load | peak of use | of which anonymous |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for dtype in ("float32", "float16"):
        rows = {"minidiff": [], "diffusers": []}
        for _ in range(args.runs + 1):
            for library, measured in rows.items():
                measured.append(run(library, dtype, args.folder))
        assert len({f"{row['checksum']:.9g}" for measured in rows.values() for row in measured}) == 1, (
            "not the same weights"
        )
        whole = whole or rows["minidiff"][0]["weights"]  # in float32
        for library, measured in rows.items():
            print(f"| {dtype} | {library} | {_line(measured[1:], whole)} |", flush=True)


def _line(measured, whole):
    cells = []
    for key in ("load", "processor", "use"):
        times = [row[key] for row in measured]
        cells.append(f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})")
    for key in ("load peak", "use peak", "anonymous"):
        size = max(row[key] for row in measured)
        cells.append(f"{size / 2**20:,.0f} MiB, {size / whole:.2f} x")
    return " | ".join(cells)


if __name__ == "__main__":
    main()
