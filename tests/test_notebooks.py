"""The notebooks: what is committed reads well, and all of them run from top to bottom."""

import importlib.util
import json
import re

import nbformat
import pytest
from test_structure import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
NAMES = [
    *("01_ddpm_taken_apart", "02_stable_diffusion_taken_apart", "03_noise_schedules_and_samplers"),
    *("04_the_unet", "05_attention_looks_at_words", "06_the_vae"),
    *("07_triton_attention", "08_triton_group_norm", "09_build_your_own_pipeline"),
]


def load_build():
    """notebooks/build.py as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location("notebooks_build", ROOT / "notebooks" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: the types of its outputs."""
    return [sorted(o.get("data", {})) or o.get("name", o.output_type) for o in cell.outputs]


def test_all_nine_are_there_in_reading_order():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@each
def test_committed_outputs_are_whole_small_and_without_noise(path):
    notebook = read(path)
    assert path.stat().st_size <= build.MOST_BYTES
    assert [cell.execution_count for cell in code_cells(notebook)] == [
        k + 1 for k in range(len(code_cells(notebook)))
    ]
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert sum(bool({"image/png", "image/jpeg"} & set(o.get("data", {}))) for o in outputs) >= 3
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    texts = json.dumps([o.get("text", "") for o in outputs] + [cell.source for cell in notebook.cells])
    assert not re.search(r"0x[0-9a-f]{8}|/(home|root|tmp|work|Users)/", texts)
    assert notebook == build.clean(read(path))


@each
def test_a_notebook_ends_in_proofs_and_exercises(path):
    cells = read(path).cells
    headings = [c.source.splitlines()[0] for c in cells if c.cell_type == "markdown" and c.source[0] == "#"]
    assert re.match(r"# \S", headings[0]) and headings[-2:] == ["## Is it right?", "## Exercises"]
    proofs = "\n".join(
        c.source for c in cells[[c.source.startswith("## Is it right?") for c in cells].index(True) :]
    )
    assert proofs.count("assert ") >= 3
    exercises = cells[-1].source
    assert exercises.count("<details><summary>Solution</summary>") >= 1
    assert exercises.count("<details>") == exercises.count("</details>")


@each
def test_links_into_the_library_point_at_what_they_name(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    assert len(build.LINK.findall(text)) >= 2
    assert build.relink(text) == text
    for target in re.findall(r"\]\((\.\./[^)#]+|[\w.]+\.ipynb)", text):
        assert (path.parent / target).exists(), target


@each
def test_a_notebook_imports_the_library_and_needs_no_network(path):
    source = "\n".join(cell.source for cell in code_cells(read(path)))
    assert "minidiff" in source
    assert not re.search(r"!pip|%pip|requests\.|urlopen|\.cuda\(\)", source)


@pytest.mark.slow
@each
def test_a_notebook_runs_and_shows_what_it_showed(path):
    """Each cell's outputs are of the committed kinds; a cell may take build.SECONDS."""
    fresh, committed = build.execute(path), read(path)
    for cell, before in zip(code_cells(fresh), code_cells(committed), strict=True):
        assert kinds(cell) == kinds(before), cell.source


@pytest.mark.slow
def test_the_page_holds_every_notebook_and_asks_nobody(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "PAGE", tmp_path / "minidiff.html")
    build.write_page(NOTEBOOKS)
    page = (tmp_path / "minidiff.html").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f'href="#{path.stem}"' in page and f'<article id="{path.stem}">' in page
    assert not re.search(r'(src|href)="(https?:)?//[^"]*\.(js|css|woff2?)', page) and "<script" not in page
    assert "<math" in page and not re.search(r"\$\$|\\frac", re.sub(r"<annotation.*?</annotation>", "", page))


def test_a_name_in_the_library_is_found_at_its_line():
    source = "A = 1\nE: int = 2\n\nclass B:\n    def c(self):\n        pass\n"
    lines = {"A": 1, "E": 2, "B": 4, "B.c": 5, "d": None, "B.d": None}
    assert {name: build.line_of(source, name) for name in lines} == lines
    with pytest.raises(ValueError, match="has no nothing"):
        build.relink("[`nothing`](../minidiff/ops.py#L3)")
