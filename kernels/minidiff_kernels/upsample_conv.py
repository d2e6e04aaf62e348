"""Doubling a picture and convolving it, as four small convolutions on the small picture.

    y = conv3x3(nearest_2x(x)) + bias,    (B, K, H, W) -> (B, N, 2H, 2W)

A doubled picture says everything four times, so of the 9 pixels under a 3 × 3 kernel only 4 differ. Which of
them fall together depends on whether the output's row and column are even or odd, its phase (p, q):

    output row 2i:   doubled rows 2i-1, 2i, 2i+1   are rows  i-1, i, i    of x:  taps {0}, {1, 2}
    output row 2i+1: doubled rows 2i, 2i+1, 2i+2   are rows  i, i, i+1    of x:  taps {0, 1}, {2}

Adding up the taps that meet the same pixel gives a 2 × 2 kernel for each phase: 4 products in place of 9, and
the doubled picture is never written. The edge comes out right because the doubled picture's frame of zeros is
the small picture's, doubled.

    folded weights (p, q, a, b, N, K)            x (B, H, W, K)             y (B, 2H, 2W, N)
           ┌──────┐ 16 matrices                 ┌─┬─┬─┬─┐                  ┌─┬─┬─┬─┬─┬─┐
           │▒▒▒▒▒▒│ (N, K);                     │ │▒│▒│ │                  │ │ │ │ │ │ │
           │      │ a block reads               ├─┼─┼─┼─┤                  ├─┼─┼─┼─┼─┼─┤
           │      │ BLOCK_N rows                │ │▒│▒│ │  4 taps of       │ │ │▒│ │▒│ │  one phase of
           └──────┘ of 4 of them                └─┴─┴─┴─┘  BLOCK_M pixels  └─┴─┴─┴─┴─┴─┘  BLOCK_M pixels

Each phase is a product of matrices with B·H·W rows, N columns and sums of 4K: row m is pixel m and its three
neighbours, which are not gathered first but loaded from where they are (implicit GEMM). Global memory holds
x, the folded weights and y; shared memory the tiles of the next steps; registers the accumulator, float32.
Folded weights are rounded once more: to float16, that is an error of the size of the result's own rounding.

Least work: 32 B H W N K FLOPs instead of 72; B H W (K + 4N) + 16 N K numbers of traffic. 640 channels from 32
× 32 to 64 × 64, batch 2: 26.8 GFLOP instead of 60.4, 34 µs at 790 TFLOP/s.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from minidiff_kernels.launch import (
    INTERPRETED,
    OPTIONS,
    check_shapes,
    check_tensors,
    differentiable,
    multiprocessors,
    on_device,
    sum_dtype,
    target,
)
from minidiff_kernels.products import add_product, blocks, choose, tile_of

FOLD_BLOCK = 512  # kernels that one program folds


def upsample_conv(x, weight, bias=None, folded=None) -> torch.Tensor:
    """F.conv2d(x doubled, weight, bias, padding=1): (B, K, H, W) -> (B, N, 2H, 2W) in the memory format of x.

    x (B, K, H, W), best in channels_last: otherwise x and the result are copied; weight (N, K, 3, 3); bias
    (N,) or None; one dtype: float16, bfloat16 or float32, in the interpreter also float64. folded:
    fold(weight), if weight is known not to change; None folds it at each call, which moves 25 numbers a
    kernel, 82 MB at 1280 × 1280 in float16. Sums are float32; products of float32 are not rounded to TF32.
    Differentiable once, through PyTorch.
    Raises ValueError for shapes that don't fit, TypeError for other dtypes, RuntimeError without a GPU.
    """
    check_tensors("upsample_conv", x=x, weight=weight, bias=bias, folded=folded)
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"upsample_conv: x {tuple(x.shape)} and weight {tuple(weight.shape)} don't fit; "
                         "expected (B, K, H, W) and (N, K, 3, 3)")  # fmt: skip
    sizes = weight.shape[:2]
    check_shapes("upsample_conv", bias=(bias, sizes[:1]), folded=(folded, (2, 2, 2, 2, *sizes)))
    dtypes = {t.dtype for t in (x, weight, bias, folded) if t is not None}
    if len(dtypes) > 1:
        raise TypeError(f"upsample_conv: the tensors are {', '.join(sorted(map(str, dtypes)))}; "
                        "cast them to one dtype")  # fmt: skip
    if x.dtype == torch.float64 and not INTERPRETED:
        raise TypeError("upsample_conv: the kernel takes float64 in Triton's interpreter only")

    def launch(x, weight, bias):
        return _launch(x, fold(weight) if folded is None else folded.contiguous(), bias)

    return differentiable(launch, _recompute, x, weight, bias)


def fold(weight) -> torch.Tensor:
    """The 3 × 3 kernels (N, K, 3, 3) as 2 × 2 kernels of each phase (p, q, a, b, N, K), summed in float32.

    Has no gradient. Raises ValueError for another shape, TypeError and RuntimeError as upsample_conv does.
    """
    check_tensors("fold", weight=weight)
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"fold: weight has shape {tuple(weight.shape)}; expected (N, K, 3, 3)")
    n, k = weight.shape[:2]
    folded = torch.empty((2, 2, 2, 2, n, k), dtype=weight.dtype, device=weight.device)
    if folded.numel() > 0:
        with on_device(weight):
            grid = (triton.cdiv(n * k, FOLD_BLOCK),)
            _fold[grid](weight.detach(), folded, n * k, k, *weight.stride(), ACC=sum_dtype(weight),
                        BLOCK=FOLD_BLOCK, **OPTIONS)  # fmt: skip
    return folded


def _recompute(x, weight, bias):
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


def _launch(x, folded, bias, config=None):
    # config: blocks other than pick's, to time them
    batch, k, height, width = x.shape
    n = folded.shape[4]
    last = x.stride(1) == 1 and not x.is_contiguous()
    y = torch.empty((batch, n, 2 * height, 2 * width), dtype=x.dtype, device=x.device,
                    memory_format=torch.channels_last)  # fmt: skip
    if y.numel() > 0:
        x = x if last else x.contiguous(memory_format=torch.channels_last)
        bias = None if bias is None else bias.contiguous()
        rows = batch * height * width
        config = config or pick(x.dtype, x.device, rows, n, k)
        grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"]), 4)
        with on_device(x):
            strides = x.stride(0), x.stride(2), x.stride(3)
            _phase_conv[grid](x, folded, bias, y, rows, n, k, height, width, *strides, ACC=sum_dtype(x),
                              **config, **OPTIONS)  # fmt: skip
    return y if last else y.contiguous()


def pick(dtype, device, rows, n, k) -> dict:
    """The config for pictures of so many pixels together, n channels and sums of k."""
    tiles = triton.cdiv(multiprocessors(device), 4)  # of a phase
    return choose(configs(dtype, target(device), even=k % 64 == 0), rows, n, tiles)


def configs(dtype, target: str, even: bool) -> list[dict]:
    """The block sizes that do not spill on this target, large ones first; even: 64 divides K.

    Rows that start anywhere are loaded number by number, which takes registers from the tiles.
    """
    if not even:
        return [blocks(64, 32, 32, 8, 2, even)]
    if dtype in (torch.float32, torch.float64) or target == "interpreter":
        return [blocks(64, 64, 32, 8, 2)]
    return {
        "sm_80": [blocks(128, 128, 32, 8, 4), blocks(64, 64, 64, 4, 3)],
        "sm_90": [blocks(128, 256, 64, 8, 3), blocks(128, 128, 64, 8, 3), blocks(64, 64, 64, 4, 4)],
        "sm_100": [blocks(128, 128, 64, 8, 3), blocks(64, 64, 64, 4, 4)],
        "gfx942": [blocks(128, 128, 64, 8, 2), blocks(64, 64, 64, 4, 2)],
    }[target]


@triton.jit
def _fold(w_ptr, folded_ptr, pairs, K, stride_n, stride_k, stride_y, stride_x,
          ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # One program folds BLOCK of the N * K kernels.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = i < pairs
    w_ptr += (i // K).to(tl.int64) * stride_n + (i % K) * stride_k
    w00, w01, w02 = _row(w_ptr, stride_x, inside, ACC)
    w10, w11, w12 = _row(w_ptr + stride_y, stride_x, inside, ACC)
    w20, w21, w22 = _row(w_ptr + 2 * stride_y, stride_x, inside, ACC)
    size = tl.cast(pairs, tl.int64)
    for row in tl.static_range(4):  # 2 p + a
        left = _tap(w00, w10, w20, row // 2, row % 2)
        middle = _tap(w01, w11, w21, row // 2, row % 2)
        right = _tap(w02, w12, w22, row // 2, row % 2)
        at = folded_ptr + (8 * (row // 2) + 2 * (row % 2)) * size + i
        for column in tl.static_range(4):  # 2 q + b
            tap = _tap(left, middle, right, column // 2, column % 2).to(folded_ptr.dtype.element_ty)
            tl.store(at + (4 * (column // 2) + column % 2) * size, tap, mask=inside)


@triton.jit
def _row(w_ptr, stride_x, inside, ACC: tl.constexpr):
    # The three weights of a row.
    left = tl.load(w_ptr, mask=inside, other=0.0).to(ACC)
    middle = tl.load(w_ptr + stride_x, mask=inside, other=0.0).to(ACC)
    return left, middle, tl.load(w_ptr + 2 * stride_x, mask=inside, other=0.0).to(ACC)


@triton.jit
def _tap(first, second, third, phase: tl.constexpr, tap: tl.constexpr):
    # Phase 0 has the taps {first} and {second, third}, phase 1 {first, second} and {third}.
    if phase == 0:
        return first if tap == 0 else second + third
    return first + second if tap == 0 else third


UNSPECIALIZED = ["M", "height", "width"]  # only channels and strides say what is aligned


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _phase_conv(x_ptr, folded_ptr, bias_ptr, y_ptr, M, N, K, height, width, stride_xb, stride_xh, stride_xw,
                ACC: tl.constexpr, EVEN: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    # One program computes BLOCK_N channels of BLOCK_M pixels of one phase.
    p, q = tl.program_id(1) // 2, tl.program_id(1) % 2
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    b, pixel = m // (height * width), m % (height * width)
    i, j = pixel // width, pixel % width
    row, column = i + p - 1, j + q - 1  # of the first tap
    x_at = x_ptr + (b * stride_xb + row * stride_xh + column * stride_xw)[:, None]  # (BLOCK_M, 1)
    top, bottom = (m < M) & (row >= 0), (m < M) & (row + 1 < height)
    left, right = column >= 0, column + 1 < width
    inside = (top & left).to(tl.int32) + (top & right).to(tl.int32) * 2  # a bit for each tap
    inside += (bottom & left).to(tl.int32) * 4 + (bottom & right).to(tl.int32) * 8
    w_at = (
        folded_ptr + tl.program_id(1).to(tl.int64) * 4 * N * K + (n.to(tl.int64) * K)[None, :]
    )  # (1, BLOCK_N)
    tap, first = 0, 0  # counted along: dividing in each step would take longer
    out = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for _ in range(4 * tl.cdiv(K, BLOCK_K)):
        k = first + tl.arange(0, BLOCK_K)
        x_inside, w_inside = ((inside >> tap) & 1 != 0)[:, None], (n < N)[None, :]
        if not EVEN:
            x_inside, w_inside = x_inside & (k < K)[None, :], w_inside & (k < K)[:, None]
        near = (tap // 2) * stride_xh + (tap % 2) * stride_xw
        x = tl.load(x_at + (near + k)[None, :], mask=x_inside, other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_at + (tap * N * K + k)[:, None], mask=w_inside, other=0.0)  # (BLOCK_K, BLOCK_N)
        out = add_product(out, x, w)
        first += BLOCK_K
        tap += tl.where(first >= K, 1, 0)
        first = tl.where(first >= K, 0, first)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(ACC)[None, :]
    y_at = y_ptr + (((b * height + i) * 2 + p) * 2 * width + 2 * j + q)[:, None] * N + n[None, :]
    tl.store(y_at, out.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
