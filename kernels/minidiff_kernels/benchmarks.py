"""Times every case of the registry against everything in PyTorch that computes the same.

`python -m minidiff_kernels.benchmarks [--cases 'attn/*' …] [--results FOLDER]` writes a line of JSON for each
case, a Markdown table and a roofline picture into FOLDER/<device>. Before a case is timed its result is held
against float64: beyond the case's tolerance, or further away than 1.5 times PyTorch's own, it is not timed
and the command ends with 1. Without a GPU it ends with 2; `--dry-run` then runs small inputs in Triton's
interpreter (TRITON_INTERPRET=1), which tests the gate and what is not compiled, and times nothing.
"""

import argparse
import fnmatch
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import triton

from minidiff_kernels import launch, measuring, reports
from minidiff_kernels.case import KernelCase
from minidiff_kernels.cases import CASES
from minidiff_kernels.contenders import contenders, yardstick

RESULTS = Path("kernels/benchmarks/results")
MORE_THAN_TORCH = 1.5  # how much further from float64 than PyTorch's result ours may be


def errors(case: KernelCase, results: dict, reference) -> dict[str, float]:
    """{name: |result - reference| / |reference|}, Euclidean norms over all numbers, in float64."""
    size = reference.double().norm()
    return {name: ((result.double() - reference).norm() / size).item() for name, result in results.items()}


def gate(case: KernelCase, ours, reference, found: dict[str, float]) -> str | None:
    """Why our result must not be timed; None if it is right. found: what `errors` gave."""
    excess = (ours.double() - reference).abs() - (case.atol + case.rtol * reference.abs())
    if not excess.max() <= 0:  # NaN too
        return f"{int((~(excess <= 0)).sum())} of {ours.numel()} numbers are beyond the tolerance"
    if launch.INTERPRETED and ours.dtype == torch.bfloat16:  # cut off there, not rounded: twice the error
        return None
    name = yardstick(case)
    rounding = torch.finfo(ours.dtype).eps / 4  # about what rounding a right result costs
    if found["minidiff"] > MORE_THAN_TORCH * max(found[name], rounding):
        return f"error {found['minidiff']:.2e}, where {name} has {found[name]:.2e}"
    return None


def try_all(case: KernelCase, inputs: dict, thorough: bool) -> tuple[dict, dict]:
    """({name: function}, {name: its result}), ours and those contenders that take these inputs."""
    functions = {"minidiff": partial(case.run, **inputs)} | contenders(case, inputs, thorough)
    results = {"minidiff": case.run(**inputs)}
    for name in [name for name in functions if name != "minidiff"]:
        try:
            results[name] = functions[name]()
        except RuntimeError as error:  # a backend that is not there, or does not do this shape or dtype
            print(f"  {name} refuses: {str(error).splitlines()[0]:.100}")
            del functions[name]
    return functions, results


def measure(case: KernelCase, inputs: dict, peak: dict | None) -> tuple[list[dict], str | None]:
    """(rows of figures, one for each state of the L2 cache; why there are none). peak None: times nothing."""
    functions, results = try_all(case, inputs, thorough=peak is not None)
    reference = case.reference(**inputs)
    found = errors(case, results, reference)
    wrong = gate(case, results["minidiff"], reference, found)
    del results, reference
    rows = []
    for cache in ("cold", "warm") if wrong is None and peak is not None else ():
        times = measuring.time_in_turns(functions, cold=cache == "cold")
        medians = {name: measuring.median(values) for name, values in times.items()}
        best = min((name for name in medians if name != "minidiff"), key=lambda name: medians[name][0])
        ours = medians["minidiff"][0]
        figures = {name: {"median": middle, "low": low, "high": high, "best": min(times[name])}
                   for name, (middle, low, high) in medians.items()}  # fmt: skip
        rows.append({
            "case": case.name, "op": case.op, "shape": case.shape, "dtype": case.dtype, "where": case.where,
            "cache": cache, "times": figures, "best": best, "ratio": medians[best][0] / ours, "errors": found,
            "flops": case.flops, "bytes": case.bytes,
            "of_flops": case.flops / (1e-3 * ours) / peak["flops"],
            "of_bandwidth": case.bytes / (1e-3 * ours) / peak["bytes"],
        })  # fmt: skip
    return rows, wrong


def about() -> dict:
    """What has to stand beside every figure: device, versions, commit, clocks."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "cuda": torch.version.cuda or torch.version.hip, "python": platform.python_version(),
            "commit": commit or "not a checkout", "clocks before": measuring.clocks()}  # fmt: skip


def main(argv=None) -> int:
    """The command; returns its exit status: 1 for a wrong result, 2 where it can't run."""
    parser = argparse.ArgumentParser(
        prog="python -m minidiff_kernels.benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--cases", nargs="+", default=["*"], metavar="PATTERN", help="names, such as 'attn/*'"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder, {RESULTS} if not given")
    parser.add_argument("--dry-run", action="store_true", help="small inputs in the interpreter, no times")
    options = parser.parse_args(argv)
    runnable = [case for case in CASES if case.run is not None]
    chosen = [case for case in runnable if any(fnmatch.fnmatch(case.name, one) for one in options.cases)]
    if not chosen:
        print(f"no case is named {' or '.join(options.cases)}; there are {len(runnable)}", file=sys.stderr)
        return 2
    if options.dry_run != launch.INTERPRETED:
        print("--dry-run goes with TRITON_INTERPRET=1, and measuring without it", file=sys.stderr)
        return 2
    if not options.dry_run and not torch.cuda.is_available():
        print("nothing is measured: there is no GPU here. With TRITON_INTERPRET=1, --dry-run tests the code",
              file=sys.stderr)  # fmt: skip
        return 2
    return _dry_run(chosen) if options.dry_run else _run(chosen, options.results)


def _dry_run(cases) -> int:
    """Holds small results against float64, of one case for each way through a kernel."""
    ways, wrong = {}, []
    for case in cases:
        parts = (case.op, case.kernel.__name__, case.dtype, str(case.constexprs), str(case.signature))
        ways.setdefault(parts, case)
    for case in ways.values():
        _, fault = measure(case, case.tiny_inputs("cpu"), None)
        print(f"{case.name}: {fault or 'right'}", flush=True)
        wrong += [case.name] if fault else []
    print(f"{len(cases)} cases take {len(ways)} ways, {len(wrong)} of them wrong: {', '.join(wrong) or '-'}")
    return 1 if wrong else 0


def _run(cases, results) -> int:
    facts, peak, rows, failed = about(), measuring.ceilings(), [], []
    for case in cases:
        figures, wrong = measure(case, case.make_inputs("cuda"), peak)
        rows += figures
        failed += [f"{case.name}: {wrong}"] if wrong else []
        for row in figures:
            print(f"{case.name}, {row['cache']}: {1e3 * row['times']['minidiff']['median']:.1f} µs, "
                  f"{row['ratio']:.2f} times as fast as {row['best']}", flush=True)  # fmt: skip
        torch.cuda.empty_cache()
    facts["clocks after"] = measuring.clocks()
    reports.write(results / facts["device"].replace(" ", "-"), rows, facts, peak)
    print("\n".join(f"NOT TIMED {line}" for line in failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
