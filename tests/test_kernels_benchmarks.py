"""Benchmarks without a GPU: the gate before the times, who runs when, what is written; no times."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from minidiff_kernels import benchmarks, measuring, reports, sweep, verdict
from minidiff_kernels.case import KernelCase
from minidiff_kernels.cases import CASES
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


class Recording:
    """What stands for a CUDA graph: a replay takes so many milliseconds."""

    replays = ()

    def __init__(self, name, calls, warm_up):
        self.name, self.calls, self.warm_up = name, calls, warm_up

    def replay(self):
        Recording.replays += (self.name,)


def test_slow_functions_are_called_less_often(monkeypatch):
    took = {"slow": 30.0, "fast": 0.01, "middle": 1.0}
    monkeypatch.setattr(Recording, "replays", ())
    monkeypatch.setattr(measuring, "record", lambda f, calls, warm_up=10: Recording(f, calls, warm_up))
    monkeypatch.setattr(
        measuring, "milliseconds", lambda graph: graph.replay() or graph.calls * took[graph.name]
    )
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.zeros(1))
    times = measuring.time_in_turns({name: name for name in took}, rounds=2)
    assert times == {cache: {name: [took[name]] * 2 for name in took} for cache in ("cold", "warm")}
    first = [name for name in took for _ in range(2)]  # to see how many calls take long
    cold = ["slow", "fast", "middle", "middle", "fast", "slow"]
    assert list(Recording.replays) == first + cold + [name for name in cold for _ in range(2)]


FACTS = {"device": "A GPU", "torch": "2", "triton": "3", "sources": "ab12", "commit": "abc",
         "ceilings": {"flops": 1e15, "bytes": 3e12}}  # fmt: skip


def row(case, cache="cold", ours=0.5, others=(("SDPA flash", 1.0),), **changes):
    """A made-up line of kernels.jsonl; times in milliseconds."""
    times = {name: {"median": m, "low": m * 0.9, "high": m * 1.1, "best": m * 0.8}
             for name, m in (("minidiff", ours), *others)}  # fmt: skip
    best, time = min(others, key=lambda pair: pair[1])
    found = {"op": "attention", "compiled": False, "times": times, "best": best, "ratio": time / ours}
    found |= {"flops": 10**9, "bytes": 10**7, "of_flops": 0.25, "of_bandwidth": 0.5}
    errors = dict.fromkeys(times, 2e-4) | {"minidiff": 1e-4}
    return FACTS | {"case": case, "cache": cache, "errors": errors} | found | changes


@pytest.mark.slow
def test_reports_hold_the_last_row_of_each_case_and_draw_a_roofline(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [
        row("attn/old", sources="cd34"),
        row("attn/x", ours=9.0),
        *(row("attn/x", c) for c in ("cold", "warm")),
    ]
    reports.append(tmp_path / "A-GPU" / "kernels.jsonl", lines)
    reports.append(tmp_path / "A-GPU" / "kernels.jsonl", [FACTS | {"case": "attn/y", "wrong": "NaN"}])
    reports.write(tmp_path / "A-GPU")
    text = (tmp_path / "A-GPU" / "kernels.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if "attn" in line] == [
        "| attn/x | 500.0 | 450.0–550.0 | SDPA flash | 1000.0 | 2.00 | 50 % | 25 % | 1.0e-04 | 2.0e-04 |",
        "- attn/y: NaN",
    ]
    assert (tmp_path / "A-GPU" / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_the_cases_that_decide_come_first_and_those_that_compile_exist():
    cases = [case for case in CASES if case.run is not None]
    first = sorted(cases, key=benchmarks.importance)
    assert [case.name for case in first[:3]] == list(benchmarks.ORDER[0])
    for pattern in (
        *(pattern for patterns in benchmarks.ORDER for pattern in patterns),
        *benchmarks.COMPILED,
    ):
        assert any(benchmarks.named(case.name, [pattern]) for case in cases), pattern
    ranks = {case.name: benchmarks.importance(case) for case in cases}
    assert all(ranks[name] < len(benchmarks.ORDER) for name in benchmarks.COMPILED)


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A GPU that there is not: which (case, compiled) are measured; attn/a is wrong."""
    measured = []

    def measure(case, inputs, peak, thorough):
        measured.append((case.name, thorough))
        return ([], "wrong") if case.name == "attn/a" else ([row(case.name)], None)

    cases = [small_case(name=name, make_inputs=lambda device: {})
             for name in ("attn/b", "attn/a", *benchmarks.ORDER[0][:2])]  # fmt: skip
    stand_ins = {"about": lambda: FACTS, "measure": measure, "CASES": cases}
    for name, value in stand_ins.items():
        monkeypatch.setattr(benchmarks, name, value)
    monkeypatch.setattr(benchmarks.launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(reports, "write", lambda folder: None)
    return measured


def test_a_run_goes_on_where_an_earlier_one_ended(pretended, tmp_path, capsys):
    options = ["--results", str(tmp_path)]
    assert benchmarks.main([*options, "--minutes", "0"]) == 0
    assert pretended == [] and "5 are left: call it again to go on" in capsys.readouterr().out
    assert benchmarks.main([*options, "--cases", "attn/b"]) == 0
    assert benchmarks.main(options) == 1  # attn/a
    first, second = benchmarks.ORDER[0][:2]
    assert pretended == [("attn/b", False), (first, False), (second, False), (first, True), ("attn/a", False)]
    assert benchmarks.main(options) == 1 and len(pretended) == 5  # it is still wrong
    assert "NOT TIMED attn/a: wrong" in capsys.readouterr().err
    pretended.clear()
    lines = (tmp_path / "A-GPU" / "kernels.jsonl").read_text().replace("ab12", "cd34")
    (tmp_path / "A-GPU" / "kernels.jsonl").write_text(lines)
    assert benchmarks.main(options) == 1 and len(pretended) == 5  # other kernels


def test_block_sizes_are_compared_with_what_is_launched():
    figures = {name: {"median": m} for name, m in (("M=64 4w", 0.02), ("M=128 8w", 0.01))}
    rows = [
        {"case": "attn/x", "pick": pick, "sweep": {"cold": figures, "warm": figures}}
        for pick in (*figures, "-")
    ]
    assert sweep.table(rows).splitlines()[2:] == [
        "| attn/x | M=64 4w | 20.0 | M=128 8w | 10.0 | 100 % | M=128 8w | 100 % |",
        "| attn/x | M=128 8w | 10.0 | M=128 8w | 10.0 | - | M=128 8w | - |",
        "| attn/x | - | refused | M=128 8w | 10.0 | inf % | M=128 8w | inf % |",
    ]


def test_block_sizes_with_wrong_results_are_refused():
    case = small_case(choices=({"BLOCK_M": 64}, {"BLOCK_M": 32}))
    wrong = dataclasses.replace(case, launch=lambda config, **x: case.run(**x) * (config["BLOCK_M"] == 64))
    right, refused = sweep.try_configs(wrong, case.tiny_inputs("cpu"), "sm_90")
    assert list(right) == ["M=64"] and list(refused) == ["M=32"]
    assert "numbers are beyond the tolerance" in refused["M=32"]


def verdicts(kernels=(), models=()):
    """{figure: (measured, verdict)} of made-up lines."""
    lines = verdict.table(verdict.of_kernels(kernels) + verdict.of_models(models)).splitlines()[2:]
    cells = [line.strip("| ").split(" | ") for line in lines]
    return {figure: (measured, found) for figure, _, measured, found in cells}


def test_without_lines_nothing_is_measured():
    assert set(verdicts().values()) == {("-", "not measured")}


def test_a_verdict_needs_a_folder_with_lines(tmp_path, capsys):
    for words, message in (([], "takes one folder"), ([str(tmp_path)], "has no kernels.jsonl or models")):
        assert verdict.main(words) == 2
        assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
    (tmp_path / "models.jsonl").touch()
    assert verdict.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == (tmp_path / "verdict.md").read_text(encoding="utf-8") + "\n"


def test_goals_are_held_against_made_up_lines():
    flash = (("SDPA flash", 0.18), ("SDPA math", 0.9), ("FlexAttention compiled", 0.01))
    norm = (("NCHW", 0.5), ("channels_last", 0.4), ("NCHW compiled", 0.1))
    found = verdicts([
        row(verdict.SELF, ours=0.2, others=flash), row(verdict.SELF, ours=0.14, others=flash),
        row(verdict.SELF, "warm", ours=0.3, others=flash), row(verdict.CROSS, ours=0.1, others=flash),
        row(verdict.NORM, ours=0.1, others=norm, of_bandwidth=0.74),
    ])  # fmt: skip
    of = sum(case.run is not None and case.op == "attention" for case in CASES)
    assert list(found.values())[:6] == [
        ("140 µs", "met"),
        (f"1.29 × at {verdict.SELF}; 0 below 1 of 2 measured, of {of}", "met where measured"),
        ("1.8 ×", "met"),
        (f"1.8 × at {verdict.CROSS}; 0 below 1 of 1 measured, of {of_cross()}", "met"),
        ("74 %", "missed"),
        ("4 ×", "met"),
    ]


def of_cross():
    return sum(case.name.startswith("attn/cross77/") for case in CASES)


def test_goals_of_models_are_held_against_made_up_lines():
    def step(**times):
        return {"task": verdict.STEP, "times": {name: {"median": m} for name, m in times.items()}}

    latents = {"task": verdict.LATENTS, "name": verdict.OURS, "median": 0.9, "worst": 1.3}
    lines = [latents, step(**{verdict.OURS: 4.0, verdict.EAGER: 17.0}),
             step(**{verdict.OURS: 5.0, verdict.TUNED: 7.0})]  # fmt: skip
    found = list(verdicts(models=lines).values())[6:]
    assert found == [
        ("5 ms", "met"),
        ("4.25 ×", "met"),
        ("1.4 ×", "missed"),
        ("0.9", "met"),
        ("1.3", "missed"),
    ]


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
    for name in (verdict.EAGER, verdict.TUNED):
        assert f"| U-Net step, 2 rows | {name} |" in done.stdout
    assert "| the same, the worst of the prompts | ≤ 1.25 |" in done.stdout
    assert "Models: dry run" in done.stdout and "not measured" in done.stdout


def test_the_dry_run_needs_the_interpreter_and_a_case(capsys):
    assert benchmarks.main(["--cases", "no/such/case", "--dry-run"]) == 2
    assert "no case is named no/such/case" in capsys.readouterr().err
    assert benchmarks.main([]) == 2
    assert "--dry-run goes with TRITON_INTERPRET=1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_tells_of_each_case(capsys):
    assert benchmarks.main(["--dry-run", "--cases", "attn/cross77/d40/l4096/*", "groupnorm/c320/*"]) == 0
    out = capsys.readouterr().out
    assert "attn/cross77/d40/l4096/b2h8: right" in out and "take 2 ways, 0 of them wrong: -" in out


@pytest.mark.slow
def test_every_block_size_that_may_be_timed_gives_the_right_result(capsys):
    assert sweep.main(["--dry-run"]) == 0, capsys.readouterr().out
    assert " configs right, 0 wrong" in capsys.readouterr().out


def test_results_name_their_device_and_commit():
    for path in (KERNELS / "benchmarks" / "results").rglob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert row["device"].replace(" ", "-") == path.parent.name
            assert row["commit"] and row["torch"] and row["triton"] and row["sources"]
