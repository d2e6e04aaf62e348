"""Figures as people read them: a Markdown table, and a picture of how near kernels come to the ceilings."""

import json
from pathlib import Path

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


def write(folder: Path, rows: list[dict], about: dict, ceilings: dict[str, float]):
    """Writes kernels.jsonl, kernels.md and roofline.png into folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(about | row, ensure_ascii=False) for row in rows)
    (folder / "kernels.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = "\n".join(f"- {name}: {value}" for name, value in about.items())
    facts += f"\n- product of 8192³: {1e-12 * ceilings['flops']:.0f} TFLOP/s"
    facts += f"\n- copy of 1 GB: {1e-9 * ceilings['bytes']:.0f} GB/s\n"
    text = f"# Kernels on {about['device']}\n\n{facts}\n{table(rows)}"
    (folder / "kernels.md").write_text(text, encoding="utf-8")
    roofline(rows, ceilings, folder / "roofline.png", f"{about['device']}, {about['commit']}")
