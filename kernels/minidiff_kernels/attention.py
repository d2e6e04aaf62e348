"""softmax(q kᵀ / √D) v without the (T, S) matrix of scores in memory: FlashAttention, in two kernels.

Papers: Dao et al. 2022, arXiv 2205.14135, algorithm 1; Dao 2023, arXiv 2307.08691. The running softmax is
from Milakov & Gimelshein 2018, arXiv 1805.02867. Read `_attention_tiled`, then `_attention_short`, then
`attention`; the sizes of blocks are in attention_blocks.py.

    scores of one head, (T, S)
                 keys ──────────►            global memory   q, k, v and out, each read or written in tiles;
            ┌──────┬──────┬──────┬──┐                        nothing of size T × S
    queries │      │      │      │  │        shared memory   the tile of q; tiles of k and v, the next ones
       │    ├──────┼──────┼──────┼──┤                        arriving while these are multiplied
       ▼    │▒▒▒▒▒▒│▒▒▒▒▒▒│      │  │ ◄ block registers      BLOCK_M × BLOCK_N scores; BLOCK_M × D of the
            ├──────┼──────┼──────┼──┤                        output; a maximum and a sum for each row
            └──────┴──────┴──────┴──┘

`_attention_tiled`: one block owns BLOCK_M queries of a head and walks over the keys. Softmax needs a row's
maximum over all keys, which only the end of the walk knows; so sum and output are kept relative to the
maximum so far, and both are multiplied by exp(old - new) when it grows. `_attention_short`: up to 128 keys,
77 for a prompt, stay on chip; a block reads them once for several tiles of queries and has a row's scores
all at once, so that nothing is kept for later and nothing rescaled.

Head sizes are split, not padded. Matrix units take powers of two from 16 on: 40 columns are a tile of 32
and one of 16, half of it masked, where one of 64 would waste a third; 80 are 64 + 16, 160 are 128 + 32, and
77 keys 64 + 16 too. A product is the sum of two then, q kᵀ = q₀ k₀ᵀ + q₁ k₁ᵀ, and the output has two
accumulators. Of heads over 256 columns, such as the VAE's 512, a block accumulates 256. The blocks that
share a row compute its scores twice, for half as many FLOPs again, but there are twice as many: 128 for a
picture of 512², which keep the 132 multiprocessors of an H100 busy, where 64 would leave half of them idle.

exp(x) is 2^(x · log₂e), which GPUs have in hardware; 1/√D · log₂e is one factor in the multiply-add that
subtracts the maximum. Maxima, sums and accumulators are float32, and no float32 is rounded to TF32.

Strides count UNIT numbers, 16 bytes if they can. A compiler loads 16 bytes at once only where it can prove
that they are aligned, and all it knows of an argument is whether 16 divides it. Heads of 40 numbers are no
multiple of 16 apart, so they would be loaded 2 bytes at a time, without asynchronous copies; 5 · UNIT with
a constant UNIT = 8 needs no proof, and one compilation serves all lengths (sm_90, 128 × 64: 167 registers
-> 118).

Least work of B · H heads: 4 T S D FLOPs, T S exponentials, and 2 (T + S) D numbers to read and write. For
16 heads of 40, T = S = 4096, in float16: 43 GFLOP and 21 MB. By the data sheet of an H100 SXM (989 TFLOP/s,
3.35 TB/s; 132 multiprocessors of 16 exponentials at the 1.83 GHz that 989 TFLOP/s mean: 3.9e12 a second) that
takes its matrix units 43 µs and its memory 6 µs, but its exponentials 69 µs. With 77 keys memory decides:
10.6 MB, 3 µs.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from minidiff_kernels import launch
from minidiff_kernels.attention_blocks import LARGEST, blocks_of, config_of, constants_of, is_short
from minidiff_kernels.products import add_product

LOG2_E = tl.constexpr(1.4426950408889634)


def attention(q, k, v, mask=None) -> torch.Tensor:
    """softmax(q kᵀ / √D + mask) v (Vaswani et al. 2017, arXiv 1706.03762, eq. 1), as minidiff.ops.attention.

    q (B, heads, T, D), k and v (B, heads, S, D) with any strides, D up to 512, of one dtype: float16,
    bfloat16 or float32, in the interpreter also float64 -> (B, heads, T, D), in memory (B, T, heads, D). mask
    broadcasts to (B, heads, T, S): bool, True where q may look, or numbers, added to the scores.
    Differentiable once, by recomputing in PyTorch.

    A row that may look nowhere, or has no score above -inf, gives 0. NaN or +inf among a row's scores gives
    NaN, as in PyTorch; a key that a bool mask hides is not among them. NaN and inf in v count even where
    their weight is 0, as in any product of matrices.
    Raises ValueError for shapes that don't fit, TypeError for other dtypes, RuntimeError without a GPU.
    """
    launch.check_tensors("attention", q=q, k=k, v=v)
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} don't fit; "
                         "expected q (B, heads, T, D) and k, v (B, heads, S, D)")  # fmt: skip
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; cast them to one dtype")
    if q.dtype == torch.float64 and not launch.INTERPRETED:
        raise TypeError("attention: the kernels take float64 in Triton's interpreter only; "
                        'use backend="torch"')  # fmt: skip
    if not 1 <= q.shape[3] <= LARGEST:
        raise ValueError(f"attention: heads of {q.shape[3]} numbers; the kernels take 1 to {LARGEST}. "
                         'Use backend="torch".')  # fmt: skip
    return launch.differentiable(_launch, _recompute, q, k, v, _checked_mask(mask, q, k))


def _checked_mask(mask, q, k):
    """mask as (B, heads, T, S), without a copy, bool or floating."""
    if mask is None:
        return None
    if mask.device != q.device:
        raise ValueError(f"attention: mask is on {mask.device}, q on {q.device}; move them to one device")
    shape = (*q.shape[:3], k.shape[2])
    fits = mask.ndim <= 4 and all(m in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1], strict=False))
    if not fits:
        raise ValueError(f"attention: mask {tuple(mask.shape)} does not broadcast to "
                         f"(B, heads, T, S) = {shape}")  # fmt: skip
    if mask.is_complex():
        raise TypeError(f"attention: mask is {mask.dtype}; expected bool or numbers to add")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        mask = mask.to(torch.float32)
    return mask.expand(shape)


def _recompute(q, k, v, mask):
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _launch(q, k, v, mask, config=None):
    # config: blocks other than the table's, to time them
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    out = torch.empty((batch, queries, heads, size), dtype=q.dtype, device=q.device).transpose(1, 2)
    if out.numel() == 0 or keys == 0:
        return out.zero_()
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
    unit = math.gcd(16 // q.element_size(), *strides)
    kind = None if mask is None else "bool" if mask.dtype == torch.bool else "float"
    arguments = [q, k, v, out, mask.view(torch.uint8) if kind == "bool" else mask]
    arguments += [stride // unit for stride in strides]
    arguments += [0, 0, 0, 0] if mask is None else mask.stride()
    arguments += [heads, queries, keys]
    short = is_short(keys, size, q.element_size(), kind)
    if config is None:
        blocks = blocks_of(short, size, q.element_size(), kind, launch.target(q.device))
        config = config_of(short, keys, size, blocks)
    constants = launch.OPTIONS | constants_of(short, keys, size, kind, unit) | config
    tiles = triton.cdiv(queries, config["BLOCK_M"])
    with launch.on_device(q):
        if short:  # as many tiles a block as leave four blocks for each multiprocessor
            run = min(max(batch * heads * tiles // (4 * launch.multiprocessors(q.device)), 1), 8)
            _attention_short[(batch * heads * triton.cdiv(tiles, run),)](*arguments, run, **constants)
        else:
            slices = triton.cdiv(size, constants["V0"] + constants["V1"])
            _attention_tiled[(batch * heads * tiles, slices)](*arguments, **constants)
    return out


STRIDES = [f"stride_{x}{axis}" for x in "qkvo" for axis in "bht"] + ["stride_mb", "stride_mh", "stride_mt"]
# not specialized: one compilation serves all lengths and layouts
UNSPECIALIZED = [*STRIDES, "heads", "T", "S"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_tiled(q_ptr, k_ptr, v_ptr, o_ptr, mask_ptr,
                     stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
                     stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
                     stride_mb, stride_mh, stride_mt, stride_ms, heads, T, S,
                     SCALE: tl.constexpr, MASK: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
                     D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    # One program computes BLOCK_M rows of one head, all columns or a slice: V0 and V1 of them.
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(T, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    column = tl.program_id(1) * V0 if D > V0 + V1 else 0
    b, h = _head(tl.program_id(0) // blocks, heads)
    stride_qt, stride_kt = stride_qt * UNIT, stride_kt * UNIT
    stride_vt, stride_ot = stride_vt * UNIT, stride_ot * UNIT
    q_ptr += (b * stride_qb + h * stride_qh) * UNIT + first.to(tl.int64) * stride_qt
    k_ptr += (b * stride_kb + h * stride_kh) * UNIT
    v_ptr += (b * stride_vb + h * stride_vh) * UNIT + column
    o_ptr += (b * stride_ob + h * stride_oh) * UNIT + first.to(tl.int64) * stride_ot + column
    if MASK is not None:
        mask_ptr += b * stride_mb + h * stride_mh + first.to(tl.int64) * stride_mt
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    q0, q1 = _load(q_ptr, stride_qt, rows, T - first, D, D0, D1, D, False)  # (BLOCK_M, D0), (BLOCK_M, D1)
    top = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    out0 = tl.zeros((BLOCK_M, V0), ACC)
    out1 = tl.zeros((BLOCK_M, V1 if V1 > 0 else 16), ACC)
    for start in range(0, S, BLOCK_N):
        left = S - start
        k0, k1 = _load(k_ptr, stride_kt, keys, left, D, D0, D1, D, EVEN)  # (BLOCK_N, D0), (BLOCK_N, D1)
        scores = _scores(q0, q1, k0.T, k1.T, D1, ACC)  # (BLOCK_M, BLOCK_N)
        scores = _masked(scores, mask_ptr, stride_mt, stride_ms, rows, T - first, keys, left,
                         SCALE, MASK, EVEN)  # fmt: skip
        highest = tl.maximum(top, _highest(scores, SCALE, MASK))  # (BLOCK_M,)
        weights = _weights(scores, highest, SCALE, MASK)  # (BLOCK_M, BLOCK_N)
        rescale = tl.exp2(top - _finite(highest))  # (BLOCK_M,), at most 1
        total = total * rescale + tl.sum(weights, 1)
        out0, out1 = out0 * rescale[:, None], out1 * rescale[:, None]
        # (BLOCK_N, V0), (BLOCK_N, V1)
        v0, v1 = _load(v_ptr, stride_vt, keys, left, D - column, V0, V1, (D - 1) % (V0 + V1) + 1, EVEN)
        out0, out1 = _add_products(out0, out1, weights, v0, v1, V1)
        top = highest
        k_ptr += BLOCK_N * stride_kt
        v_ptr += BLOCK_N * stride_vt
        if MASK is not None:
            mask_ptr += BLOCK_N * stride_ms
    _store(o_ptr, stride_ot, rows, T - first, D - column, out0, out1, total, V0, V1)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "run"])
def _attention_short(q_ptr, k_ptr, v_ptr, o_ptr, mask_ptr,
                     stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
                     stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
                     stride_mb, stride_mh, stride_mt, stride_ms, heads, T, S, run,
                     SCALE: tl.constexpr, MASK: tl.constexpr, UNIT: tl.constexpr,
                     D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
                     N0: tl.constexpr, N1: tl.constexpr, FULL: tl.constexpr,
                     BLOCK_M: tl.constexpr):  # fmt: skip
    # One program computes `run` tiles of BLOCK_M rows of one head. It keeps all S keys: the first N0, which
    # all exist if FULL, and N1 of them.
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(T, BLOCK_M * run)
    first = tl.program_id(0) % blocks * BLOCK_M * run
    b, h = _head(tl.program_id(0) // blocks, heads)
    stride_qt, stride_kt = stride_qt * UNIT, stride_kt * UNIT
    stride_vt, stride_ot = stride_vt * UNIT, stride_ot * UNIT
    q_ptr += (b * stride_qb + h * stride_qh) * UNIT + first.to(tl.int64) * stride_qt
    k_ptr += (b * stride_kb + h * stride_kh) * UNIT
    v_ptr += (b * stride_vb + h * stride_vh) * UNIT
    o_ptr += (b * stride_ob + h * stride_oh) * UNIT + first.to(tl.int64) * stride_ot
    if MASK is not None:
        mask_ptr += b * stride_mb + h * stride_mh + first.to(tl.int64) * stride_mt
    rows, keys0 = tl.arange(0, BLOCK_M), tl.arange(0, N0)
    keys1 = N0 + tl.arange(0, N1 if N1 > 0 else 16)
    k00, k01 = _load(k_ptr, stride_kt, keys0, S, D, D0, D1, D, FULL)  # (N0, D0), (N0, D1)
    v00, v01 = _load(v_ptr, stride_vt, keys0, S, D, D0, D1, D, FULL)
    k10, k11 = _load(k_ptr, stride_kt, keys1, S, D, D0, D1, D, False)  # (N1, D0), (N1, D1), unused if N1 is 0
    v10, v11 = _load(v_ptr, stride_vt, keys1, S, D, D0, D1, D, False)
    k00, k01, k10, k11 = k00.T, k01.T, k10.T, k11.T  # here: in the loop, each tile would write k again
    for start in range(first, tl.minimum(first + BLOCK_M * run, T), BLOCK_M):
        left = T - start
        q0, q1 = _load(q_ptr, stride_qt, rows, left, D, D0, D1, D, False)  # (BLOCK_M, D0), (BLOCK_M, D1)
        scores0 = _scores(q0, q1, k00, k01, D1, ACC)  # (BLOCK_M, N0)
        scores0 = _masked(scores0, mask_ptr, stride_mt, stride_ms, rows, left, keys0, S, SCALE, MASK, FULL)
        highest = _highest(scores0, SCALE, MASK)  # (BLOCK_M,)
        if N1 > 0:
            scores1 = _scores(q0, q1, k10, k11, D1, ACC)  # (BLOCK_M, N1)
            scores1 = _masked(scores1, mask_ptr, stride_mt, stride_ms, rows, left, keys1, S,
                              SCALE, MASK, False)  # fmt: skip
            highest = tl.maximum(highest, _highest(scores1, SCALE, MASK))
        weights = _weights(scores0, highest, SCALE, MASK)
        total = tl.sum(weights, 1)
        out0 = tl.zeros((BLOCK_M, D0), ACC)
        out1 = tl.zeros((BLOCK_M, D1 if D1 > 0 else 16), ACC)
        out0, out1 = _add_products(out0, out1, weights, v00, v01, D1)
        if N1 > 0:
            weights = _weights(scores1, highest, SCALE, MASK)
            total += tl.sum(weights, 1)
            out0, out1 = _add_products(out0, out1, weights, v10, v11, D1)
        _store(o_ptr, stride_ot, rows, left, D, out0, out1, total, D0, D1)
        q_ptr += BLOCK_M * stride_qt
        o_ptr += BLOCK_M * stride_ot
        if MASK is not None:
            mask_ptr += BLOCK_M * stride_mt


@triton.jit
def _head(index, heads):
    return (index // heads).to(tl.int64), (index % heads).to(tl.int64)  # offsets of pictures may pass 2**31


@triton.jit
def _load(ptr, stride_t, rows, row_limit, column_limit,
          C0: tl.constexpr, C1: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    # Tiles of C0 and C1 neighbouring columns, 0 outside. If C1 is 0, the second is the first, and not used.
    # What never lies outside needs no mask: the first WHOLE columns, and all rows if EVEN.
    columns = tl.arange(0, C0)
    inside = ((rows < row_limit) | EVEN)[:, None]  # (rows, 1)
    at = ptr + rows[:, None] * stride_t + columns[None, :]
    x0 = tl.load(at, mask=inside & ((columns < column_limit) | (C0 <= WHOLE))[None, :], other=0.0)
    x1 = x0
    if C1 > 0:
        columns = C0 + tl.arange(0, C1)
        at = ptr + rows[:, None] * stride_t + columns[None, :]
        x1 = tl.load(at, mask=inside & ((columns < column_limit) | (C0 + C1 <= WHOLE))[None, :], other=0.0)
    return x0, x1


@triton.jit
def _scores(q0, q1, k0, k1, D1: tl.constexpr, ACC: tl.constexpr):
    # q times k, which is transposed, not yet scaled
    scores = add_product(tl.zeros((q0.shape[0], k0.shape[1]), ACC), q0, k0)
    if D1 > 0:
        scores = add_product(scores, q1, k1)
    return scores


@triton.jit
def _add_products(out0, out1, weights, v0, v1, C1: tl.constexpr):
    weights = weights.to(v0.dtype)
    out0 = add_product(out0, weights, v0)
    if C1 > 0:
        out1 = add_product(out1, weights, v1)
    return out0, out1


@triton.jit
def _masked(scores, mask_ptr, stride_mt, stride_ms, rows, row_limit, keys, key_limit,
            SCALE: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    # Scores with the mask; a float one is added, for which they are brought to base 2 here.
    if MASK is not None:
        inside = (rows < row_limit)[:, None] & (keys < key_limit)[None, :]
        mask = tl.load(mask_ptr + rows[:, None] * stride_mt + keys[None, :] * stride_ms, mask=inside, other=0)
        if MASK == "bool":
            scores = tl.where(mask != 0, scores, float("-inf"))
        else:
            mask = mask.to(scores.dtype)
            # the lowest number, which people use for -inf, would become -inf: it is as good in base 2
            mask = tl.where(mask > -2e38, mask * LOG2_E, mask)
            scores = scores * (SCALE * LOG2_E) + mask
    return tl.where((keys < key_limit)[None, :] | EVEN, scores, float("-inf"))


@triton.jit
def _highest(scores, SCALE: tl.constexpr, MASK: tl.constexpr):
    # The highest score of each row, in base 2.
    return tl.max(scores, 1) * (1.0 if MASK == "float" else SCALE * LOG2_E)


@triton.jit
def _weights(scores, highest, SCALE: tl.constexpr, MASK: tl.constexpr):
    # exp of what scores are above the highest: 2 ** (factor * score - highest), in one multiply-add
    FACTOR: tl.constexpr = 1.0 if MASK == "float" else SCALE * LOG2_E
    return tl.exp2(tl.fma(scores, tl.full(scores.shape, FACTOR, scores.dtype), -_finite(highest)[:, None]))


@triton.jit
def _finite(highest):
    return tl.where(highest == float("-inf"), 0.0, highest)  # of rows that look nowhere: -inf - -inf is NaN


@triton.jit
def _store(ptr, stride_t, rows, row_limit, column_limit, out0, out1, total,
           C0: tl.constexpr, C1: tl.constexpr):  # fmt: skip
    share = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]  # each row sums to 1, or to 0
    inside = (rows < row_limit)[:, None]
    columns = tl.arange(0, C0)
    at = ptr + rows[:, None] * stride_t + columns[None, :]
    tl.store(at, (out0 * share).to(ptr.dtype.element_ty), mask=inside & (columns < column_limit)[None, :])
    if C1 > 0:
        columns = C0 + tl.arange(0, C1)
        at = ptr + rows[:, None] * stride_t + columns[None, :]
        tl.store(at, (out1 * share).to(ptr.dtype.element_ty), mask=inside & (columns < column_limit)[None, :])
