"""Layers with less work: each class computes what the forward of one kind of layer does.

- `JoinedAttention`: queries, keys and values of the same tokens as one product.
- `JoinedTimes`: what the time adds in all residual blocks of a U-Net, as one product in a step.
- `FoldedUpsample`, on a GPU `KernelUpsample`: a doubled picture convolved as four convolutions of the small
  one, with 16 products in place of 36.
- `PointwiseConv`: a 1 × 1 convolution as a product of matrices, on a GPU.
- `KernelGEGLU`: the gate inside the product in front of it, on a GPU.
"""

import torch
import torch.nn.functional as F

from minidiff.optimization import onednn
from minidiff.optimization.rewrite import Derived, Rewrite, autocast_to, makes_gradients, says_all


class Joined:
    """Several linear layers on one input, as one product: (…, C) -> (…, the sum of their widths)."""

    def __init__(self, linears):
        self.linears = list(linears)
        self.weight, self.bias, self.packed = Derived(_join), Derived(_join), Derived(_join_and_pack)

    @property
    def tensors(self) -> list:
        """All weights, then all biases, which are None for layers without."""
        return [one.weight for one in self.linears] + [one.bias for one in self.linears]

    def __call__(self, x):
        weights, biases = self.tensors[: len(self.linears)], self.tensors[len(self.linears) :]
        bias = self.bias(*biases)
        if onednn.pays(x, *weights) and onednn.takes(x, *weights, *biases):
            return onednn.linear(x, self.packed(*weights, more=(onednn.rows_of(x),)), bias)
        return F.linear(x, self.weight(*weights), bias)

    def pays(self, x) -> bool:
        """Whether x may be multiplied by joined weights, which don't have to be joined in each call."""
        return not (makes_gradients(x, *self.tensors) or self.linears[0].weight.is_inference())

    def prepare(self):
        """Brings weight and bias up to date."""
        self.weight(*self.tensors[: len(self.linears)])
        self.bias(*self.tensors[len(self.linears) :])


def _join(*tensors):
    return None if tensors[0] is None else torch.cat(tensors)


def _join_and_pack(*weights_and_rows):
    *weights, rows = weights_and_rows
    return onednn.pack_linear(torch.cat(weights), rows)


class JoinedAttention(Rewrite):
    """The forward of an Attention: (B, T, C) -> (B, T, C).

    With keys from elsewhere, for gradients, and where hooks or adapters want each projection, as it was.
    """

    def __init__(self, layer):
        super().__init__(layer)
        self.covers = (layer.to_q, layer.to_k, layer.to_v)
        self.joined = Joined(self.covers)

    def __call__(self, hidden_states, encoder_hidden_states=None, mask=None):
        layer = self.layer
        as_made = self.covers == (layer.to_q, layer.to_k, layer.to_v) and says_all(*self.covers)
        if encoder_hidden_states is not None or not as_made or not self.joined.pays(hidden_states):
            return self.plain(hidden_states, encoder_hidden_states, mask)
        qkv = self.joined(hidden_states).unflatten(-1, (3, layer.num_heads, -1))  # (B, T, 3, heads, D)
        return layer.attend(*qkv.permute(2, 0, 3, 1, 4), mask)

    def prepare(self):
        self.joined.prepare()


class JoinedTimes:
    """The time's projections in the residual blocks of a U-Net: in each step the first asks for all.

    Between `begin` and `end` all blocks get the same time; elsewhere each projects what it is given. passed:
    the modules through which the time comes to them; hooks that may change it on the way end the sharing.
    """

    def __init__(self, linears, passed=()):
        self.joined, self.running, self.results = Joined(linears), False, None
        self.passed = [*passed, *self.joined.linears]
        self.parts = [TimePart(linear, self, number) for number, linear in enumerate(self.joined.linears)]

    def begin(self):
        """A step begins."""
        self.running, self.results = not any(one._forward_pre_hooks for one in self.passed), None

    def end(self):
        """The step is over."""
        self.running, self.results = False, None

    def part(self, number, x):
        """What layer `number` gives for x (B, C)."""
        if self.results is None:
            widths = [one.out_features for one in self.joined.linears]
            parts = self.joined(x).split(widths, dim=-1)
            together = torch.cat([part.reshape(-1) for part in parts])  # each part without gaps, in one copy
            sizes = [part.numel() for part in parts]
            self.results = [flat.view_as(p) for flat, p in zip(together.split(sizes), parts, strict=True)]
        return self.results[number]


class TimePart(Rewrite):
    """The forward of a residual block's time_emb_proj: (B, C) -> (B, C')."""

    def __init__(self, layer, times: JoinedTimes, number):
        super().__init__(layer)
        self.times, self.number = times, number

    def __call__(self, x):
        times = self.times
        shared = times.running and (times.results is not None or times.joined.pays(x))
        return times.part(self.number, x) if shared else self.plain(x)

    def prepare(self):
        if self.number == 0:
            self.times.joined.prepare()


class FoldedUpsample(Rewrite):
    """The forward of an Upsample2D on a CPU: (B, C, H, W) -> (B, C, 2H, 2W); another size as it was.

    A doubled picture says everything four times: of the nine pixels under a 3 × 3 kernel only four differ.
    Which of them fall together depends on whether the output's row and column are even or odd; each of these
    four phases is a 2 × 2 convolution of the small picture, with sums of the nine weights. The edge comes out
    right because the doubled picture's frame of zeros is the small one's, doubled.
    """

    def __init__(self, layer):
        super().__init__(layer)
        self.covers, self.packed = (layer.conv,), Derived(_fold_and_pack)

    def __call__(self, x, size=None):
        weight, bias = self.layer.conv.weight, self.layer.conv.bias
        plain = (
            self.layer.backend != "torch" or not says_all(self.layer.conv) or x.shape[1] != weight.shape[1]
        )
        if plain or not doubles(x, size) or not onednn.takes(x, weight, bias):
            return self.plain(x, size)
        batch, channels, height, width = x.shape
        x = F.pad(x, (1, 1, 1, 1))  # (B, C, H + 2, W + 2)
        y = x.new_empty((batch, 2 * height, 2 * width, len(weight))).permute(0, 3, 1, 2)  # channels_last
        kernels = self.packed(weight, more=((batch, channels, height + 1, width + 1),))
        for (p, q), kernel in zip(PHASES, kernels, strict=True):
            seen = x[:, :, p : p + height + 1, q : q + width + 1]
            y[:, :, p::2, q::2] = onednn.conv(seen, kernel, bias, *UNPADDED)  # (B, C', H, W)
        return y


PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))  # (p, q): the output's rows 2i + p and columns 2j + q
UNPADDED = ([0, 0], [1, 1], [1, 1], 1)


def doubles(x, size) -> bool:
    """Whether a picture x (B, C, H, W) is to be doubled: size is (2H, 2W), or None."""
    return size is None or tuple(size) == (2 * x.shape[2], 2 * x.shape[3])


def fold(weight) -> list[torch.Tensor]:
    """3 × 3 kernels (N, K, 3, 3) as the 2 × 2 kernels (N, K, 2, 2) of each phase, summed in float32 or wider.

    Of the small picture's rows phase 0 sees i - 1 and i, through the taps {0} and {1, 2}; phase 1 sees i and
    i + 1, through {0, 1} and {2}.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    sums = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=wide.dtype)  # (phase, tap, 3)
    return [torch.einsum("ay,nkyx,bx->nkab", sums[p], wide, sums[q]).to(weight.dtype) for p, q in PHASES]


def _fold_and_pack(weight, shape):
    return [onednn.pack_conv(kernel, shape, *UNPADDED) for kernel in fold(weight)]


class PointwiseConv(Rewrite):
    """The forward of a 1 × 1 Conv2d as a product of matrices: (B, C, H, W) -> (B, C', H, W), channels_last.

    On a GPU cuBLAS adds the bias while it writes, where cuDNN's convolution is followed by a pass for it.
    Pictures in another order take the convolution.
    """

    def __call__(self, x):
        layer = self.layer
        if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            return self.plain(x)
        pixels = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        y = F.linear(pixels.flatten(0, 2), layer.weight.flatten(1), layer.bias)  # (B H W, C')
        return y.unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)


def is_pointwise(layer) -> bool:
    """Whether this layer is a 1 × 1 convolution that sees every pixel by itself."""
    if type(layer) is not torch.nn.Conv2d:
        return False
    return (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)


class KernelRewrite(Rewrite):
    """A forward by a kernel, where the layer was when it was rewritten: on one GPU."""

    def __init__(self, layer):
        super().__init__(layer)
        self.device = next(layer.parameters()).device

    def runs(self, x, weight, bias) -> bool:
        """Whether the kernel is to do it: not for gradients, nor where another version was asked for."""
        other = getattr(self.layer, "backend_chosen", False) and self.layer.backend != "triton"
        here = x.device == self.device and x.dtype == weight.dtype and autocast_to(x.device) is None
        return here and not other and not makes_gradients(x, weight, bias)


class KernelUpsample(KernelRewrite):
    """The forward of an Upsample2D by the kernel, whose folded weights are kept; another size as it was."""

    def __init__(self, layer, upsample_conv, fold):
        super().__init__(layer)
        self.upsample_conv, self.folded, self.covers = upsample_conv, Derived(fold), (layer.conv,)

    def __call__(self, x, size=None):
        weight, bias = self.layer.conv.weight, self.layer.conv.bias
        if not (doubles(x, size) and says_all(self.layer.conv) and self.runs(x, weight, bias)):
            return self.plain(x, size)
        return self.upsample_conv(x, weight, bias, self.folded(weight))

    def prepare(self):
        self.folded(self.layer.conv.weight)


class KernelGEGLU(KernelRewrite):
    """The forward of a GEGLU by the kernel that gates inside the product: (…, C) -> (…, width)."""

    def __init__(self, layer, geglu_linear):
        super().__init__(layer)
        self.geglu_linear, self.covers = geglu_linear, (layer.proj,)

    def __call__(self, x):
        proj = self.layer.proj
        if not says_all(proj) or not self.runs(x, proj.weight, proj.bias):
            return self.plain(x)
        return self.geglu_linear(x, proj.weight, proj.bias)


class LastConv(Rewrite):
    """The forward of a Conv2d on a GPU whose result leaves a model, in the order of PyTorch's new tensors.

    Inside, pictures are channels_last; outside, torch.randn_like would draw other noise for them.
    """

    def __call__(self, x):
        return self.plain(x).contiguous()
