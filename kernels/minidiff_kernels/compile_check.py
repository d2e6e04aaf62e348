"""Compiles every kernel of the registry for GPUs that need not be here, and holds it against their limits.

`python -m minidiff_kernels.compile_check [--targets sm_90 …] [--cases 'attn/*' …] [--jobs 2] [--keep]` prints
what each configuration takes, and ends with 1 if one of them could not be launched or would be slow: a spill
of registers to memory, more shared memory, tensor memory or registers than a block can have, an attention
kernel of half precision without matrix instructions, a case without a configuration for one of its targets.
--keep leaves all in Triton's cache: launches find it there by Triton 3.6, while 3.9 has other keys for them.
"""

import argparse
import contextlib
import fnmatch
import io
import multiprocessing
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget

from minidiff_kernels import launch
from minidiff_kernels.case import TARGETS, KernelCase
from minidiff_kernels.cases import CASES

OPTIONS = (
    *("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "waves_per_eu"),
    "matrix_instr_nonkdim",
)


@dataclass(frozen=True)
class Limits:
    """What a block of threads can have: bytes of shared memory, registers a thread, threads a warp."""

    target: GPUTarget
    shared: int
    registers: int
    matrix: str  # matches its matrix instructions

    def block_registers(self, registers, warps):
        """(what a block takes of the registers that its threads share, how many there are)."""
        if (
            self.target.backend == "hip"
        ):  # 4 SIMD units; each holds every fourth wave, with 512 registers a lane
            return -(-warps // 4) * registers, 512
        return warps * 32 * -(-registers // 8) * 8, 65_536  # given out by eights


_MMA = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma"
LIMITS = {
    "sm_80": Limits(GPUTarget("cuda", 80, 32), 166_912, 255, _MMA),
    "sm_90": Limits(GPUTarget("cuda", 90, 32), 232_448, 255, _MMA),
    "sm_100": Limits(GPUTarget("cuda", 100, 32), 232_448, 255, _MMA),
    "gfx942": Limits(GPUTarget("hip", "gfx942", 64), 65_536, 512, "v_s?mfma"),
}
TENSOR_MEMORY = 512  # columns, of sm_100's tcgen05


@dataclass(frozen=True)
class Compiled:
    """What a configuration of a kernel takes on a target."""

    registers: int  # of a thread; gfx942: VGPRs and AGPRs
    spill: int  # bytes of a thread that go to memory and back
    shared: int  # bytes of a block
    tensor_memory: int  # columns
    matrix: bool  # whether it has matrix instructions
    warps: int
    seconds: float  # of processor time, of compiling


@dataclass(frozen=True)
class Task:
    """One compilation: a kernel with a configuration, on a target, for all cases that share it."""

    case: KernelCase  # the first of them
    config: dict
    target: str

    @property
    def key(self):
        """Equal keys compile to equal code."""
        case = self.case
        mappings = (case.signature, case.constexprs, self.config)
        return (case.kernel.__name__, self.target, case.aligned, *map(_frozen, mappings))


def _frozen(mapping):
    return tuple(sorted((key, str(value)) for key, value in mapping.items()))


def compile_case(case: KernelCase, config: dict, target: str) -> Compiled:
    """Compiles case.kernel with a config for target, one of LIMITS; nothing is run, no GPU is needed."""
    kernel, limits = case.kernel, LIMITS[target]
    options = launch.OPTIONS | {key: value for key, value in config.items() if key in OPTIONS}
    constants = case.constexprs | {key: value for key, value in config.items() if key not in OPTIONS}
    types = case.signature | dict.fromkeys(constants, "constexpr")
    if set(types) != set(kernel.arg_names) or set(case.signature) & set(constants):
        wrong = set(types) ^ set(kernel.arg_names) or set(case.signature) & set(constants)
        raise ValueError(f"{case.name}: {', '.join(sorted(wrong))} must be an argument of {kernel.__name__} "
                         f"and in one of signature, constexprs and config {config}")  # fmt: skip
    position = {name: (kernel.arg_names.index(name),) for name in types}
    source = triton.compiler.ASTSource(
        kernel,
        {name: types[name] for name in kernel.arg_names},
        {position[name]: value for name, value in constants.items()},
        {position[name]: [["tt.divisibility", 16]] for name in case.aligned},
    )
    start, log = sum(os.times()[:4]), io.StringIO()  # of this process and its children, the assemblers
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=limits.target, options=options)
    seconds = sum(os.times()[:4]) - start
    assembly = compiled.asm["amdgcn" if limits.target.backend == "hip" else "ptx"]
    if limits.target.backend == "hip":
        registers, spill = _amd(assembly, "vgpr_count"), 4 * _amd(assembly, "vgpr_spill_count")
    else:
        registers, spill = _ptxas(log.getvalue())
    metadata = compiled.metadata
    return Compiled(registers, spill, metadata.shared, getattr(metadata, "tmem_size", None) or 0,
                    re.search(limits.matrix, assembly) is not None, metadata.num_warps, seconds)  # fmt: skip


def _amd(assembly, field):
    return int(re.search(rf"^\s*\.{field}:\s*(\d+)", assembly, re.MULTILINE)[1])


def _ptxas(log):
    """(registers, spilled bytes) that ptxas -v tells, the greatest of stores and loads."""
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    return int(re.search(r"Used (\d+) registers", log)[1]), max(spills)


def faults(case: KernelCase, target: str, compiled: Compiled) -> list[str]:
    """What is wrong with a compiled configuration; empty if it can be launched and does not spill."""
    limits, found = LIMITS[target], []
    taken, available = limits.block_registers(compiled.registers, compiled.warps)
    if compiled.spill > case.max_spill_bytes:
        found.append(f"{compiled.spill} bytes of registers spill")
    if compiled.shared > limits.shared:
        found.append(f"{compiled.shared} bytes of shared memory, of {limits.shared}")
    if compiled.registers > limits.registers or taken > available:
        found.append(f"{compiled.registers} registers in {compiled.warps} warps")
    if compiled.tensor_memory > TENSOR_MEMORY:
        found.append(f"{compiled.tensor_memory} columns of tensor memory, of {TENSOR_MEMORY}")
    if case.op == "attention" and case.dtype in ("fp16", "bf16") and not compiled.matrix:
        found.append("no matrix instruction")
    return found


def tasks(cases, targets) -> tuple[list[Task], list[str]]:
    """The compilations that these cases need, each once, and the cases without a config for a target."""
    needed, missing = {}, []
    for case in cases:
        for target in (target for target in case.targets if target in targets):
            configs = case.configs_for(target)
            if not configs:
                missing.append(f"{case.name}, {target}: no configuration")
            for config in configs:
                task = Task(case, config, target)
                needed.setdefault(task.key, task)
    return list(needed.values()), missing


_todo: list[Task] = []  # what the processes, which are forks of this one, work on


def _compile(number):
    task = _todo[number]
    return compile_case(task.case, task.config, task.target)


def check(cases=CASES, targets=TARGETS, jobs=2, keep=False) -> list[str]:
    """Compiles all, prints a line for each configuration and returns what is wrong, a line for each fault.

    keep: in Triton's cache, where launches look, rather than in a folder that goes away.
    """
    _todo[:], wrong = tasks(cases, targets)
    width = max((len(_title(task)) for task in _todo), default=0)
    print(f"{'case, configuration':{width}}  target  regs  spill   shared        of  tmem  matrix      s")
    with contextlib.ExitStack() as stack:
        if not keep:
            stack.enter_context(triton.knobs.cache.scope())
            triton.knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        pool = stack.enter_context(ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")))
        for task, compiled in zip(_todo, pool.map(_compile, range(len(_todo))), strict=True):
            print(f"{_title(task):{width}}  {task.target:6}  {compiled.registers:4}  {compiled.spill:5}  "
                  f"{compiled.shared:7}  {LIMITS[task.target].shared:8}  {compiled.tensor_memory:4}  "
                  f"{'yes' if compiled.matrix else '-':6}  {compiled.seconds:5.2f}", flush=True)  # fmt: skip
            wrong += [
                f"{_title(task)}, {task.target}: {fault}"
                for fault in faults(task.case, task.target, compiled)
            ]
    return wrong


def _title(task):
    """The case's name and its configuration in a few words: 128 × 64, 8 warps, 2 stages."""
    blocks = [
        f"{key.removeprefix('BLOCK_')}={value}" for key, value in task.config.items() if key not in OPTIONS
    ]
    options = [
        f"{value}{key.removeprefix('num_')[0]}" for key, value in task.config.items() if key in OPTIONS
    ]
    return f"{task.case.name} {task.case.kernel.__name__} {' '.join(blocks + options)}"


def main(argv=None) -> int:
    """The command; returns its exit status: 1 for faults, 2 where nothing can be compiled."""
    parser = argparse.ArgumentParser(
        prog="python -m minidiff_kernels.compile_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument(
        "--cases", nargs="+", default=["*"], metavar="PATTERN", help="names, such as 'attn/*'"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile at once")
    parser.add_argument("--keep", action="store_true", help="leave all in Triton's cache, for launches")
    arguments = parser.parse_args(argv)
    if launch.INTERPRETED:
        print(
            "TRITON_INTERPRET=1 is set, so kernels are interpreted; unset it to compile them", file=sys.stderr
        )
        return 2
    chosen = [
        case for case in CASES if any(fnmatch.fnmatch(case.name, pattern) for pattern in arguments.cases)
    ]
    if not chosen:
        print(f"no case is named {' or '.join(arguments.cases)}; there are {len(CASES)}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    wrong = check(chosen, arguments.targets, arguments.jobs, arguments.keep)
    print(
        f"{len(_todo)} configurations of {len(chosen)} cases compiled in {time.perf_counter() - start:.0f} s"
    )
    for line in wrong:
        print(f"FAULT {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
