"""The wheel, which holds everything that runs and nothing else, and the README, which tells the truth.

How the wheel runs elsewhere is tested by .ci/run.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import minidiff

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WEIGHTS = ROOT / "minidiff" / "weights"
NOT_COPIED = (
    ".git",
    ".venv",
    "runs",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    "notebooks",
    ".ruff_cache",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """minidiff's wheel, built from a copy of the tree with the setuptools that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*NOT_COPIED))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(folder / "tree")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("minidiff-*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def files_below(folder):
    return {
        p.relative_to(folder.parent).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }


@pytest.mark.slow
def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(wheel):
    expected = files_below(ROOT / "minidiff") | files_below(ROOT / "kernels" / "minidiff_kernels")
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {"minidiff/py.typed", "minidiff/weights/scenes/tokenizer/merges.txt"} <= packed
    assert packed == expected


@pytest.mark.slow
def test_the_wheel_tells_what_it_is_and_what_it_needs(wheel):
    about = f"minidiff-{minidiff.__version__}.dist-info"
    metadata = Parser().parsestr(wheel.read(f"{about}/METADATA").decode())
    assert metadata["Version"] == minidiff.__version__
    assert metadata["License-Expression"] == "Apache-2.0 AND MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert wheel.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "minidiff = minidiff.cli:main" in wheel.read(f"{about}/entry_points.txt").decode()


def test_every_dependency_has_a_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    pinned = {
        line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert {requirement.split(">")[0].split("=")[0].strip() for requirement in needed} == pinned


def test_the_shipped_weights_are_half_precision_and_at_most_32_mb():
    from safetensors import safe_open

    sizes = {path.relative_to(WEIGHTS): path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()}
    assert sizes, "no weights ship"
    sizes |= {path.name: path.stat().st_size for path in (ROOT / "minidiff").rglob("*.gz")}
    assert sum(sizes.values()) <= 32_000_000, sizes
    for path in WEIGHTS.rglob("*.safetensors"):
        with safe_open(path, "np") as tensors:
            dtypes = {str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}  # noqa: SIM118
        assert dtypes <= {"F16", "I64"}, f"{path}: {dtypes}"


def test_the_readme_links_to_files_that_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_readmes_reading_order_has_true_line_counts():
    rows = re.findall(r"\]\((minidiff/\S+\.py)\) \| (\d+) \|", README)
    assert len(rows) == 10
    for path, told in rows:
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert abs(int(told) - lines) <= max(10, 0.1 * lines), (
            f"{path} has {lines} lines, the README says {told}"
        )


@pytest.mark.slow
def test_the_readmes_python_makes_a_picture(tmp_path):
    from PIL import Image

    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # found without an installation, too
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "first.png") as image:
        assert image.size == (128, 128)
