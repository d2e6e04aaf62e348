"""GEGLU's cases: the feed-forward layers of Stable Diffusion in float16, other dtypes, and the gate alone."""

import torch
import torch.nn.functional as F
import triton.language as tl

from minidiff_kernels.case import TARGETS, KernelCase, specialized
from minidiff_kernels.geglu import (
    TILE,
    _geglu,
    _geglu_linear,
    _launch_linear,
    configs,
    geglu,
    geglu_linear,
    pick,
)
from minidiff_kernels.products import blocks
from minidiff_kernels.shapes import GEGLU

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCES = {"fp16": 3e-3, "bf16": 2e-2, "fp32": 1e-5}  # as in the tests
CANDIDATES = [  # blocks for sm_90 beside those that are launched, to time them
    blocks(128, 128, 64, 8, 4),
    blocks(256, 64, 64, 8, 3),
    blocks(128, 64, 64, 8, 4),
    blocks(128, 64, 64, 4, 3),
    blocks(64, 128, 64, 4, 3),
]
OTHERS = [((2048, 640, 2560), "bf16"), ((2048, 640, 2560), "fp32"), ((2000, 1000, 1001), "fp16")]
GATES = [((8192, 1280), "fp16"), ((2048, 2560), "bf16"), ((512, 5120), "fp32")]  # rows, C: without a product


def _linear_case(shape, where, dtype="fp16") -> KernelCase:
    m, k, n = shape
    names = ("x_ptr", "weight_ptr", "bias_ptr", "y_ptr")
    numbers = {"M": m, "N": n, "K": k, "stride_xm": k, "stride_wn": k}
    given = specialized(dict.fromkeys(names, f"*{dtype}"), numbers, ["M"])
    given["constexprs"]["ACC"] = tl.float32
    found = [(t, config) for t in TARGETS for config in configs(DTYPES[dtype], t, even=k % 64 == 0)]
    found += [("sm_90", config) for config in CANDIDATES if where]
    return KernelCase(
        name="/".join(["geglu", f"k{k}", f"n{n}", f"m{m}"] + [dtype] * (dtype != "fp16")),
        kernel=_geglu_linear,
        configs=[{"targets": (t,)} | config for t, config in found],
        op="geglu",
        shape=shape,
        dtype=dtype,
        where=where,
        make_inputs=lambda device: _inputs((m, k, n), dtype, device),
        tiny_inputs=lambda device: _inputs((70, 64 + k % 64, 80), dtype, device),
        run=geglu_linear,
        launch=lambda config, x, weight, bias: _launch_linear(x, weight, bias, config),
        pick=lambda device: pick(DTYPES[dtype], device, m, n, k),
        reference=reference,
        flops=4 * m * n * k,
        bytes=(m * k + 2 * n * k + m * n) * DTYPES[dtype].itemsize,
        atol=TOLERANCES[dtype],
        rtol=TOLERANCES[dtype],
        **given,
    )


def _gate_case(shape, dtype) -> KernelCase:
    rows, columns = shape
    numbers = {"rows": rows, "columns": columns, "stride_xm": 2 * columns}
    given = specialized(dict.fromkeys(("x_ptr", "y_ptr"), f"*{dtype}"), numbers)
    given["constexprs"]["ACC"] = tl.float32
    return KernelCase(
        name="/".join(["geglu", "gate", f"c{columns}", f"m{rows}"] + [dtype] * (dtype != "fp16")),
        kernel=_geglu,
        configs=[TILE],
        op="geglu",
        shape=shape,
        dtype=dtype,
        make_inputs=lambda device: {"x": _randn((rows, 2 * columns), dtype, device)},
        tiny_inputs=lambda device: {"x": _randn((11, 2 * 300), dtype, device)},
        run=geglu,
        reference=reference,
        flops=5 * rows * columns,
        bytes=3 * rows * columns * DTYPES[dtype].itemsize,
        atol=TOLERANCES[dtype],
        rtol=TOLERANCES[dtype],
        **given,
    )


def _randn(shape, dtype, device, seed=0, scale=1.0):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, dtype=DTYPES[dtype], device=device, generator=generator) * scale


def _inputs(shape, dtype, device):
    """Weights as large as those of trained layers: value and gate have a deviation of about 1."""
    m, k, n = shape
    sizes = {"x": ((m, k), 1.0), "weight": ((2 * n, k), k**-0.5), "bias": ((2 * n,), 0.1)}
    return {name: _randn(size, dtype, device, seed, scale)
            for seed, (name, (size, scale)) in enumerate(sizes.items())}  # fmt: skip


def reference(x, weight=None, bias=None) -> torch.Tensor:
    """The formula in float64."""
    both = x.double() if weight is None else F.linear(x.double(), weight.double(), bias.double())
    value, gate = both.chunk(2, dim=-1)
    return value * F.gelu(gate)


CASES = [
    *(_linear_case(shape, where) for shape, where in GEGLU.items()),
    *(_linear_case(shape, "", dtype) for shape, dtype in OTHERS),
    *(_gate_case(shape, dtype) for shape, dtype in GATES),
]
