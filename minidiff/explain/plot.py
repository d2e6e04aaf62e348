"""The plot of `minidiff samplers`: error over model calls, both in logarithms, so that an order is a slope.

Samplers that make the same errors are one method under several names, and share a line. matplotlib and PIL
are needed here alone, so they are imported when something is drawn.
"""

import importlib.util
import io
import textwrap
from dataclasses import dataclass

import numpy as np

from minidiff.explain.convergence import FLOOR, Curve

COLORS = {  # of the lines, by order: from one order to the next the hue changes, within one the shade
    1: ("#e07b00", "#9c5200", "#c49000", "#c75b39"),
    2: ("#08306b", "#2b7bba", "#0f8a94", "#5a5fc0", "#3a97d4", "#16509a", "#00706b", "#7d74d8", "#4f87a8"),
    3: ("#00682a", "#35a35c", "#6f9c1e"),
    4: ("#b30000", "#e0407f"),
    None: ("#444444", "#7a7a7a", "#a0a0a0"),
}
MARKERS = "os^Dv<>pPXhd"
LOWEST, HIGHEST = 1e-7, 1  # of the errors shown; smaller ones are drawn just above
LINE = 0.033  # the height of a line of text, as a share of the axes'


@dataclass(frozen=True)
class Panel:
    """Where a half of the figure is, in shares of the whole, and where its guides start: an error."""

    noise: bool
    title: str
    left: float
    width: float
    guides: float
    letters: int  # that fit into a line of a label


PANELS = (
    Panel(False, "Without noise: distance from the exact path", 0.06, 0.32, 5e-5, 34),
    Panel(True, "With noise: distance from the exact distribution", 0.6, 0.2, 6e-4, 32),
)


def check_matplotlib():
    """Raises RuntimeError, saying what to do, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib, which isn't installed: pip install matplotlib")


def draw(curves: list[Curve]):
    """A matplotlib Figure: one panel of samplers without noise, one of those with it; lines are labelled."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    figure = Figure(figsize=(11, 6.6), dpi=150)
    figure.suptitle(
        "How the error falls: samplers on Gaussian data, whose exact solution is known", fontsize=11
    )
    for panel in PANELS:
        axes = figure.add_axes([panel.left, 0.085, panel.width, 0.815])
        _set_up_axes(axes, panel)
        _draw_guides(axes, panel)
        _draw_lines(axes, same_errors([c for c in curves if c.sampler.noise == panel.noise]), panel)
    return figure


def save(figure, path):
    """Writes a matplotlib Figure as a PNG of 256 colours: a third of the bytes, and letters look the same."""
    from PIL import Image

    whole = io.BytesIO()
    figure.savefig(whole, format="png")
    image = Image.open(whole).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


def same_errors(curves: list[Curve]) -> list[list[Curve]]:
    """The curves in groups whose model calls are the same and whose errors differ by less than 1 %."""
    groups = []
    for curve in curves:
        for group in groups:
            first = group[0]
            if curve.calls == first.calls and np.allclose(curve.errors, first.errors, rtol=0.01, atol=1e-6):
                group.append(curve)
                break
        else:
            groups.append([curve])
    return groups


def _set_up_axes(axes, panel):
    axes.set(xscale="log", yscale="log", xlim=(5.5, 290), ylim=(LOWEST, HIGHEST))
    axes.set_xlabel("model calls", fontsize=9)
    if panel is PANELS[0]:
        axes.set_ylabel("error, in standard deviations of the noisy data", fontsize=9)
    axes.set_title(panel.title, fontsize=9.5, loc="left")
    axes.set_xticks([8, 16, 32, 64, 128, 256], ["8", "16", "32", "64", "128", "256"])
    axes.tick_params(labelsize=8)
    axes.minorticks_off()
    axes.grid(color="#eeeeee", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhspan(LOWEST, FLOOR, color="#f4f4f4", zorder=0)
    axes.text(6, 1.1 * LOWEST, "float32 rounding", fontsize=7, color="#888888", va="bottom")


def _draw_guides(axes, panel):
    """A fan of dashed lines that fall with the orders 1 to 4, in the colours of these orders."""
    few, many = 6.2, 15
    for order in (1, 2, 3, 4):
        end = panel.guides * (few / many) ** order
        color = COLORS[order][0]
        axes.plot([few, many], [panel.guides, end], color=color, linewidth=1.2, linestyle=(0, (3, 2)))
        axes.text(many * 1.06, end, f"order {order}", color=color, fontsize=8, va="center")


def _draw_lines(axes, groups, panel):
    groups = sorted(groups, key=lambda group: -group[0].errors[-1])
    counts, ends = dict.fromkeys(COLORS, 0), []
    for number, group in enumerate(groups):
        curve, order = group[0], group[0].sampler.order
        color = COLORS[order][counts[order] % len(COLORS[order])]
        counts[order] += 1
        marker = MARKERS[number % len(MARKERS)]
        errors = np.maximum(curve.errors, 3 * LOWEST)
        axes.plot(curve.calls, errors, color=color, marker=marker, markersize=4, linewidth=1.3)
        ends.append((curve.calls[-1], errors[-1], color, _label(group, panel.letters)))
    _write_labels(axes, ends)


def _label(group, letters):
    """The names of a group, with what is not default about them, in lines of so many letters."""
    samplers = [curve.sampler for curve in group]
    names = [f"{s.name} ({s.settings})" if s.settings else s.name for s in samplers]
    if samplers[0].order is None:
        names[-1] += " (consistency models)"
    return textwrap.fill(" = ".join(names), letters, break_on_hyphens=False)


def _write_labels(axes, ends):
    """Writes labels right of the axes, each as near to the end of its line as the others leave room."""
    heights = [LINE * (1 + label.count("\n")) for *_, label in ends]
    wanted = [np.log(error / LOWEST) / np.log(HIGHEST / LOWEST) for _, error, *_ in ends]
    leader = {"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.6, "relpos": (0, 0.5), "shrinkB": 3}
    for (calls, error, color, label), y in zip(ends, spread(wanted, heights), strict=True):
        axes.annotate(
            label,
            (calls, error),
            (1.06, y),
            textcoords="axes fraction",
            color=color,
            fontsize=7.5,
            va="center",
            arrowprops=leader | {"color": color},
        )


def spread(wanted, heights) -> list[float]:
    """Places from 1 down to 0, as near to the wanted ones, which fall, as labels of these heights allow."""
    at = list(wanted)
    for _ in range(500):  # neighbours that overlap push each other away
        for k in range(len(at) - 1):
            overlap = (heights[k] + heights[k + 1]) / 2 - (at[k] - at[k + 1])
            if overlap > 0:
                at[k], at[k + 1] = at[k] + overlap / 2, at[k + 1] - overlap / 2
        at[0] = min(at[0], 1 - heights[0] / 2)
        at[-1] = max(at[-1], heights[-1] / 2)
    return at
