"""Group norm, temb and SiLU of channels_last pictures on a CPU, in two walks through pieces in the cache.

PyTorch's own version for this order takes the variance as E[x²] - E[x]², in single sums over all pixels: at
a mean of 100 standard deviations its results are off by 2 %, at 3 on 256 x 256 pixels by 2e-4. Here the mean
comes first, then the squared distances from it, then the result: as near to float64 as for other orders.
"""

import torch
import torch.nn.functional as F

from minidiff.optimization.rewrite import Rewrite, makes_gradients

PIECE = 2**16  # numbers: 256 kB in float32


class ChannelsLastNorm(Rewrite):
    """The forward of a GroupNorm: x (B, C, H, W), temb (B, C) or None; other orders as they were."""

    def __call__(self, x, temb=None):
        layer = self.layer
        tensors = [t for t in (x, temb, layer.weight, layer.bias) if t is not None]
        if (
            not x.is_contiguous(memory_format=torch.channels_last)
            or x.is_contiguous()
            or any(t.device.type != "cpu" for t in tensors)
            or torch.is_autocast_enabled("cpu")
            or makes_gradients(*tensors)
        ):
            return self.plain(x, temb)
        y = group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps, layer.silu, temb)
        return y if layer.act is None else layer.act(y)


def group_norm(x, num_groups, weight, bias, eps, silu=False, temb=None) -> torch.Tensor:
    """As minidiff.ops.group_norm, for x (B, C, H, W) in channels_last: the result is so too."""
    batch, channels, height, width = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, C)
    y = torch.empty_like(pixels)
    rows = max(1, PIECE // (batch * channels))
    pieces = pixels.split(rows, dim=1)
    buffer = pixels.new_empty((batch, min(rows, height * width), channels), dtype=wide)  # in the cache
    mean, squares = _moments(pieces, buffer)  # (B, C)
    added = mean.new_zeros(()) if temb is None else temb.to(wide)

    def of_groups(values):
        """(B, C) -> the mean over each group's channels, for each channel: (B, C)."""
        means = values.unflatten(1, (num_groups, -1)).mean(-1, keepdim=True)
        return means.expand(-1, -1, channels // num_groups).flatten(1)

    center = of_groups(mean + added)
    variance = of_groups(squares / (height * width) + (mean + added - center).square())
    scale = torch.rsqrt(variance + eps) * weight.to(wide)
    shift = bias.to(wide) + (added - center) * scale
    for piece, result in zip(pieces, y.split(rows, dim=1), strict=True):
        out = buffer[:, : piece.shape[1]].copy_(piece)
        torch.addcmul(shift[:, None], out, scale[:, None], out=out)
        result.copy_(F.silu(out, inplace=True) if silu else out)
    return y.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _moments(pieces, buffer):
    """Means over the rows of all pieces (B, rows, C), and sums of squared distances from them: (B, C) each.

    Each piece is read once: its moments are joined with the others' (Chan, Golub & LeVeque 1979).
    """
    means, squares = [], 0
    for piece in pieces:
        values = buffer[:, : piece.shape[1]].copy_(piece)
        means.append(values.mean(1, keepdim=True))
        squares = squares + values.sub_(means[-1]).square_().sum(1)
    means = torch.cat(means, dim=1)  # (B, pieces, C)
    counts = torch.tensor([[piece.shape[1]] for piece in pieces], dtype=means.dtype)  # (pieces, 1)
    mean = (means * (counts / counts.sum())).sum(1)
    return mean, squares + ((means - mean[:, None]).square() * counts).sum(1)
