"""3 × 3 convolutions in float32 with 16 products for 4 results, in place of 36: Winograd's F(2×2, 3×3).

    y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A        (Lavin & Gray 2015, arXiv 1509.09308, eq. 8 and section 4.1)

d is a tile of 4 × 4 pixels, tiles overlap by two, and y has 2 × 2. With many channels the elementwise
products are 16 products of matrices, (tiles, C) times (C, C'). Bᵀ and Aᵀ hold only 0 and ±1, so the
transforms are sums; they cost memory traffic, and pay where there are many channels. The result is exact but
for rounding: with 1280 channels it is three times nearer to float64 than oneDNN's packed convolution, and
half as near as its convolution of plain weights. The transformed weight takes 16/9 of the weight's memory.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minidiff.optimization import onednn
from minidiff.optimization.rewrite import Derived

TILES = 512  # of a strip: their transforms stay in the cache


class WinogradConv(onednn.PackedConv):
    """The forward of a Conv2d, 3 × 3, on a CPU; small pictures, and other dtypes, take the packed way."""

    def __init__(self, layer: nn.Conv2d, last=False):
        super().__init__(layer, last)
        self.transformed = Derived(transform_weight)

    def __call__(self, x):
        if not (self.takes(x) and fits(self.layer) and pays(x)):
            return super().__call__(x)
        return conv(x, self.transformed(self.layer.weight), self.layer.bias)


def fits(layer: nn.Conv2d) -> bool:
    """Whether this convolution is one for which Winograd pays: 3 × 3, stride 1, many channels."""
    plain = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    return plain == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and min(layer.in_channels, layer.out_channels) >= 256


def pays(x) -> bool:
    """Whether these pictures (B, C, H, W) are large enough, and exact enough, for Winograd."""
    return x.dtype == torch.float32 and min(x.shape[2:]) >= 8


def transform_weight(weight) -> torch.Tensor:
    """G g Gᵀ of each kernel: (N, K, 3, 3) -> (16, K, N)."""
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    return torch.einsum("iy,nkyx,jx->ijkn", g, weight.double(), g).flatten(0, 1).to(weight.dtype).contiguous()


def conv(x, weight, bias):
    """x (B, C, H, W), weight (16, C, N), bias (N,) or None -> (B, N, H, W), channels_last."""
    batch, _, height, width = x.shape
    rows, columns = -(-height // 2), -(-width // 2)  # tiles
    frame = 0, 0, 1, 1 + 2 * columns - width, 1, 1 + 2 * rows - height
    x = F.pad(x.permute(0, 2, 3, 1), frame)  # (B, 2 rows + 2, 2 columns + 2, C)
    y = x.new_empty((batch, 2 * rows, 2 * columns, weight.shape[2]))
    step = max(1, TILES // (batch * columns))  # rows of tiles in a strip
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        strip = _transform(x[:, 2 * top : 2 * bottom + 2], bottom - top, columns)  # (16, tiles, C)
        products = torch.bmm(strip, weight).unflatten(1, (batch, bottom - top, columns))
        _back(products, bias, y[:, 2 * top : 2 * bottom])
    return y[:, :height, :width].permute(0, 3, 1, 2)


def _transform(x, rows, columns):
    """Bᵀ d B of all tiles of x (B, 2 rows + 2, 2 columns + 2, C): (16, B * rows * columns, C)."""
    batch, channels = x.shape[0], x.shape[3]
    d = [x[:, i : i + 2 * rows : 2] for i in range(4)]  # (B, rows, 2 columns + 2, C): row i of each tile
    result = x.new_empty((4, 4, batch, rows, columns, channels))
    for i, row in enumerate((d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3])):
        e = [row[:, :, j : j + 2 * columns : 2] for j in range(4)]  # (B, rows, columns, C)
        torch.sub(e[0], e[2], out=result[i, 0])
        torch.add(e[1], e[2], out=result[i, 1])
        torch.sub(e[2], e[1], out=result[i, 2])
        torch.sub(e[1], e[3], out=result[i, 3])
    return result.flatten(0, 1).flatten(1, 3)


def _back(products, bias, y):
    """Aᵀ m A of products (16, B, rows, columns, N), plus bias, into y (B, 2 rows, 2 columns, N)."""
    m = products.unflatten(0, (4, 4))
    first = m[0] + m[1] + m[2]  # (4, B, rows, columns, N)
    second = m[1] - m[2] - m[3]
    for p, row in enumerate((first, second)):
        left, right = row[0] + row[1], row[1] - row[2]
        left += row[2]
        right -= row[3]
        for q, half in enumerate((left, right)):
            y[:, p::2, q::2] = half if bias is None else half.add_(bias)
