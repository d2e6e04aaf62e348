"""Figures as people read them: a Markdown table, and a picture of how near kernels come to the ceilings."""

import json
from pathlib import Path

SAME = ("device", "torch", "triton", "sources")  # rows that agree in these belong together
FACTS = (*SAME, "cuda", "python", "commit", "clocks before")
COLUMNS = (
    "case",
    "ours, µs",
    "quartiles",
    "fastest other",
    "µs",
    "ratio",
    "bandwidth",
    "FLOPs",
    "error",
    "its error",
)


def table(rows: list[dict]) -> str:
    """A Markdown table of the rows with an L2 cache that is cold, which is how a model meets it."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for row in (row for row in rows if row["cache"] == "cold"):
        ours, best = row["times"]["minidiff"], row["times"][row["best"]]
        cells = (
            row["case"],
            f"{1e3 * ours['median']:.1f}",
            f"{1e3 * ours['low']:.1f}–{1e3 * ours['high']:.1f}",
            row["best"],
            f"{1e3 * best['median']:.1f}",
            f"{row['ratio']:.2f}",
            f"{100 * row['of_bandwidth']:.0f} %",
            f"{100 * row['of_flops']:.0f} %",
            f"{row['errors']['minidiff']:.1e}",
            f"{row['errors'][row['best']]:.1e}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def roofline(rows: list[dict], ceilings: dict[str, float], path: Path, title: str):
    """Draws FLOP/s over FLOPs per byte, both axes logarithmic: the two ceilings, and a dot for each case."""
    import matplotlib  # late: half a second, and only those who measure need it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["cache"] == "cold"]
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    flops, ridge = 1e-12 * ceilings["flops"], ceilings["flops"] / ceilings["bytes"]
    first = min([0.1, *(row["flops"] / row["bytes"] for row in rows)])
    axes.plot([first, ridge, 100 * ridge], [flops * first / ridge, flops, flops], "k", label="ceilings")
    for number, op in enumerate(sorted({row["op"] for row in rows})):
        for name, marker in (("minidiff", "o"), ("fastest other", "x")):
            chosen = [row for row in rows if row["op"] == op]
            times = [row["times"][row["best"] if name == "fastest other" else name] for row in chosen]
            x = [row["flops"] / row["bytes"] for row in chosen]
            y = [1e-9 * row["flops"] / time["median"] for row, time in zip(chosen, times, strict=True)]
            axes.scatter(x, y, marker=marker, color=f"C{number}", label=f"{op}, {name}")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte, at least", ylabel="TFLOP/s", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def append(path: Path, rows: list[dict]):
    """Adds lines to a file, so that a run that is ended loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: Path, about: dict | None = None) -> list[dict]:
    """The rows of a file that were measured as about says, on one device by one version of all; [] if none.

    Without about, those of the last row's versions.
    """
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    about = about or (rows[-1] if rows else {})
    return [row for row in rows if all(row[name] == about[name] for name in SAME)]


def facts_of(about: dict) -> str:
    """What stands above every table."""
    facts = [f"- {name}: {about[name]}" for name in FACTS if name in about]
    facts.append(f"- product of 8192³: {1e-12 * about['ceilings']['flops']:.0f} TFLOP/s")
    facts.append(f"- copy of 1 GB: {1e-9 * about['ceilings']['bytes']:.0f} GB/s")
    return "\n".join(facts) + "\n"


def write(folder: Path):
    """Writes kernels.md and roofline.png from folder's kernels.jsonl; of several rows of a case the last."""
    rows = read(folder / "kernels.jsonl")
    timed = list({(row["case"], row["cache"]): row for row in rows if "times" in row}.values())
    wrong = {row["case"]: row["wrong"] for row in rows if "wrong" in row}
    about = rows[-1]
    untimed = "".join(f"- {name}: {reason}\n" for name, reason in wrong.items())
    text = f"# Kernels on {about['device']}\n\n{facts_of(about)}\n{table(timed)}"
    text += f"\nNot timed:\n\n{untimed}" if wrong else ""
    (folder / "kernels.md").write_text(text, encoding="utf-8")
    if timed:
        roofline(timed, about["ceilings"], folder / "roofline.png", f"{about['device']}, {about['commit']}")
