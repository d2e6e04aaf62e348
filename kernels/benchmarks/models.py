"""A step of the U-Net, a decoding and a whole picture, at Stable Diffusion 1.5's size, beside diffusers.

`python kernels/benchmarks/models.py [--minutes 9] [--results FOLDER]` adds lines to
FOLDER/<device>/models.jsonl as it goes, writes models.md beside them, and goes on where an earlier call
ended. Weights are random and the same for all. Contenders take turns (ABBA); before they are timed, our
float16 latents after 25 steps must be no further from a float32 run of diffusers than diffusers' own float16
ones, over four prompts. torch.compile's most thorough mode, which compiles for minutes, comes last, in turns
with our CUDA graph; models.md says what is missing. Without a GPU it ends with 2; `--dry-run` goes the same
way with a tiny model on a CPU, in float32, where nothing is compiled and no figure is kept.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import diffusers
import torch
from minidiff_kernels import benchmarks, measuring, reports, verdict

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


def contenders(folder, device, dtype) -> dict:
    """{name: pipeline} of those that need no compiler, and ours with its CUDA graph."""
    found = {name: load(library, folder, device, dtype)
             for name, library in (("minidiff", minidiff), (verdict.EAGER, diffusers))}  # fmt: skip
    fused = found["diffusers, channels_last, fused QKV"] = load(diffusers, folder, device, dtype)
    ours = found[verdict.OURS] = load(minidiff, folder, device, dtype)
    for model in (fused.unet, fused.vae, ours.vae):
        model.to(memory_format=torch.channels_last)
    fused.fuse_qkv_projections()
    if device == "cuda":
        ours.compile()
    return found


def tuned(folder, device, dtype):
    """diffusers' pipeline, compiled as thoroughly as torch can; it compiles at its first calls."""
    pipe = load(diffusers, folder, device, dtype)
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=torch.channels_last)
    if device == "cuda":
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune", fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune", fullgraph=True)
    return pipe


def latents_of(pipe, prompt, steps):
    """The latents after all steps, float64 on the CPU; noise depends on the prompt alone."""
    generator = torch.Generator().manual_seed(len(prompt))
    result = pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent")
    return torch.as_tensor(result.images).double().cpu()


def distances(exact, theirs, pipes, steps) -> list[dict]:
    """How far each of pipes is from exact's latents, over theirs' distance: median and worst of prompts."""
    found = {name: [] for name in pipes}
    for prompt in PROMPTS:
        right = latents_of(exact, prompt, steps)
        theirs_off = (latents_of(theirs, prompt, steps) - right).norm() / right.norm()
        for name, pipe in pipes.items():
            ours_off = (latents_of(pipe, prompt, steps) - right).norm() / right.norm()
            found[name].append((ours_off / theirs_off.clamp(min=1e-6)).item())
            print(f"{prompt!r}: {name} {ours_off:.2e} from float32, diffusers {theirs_off:.2e}", flush=True)
    return [{"task": verdict.LATENTS, "name": name, "ratios": ratios, "worst": max(ratios),
             "median": measuring.median(ratios)[0]} for name, ratios in found.items()]  # fmt: skip


def gate(row) -> str | None:
    """Why a pipeline must not be timed; None if its latents are as near to the exact as diffusers' own."""
    if row["median"] > 1 or row["worst"] > 1.25:
        times = ", ".join(f"{ratio:.2f}" for ratio in row["ratios"])
        return f"latents of {row['name']} are {times} times as far away as diffusers'"
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
        verdict.STEP: torch.no_grad()(lambda: pipe.unet(latents, t, embeds, return_dict=False)[0]),
        "VAE decode": torch.no_grad()(lambda: pipe.vae.decode(latents[:1], return_dict=False)[0]),
        f"picture, {steps} steps": lambda: draw(generator=torch.Generator().manual_seed(0)).images[0],
    }


def milliseconds(function) -> float:
    """The time of one call, from an idle GPU to an idle GPU, as a caller meets it."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    start = time.perf_counter()
    function()
    wait()
    return 1e3 * (time.perf_counter() - start)


def measure(work, what, rounds) -> dict:
    """The figures of one task, contenders in turns after a warm-up; work: {contender: its tasks}."""
    for name in work:
        for _ in range(min(rounds, 3)):
            work[name][what]()
    times = {name: [] for name in work}
    for name in measuring.turns(list(work), rounds):
        times[name].append(milliseconds(work[name][what]))
    return {"task": what, "times": measuring.summary(times)}


def table(rows) -> str:
    """A Markdown table: a line for each task and contender, in milliseconds; those in turns together."""
    lines = ["| task | contender | ms | quartiles | best |", "| --- | --- | --- | --- | --- |"]
    for row in (row for row in rows if "times" in row):
        for name, time_ in row["times"].items():
            spread = f"{time_['low']:.2f}–{time_['high']:.2f}"
            lines.append(
                f"| {row['task']} | {name} | {time_['median']:.2f} | {spread} | {time_['best']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def write(folder, missing):
    """Writes models.md from folder's models.jsonl; missing: what was not measured."""
    rows = reports.read(folder / "models.jsonl")
    text = f"# Stable Diffusion 1.5's size on {rows[-1]['device']}\n\n{reports.facts_of(rows[-1])}\n"
    text += table(rows)
    for row in (row for row in rows if row["task"] == verdict.LATENTS):
        text += (f"\nLatents of {row['name']}: {row['median']:.2f} times as far from float32 as diffusers' "
                 f"own (median of prompts), {row['worst']:.2f} times at worst.\n")  # fmt: skip
    text += f"\nNot measured: {'; '.join(missing)}.\n" if missing else ""
    (folder / "models.md").write_text(text, encoding="utf-8")


def run(folder, results, minutes, facts, sizes, device, dtype, steps, rounds) -> int:
    """Measures what is not yet in results: latents, tasks, then the tasks beside torch.compile."""
    torch.backends.cudnn.allow_tf32 = False  # else float32, which ours is held against, has 10 bits
    end = time.monotonic() + 60 * minutes
    path = results / "models.jsonl"
    known = reports.read(path, facts)
    pipes = contenders(folder, device, dtype)
    checked = [row for row in known if row["task"] == verdict.LATENTS]
    if not checked:
        exact = load(diffusers, folder, device, torch.float32)
        ours = {name: pipes[name] for name in ("minidiff", verdict.OURS)}
        checked = distances(exact, pipes[verdict.EAGER], ours, steps)
        reports.append(path, [facts | row for row in checked])
        del exact
    if wrong := [line for row in checked if (line := gate(row))]:
        print(f"NOT TIMED: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    done = {(row["task"], tuple(row["times"])) for row in known if "times" in row}
    beside = {verdict.OURS: pipes[verdict.OURS], verdict.TUNED: None}  # compiled when its turn comes
    names = list(tasks(pipes["minidiff"], sizes, device, dtype, steps))
    left = [(what, group) for group in (pipes, beside) for what in names if (what, tuple(group)) not in done]
    while left and time.monotonic() < end:
        what, group = left.pop(0)
        if verdict.TUNED in group:
            group[verdict.TUNED] = group[verdict.TUNED] or tuned(folder, device, dtype)
        work = {name: tasks(pipe, sizes, device, dtype, steps) for name, pipe in group.items()}
        row = measure(work, what, rounds)
        reports.append(path, [facts | row])
        write(results, [f"{what}, {' beside '.join(group)}" for what, group in left])
        print(table([row]), flush=True)
    write(results, [f"{what}, {' beside '.join(group)}" for what, group in left])
    print(verdict.write(results))
    return 0


def main(argv=None) -> int:
    """The command; returns its exit status: 1 for latents that are off, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=benchmarks.RESULTS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="starts nothing after them")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on a CPU, no figures are kept")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print("nothing is measured: there is no GPU here; --dry-run tests the code", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        if options.dry_run:
            facts = dict.fromkeys((*reports.SAME, "commit"), "dry run") | {
                "ceilings": {"flops": 1, "bytes": 1}
            }
            write_checkpoint(folder, TINY)
            return run(folder, Path(folder), options.minutes, facts, TINY, "cpu", torch.float32, 2, 1)
        facts = benchmarks.about() | {"dtype": "fp16", "steps": STEPS}
        results = options.results / facts["device"].replace(" ", "-")
        write_checkpoint(folder, FULL)
        return run(folder, results, options.minutes, facts, FULL, "cuda", torch.float16, STEPS, ROUNDS)


if __name__ == "__main__":
    sys.exit(main())
