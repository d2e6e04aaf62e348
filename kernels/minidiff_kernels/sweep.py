"""Times the block sizes of a case against each other: is what the launcher takes the best?

`python -m minidiff_kernels.sweep [--cases 'attn/*' …] [--minutes 9] [--results FOLDER]` runs every config
that the registry has for this kind of GPU, in turns, and adds a line of JSON for each case to
FOLDER/<device>/sweep.jsonl as it goes; sweep.md beside it says what is fastest, by how much, and what is
launched today. Without --cases it takes those that decide (benchmarks.ORDER). Called again it goes on. A
config whose result is wrong, or which this GPU refuses, is not timed, and the command ends with 1.
`--dry-run` as in benchmarks.py: every config of one case for each way, on small inputs.
"""

import sys
from functools import partial

from triton import OutOfResources

from minidiff_kernels import benchmarks, launch, measuring, reports
from minidiff_kernels.case import KernelCase

COLUMNS = ("case", "launched", "µs", "fastest", "µs", "gain", "warm: fastest", "gain")
NOISE = 0.02  # a gain below it is none


def title(config: dict) -> str:
    """A config in a few words: M=128 N=64 8w 3s."""
    short = {"num_warps": "w", "num_stages": "s"}
    return " ".join(f"{value}{short[key]}" if key in short else f"{key.removeprefix('BLOCK_')}={value}"
                    for key, value in config.items())  # fmt: skip


def try_configs(case: KernelCase, inputs: dict, target: str) -> tuple[dict, dict]:
    """({config: function}, {config: why not}) of the configs for target whose results are right."""
    reference = case.reference(**inputs)
    right, wrong = {}, {}
    for config in case.choices_for(target):
        function = partial(case.launch, config, **inputs)
        try:
            fault = benchmarks.beyond(case, function(), reference)
        except OutOfResources as error:  # this GPU has less shared memory than the largest of its kind
            fault = str(error)
        if fault:
            wrong[title(config)] = fault
        else:
            right[title(config)] = function
    return right, wrong


def measure(case: KernelCase, inputs: dict, device) -> tuple[list[dict], str | None]:
    """([the figures of a case], which configs are wrong)."""
    functions, wrong = try_configs(case, inputs, launch.target(device))
    fault = "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
    if not functions:
        return [], fault or "no config"
    times = {cache: measuring.summary(found) for cache, found in measuring.time_in_turns(functions).items()}
    row = {"case": case.name, "op": case.op, "shape": case.shape, "pick": title(case.pick(device)),
           "sweep": times, "refused": wrong}  # fmt: skip
    return [row], None


def table(rows: list[dict]) -> str:
    """A Markdown table: for each case what is launched and what is fastest, with a cold and a warm cache."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for row in rows:
        medians = {cache: {name: figure["median"] for name, figure in found.items()}
                   for cache, found in row["sweep"].items()}  # fmt: skip
        pick, cold, warm = row["pick"], medians["cold"], medians["warm"]
        best, best_warm = min(cold, key=cold.get), min(warm, key=warm.get)
        ours = cold.get(pick)
        times = ["refused" if ours is None else f"{1e3 * ours:.1f}", best, f"{1e3 * cold[best]:.1f}"]
        gains = [_gain(cold, pick, best), best_warm, _gain(warm, pick, best_warm)]
        lines.append(f"| {' | '.join([row['case'], pick, *times, *gains])} |")
    return "\n".join(lines) + "\n"


def _gain(medians, pick, best):
    gain = medians.get(pick, float("inf")) / medians[best] - 1
    return f"{100 * gain:.0f} %" if gain > NOISE else "-"


def write(folder):
    """Writes sweep.md from folder's sweep.jsonl: the table, and each case's configs from the fastest on."""
    rows = reports.read(folder / "sweep.jsonl")
    timed = [row for row in rows if "sweep" in row]
    text = f"# Block sizes on {rows[-1]['device']}\n\n{reports.facts_of(rows[-1])}\n{table(timed)}"
    for row in timed:
        cold = sorted(row["sweep"]["cold"].items(), key=lambda item: item[1]["median"])
        text += f"\n{row['case']}, cold:\n\n"
        text += "".join(f"- {1e3 * figure['median']:.1f} µs ({1e3 * figure['low']:.1f}–"
                        f"{1e3 * figure['high']:.1f}) {name}\n" for name, figure in cold)  # fmt: skip
        text += "".join(f"- refused: {name}, {reason}\n" for name, reason in row["refused"].items())
    (folder / "sweep.md").write_text(text, encoding="utf-8")


def main(argv=None) -> int:
    """The command; returns its exit status: 1 for a wrong result, 2 where it can't run."""
    parsed = benchmarks.parse(argv, "sweep", __doc__.split("\n")[0])
    if parsed == 2:
        return 2
    options, cases = parsed
    cases = [case for case in cases if case.launch is not None and len(case.choices_for("sm_90")) > 1]
    if options.dry_run:
        return _dry_run(cases)
    if not options.cases:
        cases = [case for case in cases if benchmarks.importance(case) < len(benchmarks.ORDER)]
    facts = benchmarks.about()
    folder = options.results / facts["device"].replace(" ", "-")
    done = {row["case"] for row in reports.read(folder / "sweep.jsonl", facts)}
    failed = []
    for case in benchmarks.in_time([case for case in cases if case.name not in done], options.minutes):
        rows = benchmarks.rows_or_reason(case, measure, benchmarks.DEVICE)
        reports.append(folder / "sweep.jsonl", [facts | row for row in rows])
        failed += [f"{case.name}: {row.get('wrong') or row['refused']}" for row in rows
                   if "wrong" in row or row["refused"]]  # fmt: skip
        print(table([row for row in rows if "sweep" in row]).splitlines()[-1], flush=True)
    write(folder)
    print("\n".join(f"NOT TIMED {line}" for line in failed), file=sys.stderr)
    return 1 if failed else 0


def _dry_run(cases) -> int:
    """Holds the small results of all configs for sm_90 against float64, of one case for each way."""
    chosen = benchmarks.ways(cases)
    count, failed = 0, []
    for case in chosen:
        right, wrong = try_configs(case, case.tiny_inputs("cpu"), "sm_90")
        count += len(right)
        failed += [f"{case.name}, {name}: {reason}" for name, reason in wrong.items()]
        print(f"{case.name}: {len(right)} right, {len(wrong)} wrong", flush=True)
    print(f"{len(chosen)} ways, {count} configs right, {len(failed)} wrong", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
