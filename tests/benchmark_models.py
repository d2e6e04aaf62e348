"""How long the networks take on a CPU, minidiff's plain and optimized beside diffusers': a Markdown table.

    python tests/benchmark_models.py [--tasks unet vae ddpm clip] [--dtypes float32 bfloat16] [--rounds 7]

Sizes are published ones: Stable Diffusion 1.5's U-Net on two latents of 32 x 32 with their texts, its decoder
from 32 x 32 to 256 x 256, the U-Net of google/ddpm-cat-256 at 128 x 128, CLIP-L on two prompts. Weights are
random and the same for all. One thread; contenders take turns (ABBA). A figure is the median over the rounds,
with the smallest and the largest, of the processor's time: on a machine that others use it tells more than
the clock. Beside it stands each result's distance from diffusers' in float64: a speed counts only at equal
accuracy. --compile adds torch.compile(mode="max-autotune") of diffusers' model, which takes minutes.
"""

import argparse
import copy
import statistics
from time import process_time

import diffusers
import torch
import transformers
from test_manifests import DATA

import minidiff

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pair(name, ours, theirs):
    """A model of ours and one of theirs, of a published part's size, with the same random weights."""
    config = DATA["files"][name]["config"]
    torch.manual_seed(0)
    model = ours.from_config(config).eval()
    if theirs is transformers.CLIPTextModel:
        twin = theirs(transformers.CLIPTextConfig(**config)).eval()
        weights = {key.removeprefix("text_model."): weight for key, weight in model.state_dict().items()}
    else:
        twin, weights = theirs.from_config(config).eval(), model.state_dict()
    twin.load_state_dict(weights, assign=True)  # shared: they are large
    return model, twin


def task(name):
    """(ours, theirs, their inputs in float64, a function that calls either with inputs)."""
    torch.manual_seed(1)
    if name == "unet":
        models = pair(
            "stable-diffusion-v1-5.unet", minidiff.UNet2DConditionModel, diffusers.UNet2DConditionModel
        )
        inputs = [torch.randn(2, 4, 32, 32), torch.randn(2, 77, 768)]
        return *models, inputs, lambda model, x, text: model(x, 500, text, return_dict=False)[0]
    if name == "vae":
        models = pair("stable-diffusion-v1-5.vae", minidiff.AutoencoderKL, diffusers.AutoencoderKL)
        return *models, [torch.randn(1, 4, 32, 32)], lambda model, z: model.decode(z, return_dict=False)[0]
    if name == "ddpm":
        models = pair("ddpm-cat-256.unet", minidiff.UNet2DModel, diffusers.UNet2DModel)
        return *models, [torch.randn(1, 3, 128, 128)], lambda model, x: model(x, 500, return_dict=False)[0]
    models = pair("stable-diffusion-v1-5.text_encoder", minidiff.CLIPTextModel, transformers.CLIPTextModel)
    return *models, [torch.randint(0, 49000, (2, 77))], lambda model, ids: model(ids)[0]


TASKS = {"unet": "U-Net step", "vae": "VAE decoding", "ddpm": "DDPM step", "clip": "text"}


def sharing(model):
    """A copy of model with the same weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def contenders(ours, theirs, compiled):
    """{name: model} of the models that can be had of these two."""
    found = {"diffusers": theirs}
    if not isinstance(theirs, transformers.CLIPTextModel):
        best = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
        if hasattr(best, "fuse_qkv_projections"):
            best.fuse_qkv_projections()
        found["diffusers, channels_last, fused"] = best
    if compiled:
        found["diffusers, max-autotune"] = torch.compile(sharing(theirs), mode="max-autotune")
    found["minidiff"] = ours
    found["minidiff, optimized"] = minidiff.optimize(sharing(ours))
    if ours.dtype == torch.float32 and not isinstance(theirs, transformers.CLIPTextModel):
        found["minidiff, optimized, Winograd"] = minidiff.optimize(sharing(ours), winograd=True)
    return found


def measure(models, call, inputs, exact, rounds):
    """{name: (distance from exact over its largest number, processor's seconds of each round)}."""
    found = {}
    for name, model in models.items():
        result = call(model, *inputs).double()  # warms up too: weights are packed, models compiled
        found[name] = (((result - exact).abs().max() / exact.abs().max()).item(), [])
    for number in range(rounds):
        for name in list(models)[:: 1 if number % 2 == 0 else -1]:
            start = process_time()
            call(models[name], *inputs)
            found[name][1].append(process_time() - start)
    return found


@torch.no_grad()
def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| what | type | whose | processor, s | diffusers' time over it | distance from float64 |")
    print("| --- | --- | --- | --- | ---: | ---: |")
    for name in args.tasks:
        ours, theirs, inputs, call = task(name)
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        exact = call(copy.deepcopy(theirs).double(), *wide)
        for dtype in sorted(args.dtypes, reverse=True):  # float32 first: what is rounded stays so
            given = [x.to(DTYPES[dtype]) if x.is_floating_point() else x for x in inputs]
            models = contenders(ours.to(DTYPES[dtype]), theirs.to(DTYPES[dtype]), args.compile)
            found = measure(models, call, given, exact, args.rounds)
            del models  # before the next type needs the memory
            base = statistics.median(found["diffusers"][1])
            for who, (distance, times) in found.items():
                middle = statistics.median(times)
                spread = f"{middle:.3f} ({min(times):.3f} to {max(times):.3f})"
                row = [TASKS[name], dtype, who, spread, f"{base / middle:.2f}", f"{distance:.1e}"]
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
