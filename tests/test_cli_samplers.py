"""`minidiff samplers`: its table, its numbers, its plot, and what it says when it can't draw."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from minidiff.cli import _parser, main
from minidiff.explain import convergence, plot
from minidiff.explain.samplers import SAMPLERS

FEW = [SAMPLERS[0], next(s for s in SAMPLERS if s.note), next(s for s in SAMPLERS if s.order is None)]


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs the command line: run(*words) -> (exit status, stdout, lines of stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = main(["samplers", *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err.splitlines()

    return run


@pytest.fixture
def few(monkeypatch):
    """Only three samplers, for tests of what does not depend on how many there are."""
    monkeypatch.setattr("minidiff.cli.samplers.SAMPLERS", FEW)


def test_the_table_has_a_row_for_each_sampler_and_explains_its_marks(run):
    status, out, err = run()
    assert (status, err) == (0, [])
    lines = out.splitlines()
    assert lines[0].split()[:5] == ["name", "order", "measured", "calls", "noise"]
    for line, sampler in zip(lines[1:], SAMPLERS, strict=False):
        assert line.split()[0] == sampler.name and sampler.scheduler in line and sampler.paper[1] in line
        order, measured = line.replace(" (", "(").split()[1:3]
        if sampler.order is None:
            assert (order[:3], measured) == ("any", "exact")
        else:
            assert int(order[0]) == sampler.order and abs(float(measured) - sampler.order) < 0.25
    notes = lines[1 + len(SAMPLERS) :]
    assert {note.split(" ", 1)[1] for note in notes} == {s.note for s in SAMPLERS if s.note}
    assert all(f"({number})" in out for number in range(1, len(notes) + 1))


def test_json_has_all_errors(run, few):
    status, out, err = run("--json")
    rows = json.loads(out)
    assert (status, err, len(rows)) == (0, [], len(FEW))
    for row, sampler in zip(rows, FEW, strict=True):
        measured = convergence.curve(sampler)
        assert (row["scheduler"], row["arxiv"]) == (sampler.scheduler, sampler.paper[1])
        assert row["measured"]["errors"] == pytest.approx(measured.errors)
        assert row["measured"]["model_calls"] == measured.calls and row["measured"]["steps"] == measured.steps


def test_the_plot_is_a_picture_and_its_name_is_printed(run, few, tmp_path):
    pytest.importorskip("matplotlib")
    status, out, err = run("--plot", "plot.png")
    assert (status, err, out.splitlines()[-1]) == (0, [], "plot.png")
    image = Image.open(tmp_path / "plot.png")
    assert image.format == "PNG" and image.width > 1000 and len(np.unique(image)) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


@pytest.mark.slow
def test_json_stays_json_beside_a_plot(run, few, tmp_path):
    pytest.importorskip("matplotlib")
    _, out, _ = run("--plot", "plot.png", "--json")
    assert len(json.loads(out)) == len(FEW) and (tmp_path / "plot.png").exists()


@pytest.mark.slow
def test_every_sampler_is_named_in_the_plot_once_and_no_two_labels_overlap():
    FigureCanvasAgg = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg
    Text = pytest.importorskip("matplotlib.text").Text
    figure = plot.draw([convergence.curve(sampler) for sampler in SAMPLERS])
    labels = [text for axes in figure.axes for text in axes.texts if text.get_fontsize() == 7.5]
    named = " = ".join(text.get_text().replace("\n", " ") for text in labels).split(" = ")
    expected = [f"{s.name} ({s.settings})" if s.settings else s.name for s in SAMPLERS]
    assert sorted(name.removesuffix(" (consistency models)") for name in named) == sorted(expected)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # which puts the labels into their places
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in labels]  # without the leaders
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x1 < figure.bbox.width and 0 < box.y0 < box.y1 < figure.bbox.height for box in boxes)


def test_methods_that_are_the_same_share_a_line():
    first_order = [s for s in SAMPLERS if s.name in ("ddim", "euler", "edmeuler", "flowmatcheuler", "heun")]
    curves = [convergence.curve(s) for s in first_order if not s.noise]
    groups = [{curve.sampler.name for curve in group} for group in plot.same_errors(curves)]
    assert groups == [{"ddim", "euler", "edmeuler", "flowmatcheuler"}, {"heun"}]


def test_labels_are_spread_as_little_as_they_must():
    assert plot.spread([0.9, 0.5, 0.1], [0.1, 0.1, 0.1]) == [0.9, 0.5, 0.1]
    a, b, c = plot.spread([0.5, 0.5, 0.0], [0.1, 0.2, 0.1])
    assert a - b == pytest.approx(0.15, abs=1e-6) and (a + b) / 2 == pytest.approx(0.5) and c == 0.05


def test_without_matplotlib_one_line_says_what_to_do(run, few, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run("--plot", "plot.png")
    assert (status, out) == (2, "")
    assert err == ["minidiff: --plot needs matplotlib, which isn't installed: pip install matplotlib"]
    assert run()[0] == 0  # the table needs none


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plot.jpg", "--plot plot.jpg: .*end it in .png"),
        ("nowhere/plot.png", "--plot nowhere/plot.png: there is no folder nowhere"),
        (".", "--plot .: this is a folder; give the plot a name that ends in .png"),
        ("new/", "--plot new/: this is a folder; give the plot a name that ends in .png"),
    ],
)
def test_a_plot_that_could_not_be_written_is_refused_before_anything_is_measured(
    run, monkeypatch, name, message
):
    monkeypatch.setattr(convergence, "measure", None)
    status, out, (line,) = run("--plot", name)
    assert (status, out) == (2, "")
    assert re.search(message, line)


def test_the_command_needs_no_torch_and_no_matplotlib():
    code = """
import sys
sys.modules["torch"] = sys.modules["matplotlib"] = None
from minidiff.cli import _parser, main
sys.exit(main(["samplers"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and "unipc" in done.stdout, done.stderr


def test_the_help_has_examples_that_parse(capsys):
    with pytest.raises(SystemExit):
        main(["samplers", "--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    examples = [re.split("   +", line)[0].split() for line in lines if line.startswith("minidiff samplers")]
    assert len(examples) == 3
    for _, *words in examples:
        assert _parser(words).parse_args(words).run
