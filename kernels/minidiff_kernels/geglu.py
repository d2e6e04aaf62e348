"""value · GELU(gate), by itself and inside the matrix product that makes value and gate.

    [value, gate] = x Wᵀ + b,    y = value · gate · ½ (1 + erf(gate / √2))

is the feed-forward layer of every transformer block (Shazeer 2020, arXiv 2002.05202, eq. 6; GELU: Hendrycks &
Gimpel 2016, arXiv 1606.08415). `geglu` takes [value, gate] and reads and writes each number once, where GELU
and product apart move five. `geglu_linear` never writes [value, gate]:

       W (2N, K)             x (M, K)           global memory  x and W in tiles, y once
    value ┌──┬──┐           ┌──┬──┬──┐          shared memory  the tiles of the next BLOCK_Ks, which arrive
          │▒▒│  │ N         │▒▒│  │  │                         while these are multiplied
          ├──┼──┤           ├──┼──┼──┤ M        registers      two accumulators of BLOCK_M × BLOCK_N, float32:
     gate │▒▒│  │ N         │  │  │  │                         as many as a plain product with tiles twice
          └──┴──┘           └──┴──┴──┘                         as wide has

One block multiplies the same rows of x with BLOCK_N rows of W's value half and the BLOCK_N rows of its gate
half that belong to them, so it holds both factors of its part of y at the end. The weight stays as it is in
the checkpoint. It pays because the product is small: M = 8192, K = 320, N = 1280 are 13.4 GFLOP, 17 µs at 790
TFLOP/s, but [value, gate] are 42 MB that would be written and read again, 25 µs at 3.35 TB/s.

Least work: 4 M N K FLOPs, M N error functions, (M K + 2 N K + M N) numbers of traffic.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from minidiff_kernels.launch import (
    INTERPRETED,
    OPTIONS,
    check_tensors,
    differentiable,
    multiprocessors,
    on_device,
    sum_dtype,
    target,
)
from minidiff_kernels.products import add_product, blocks, choose, tile_of

TILE = {"BLOCK_M": 8, "BLOCK_N": 256, "num_warps": 8}  # of geglu: 8 numbers of value and gate a thread


def geglu(x) -> torch.Tensor:
    """value · GELU(gate) of x = [value, gate]: (…, 2C) -> (…, C); exact GELU, with the error function.

    float16, bfloat16 and float32 are computed in float32, float64 in itself. Differentiable once, through
    PyTorch. Raises ValueError for an odd last axis, TypeError for other dtypes, RuntimeError without a GPU.
    """
    check_tensors("geglu", x=x)
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"geglu: x has shape {tuple(x.shape)}; expected (..., 2C), value and gate")
    return differentiable(_launch, _recompute, x)


def geglu_linear(x, weight, bias=None) -> torch.Tensor:
    """geglu(F.linear(x, weight, bias)) without the intermediate result: (…, K) -> (…, N).

    x (…, K); weight (2N, K), first the rows of value, then those of gate; bias (2N,) or None; one dtype:
    float16, bfloat16 or float32, in the interpreter also float64. Sums are float32 and are not rounded before
    GELU; products of float32 are not rounded to TF32. Differentiable once, through PyTorch.
    Raises ValueError for shapes that don't fit, TypeError for other dtypes, RuntimeError without a GPU.
    """
    check_tensors("geglu_linear", x=x, weight=weight, bias=bias)
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[0] % 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"geglu_linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} don't fit; "
                         "expected (..., K) and (2N, K)")  # fmt: skip
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"geglu_linear: bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)")
    if any(t.dtype != x.dtype for t in (weight, bias) if t is not None):
        raise TypeError(f"geglu_linear: x is {x.dtype}, weight {weight.dtype}, bias "
                        f"{None if bias is None else bias.dtype}; cast them to one dtype")  # fmt: skip
    if x.dtype == torch.float64 and not INTERPRETED:
        raise TypeError("geglu_linear: the kernel takes float64 in Triton's interpreter only")
    return differentiable(_launch_linear, _recompute_linear, x, weight, bias)


def _recompute(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _recompute_linear(x, weight, bias):
    return _recompute(F.linear(x, weight, bias))


def _launch(x):
    columns = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = _rows(x)
    grid = (triton.cdiv(columns, TILE["BLOCK_N"]), triton.cdiv(len(rows), TILE["BLOCK_M"]))
    with on_device(x):
        _geglu[grid](rows, y, len(rows), columns, rows.stride(0), ACC=sum_dtype(x), **TILE, **OPTIONS)
    return y


def _launch_linear(x, weight, bias, config=None):
    # config: blocks other than pick's, to time them
    y = torch.empty((*x.shape[:-1], len(weight) // 2), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows, weight = _rows(x), _rows(weight)
    bias = None if bias is None else bias.contiguous()
    sizes = m, n, _ = len(rows), y.shape[-1], rows.shape[1]
    config = config or pick(x.dtype, x.device, *sizes)
    grid = (triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"]),)
    with on_device(x):
        _geglu_linear[grid](rows, weight, bias, y, *sizes, rows.stride(0), weight.stride(0),
                            ACC=sum_dtype(x), **config, **OPTIONS)  # fmt: skip
    return y


def pick(dtype, device, m, n, k) -> dict:
    """The config of geglu_linear for a result (m, n) and sums of k numbers."""
    return choose(configs(dtype, target(device), even=k % 64 == 0), m, n, multiprocessors(device))


def _rows(x):
    """x as (rows, columns) whose columns are neighbours in memory; a copy where there is no such view."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def configs(dtype, target: str, even: bool) -> list[dict]:
    """The block sizes of geglu_linear that do not spill on this target, large ones first; even: 64 divides K.

    Rows that start anywhere are loaded number by number, which takes registers from the tiles.
    """
    if not even:
        return [blocks(64, 32, 32, 8, 2, even)]
    if dtype in (torch.float32, torch.float64) or target == "interpreter":
        return [blocks(64, 32, 32, 8, 2)]
    return {
        "sm_80": [blocks(128, 64, 64, 8, 3), blocks(64, 64, 32, 4, 4)],
        "sm_90": [blocks(128, 128, 64, 8, 3), blocks(128, 64, 64, 8, 3), blocks(64, 64, 64, 4, 4)],
        "sm_100": [blocks(128, 128, 64, 8, 3), blocks(128, 64, 64, 8, 3), blocks(64, 64, 64, 4, 4)],
        "gfx942": [blocks(128, 128, 32, 8, 2), blocks(128, 64, 64, 8, 2), blocks(64, 64, 64, 4, 2)],
    }[target]


@triton.jit
def _gated(value, gate):
    return value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))


@triton.jit
def _geglu(
    x_ptr, y_ptr, rows, columns, stride_xm, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    # One program computes a tile of y from the same tile of both halves of x.
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    inside = (m < rows)[:, None] & (n < columns)[None, :]  # (BLOCK_M, BLOCK_N)
    at = x_ptr + (m * stride_xm)[:, None] + n[None, :]
    value = tl.load(at, mask=inside, other=0.0).to(ACC)
    gate = tl.load(at + columns, mask=inside, other=0.0).to(ACC)
    y = _gated(value, gate)
    tl.store(y_ptr + (m * columns)[:, None] + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _geglu_linear(x_ptr, weight_ptr, bias_ptr, y_ptr, M, N, K, stride_xm, stride_wn,
                  ACC: tl.constexpr, EVEN: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    # One program computes a (BLOCK_M, BLOCK_N) tile of y.
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (m * stride_xm)[:, None] + k[None, :]  # (BLOCK_M, BLOCK_K)
    value_at = weight_ptr + k[:, None] + (n * stride_wn)[None, :]  # (BLOCK_K, BLOCK_N)
    gate_at = value_at + tl.cast(N, tl.int64) * stride_wn
    value = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    gate = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, K, BLOCK_K):
        x_inside, w_inside = (m < M)[:, None], (n < N)[None, :]
        if not EVEN:
            x_inside, w_inside = x_inside & (k < K - start)[None, :], w_inside & (k < K - start)[:, None]
        x = tl.load(x_at, mask=x_inside, other=0.0)
        w = tl.load(value_at, mask=w_inside, other=0.0)
        value = add_product(value, x, w)
        w = tl.load(gate_at, mask=w_inside, other=0.0)
        gate = add_product(gate, x, w)
        x_at += BLOCK_K
        value_at += BLOCK_K
        gate_at += BLOCK_K
    if bias_ptr is not None:
        value += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(ACC)[None, :]
        gate += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(ACC)[None, :]
    y = _gated(value, gate)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + (m * N)[:, None] + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
