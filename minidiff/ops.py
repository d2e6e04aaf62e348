"""Attention, group norm, GEGLU and upsampling, each in three versions, of which the caller names one.

`"reference"` is the formula, in any precision; `"torch"` PyTorch's fused functions; `"triton"` the kernels of
`minidiff_kernels`, for a GPU; nothing is replaced in silence. Read the reference versions first; backends.py
has how one is chosen. Every version has scores, softmax, means and variances in float32 or wider.
"""

import math

import torch
import torch.nn.functional as F

from minidiff.backends import (  # noqa: F401
    BACKENDS,
    BackendUnavailable,
    available_backends,
    check_backend,
    default_backend,
    kernel,
    use_backend,
)


def attention(q, k, v, mask=None, backend: str = "torch") -> torch.Tensor:
    """softmax(q kᵀ / √D + mask) v (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    q (B, heads, T, D), k and v (B, heads, S, D), one floating dtype -> (B, heads, T, D). mask broadcasts to
    (B, heads, T, S): bool, True where q may look, or float, added to the scores. A row that may look nowhere
    gives 0. Raises ValueError for shapes that don't fit, BackendUnavailable if the backend can't run here.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} don't fit; "
                         "expected q (B, heads, T, D) and k, v (B, heads, S, D)")  # fmt: skip
    if backend == "torch":
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if backend == "triton":
        return kernel("attention", q.device)(q, k, v, mask)
    check_backend(backend)
    return _attention_reference(q, k, v, mask)


def _attention_reference(q, k, v, mask):
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, heads, T, S)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(wide)
    finite = torch.finfo(wide)
    highest = scores.amax(-1, keepdim=True).clamp(min=finite.min)  # clamped: -inf - -inf would be NaN
    weights = torch.exp(scores - highest)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=finite.tiny)  # each row sums to 1, or to 0
    return (weights @ v.to(wide)).to(q.dtype)  # (B, heads, T, D)


def group_norm(
    x, num_groups, weight, bias, eps, silu: bool = False, backend: str = "torch", temb=None
) -> torch.Tensor:
    """(x - mean) / √(variance + eps) · weight + bias, per image and group (Wu & He 2018, arXiv 1803.08494).

    x (B, C, H, W), contiguous or channels_last; weight and bias (C,) -> the same shape. The channels form
    num_groups groups of neighbours. silu: the result y is multiplied by sigmoid(y). temb (B, C): added to x
    first. Raises ValueError if num_groups does not divide C, BackendUnavailable if backend can't run here.
    """
    if x.shape[1] % num_groups:
        raise ValueError(f"group_norm: {x.shape[1]} channels can't be split into {num_groups} groups; "
                         "num_groups must divide the channels")  # fmt: skip
    if backend == "triton":
        return kernel("group_norm", x.device)(x, num_groups, weight, bias, eps, silu, temb)
    if temb is not None:
        x = x + temb[:, :, None, None]
    if backend == "torch":
        y = F.group_norm(x, num_groups, weight, bias, eps)
        return F.silu(y) if silu else y
    check_backend(backend)
    return _group_norm_reference(x, num_groups, weight, bias, eps, silu)


def _group_norm_reference(x, num_groups, weight, bias, eps, silu):
    wide = torch.promote_types(x.dtype, torch.float32)
    groups = x.to(wide).unflatten(1, (num_groups, -1)).flatten(2)  # (B, G, C/G * H * W)
    distance = groups - groups.mean(-1, keepdim=True)
    variance = distance.square().mean(-1, keepdim=True)  # not E[x²] - E[x]², which cancels far from 0
    y = (distance / torch.sqrt(variance + eps)).reshape(x.shape)
    per_channel = (-1,) + (1,) * (x.ndim - 2)
    y = y * weight.to(wide).reshape(per_channel) + bias.to(wide).reshape(per_channel)
    return (y * torch.sigmoid(y) if silu else y).to(x.dtype)


def geglu(x, backend: str = "torch") -> torch.Tensor:
    """value · GELU(gate) of x = [value, gate], (…, 2C) -> (…, C) (Shazeer 2020, arXiv 2002.05202, eq. 6).

    GELU is the exact one: gate times the normal distribution's share below it, ½ (1 + erf(gate / √2)).
    """
    if backend == "triton":
        return kernel("geglu", x.device)(x)
    if backend == "torch":
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)
    check_backend(backend)
    value, gate = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (value * gate * (1 + torch.erf(gate / math.sqrt(2))) / 2).to(x.dtype)


def upsample_conv(x, size, weight, bias, backend: str = "torch") -> torch.Tensor:
    """Repeats pixels up to size, then convolves 3 × 3: (B, C, H, W) -> (B, C', *size).

    size (height, width); weight (C', C, 3, 3), bias (C',). The kernel doubles both sides, and raises
    ValueError for another size.
    """
    if backend == "triton":
        if tuple(size) != (2 * x.shape[2], 2 * x.shape[3]):
            raise ValueError(f'upsample_conv: backend "triton" doubles a picture; {tuple(x.shape[2:])} to '
                             f'{tuple(size)} needs backend="torch"')  # fmt: skip
        return kernel("upsample_conv", x.device)(x, weight, bias)
    if backend == "torch":
        return F.conv2d(F.interpolate(x, size=tuple(size), mode="nearest"), weight, bias, padding=1)
    check_backend(backend)
    rows, columns = (
        torch.arange(n, device=x.device) * old // n for n, old in zip(size, x.shape[2:], strict=True)
    )
    patches = F.unfold(
        x[:, :, rows[:, None], columns].to(torch.promote_types(x.dtype, torch.float32)), 3, padding=1
    )
    y = weight.to(patches.dtype).flatten(1) @ patches + bias.to(patches.dtype)[:, None]  # (B, C', H' * W')
    return y.unflatten(2, tuple(size)).to(x.dtype)
