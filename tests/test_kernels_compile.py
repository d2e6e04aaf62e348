"""Kernels compiled for GPUs that are not here: all cases of the registry, within the limits of each GPU.

Tests interpret kernels (conftest); what compiles them runs in a process of its own.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
from minidiff_kernels import compile_check
from minidiff_kernels.case import TARGETS
from minidiff_kernels.cases import CASES
from minidiff_kernels.compile_check import LIMITS, Compiled, Task, faults, tasks
from test_structure import KERNELS, ROOT

RIGHT = Compiled(registers=128, spill=0, shared=49_152, tensor_memory=0, matrix=True, warps=8, seconds=1.0)
ATTENTION = next(case for case in CASES if case.op == "attention" and case.dtype == "fp16")


def compile_with(*command):
    """A Python command that compiles: without the interpreter, kernels/ on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(KERNELS), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_no_case_spills_or_exceeds_a_limit_of_its_targets():
    done = compile_with("-m", "minidiff_kernels.compile_check", "--jobs", "2")
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert f"configurations of {len(CASES)} cases compiled" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_launched_is_what_is_compiled(target):
    done = compile_with("tests/launched_kernels.py", target)
    assert done.returncode == 0, done.stderr
    assert ", 0 launched but not compiled" in done.stdout, done.stdout


@pytest.mark.slow
def test_faulty_kernels_are_found():
    done = compile_with("tests/faulty_kernels.py")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for fault in (
        "spilling .*sm_90: [1-9][0-9]* bytes of registers spill",
        "spilling .*gfx942: [1-9][0-9]* bytes of registers spill",
        "large .*sm_80: [0-9]+ bytes of shared memory, of 166912",
        "large .*gfx942: [0-9]+ bytes of shared memory, of 65536",
        "adding .*sm_90: no matrix instruction",
        "adding .*gfx942: no matrix instruction",
        "adding, sm_100: no configuration",
    ):
        assert any(compile_check.re.search(f"^FAULT {fault}", line) for line in lines), (fault, done.stdout)
    assert not any(line.startswith("FAULT right") for line in lines), done.stdout


@pytest.mark.parametrize(
    ("target", "change", "fault"),
    [
        ("sm_90", {}, None),
        ("sm_90", {"spill": 4}, "4 bytes of registers spill"),
        ("sm_80", {"shared": 166_913}, "166913 bytes of shared memory, of 166912"),
        ("sm_90", {"shared": 166_913}, None),
        ("gfx942", {"shared": 65_537}, "65537 bytes of shared memory, of 65536"),
        ("sm_80", {"registers": 255}, None),
        ("sm_80", {"registers": 255, "warps": 16}, "255 registers in 16 warps"),
        ("gfx942", {"registers": 300, "warps": 8}, "300 registers in 8 warps"),
        ("gfx942", {"registers": 300, "warps": 4}, None),
        ("sm_100", {"tensor_memory": 513}, "513 columns of tensor memory, of 512"),
        ("sm_90", {"matrix": False}, "no matrix instruction"),
    ],
)
def test_each_limit_is_checked(target, change, fault):
    found = faults(ATTENTION, target, dataclasses.replace(RIGHT, **change))
    assert found == ([] if fault is None else [fault])


def test_float32_and_other_operations_need_no_matrix_instruction():
    plain = dataclasses.replace(RIGHT, matrix=False)
    assert faults(dataclasses.replace(ATTENTION, dtype="fp32"), "sm_90", plain) == []
    assert faults(dataclasses.replace(ATTENTION, op="group_norm"), "sm_90", plain) == []


def test_equal_compilations_are_done_once_and_missing_ones_told():
    twice = [ATTENTION, dataclasses.replace(ATTENTION, name="again")]
    assert len(tasks(twice, ["sm_90"])[0]) == len(ATTENTION.configs_for("sm_90"))
    other = dataclasses.replace(ATTENTION, constexprs=ATTENTION.constexprs | {"SCALE": 2.0})
    assert len(tasks([ATTENTION, other], ["sm_90"])[0]) == 2 * len(ATTENTION.configs_for("sm_90"))
    bare = dataclasses.replace(ATTENTION, name="bare", configs=[{"targets": ("sm_90",)}])
    assert tasks([bare], TARGETS)[1] == [f"bare, {t}: no configuration" for t in TARGETS if t != "sm_90"]


def test_an_argument_without_a_type_or_value_is_named():
    signature = {name: kind for name, kind in ATTENTION.signature.items() if name != "q_ptr"}
    broken = dataclasses.replace(ATTENTION, signature=signature)
    with pytest.raises(
        ValueError, match=r"attn/.*: q_ptr must be an argument of _attention_tiled and in one of"
    ):
        compile_check.compile_case(broken, broken.configs_for("sm_90")[0], "sm_90")


def test_what_compilers_print_is_read():
    log = ("ptxas info    : Function properties for kernel\n    0 bytes stack frame, 40 bytes spill stores, "
           "44 bytes spill loads\nptxas info    : Used 255 registers, used 1 barriers")  # fmt: skip
    assert compile_check._ptxas(log) == (255, 44)
    assert compile_check._amd("    .vgpr_count:     96\n    .vgpr_spill_count: 3\n", "vgpr_spill_count") == 3


def test_the_interpreter_is_refused(capsys):
    assert compile_check.main([]) == 2
    assert "TRITON_INTERPRET=1 is set, so kernels are interpreted; unset it" in capsys.readouterr().err


def test_targets_have_limits_and_a_task_says_what_it_is():
    assert set(LIMITS) == set(TARGETS)
    task = Task(ATTENTION, {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}, "sm_90")
    assert compile_check._title(task) == f"{ATTENTION.name} _attention_tiled M=128 N=64 8w 2s"
