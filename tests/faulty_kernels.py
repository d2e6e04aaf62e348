"""Kernels that could not be launched or would be slow, and one that is right, compiled: prints the faults."""

import triton
import triton.language as tl
from minidiff_kernels import compile_check
from minidiff_kernels.case import KernelCase


@triton.jit
def product(a_ptr, b_ptr, y_ptr, BLOCK: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, K)[None, :]
    out = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(STEPS):
        a = tl.load(a_ptr + rows * K + columns)  # (BLOCK, K)
        b = tl.load(b_ptr + rows * K + columns)  # (BLOCK, K)
        out = tl.dot(a, tl.trans(b), out)
        a_ptr += BLOCK * K
        b_ptr += BLOCK * K
    tl.store(y_ptr + rows * BLOCK + tl.arange(0, BLOCK)[None, :], out)


@triton.jit
def adding(a_ptr, b_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(a_ptr + at) + tl.load(b_ptr + at))


POINTERS = {"a_ptr": "*fp16", "b_ptr": "*fp16", "y_ptr": "*fp32"}
COMMON = {"op": "attention", "shape": (), "signature": POINTERS, "aligned": tuple(POINTERS)}
TARGETS = ("sm_80", "sm_90", "gfx942")
SPILLING = {"K": 32, "STEPS": 8, "num_warps": 1, "num_stages": 2}
CASES = [
    KernelCase(name="right", kernel=product, targets=TARGETS, **COMMON,
               configs=[{"BLOCK": 64, "K": 32, "STEPS": 8, "num_warps": 4, "num_stages": 2}]),
    KernelCase(name="spilling", kernel=product, targets=("sm_90", "gfx942"), **COMMON,
               configs=[SPILLING | {"BLOCK": 128, "targets": ("sm_90",)},  # 256 takes ptxas a minute
                        SPILLING | {"BLOCK": 256, "targets": ("gfx942",)}]),
    KernelCase(name="large", kernel=product, targets=("sm_80", "gfx942"), **COMMON,
               configs=[{"BLOCK": 128, "K": 128, "STEPS": 8, "num_warps": 8, "num_stages": 4}]),
    KernelCase(name="adding", kernel=adding, **COMMON,
               configs=[{"BLOCK": 1024, "num_warps": 4, "targets": TARGETS}]),
]  # fmt: skip

if __name__ == "__main__":
    for line in compile_check.check(CASES, jobs=2):
        print(f"FAULT {line}")
