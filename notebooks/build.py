"""Runs the notebooks, keeps their outputs, and writes all of them into one HTML page.

    python notebooks/build.py                 # all of them, then notebooks/minidiff.html
    python notebooks/build.py 01 03           # these alone, no page
    python notebooks/build.py --page          # sets links and writes the page, from outputs that are there

A notebook is written back only after it has run to its end. What would differ from run to run (times,
progress bars, versions of the kernel) is left out. Links to the library, [`name`](../minidiff/x.py#L1),
get the line where that name stands now. The page needs no network: formulas become MathML.
"""

import argparse
import ast
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from minidiff.config import replacing

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "minidiff.html"
SECONDS = 60  # that a notebook may take, on two cores
MOST_BYTES = 500_000
WIDGET = "application/vnd.jupyter.widget-view+json"
LINK = re.compile(r"\[`(?P<name>[\w.]+)`\]\((?P<path>\.\./[\w/.]+\.py)#L(?P<line>\d+)\)")
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$(?![\w$])", re.DOTALL)


def notebooks(wanted=()) -> list[Path]:
    """The notebooks in reading order; those alone whose names start with one of wanted, if there are any."""
    every = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    chosen = [path for path in every if not wanted or path.name.startswith(tuple(wanted))]
    if not chosen:
        raise SystemExit(f"no notebook starts with {' or '.join(wanted)}; there are "
                         f"{', '.join(path.name for path in every)}")  # fmt: skip
    return chosen


def execute(path: Path):
    """The notebook with fresh outputs; raises nbclient's CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", coalesce_streams=True,
                   resources={"metadata": {"path": str(FOLDER)}}).execute()  # fmt: skip
    return clean(notebook)


def clean(notebook):
    """Leaves out what differs from run to run; ids and counts follow the order of the cells."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    count = 0
    for k, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{k:02}", {}
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        # progress bars and warnings of other libraries, which are widgets where ipywidgets is installed
        cell.outputs = [
            output
            for output in cell.outputs
            if output.get("name") != "stderr" and WIDGET not in output.get("data", ())
        ]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    return notebook


def line_of(source: str, name: str) -> int | None:
    """The line of source that defines name: a function, a class, a method (Class.method) or a constant."""
    nodes, found = ast.parse(source).body, None
    for part in name.split("."):
        found = next((node for node in nodes if part in _names(node)), None)
        if found is None:
            return None
        nodes = getattr(found, "body", [])
    return found.lineno


def _names(node):
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return [getattr(node, "name", None)]


def relink(text: str) -> str:
    """text with the lines of its links to the library set right; ValueError for a name that is not there."""

    def at_its_line(match):
        line = line_of((FOLDER / match["path"]).read_text(encoding="utf-8"), match["name"])
        if line is None:
            raise ValueError(f"{match['path']} has no {match['name']}, to which a notebook links")
        return f"[`{match['name']}`]({match['path']}#L{line})"

    return LINK.sub(at_its_line, text)


def write(path: Path, notebook) -> int:
    """Writes a notebook with its links set right; its size in bytes."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source)
    text = nbformat.writes(notebook) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return len(text.encode())


def run(path: Path):
    """Executes one notebook and writes it back; says how long it took and how large it is."""
    start = time.perf_counter()
    size = write(path, execute(path))
    print(f"{path.name}: {time.perf_counter() - start:.0f} s, {size / 1000:.0f} kB", flush=True)
    if size > MOST_BYTES:
        raise SystemExit(f"{path.name} has {size} bytes, more than {MOST_BYTES}: show smaller pictures")


def write_page(paths: list[Path]):
    """One HTML file with a table of contents and all notebooks, without links to scripts or fonts outside."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic")
    style, contents, bodies = "", [], []
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        anchor = path.stem
        title = re.search(r"^# (.+)$", notebook.cells[0].source, re.MULTILINE)[1]
        sections = [
            heading
            for cell in notebook.cells
            if cell.cell_type == "markdown"
            for heading in re.findall(r"^## (.+)$", cell.source, re.MULTILINE)
        ]
        contents.append((anchor, title, sections))
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = FORMULA.sub(_mathml, cell.source)
                cell.source = re.sub(r"\]\(\.\./([\w/.]+)(#L\d+)?\)", r"](\1\2)", cell.source)
        body, _ = exporter.from_notebook_node(notebook)
        # ids of headings are unique in a notebook only
        body = re.sub(r'(id="|href="#)([^"]+)"', rf'\g<1>{anchor}-\g<2>"', body)
        bodies.append(f'<article id="{anchor}">\n{body}\n</article>')
    style = PAGE_STYLE + _code_colors()
    listed = "\n".join(
        f'<li><a href="#{anchor}">{title}</a><br><small>{" · ".join(sections)}</small></li>'
        for anchor, title, sections in contents
    )
    page = PAGE_HTML.format(style=style, contents=listed, bodies="\n".join(bodies))
    with replacing(PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{PAGE.name}: {len(paths)} notebooks, {len(page) / 1e6:.1f} MB")


def _mathml(match):
    import latex2mathml.converter

    display = "block" if match[1] else "inline"
    return latex2mathml.converter.convert(match[1] or match[2], display=display).replace("\n", " ")


def _code_colors():
    from pygments.formatters import HtmlFormatter

    return HtmlFormatter(style="default").get_style_defs(".highlight")


PAGE_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
article { border-top: 3px solid #ddd; margin-top: 4rem; padding-top: 1rem; }
img { max-width: 100%; }
pre { background: #f7f7f7; padding: .6rem .8rem; overflow-x: auto; font-size: 13.5px; line-height: 1.4; }
.jp-OutputPrompt, .jp-InputPrompt, .prompt { display: none; }
.jp-OutputArea-output pre, .output pre { background: none; border-left: 3px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; border-bottom: 1px solid #eee; }
details { background: #fafafa; padding: .5rem 1rem; border: 1px solid #eee; }
nav small { color: #666; }
"""
PAGE_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>minidiff: how diffusion works</title>
<style>{style}</style>
</head>
<body>
<h1>minidiff: how diffusion works</h1>
<nav><ol>
{contents}
</ol></nav>
{bodies}
</body>
</html>
"""


def main():
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="starts of names, such as 01; all notebooks if left out")
    help_ = "set links and write the page, from the outputs that are there"
    parser.add_argument("--page", action="store_true", help=help_)
    args = parser.parse_args()
    for path in notebooks(args.names):
        if args.page:
            write(path, clean(nbformat.read(path, as_version=4)))
        else:
            run(path)
    if args.page or not args.names:
        write_page(notebooks())


if __name__ == "__main__":
    sys.exit(main())
