"""Times every case of the registry against everything in PyTorch that computes the same.

`python -m minidiff_kernels.benchmarks [--cases 'attn/*' …] [--minutes 9] [--results FOLDER]` adds lines of
JSON to FOLDER/<device>/kernels.jsonl as it goes, the cases that decide first, and writes a Markdown table and
a roofline picture beside them. Called again it goes on with what is missing; changed kernels or versions
start anew. Before a case is timed its result is held against float64: beyond the case's tolerance, or further
away than 1.5 times PyTorch's own, it is not timed and the command ends with 1. Without a GPU it ends with 2;
`--dry-run` then runs small inputs in Triton's interpreter (TRITON_INTERPRET=1), which tests the gate and what
is not compiled, and times nothing.
"""

import argparse
import fnmatch
import hashlib
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import triton

from minidiff_kernels import launch, measuring, reports
from minidiff_kernels.case import KernelCase
from minidiff_kernels.cases import CASES
from minidiff_kernels.contenders import contenders, yardstick

RESULTS = Path("kernels/benchmarks/results")
DEVICE = torch.device("cuda")
MORE_THAN_TORCH = 1.5  # how much further from float64 than PyTorch's result ours may be
ORDER = (  # what is measured first: what has a goal, Stable Diffusion 1.x with guidance, its VAE
    ("attn/self/d40/l4096/b2h8", "attn/cross77/d40/l4096/b2h8", "groupnorm_silu/c128/512x512/b1"),
    ("attn/*/d40/l4096/b2h8", "attn/*/d80/l1024/b2h8", "attn/*/d160/l*/b2h8", "attn/self/d512/l4096/b1h1"),
    ("groupnorm*/64x64/b2", "groupnorm*/32x32/b2", "groupnorm*/16x16/b2", "groupnorm*/8x8/b2"),
    ("geglu/k320/n1280/m8192", "geglu/k640/n2560/m2048", "geglu/k1280/n5120/m512"),
    ("upsample_conv/*/b2", "upsample_conv/*/b1", "groupnorm*/512x512/b1", "groupnorm*/256x256/b1"),
)
# Also beside what torch.compile makes of the same, which takes it up to a minute each.
COMPILED = (
    *("attn/self/d40/l4096/b2h8", "attn/self/d80/l1024/b2h8", "attn/self/d512/l4096/b1h1"),
    *("groupnorm_silu/c128/512x512/b1", "groupnorm_silu/c320/64x64/b2", "groupnorm_silu/c1280/16x16/b2"),
    *("geglu/k320/n1280/m8192", "geglu/k1280/n5120/m512"),
    *("upsample_conv/c640/32x32/b2", "upsample_conv/c512/128x128/b1"),
)


def named(name: str, patterns) -> bool:
    """Whether one of patterns, such as 'attn/*', fits a case's name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def importance(case: KernelCase) -> int:
    """The place of a case in ORDER; after these attention, which has goals for all cases, then float16."""
    ranks = [rank for rank, patterns in enumerate(ORDER) if named(case.name, patterns)]
    return min([*ranks, len(ORDER) + 2 * (case.op != "attention") + (case.dtype != "fp16")])


def errors(results: dict, reference) -> dict[str, float]:
    """{name: |result - reference| / |reference|}, Euclidean norms over all numbers, in float64."""
    size = reference.double().norm()
    return {name: ((result.double() - reference).norm() / size).item() for name, result in results.items()}


def beyond(case: KernelCase, ours, reference) -> str | None:
    """How many numbers are beyond the case's tolerance; None if there are none."""
    excess = (ours.double() - reference).abs() - (case.atol + case.rtol * reference.abs())
    if not excess.max() <= 0:  # NaN too
        return f"{int((~(excess <= 0)).sum())} of {ours.numel()} numbers are beyond the tolerance"
    return None


def gate(case: KernelCase, ours, reference, found: dict[str, float]) -> str | None:
    """Why our result must not be timed; None if it is right. found: what `errors` gave."""
    wrong = beyond(case, ours, reference)
    if wrong or (launch.INTERPRETED and ours.dtype == torch.bfloat16):  # cut off there: twice the error
        return wrong
    others = {name: error for name, error in found.items() if name != "minidiff"}
    name = yardstick(case) if yardstick(case) in others else min(others, key=others.get)
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


def measure(case: KernelCase, inputs: dict, peak: dict | None, thorough=False) -> tuple[list, str | None]:
    """(rows of figures, one for each state of the L2 cache; why there are none). peak None: times nothing."""
    functions, results = try_all(case, inputs, thorough)
    reference = case.reference(**inputs)
    found = errors(results, reference)
    wrong = gate(case, results["minidiff"], reference, found)
    del results, reference
    if wrong or peak is None:
        return [], wrong
    rows = []
    for cache, times in measuring.time_in_turns(functions).items():
        figures = measuring.summary(times)
        medians = {name: figure["median"] for name, figure in figures.items()}
        ours = medians.pop("minidiff")
        best = min(medians, key=medians.get)
        rows.append({
            "case": case.name, "op": case.op, "shape": case.shape, "dtype": case.dtype, "where": case.where,
            "cache": cache, "compiled": thorough, "times": figures, "best": best,
            "ratio": medians[best] / ours, "errors": found, "flops": case.flops, "bytes": case.bytes,
            "of_flops": case.flops / (1e-3 * ours) / peak["flops"],
            "of_bandwidth": case.bytes / (1e-3 * ours) / peak["bytes"],
        })  # fmt: skip
    return rows, None


def about() -> dict:
    """What has to stand beside every figure: device, versions, commit, clocks, and what this GPU can do."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))))
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "cuda": torch.version.cuda or torch.version.hip, "python": platform.python_version(),
            "commit": commit or "not a checkout", "sources": sources.hexdigest()[:12],
            "clocks before": measuring.clocks(), "ceilings": measuring.ceilings()}  # fmt: skip


def parse(argv, name: str, text: str):
    """(the options of a command that measures cases, the chosen cases in order) or its exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m minidiff_kernels.{name}", description=text)
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help="names, such as 'attn/*'")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="starts no case after them")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder, {RESULTS} if not given")
    parser.add_argument("--dry-run", action="store_true", help="small inputs in the interpreter, no times")
    options = parser.parse_args(argv)
    runnable = sorted((case for case in CASES if case.run is not None), key=importance)
    chosen = [case for case in runnable if named(case.name, options.cases or ["*"])]
    if not chosen:
        print(f"no case is named {' or '.join(options.cases)}; there are {len(runnable)}", file=sys.stderr)
    elif options.dry_run != launch.INTERPRETED:
        print("--dry-run goes with TRITON_INTERPRET=1, and measuring without it", file=sys.stderr)
    elif not options.dry_run and not torch.cuda.is_available():
        print("nothing is measured: there is no GPU here. With TRITON_INTERPRET=1, --dry-run tests the code",
              file=sys.stderr)  # fmt: skip
    else:
        return options, chosen
    return 2


def main(argv=None) -> int:
    """The command; returns its exit status: 1 for a wrong result, 2 where it can't run."""
    parsed = parse(argv, "benchmarks", __doc__.split("\n")[0])
    if parsed == 2:
        return 2
    options, chosen = parsed
    return _dry_run(chosen) if options.dry_run else _run(chosen, options)


def ways(cases) -> list[KernelCase]:
    """One case for each way through a kernel: the others differ in sizes that no compilation depends on."""
    found = {}
    for case in cases:
        parts = (case.op, case.kernel.__name__, case.dtype, str(case.constexprs), str(case.signature))
        found.setdefault(parts, case)
    return list(found.values())


def _dry_run(cases) -> int:
    """Holds small results against float64, of one case for each way through a kernel."""
    chosen, wrong = ways(cases), []
    for case in chosen:
        _, fault = measure(case, case.tiny_inputs("cpu"), None)
        print(f"{case.name}: {fault or 'right'}", flush=True)
        wrong += [case.name] if fault else []
    print(
        f"{len(cases)} cases take {len(chosen)} ways, {len(wrong)} of them wrong: {', '.join(wrong) or '-'}"
    )
    return 1 if wrong else 0


def in_time(work: list, minutes: float):
    """The items of work, until minutes have passed; then says how many are left."""
    end = time.monotonic() + 60 * minutes
    for number, item in enumerate(work):
        if time.monotonic() > end:
            print(f"{minutes} minutes have passed; {len(work) - number} are left: call it again to go on")
            return
        yield item


def rows_or_reason(case: KernelCase, function, *arguments) -> list[dict]:
    """The rows that function makes of the case's inputs, or one that says why there are none."""
    try:
        rows, wrong = function(case, case.make_inputs(DEVICE), *arguments)
    except torch.OutOfMemoryError as error:
        rows, wrong = [], str(error).split(".")[0]
    torch.cuda.empty_cache()
    return [{"case": case.name, "wrong": wrong}] if wrong else rows


def _run(cases, options) -> int:
    """Measures what is not yet in the file; torch.compile has its turn when ORDER is done."""
    torch.backends.cudnn.allow_tf32 = False  # contenders in float32 compute in float32
    facts = about()
    folder = options.results / facts["device"].replace(" ", "-")
    path = folder / "kernels.jsonl"
    done = {(row["case"], row.get("compiled", False)) for row in reports.read(path, facts)}
    first = [case for case in cases if importance(case) < len(ORDER)]
    work = [(case, False) for case in first]
    work += [(case, True) for case in first if named(case.name, COMPILED)]
    work += [(case, False) for case in cases[len(first) :]]
    for case, thorough in in_time([(c, t) for c, t in work if (c.name, t) not in done], options.minutes):
        rows = rows_or_reason(case, measure, facts["ceilings"], thorough)
        reports.append(path, [facts | row | {"compiled": thorough} for row in rows])
        for row in rows:
            print(f"{case.name}: NOT TIMED: {row['wrong']}" if "wrong" in row else
                  f"{case.name}, {row['cache']}: {1e3 * row['times']['minidiff']['median']:.1f} µs, "
                  f"{row['ratio']:.2f} times as fast as {row['best']}", flush=True)  # fmt: skip
    reports.write(folder)
    print(f"clocks after: {measuring.clocks()}")
    failed = [row for row in reports.read(path, facts) if "wrong" in row]
    print("\n".join(f"NOT TIMED {row['case']}: {row['wrong']}" for row in failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
