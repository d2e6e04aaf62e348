"""A step of the U-Net, a decoding and a whole picture, at Stable Diffusion 1.5's size, beside diffusers.

`python kernels/benchmarks/models.py [--results FOLDER]` writes models.jsonl and models.md into
FOLDER/<device>. Weights are random and the same for all. Contenders take turns (ABBA); before they are timed,
our float16 latents after 25 steps must be no further from a float32 run of diffusers than diffusers' own
float16 ones, over four prompts. Without a GPU it ends with 2; `--dry-run` runs a tiny model on a CPU, in
float32, once, without times.
"""

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import diffusers
import torch
from minidiff_kernels import benchmarks, measuring

import minidiff
from minidiff.checkpoints import vocabulary

diffusers.utils.logging.disable_progress_bar()
STEPS = 25
PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a red cube",
    "",
    "a lighthouse in a storm, oil on canvas",
)
ROUNDS = 10
FULL = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "vae": {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "text": {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406},
}  # fmt: skip
TINY = {
    "unet": {
        "sample_size": 8, "cross_attention_dim": 32, "block_out_channels": (16, 32), "norm_num_groups": 8,
        "layers_per_block": 1, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "vae": {
        "block_out_channels": (16, 32), "norm_num_groups": 8, "sample_size": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "text": FULL["text"] | {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    },
}  # fmt: skip


def write_checkpoint(folder, sizes):
    """A pipeline with random weights, in float32, which minidiff and diffusers can load."""
    torch.manual_seed(0)
    pipe = minidiff.StableDiffusionPipeline(
        minidiff.AutoencoderKL(**sizes["vae"]),
        minidiff.CLIPTextModel(**sizes["text"]),
        minidiff.CLIPTokenizer(**vocabulary.clip("<|endoftext|>")),
        minidiff.UNet2DConditionModel(**sizes["unet"]),
        minidiff.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
        ),
    )
    pipe.save_pretrained(folder)


def load(library, folder, device, dtype):
    """The pipeline of minidiff or diffusers, without a progress bar."""
    options = {"torch_dtype": dtype} | ({"safety_checker": None} if library is diffusers else {})
    pipe = library.StableDiffusionPipeline.from_pretrained(folder, **options).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def contenders(folder, device, dtype, compiled: bool) -> dict:
    """{name: pipeline}; compiled: also those that compile for minutes, and our CUDA graph."""
    found = {
        "minidiff": load(minidiff, folder, device, dtype),
        "diffusers": load(diffusers, folder, device, dtype),
    }
    fused = found["diffusers, channels_last, fused QKV"] = load(diffusers, folder, device, dtype)
    for model in (fused.unet, fused.vae):
        model.to(memory_format=torch.channels_last)
    fused.fuse_qkv_projections()
    if compiled:
        best = found["diffusers, max-autotune"] = load(diffusers, folder, device, dtype)
        for model in (best.unet, best.vae):
            model.to(memory_format=torch.channels_last)
        best.unet = torch.compile(best.unet, mode="max-autotune", fullgraph=True)
        best.vae.decode = torch.compile(best.vae.decode, mode="max-autotune", fullgraph=True)
        ours = found["minidiff, compiled"] = load(minidiff, folder, device, dtype)
        ours.vae.to(memory_format=torch.channels_last)
        ours.compile()
    return found


def latents_of(pipe, prompt, steps):
    """The latents after all steps, float64 on the CPU; noise depends on the prompt alone."""
    generator = torch.Generator().manual_seed(len(prompt))
    result = pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent")
    return torch.as_tensor(result.images).double().cpu()


def gate(exact, theirs, ours, steps) -> str | None:
    """Why our pictures must not be timed; None if they are as near to the exact ones as diffusers' own."""
    ratios = []
    for prompt in PROMPTS:
        right = latents_of(exact, prompt, steps)
        distances = [
            (latents_of(pipe, prompt, steps) - right).norm() / right.norm() for pipe in (ours, theirs)
        ]
        ratios.append((distances[0] / distances[1].clamp(min=1e-6)).item())
        print(f"{prompt!r}: {distances[0]:.2e} from float32, diffusers {distances[1]:.2e}")
    if measuring.median(ratios)[0] > 1 or max(ratios) > 1.25:
        return (
            f"our latents are {', '.join(f'{ratio:.2f}' for ratio in ratios)} times as far away as diffusers'"
        )
    return None


@torch.no_grad()
def tasks(pipe, sizes, device, dtype, steps) -> dict:
    """{what: function}: a step of two rows, a decoding, a picture from its prompt to uint8."""
    side, text = sizes["unet"]["sample_size"], sizes["unet"]["cross_attention_dim"]
    latents = torch.randn(2, 4, side, side, device=device, dtype=dtype)
    embeds = torch.randn(2, 77, text, device=device, dtype=dtype)
    t = torch.tensor([500.0, 500.0], device=device)
    draw = partial(pipe, PROMPTS[0], num_inference_steps=steps)
    return {
        "U-Net step, 2 rows": torch.no_grad()(lambda: pipe.unet(latents, t, embeds, return_dict=False)[0]),
        "VAE decode": torch.no_grad()(lambda: pipe.vae.decode(latents[:1], return_dict=False)[0]),
        f"picture, {steps} steps": lambda: draw(generator=torch.Generator().manual_seed(0)).images[0],
    }


def milliseconds(function) -> float:
    """The time of one call, from an idle GPU to an idle GPU, as a caller meets it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(pipes, sizes, device, dtype) -> list[dict]:
    """A row of figures for each task, contenders in turns after a warm-up."""
    work = {name: tasks(pipe, sizes, device, dtype, STEPS) for name, pipe in pipes.items()}
    rows = []
    for what in work["minidiff"]:
        for name in work:
            for _ in range(3):
                work[name][what]()
        times = {name: [] for name in work}
        for name in measuring.turns(list(work), ROUNDS):
            times[name].append(milliseconds(work[name][what]))
        figures = {}
        for name, values in times.items():
            middle, low, high = measuring.median(values)
            figures[name] = {"median": middle, "low": low, "high": high, "best": min(values)}
        rows.append({"task": what, "times": figures})
        print(what, {name: f"{figure['median']:.2f} ms" for name, figure in figures.items()}, flush=True)
    return rows


def table(rows) -> str:
    """A Markdown table: a line for each task and contender, in milliseconds."""
    lines = ["| task | contender | ms | quartiles | best |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        for name, time_ in row["times"].items():
            spread = f"{time_['low']:.2f}–{time_['high']:.2f}"
            lines.append(
                f"| {row['task']} | {name} | {time_['median']:.2f} | {spread} | {time_['best']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def write(folder, rows, about):
    """Writes models.jsonl and models.md."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(about | row, ensure_ascii=False) for row in rows)
    (folder / "models.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = "\n".join(f"- {name}: {value}" for name, value in about.items())
    text = f"# Stable Diffusion 1.5's size on {about['device']}\n\n{facts}\n\n{table(rows)}"
    (folder / "models.md").write_text(text, encoding="utf-8")


def main(argv=None) -> int:
    """The command; returns its exit status: 1 for latents that are off, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=benchmarks.RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on a CPU, without times")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print("nothing is measured: there is no GPU here; --dry-run tests the code", file=sys.stderr)
        return 2
    device, dtype, sizes = ("cpu", torch.float32, TINY) if options.dry_run else ("cuda", torch.float16, FULL)
    steps = 2 if options.dry_run else STEPS
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, sizes)
        pipes = contenders(folder, device, dtype, compiled=not options.dry_run)
        exact = load(diffusers, folder, device, torch.float32)
    wrong = [line for name in pipes if name.startswith("minidiff")
             if (line := gate(exact, pipes["diffusers"], pipes[name], steps))]  # fmt: skip
    del exact
    if wrong:
        print(f"NOT TIMED: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    if options.dry_run:
        for name, pipe in pipes.items():
            sizes_of = [
                what for what, run in tasks(pipe, sizes, device, dtype, steps).items() if run() is not None
            ]
            print(f"{name}: {', '.join(sizes_of)} run")
        return 0
    facts = benchmarks.about()
    rows = measure(pipes, sizes, device, dtype)
    facts["clocks after"] = measuring.clocks()
    write(
        options.results / facts["device"].replace(" ", "-"), rows, facts | {"dtype": "fp16", "steps": STEPS}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
