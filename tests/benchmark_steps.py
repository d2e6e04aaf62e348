"""How long one step of each scheduler takes, minidiff's on NumPy arrays beside diffusers' on CPU tensors.

python tests/benchmark_steps.py [--names EulerDiscreteScheduler ...] [--steps 40] [--rounds 9]

Both walk the same schedule from the same noise on (1, 4, 64, 64) float32, one thread each, in turns: a round
is one whole loop of each. A figure is the median over the steps of a round; printed are the median over the
rounds and, in brackets, the smallest and the largest. Stochastic schedulers draw from a torch.Generator in
both. The results are compared, too: a speed counts only where they are equal.
"""

import argparse
import inspect
import statistics
import sys
import warnings
from time import perf_counter

import diffusers
import numpy as np
import torch

import minidiff

OPTIONS = {  # where a scheduler's default is not its usual use, or several rules share a class
    "DDPMScheduler": [{"clip_sample": False}],
    "DDIMScheduler": [{"clip_sample": False}],
    "DDIMInverseScheduler": [{"clip_sample": False}],
    "PNDMScheduler": [{"skip_prk_steps": True}],
    "UniPCMultistepScheduler": [{"solver_order": n} for n in (1, 2, 3)],
    "DPMSolverMultistepScheduler": [{"solver_order": n} for n in (1, 2, 3)]
    + [{"algorithm_type": "sde-dpmsolver++"}],
    "DPMSolverSinglestepScheduler": [{"solver_order": n} for n in (1, 2, 3)],
    "DEISMultistepScheduler": [{"solver_order": n} for n in (1, 2, 3)],
    "EDMDPMSolverMultistepScheduler": [{"solver_order": n} for n in (2, 3)],
    "LCMScheduler": [{"original_inference_steps": 500}],
    "TCDScheduler": [{"original_inference_steps": 500}],
}


def loop(scheduler, outputs, sample):
    """Microseconds of the median step of a loop whose model outputs are given, and where it ends."""
    drawn = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(0)} if drawn else {}
    durations = []
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else None
        start = perf_counter()
        result = scheduler.step(output, t, sample, **options)
        durations.append(perf_counter() - start)
        sample = result[0] if isinstance(result, tuple) else result.prev_sample
    return 1e6 * statistics.median(durations), sample


def compare(name, config, steps, rounds):
    """(our medians, diffusers' medians, worst relative difference of the ends)."""
    pair = [getattr(library, name)(**config) for library in (minidiff, diffusers)]
    rng = np.random.default_rng(0)
    start = rng.standard_normal((1, 4, 64, 64), dtype=np.float32)
    times = [], []
    for round_ in range(rounds + 1):  # the first warms up
        ends = []
        for scheduler, taken in zip(pair, times, strict=True):
            scheduler.set_timesteps(steps)
            outputs = [
                0.5 * np.random.default_rng(k).standard_normal(start.shape, dtype=np.float32)
                for k in range(len(scheduler.timesteps))
            ]
            sample = (
                start * float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else start
            )
            if scheduler is pair[1]:
                outputs, sample = [torch.from_numpy(x) for x in outputs], torch.from_numpy(sample)
            median, end = loop(scheduler, outputs, sample)
            ends.append(np.asarray(end, np.float64))
            if round_:
                taken.append(median)
    difference = np.abs(ends[0] - ends[1]).max() / np.abs(ends[1]).max()
    return *times, difference


def main():
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
    parser.add_argument("--names", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    print("| scheduler | minidiff, µs | diffusers, µs | diffusers / minidiff | ends differ by |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in args.names:
        for config in OPTIONS.get(name, [{}]):
            ours, theirs, difference = compare(name, config, args.steps, args.rounds)
            cells = [f"{statistics.median(x):.0f} ({min(x):.0f} to {max(x):.0f})" for x in (ours, theirs)]
            ratio = statistics.median(theirs) / statistics.median(ours)
            label = ", ".join([name.removesuffix("Scheduler"), *(f"{k} {v}" for k, v in config.items())])
            print(f"| {label} | {cells[0]} | {cells[1]} | {ratio:.1f} | {difference:.0e} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
