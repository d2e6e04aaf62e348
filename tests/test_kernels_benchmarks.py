"""Benchmarks without a GPU: the gate before the times, who runs when, what is written; no times."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from minidiff_kernels import benchmarks, measuring, reports
from minidiff_kernels.case import KernelCase
from test_structure import KERNELS, ROOT


def small_case(**changes):
    """A case of attention whose kernel is PyTorch's own."""
    scale = torch.nn.functional.scaled_dot_product_attention

    def make_inputs(device):
        torch.manual_seed(0)
        return {name: torch.randn(2, 3, 16, 8, dtype=torch.float16, device=device) for name in "qkv"}

    defaults = {
        "name": "attn/small", "kernel": None, "signature": {}, "op": "attention", "shape": (2, 3, 16, 16, 8),
        "tiny_inputs": make_inputs, "run": lambda q, k, v: scale(q, k, v),
        "reference": lambda q, k, v: scale(q.double(), k.double(), v.double()), "atol": 2e-3,
    }  # fmt: skip
    return KernelCase(**defaults | changes)


def gated(case):
    return benchmarks.measure(case, case.tiny_inputs("cpu"), None)[1]


def test_a_right_result_passes_the_gate(capsys):
    assert gated(small_case()) is None
    assert "SDPA cuDNN refuses" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda out: out + 0.01, "768 of 768 numbers are beyond the tolerance"),
        (lambda out: out * float("nan"), "768 of 768 numbers are beyond the tolerance"),
        (lambda out: out * 1.001, "error .*, where SDPA math has"),
    ],
)
def test_a_wrong_result_is_not_timed(change, reason):
    right = small_case()
    with pytest.raises(AssertionError, match=reason):
        assert not gated(dataclasses.replace(right, run=lambda **inputs: change(right.run(**inputs))))


def test_contenders_take_turns_forwards_and_backwards():
    assert measuring.turns(["a", "b", "c"], 3) == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_the_median_comes_with_its_quartiles():
    assert measuring.median([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)


def rows():
    times = {name: {"median": m, "low": m * 0.9, "high": m * 1.1, "best": m * 0.8}
             for name, m in (("minidiff", 0.5), ("SDPA flash", 1.0))}  # fmt: skip
    common = {"op": "attention", "times": times, "best": "SDPA flash", "ratio": 2.0, "flops": 10**9,
              "bytes": 10**7, "errors": {"minidiff": 1e-4, "SDPA flash": 2e-4}, "of_flops": 0.25,
              "of_bandwidth": 0.5}  # fmt: skip
    return [common | {"case": "attn/x", "cache": cache} for cache in ("cold", "warm")]


@pytest.mark.slow
def test_reports_hold_every_row_and_draw_a_roofline(tmp_path):
    pytest.importorskip("matplotlib")
    about = {"device": "A GPU", "commit": "abc"}
    reports.write(tmp_path / "A-GPU", rows(), about, {"flops": 1e15, "bytes": 3e12})
    lines = (tmp_path / "A-GPU" / "kernels.jsonl").read_text().splitlines()
    assert [json.loads(line)["cache"] for line in lines] == ["cold", "warm"]
    assert json.loads(lines[0])["device"] == "A GPU"
    text = (tmp_path / "A-GPU" / "kernels.md").read_text()
    assert (
        "| attn/x | 500.0 | 450.0–550.0 | SDPA flash | 1000.0 | 2.00 | 50 % | 25 % | 1.0e-04 | 2.0e-04 |"
        in text
    )
    assert (tmp_path / "A-GPU" / "roofline.png").read_bytes().startswith(b"\x89PNG")


def run(*command, **environment):
    path = os.pathsep.join([str(ROOT), str(KERNELS)])
    environment = (
        {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path} | environment
    )
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
@pytest.mark.parametrize(
    "command", [["-m", "minidiff_kernels.benchmarks"], ["kernels/benchmarks/models.py"]], ids=str
)
def test_without_a_gpu_benchmarks_say_so_and_end(command):
    done = run(*command)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("nothing is measured: there is no GPU here")


@pytest.mark.slow
def test_whole_models_run_beside_diffusers():
    done = run("kernels/benchmarks/models.py", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "minidiff: U-Net step, 2 rows, VAE decode, picture, 2 steps run" in done.stdout


def test_the_dry_run_needs_the_interpreter_and_a_case(capsys):
    assert benchmarks.main(["--cases", "no/such/case", "--dry-run"]) == 2
    assert "no case is named no/such/case" in capsys.readouterr().err
    assert benchmarks.main([]) == 2
    assert "--dry-run goes with TRITON_INTERPRET=1" in capsys.readouterr().err


def test_a_dry_run_tells_of_each_case(capsys):
    assert benchmarks.main(["--dry-run", "--cases", "attn/cross77/d40/l4096/*", "groupnorm/c320/*"]) == 0
    out = capsys.readouterr().out
    assert "attn/cross77/d40/l4096/b1h8: right" in out and "take 2 ways, 0 of them wrong: -" in out


def test_results_name_their_device_and_commit():
    for path in (KERNELS / "benchmarks" / "results").rglob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert row["device"].replace(" ", "-") == path.parent.name
            assert row["commit"] and row["torch"] and row["times"]["minidiff"]["median"] > 0
