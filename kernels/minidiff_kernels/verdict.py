"""Which goals are met, from what was measured: a Markdown table.

`python -m minidiff_kernels.verdict FOLDER` reads FOLDER's kernels.jsonl and models.jsonl, as the benchmarks
write them, prints the table and writes it into verdict.md. Kernels count with a cold L2 cache, by medians.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from minidiff_kernels import reports
from minidiff_kernels.cases import CASES

SELF, CROSS, NORM = (
    *("attn/self/d40/l4096/b2h8", "attn/cross77/d40/l4096/b2h8"),
    "groupnorm_silu/c128/512x512/b1",
)
STEP, LATENTS = "U-Net step, 2 rows", "latents"
OURS = "minidiff, compiled"
EAGER, TUNED = "diffusers", "diffusers, max-autotune"


class Goal(NamedTuple):
    """A figure, what it should be, what it is (None: not measured) and whether that is enough."""

    what: str
    goal: str
    measured: str | None
    met: bool | None


def at_most(what, limit, value, unit, note="") -> Goal:
    """A goal that is met by value <= limit."""
    measured = None if value is None else f"{value:.4g} {unit}{note}".strip()
    return Goal(what, f"≤ {limit:g} {unit}".strip(), measured, value is not None and value <= limit)


def at_least(what, limit, value, unit="×", note="") -> Goal:
    """A goal that is met by value >= limit."""
    measured = None if value is None else f"{value:.3g} {unit}{note}".strip()
    return Goal(what, f"≥ {limit:g} {unit}", measured, value is not None and value >= limit)


def ratio(row: dict | None, others, ours="minidiff") -> float | None:
    """How many times as fast as the fastest of others we are in a row; None without any of both."""
    if row is None:
        return None
    times = [row["times"][name]["median"] for name in row["times"] if others(name)]
    return min(times) / row["times"][ours]["median"] if times and ours in row["times"] else None


def worst(rows: dict, start: str) -> tuple[float | None, str]:
    """(the lowest ratio to SDPA's fastest back end of the cases that start so, which it is, of how many)."""
    wanted = [case.name for case in CASES if case.run and case.name.startswith(start)]
    ratios = {name: ratio(rows.get(name), lambda other: other.startswith("SDPA")) for name in wanted}
    found = {name: value for name, value in ratios.items() if value is not None}
    if not found:
        return None, ""
    name = min(found, key=found.get)
    below = sum(value < 1 for value in found.values())
    return found[name], f" at {name}; {below} below 1 of {len(found)} measured, of {len(wanted)}"


def of_kernels(rows: list[dict]) -> list[Goal]:
    """The goals of kernels, from rows of kernels.jsonl; a later row of a case replaces an earlier one."""
    cold = {row["case"]: row for row in rows if row.get("cache") == "cold"}
    attention, norm = cold.get(SELF), cold.get(NORM)
    time = attention and 1e3 * attention["times"]["minidiff"]["median"]
    lowest, where = worst(cold, "attn/")
    of_all = at_least("every attention case against SDPA's best back end", 1, lowest, note=where)
    wanted = sum(case.run is not None and case.op == "attention" for case in CASES)
    if of_all.met and f" of {wanted} measured" not in where:
        of_all = of_all._replace(met=None)  # those that are measured are
    lowest, where = worst(cold, "attn/cross77/")
    eager = ratio(norm, lambda name: name in ("NCHW", "channels_last"))
    return [
        at_most(f"attention {SELF}", 150, time, "µs"),
        of_all,
        at_least(f"77 keys against SDPA's best back end, {CROSS}", 1.5,
                 ratio(cold.get(CROSS), lambda name: name.startswith("SDPA"))),
        at_least("77 keys, the worst case", 1.5, lowest, note=where),
        at_least(f"group norm + SiLU, {NORM}, of the copy bandwidth", 75,
                 norm and 100 * norm["of_bandwidth"], "%"),
        at_least("the same against torch's eager pair, the faster format", 3, eager),
    ]  # fmt: skip


def of_models(rows: list[dict]) -> list[Goal]:
    """The goals of whole models, from rows of models.jsonl; those of one task may be measured apart."""
    steps = [row for row in rows if row.get("task") == STEP]
    latents = next(
        (row for row in reversed(rows) if row.get("task") == LATENTS and row["name"] == OURS), None
    )

    def against(name):
        row = next((row for row in reversed(steps) if {name, OURS} <= set(row["times"])), None)
        return ratio(row, lambda other: other == name, OURS)

    ours = next((row["times"][OURS]["median"] for row in reversed(steps) if OURS in row["times"]), None)
    distances = latents and [
        at_most(
            "distance of float16 latents from float32, of diffusers' own: median", 1, latents["median"], ""
        ),
        at_most("the same, the worst of the prompts", 1.25, latents["worst"], ""),
    ]
    return [
        at_most("U-Net step, batch 2, 512²", 5.0, ours, "ms"),
        at_least("the same against diffusers eager", 4, against(EAGER)),
        at_least("the same against diffusers under max-autotune", 1.5, against(TUNED)),
        *(distances or [at_most("distance of float16 latents from float32, of diffusers' own", 1, None, "")]),
    ]


def table(goals: list[Goal]) -> str:
    """The goals as a Markdown table."""
    lines = ["| figure | goal | measured | verdict |", "| --- | --- | --- | --- |"]
    for goal in goals:
        verdict = {True: "met", False: "missed", None: "met where measured"}[goal.met]
        cells = (goal.what, goal.goal, goal.measured or "-", verdict if goal.measured else "not measured")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(folder: Path) -> str:
    """Writes verdict.md from the lines in folder and returns it."""
    kernels, models = (reports.read(folder / f"{name}.jsonl") for name in ("kernels", "models"))
    facts = "\n".join(f"{name}: {rows[-1]['device']}, {rows[-1]['commit']}, torch {rows[-1]['torch']}, "
                      f"Triton {rows[-1]['triton']}\n"
                      for name, rows in (("Kernels", kernels), ("Models", models)) if rows)  # fmt: skip
    text = f"# Goals\n\n{facts}\n{table(of_kernels(kernels) + of_models(models))}"
    (folder / "verdict.md").write_text(text, encoding="utf-8")
    return text


def main(argv: list[str]) -> int:
    """The command; returns its exit status: 2 where nothing was measured."""
    if len(argv) != 1:
        print("python -m minidiff_kernels.verdict takes one folder, that of a device", file=sys.stderr)
        return 2
    folder = Path(argv[0])
    if not any((folder / f"{name}.jsonl").is_file() for name in ("kernels", "models")):
        print(f"{folder} has no kernels.jsonl or models.jsonl, which the benchmarks write", file=sys.stderr)
        return 2
    print(write(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
