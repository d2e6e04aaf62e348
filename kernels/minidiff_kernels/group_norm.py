"""Group norm with SiLU and a time embedding in one read for the sums and one for the result.

    y = (x + temb - mean) / √(variance + eps) · weight + bias,  then  y · sigmoid(y)

mean and variance are those of a group of neighbouring channels over all pixels of a picture (Wu & He 2018,
arXiv 1803.08494, eqs. 1-3). PyTorch needs five passes over memory for norm and SiLU; the least is two
(read, write) if a group fits on the chip, else three (read, read, write). There are as many pictures below.

A group fits (U-Nets at 16 × 16 pixels and below): `_norm_one_block`, one launch, one block a group.

          channels ──►                      global memory  x in, y out, each once
    pixels ┌──┬──┬──┬──┐                    registers      the whole group, float32
      │    │▒▒│  │  │  │ ▒▒ one block       shared memory  only to add up between warps
      ▼    │▒▒│  │  │  │
           └──┴──┴──┴──┘

It does not: three launches, of which the middle one is tiny. Only that one knows about groups, so 10 or 60
channels in a group are as good as 32.

           ┌──┬──┬──┬──┐  1 `_moments`: one block has 64 channels of a chunk of pixels and walks through it
    chunk 0│▒▒│  │  │  │    tile by tile. Each place of the tile has a sum and a sum of squares in registers,
           ├──┼──┼──┼──┤    counted from the first value it met; at the end the tile's rows are joined.
    chunk 1│  │  │  │  │  2 `_tables`: one block a group joins its chunks, always in the same order, and
           ├──┼──┼──┼──┤    writes center, scale and shift of each channel, so that
    chunk 2│  │  │  │  │  3 `_apply` is y = (x - center) · scale + shift: the same blocks in the opposite
           └──┴──┴──┴──┘    order, because the L2 cache still holds what was read last.

Why nothing cancels: E[x²] - E[x]² loses all digits if the mean is 1e4 times the deviation. Counted from one
of its own k values, the variance of k values loses at most a factor of k in precision, whatever the values
are, because that value is part of the variance; k is the number of tiles in a chunk, 2 to 32. Everything else
is joined as Chan, Golub & LeVeque 1983 (eq. 2.1) do, by squares of distances between means. Means are kept as
distances from the first pixel, and `center` and `shift` together hold the mean to twice float32's digits:
x - center is exact near the mean. So float32 at mean 1e4 is as good as at mean 0. temb only moves the means
of channels: it costs nothing in passes 1 and 3.

Least work for N numbers of s bytes: 2 N s bytes, or 3 N s with three launches (3 is what bandwidth is
compared with). 4 FLOPs a number for the sums, 8 with an exponential for the result: memory decides. VAE's
128 channels at 512 × 512 in float16 are 201 MB, 60 µs at 3.35 TB/s.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from minidiff_kernels.launch import OPTIONS, check_shapes, check_tensors, differentiable, on_device, sum_dtype

ONE_BLOCK = (
    32768  # numbers of a group, padded to powers of two, that one block keeps: 64 registers in 512 threads
)
TILE = 2048  # numbers of a tile in pass 1: 8 in each of 256 threads, so that four tiles can be on their way
TABLE_BLOCK = 512  # parts of a group that pass 2 joins at a time
MAX_BLOCKS = (
    512  # of a picture in passes 1 and 3: 4 for each multiprocessor; no part of the result depends on the GPU
)


class Blocks(NamedTuple):
    """How C channels of N pixels are cut into tiles, and into chunks of pixels; None: a block has a group."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int
    chunk_pixels: int | None


def group_norm(x, num_groups, weight, bias, eps, silu=False, temb=None) -> torch.Tensor:
    """Group norm of x + temb, followed by SiLU if silu: (B, C, …) -> the same shape, dtype and memory format.

    x (B, C, H, W), contiguous, channels_last or a view of one, or (B, C, T); weight and bias (C,) or None;
    temb (B, C) or None. float16, bfloat16 and float32 are summed in float32, float64 in itself. The same
    picture gives the same bits, whatever else is in the batch. Differentiable once, through PyTorch.
    Raises ValueError for shapes that don't fit, TypeError for other dtypes, RuntimeError without a GPU.
    """
    check_tensors("group_norm", x=x, weight=weight, bias=bias, temb=temb)
    if x.ndim < 2:
        raise ValueError(f"group_norm: x has shape {tuple(x.shape)}; expected (B, C, ...)")
    batch, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm: {channels} channels can't be split into {num_groups} groups; "
                         "num_groups must divide the channels")  # fmt: skip
    one = (channels,)
    check_shapes("group_norm", weight=(weight, one), bias=(bias, one), temb=(temb, (batch, channels)))

    def launch(x, weight, bias, temb):
        return _launch(x, num_groups, weight, bias, float(eps), silu, temb)

    def recompute(x, weight, bias, temb):
        wide = torch.promote_types(x.dtype, torch.float32)
        x, weight, bias, temb = (t if t is None else t.to(wide) for t in (x, weight, bias, temb))
        if temb is not None:
            x = x + temb.unflatten(1, (-1,) + (1,) * (x.ndim - 2))
        y = torch.group_norm(x, num_groups, weight, bias, eps)  # F.group_norm refuses groups of one value
        return (F.silu(y) if silu else y).to(dtype)

    dtype = x.dtype
    return differentiable(launch, recompute, x, weight, bias, temb)


def blocks(channels, pixels, num_groups, channels_last) -> Blocks:
    """The blocks for pictures of this size: those that were compiled without spills, see cases."""
    width = triton.next_power_of_2(channels // num_groups)
    if triton.next_power_of_2(pixels) * width <= ONE_BLOCK:
        size = triton.next_power_of_2(pixels) * width
        return Blocks(triton.next_power_of_2(pixels), width, min(16, max(1, size // 1024)), None)
    if channels_last:  # 64 channels of float16 are one line of 128 bytes
        width = 64 if channels % 64 == 0 else min(64, triton.next_power_of_2(channels))
        height = TILE // width
    else:  # neighbours in memory are pixels
        height = min(TILE, triton.next_power_of_2(pixels))
        width = min(TILE // height, triton.next_power_of_2(channels))
    return chunked(channels, pixels, height, width, 8, MAX_BLOCKS)


def chunked(channels, pixels, height, width, num_warps, most) -> Blocks:
    """Tiles of height pixels and width channels, and chunks so long that a picture has most blocks."""
    chunks = max(1, most // triton.cdiv(channels, width))
    tiles = triton.cdiv(pixels, height)
    return Blocks(height, width, num_warps, triton.cdiv(tiles, chunks) * height)


def _launch(x, num_groups, weight, bias, eps, silu, temb, cut=None):
    # cut: other blocks than those of `blocks`, to time them
    batch, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    x, y, strides = _flat(x, pixels)
    if y.numel() == 0:
        return y
    weight, bias, temb = (t if t is None else t.contiguous() for t in (weight, bias, temb))
    cut = cut or blocks(channels, pixels, num_groups, channels_last=strides[5] == 1 and pixels > 1)
    tile = OPTIONS | {"ACC": sum_dtype(x), "num_warps": cut.num_warps}
    tile |= {"BLOCK_N": cut.BLOCK_N, "BLOCK_C": cut.BLOCK_C}
    sizes = (channels, pixels, *strides)
    per_group = channels // num_groups
    with on_device(x):
        if cut.chunk_pixels is None:
            _norm_one_block[(batch * num_groups,)](x, y, weight, bias, temb, *sizes, PER_GROUP=per_group,
                                                   EPS=eps, SILU=silu, **tile)  # fmt: skip
            return y
        chunks = triton.cdiv(pixels, cut.chunk_pixels)
        moments = x.new_empty((2, batch, chunks, channels), dtype=torch.promote_types(x.dtype, torch.float32))
        table = moments.new_empty((batch, 3, channels))
        grid = (batch * triton.cdiv(channels, cut.BLOCK_C), chunks)
        _moments[grid](x, *moments, cut.chunk_pixels, channels, pixels, *strides[:3], **tile)
        _tables[(batch * num_groups,)](x, *moments, table, weight, bias, temb, per_group, chunks,
                                       cut.chunk_pixels, channels, pixels, strides[0], strides[2],
                                       EPS=eps, ACC=tile["ACC"], BLOCK=TABLE_BLOCK, num_warps=4,
                                       **OPTIONS)  # fmt: skip
        tile["BLOCK_N"] *= 2  # stores keep the next loads back, so it loads more at a time
        _apply[grid](x, y, table, cut.chunk_pixels, *sizes, SILU=silu, **tile)
    return y


def _flat(x, pixels):
    """x with evenly spaced pixels, an empty y, and the strides of batch, pixels, channels of x, then of y."""
    last = x.ndim == 4 and x.stride(1) == 1 and not x.is_contiguous()
    order = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=order)
    spaced = [(size, stride) for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True) if size > 1]
    for (_, outer), (size, inner) in pairwise(spaced):
        if outer != size * inner:  # rows with a gap between them, as in x[:, :, :, 1:]
            return _flat(x.contiguous(memory_format=order), pixels)
    step = spaced[-1][1] if spaced else x.stride(1)
    channels = x.shape[1]
    of_y = (channels * pixels, channels, 1) if last else (channels * pixels, 1, pixels)
    return x, y, (x.stride(0), step, x.stride(1), *of_y)


@triton.jit
def _load_or(default: tl.constexpr, ptr, at, inside, ACC: tl.constexpr):
    # What is at ptr + at, or default everywhere if ptr is None.
    if ptr is None:
        return tl.full(at.shape, default, ACC)
    else:
        return tl.load(ptr + at, mask=inside, other=0.0).to(ACC)


@triton.jit
def _silu(y):
    return y / (1.0 + tl.exp2(-1.4426950408889634 * y))  # exp would handle results that vanish beside 1


@triton.jit
def _norm_one_block(x_ptr, y_ptr, weight_ptr, bias_ptr, temb_ptr, channels, pixels,
                    stride_xb, stride_xn, stride_xc, stride_yb, stride_yn, stride_yc,
                    PER_GROUP: tl.constexpr, EPS: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    # One program normalizes one group of one picture, which stays in its registers.
    groups = channels // PER_GROUP
    b = (tl.program_id(0) // groups).to(tl.int64)
    first_channel = (tl.program_id(0) % groups) * PER_GROUP
    n = tl.arange(0, BLOCK_N)[:, None]
    j = tl.arange(0, BLOCK_C)
    c = first_channel + j  # (BLOCK_C,)
    inside = (n < pixels) & (j < PER_GROUP)[None, :]  # (BLOCK_N, BLOCK_C)
    x_ptr += b * stride_xb + first_channel.to(tl.int64) * stride_xc
    x = tl.load(x_ptr + n * stride_xn + (j * stride_xc)[None, :], mask=inside, other=0.0).to(ACC)
    x -= tl.load(x_ptr).to(ACC)  # exact near the mean: from here on small numbers
    x += _load_or(0.0, temb_ptr, b * channels + c, j < PER_GROUP, ACC)[None, :]
    size = tl.cast(pixels * PER_GROUP, ACC)
    x -= tl.sum(tl.sum(tl.where(inside, x, 0.0), 1), 0) / size
    variance = tl.sum(tl.sum(tl.where(inside, x * x, 0.0), 1), 0) / size
    y = x * (1.0 / tl.sqrt(variance + EPS))
    y *= _load_or(1.0, weight_ptr, c, j < PER_GROUP, ACC)[None, :]
    y += _load_or(0.0, bias_ptr, c, j < PER_GROUP, ACC)[None, :]
    if SILU:
        y = _silu(y)
    y_ptr += b * stride_yb + first_channel.to(tl.int64) * stride_yc
    tl.store(y_ptr + n * stride_yn + (j * stride_yc)[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _moments(x_ptr, mean_ptr, squares_ptr, chunk_pixels, channels, pixels, stride_xb, stride_xn, stride_xc,
             ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    # One program takes BLOCK_C channels of one chunk: per channel the mean, as a distance from the picture's
    # first pixel, and the sum of squared distances from the mean.
    tiles = tl.cdiv(channels, BLOCK_C)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first_channel = (tl.program_id(0) % tiles) * BLOCK_C
    chunk = tl.program_id(1)
    size = tl.minimum(chunk_pixels, pixels - chunk * chunk_pixels)
    n = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_C)
    existing = j < channels - first_channel  # (BLOCK_C,)
    x_ptr += b * stride_xb + first_channel.to(tl.int64) * stride_xc
    origin = tl.load(x_ptr + j * stride_xc, mask=existing, other=0.0).to(ACC)  # (BLOCK_C,)
    x_ptr += (chunk * chunk_pixels).to(tl.int64) * stride_xn
    at = x_ptr + (n * stride_xn)[:, None] + (j * stride_xc)[None, :]  # (BLOCK_N, BLOCK_C)
    first = tl.load(at, mask=(n < size)[:, None] & existing[None, :], other=0.0)
    sums = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    squares = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    for start in tl.range(BLOCK_N, size, BLOCK_N, loop_unroll_factor=4):
        at += BLOCK_N * stride_xn
        inside = (n < size - start)[:, None] & existing[None, :]
        distance = tl.load(at, mask=inside, other=first).to(ACC) - first.to(ACC)  # 0 past the end
        sums += distance
        squares += distance * distance
    visits = tl.maximum(tl.cdiv(size - n, BLOCK_N), 0).to(ACC)[
        :, None
    ]  # (BLOCK_N, 1): the last tile may be cut
    mean = sums / tl.maximum(visits, 1.0)  # of each place, from its first value
    squares -= sums * mean
    squares = tl.where(squares < 0.0, 0.0, squares)
    mean += first.to(ACC) - origin[None, :]
    joint = tl.sum(mean * (visits / size), 0)  # (BLOCK_C,)
    mean -= joint[None, :]
    squares = tl.sum(squares + mean * mean * visits, 0)  # Chan: within the places and between them
    out = (b * tl.num_programs(1) + chunk) * channels + first_channel + j
    tl.store(mean_ptr + out, joint, mask=existing)
    tl.store(squares_ptr + out, squares, mask=existing)


# not specialized: one compilation serves all sizes, of a kernel that hardly takes time
UNSPECIALIZED = ["per_group", "chunks", "chunk_pixels", "channels", "pixels", "stride_xb", "stride_xc"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _tables(x_ptr, mean_ptr, squares_ptr, table_ptr, weight_ptr, bias_ptr, temb_ptr, per_group, chunks,
            chunk_pixels, channels, pixels, stride_xb, stride_xc,
            EPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # One program joins the moments of one group of one picture; all means are distances from `origin`.
    groups = channels // per_group
    b = (tl.program_id(0) // groups).to(tl.int64)
    first_channel = (tl.program_id(0) % groups) * per_group
    x_ptr += b * stride_xb
    mean_ptr += b * chunks * channels
    squares_ptr += b * chunks * channels
    row = b * channels  # of temb
    origin = tl.load(x_ptr + first_channel.to(tl.int64) * stride_xc).to(ACC)
    size = (pixels * per_group).to(ACC)
    sums = tl.zeros((BLOCK,), ACC)
    for start in range(0, chunks * per_group, BLOCK):
        at, count, distance = _part(start + tl.arange(0, BLOCK), x_ptr, mean_ptr, temb_ptr, row, origin,
                                    first_channel, per_group, chunks, chunk_pixels, channels, pixels,
                                    stride_xc, ACC)  # fmt: skip
        sums += distance * (count / size)
    mean = tl.sum(sums, 0)
    sums = tl.zeros((BLOCK,), ACC)
    for start in range(0, chunks * per_group, BLOCK):
        at, count, distance = _part(start + tl.arange(0, BLOCK), x_ptr, mean_ptr, temb_ptr, row, origin,
                                    first_channel, per_group, chunks, chunk_pixels, channels, pixels,
                                    stride_xc, ACC)  # fmt: skip
        within = tl.load(squares_ptr + at, mask=count > 0.0, other=0.0)
        sums += within + count * (distance - mean) * (distance - mean)
    rstd = 1.0 / tl.sqrt(tl.sum(sums, 0) / size + EPS)
    high = origin + mean
    low = mean - (high - origin)  # high + low is the mean to twice the digits
    table_ptr += b * 3 * channels
    for start in range(0, per_group, BLOCK):
        i = start + tl.arange(0, BLOCK)
        c = first_channel + i
        temb = _load_or(0.0, temb_ptr, row + c, i < per_group, ACC)
        center = high - temb
        rest = low + ((high - center) - temb)
        scale = rstd * _load_or(1.0, weight_ptr, c, i < per_group, ACC)
        shift = _load_or(0.0, bias_ptr, c, i < per_group, ACC) - rest * scale
        tl.store(table_ptr + c, center, mask=i < per_group)
        tl.store(table_ptr + channels + c, scale, mask=i < per_group)
        tl.store(table_ptr + 2 * channels + c, shift, mask=i < per_group)


@triton.jit
def _part(i, x_ptr, mean_ptr, temb_ptr, row, origin, first_channel, per_group, chunks,
          chunk_pixels, channels, pixels, stride_xc, ACC: tl.constexpr):  # fmt: skip
    # Part i of a group is one channel of one chunk: where it is, its pixels, its mean's distance from origin.
    valid = i < chunks * per_group
    chunk = i // per_group
    c = first_channel + i % per_group
    count = tl.where(valid, tl.minimum(chunk_pixels, pixels - chunk * chunk_pixels), 0).to(ACC)
    first = tl.load(x_ptr + c.to(tl.int64) * stride_xc, mask=valid, other=0.0).to(ACC)
    at = chunk * channels + c
    distance = first - origin + tl.load(mean_ptr + at, mask=valid, other=0.0)
    distance += _load_or(0.0, temb_ptr, row + c, valid, ACC)
    return at, count, tl.where(valid, distance, 0.0)


@triton.jit
def _apply(x_ptr, y_ptr, table_ptr, chunk_pixels, channels, pixels,
           stride_xb, stride_xn, stride_xc, stride_yb, stride_yn, stride_yc,
           SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    # One program writes BLOCK_C channels of one chunk, last chunk first: y = (x - center) * scale + shift.
    tiles = tl.cdiv(channels, BLOCK_C)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    first_channel = (program % tiles) * BLOCK_C
    chunk = tl.num_programs(1) - 1 - tl.program_id(1)
    size = tl.minimum(chunk_pixels, pixels - chunk * chunk_pixels)
    n = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_C)
    existing = j < channels - first_channel  # (BLOCK_C,)
    table_ptr += b * 3 * channels + first_channel
    center = tl.load(table_ptr + j, mask=existing, other=0.0)[None, :]  # (1, BLOCK_C)
    scale = tl.load(table_ptr + channels + j, mask=existing, other=0.0)[None, :]
    shift = tl.load(table_ptr + 2 * channels + j, mask=existing, other=0.0)[None, :]
    first_pixel = (chunk * chunk_pixels).to(tl.int64)
    x_ptr += b * stride_xb + first_pixel * stride_xn + first_channel.to(tl.int64) * stride_xc
    y_ptr += b * stride_yb + first_pixel * stride_yn + first_channel.to(tl.int64) * stride_yc
    x_at = x_ptr + (n * stride_xn)[:, None] + (j * stride_xc)[None, :]  # (BLOCK_N, BLOCK_C)
    y_at = y_ptr + (n * stride_yn)[:, None] + (j * stride_yc)[None, :]
    for start in range(0, size, BLOCK_N):
        inside = (n < size - start)[:, None] & existing[None, :]
        x = tl.load(x_at, mask=inside, other=0.0).to(ACC)
        y = (x - center) * scale + shift
        if SILU:
            y = _silu(y)
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)
        x_at += BLOCK_N * stride_xn
        y_at += BLOCK_N * stride_yn
