"""Convolutions and linear layers on a CPU with weights in the order in which oneDNN reads them.

PyTorch hands oneDNN a weight as it is in the checkpoint, and oneDNN brings it into blocks for its registers,
in every call anew: at low resolutions, where a weight is larger than the picture, that is most of the time.
Here it is done once for a shape of inputs; the products are the same. Pictures come out channels_last, as
oneDNN makes them. These operators of PyTorch are not documented, so they stay in this file, and `usable` says
whether they are there.
"""

import functools

import torch
from torch import nn

from minidiff.models.layers import divided
from minidiff.optimization.rewrite import Derived, Rewrite, has_hooks, makes_gradients, rewrite_of

NEEDED = ("_reorder_convolution_weight", "_convolution_pointwise", "_reorder_linear_weight",
          "_linear_pointwise")  # fmt: skip
ALONE = ("none", [], "")  # no function is applied to the result
LEAST = 2**23  # multiplications of a float32 product, 0.1 ms


@functools.cache
def usable(dtype: torch.dtype) -> bool:
    """Whether this PyTorch on this processor packs weights of dtype, and multiplies them in it."""
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, n) for n in NEEDED):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def takes(x, *weights) -> bool:
    """Whether x can be multiplied by these weights, packed; where it can't, the plain way is right."""
    if not (usable(x.dtype) and torch.backends.mkldnn.enabled and x.is_cpu and x.numel() > 0):
        return False
    for weight in weights:
        if weight is not None and (not weight.is_cpu or weight.dtype != x.dtype):
            return False
        if weight is not None and weight.is_inference():  # would be packed anew in each call
            return False
    return not torch.is_autocast_enabled("cpu") and not makes_gradients(x, *weights)


def pays(x, *weights) -> bool:
    """Whether the product of x and weights (N, K) is worth it: it takes longer to start than a plain one."""
    return x.dtype != torch.float32 or x.numel() * sum(map(len, weights)) >= LEAST


class PackedConv(Rewrite):
    """The forward of a Conv2d: (B, C, H, W) -> (B, C', H', W').

    last: the result leaves the model, in the order that the weight has. Inside, pictures are channels_last;
    outside, torch.randn_like would draw other noise for them.
    """

    def __init__(self, layer: nn.Conv2d, last=False):
        super().__init__(layer)
        self.packed, self.last = Derived(pack_conv), last

    def takes(self, x, other=None) -> bool:
        """Whether x fits the weight, packed, and other x: what doesn't is for the plain layer."""
        layer = self.layer
        fits = x.ndim == 4 and x.shape[1] == layer.in_channels
        padded = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        adds = other is None or (other.dtype == x.dtype and not makes_gradients(other))
        return fits and padded and adds and takes(x, layer.weight, layer.bias)

    def __call__(self, x):
        if not self.takes(x):
            return self.plain(x)
        y = self.added_to(None, x)
        return y.contiguous() if self.last and self.layer.weight.is_contiguous() else y

    def added_to(self, other, x):
        """The convolved x, plus other, of its shape, if that isn't None: the sum takes no pass of its own."""
        layer = self.layer
        options = list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups
        packed = self.packed(layer.weight, more=(x.shape, *options))
        return conv(x, packed, layer.bias, *options, other=other)


class PackedResnet(Rewrite):
    """The forward of a ResnetBlock2D whose second convolution, packed, adds its result to the shortcut."""

    def __call__(self, x, temb=None):
        block, last = self.layer, rewrite_of(self.layer.conv2)
        if type(last) is not PackedConv or has_hooks(block.conv2):
            return self.plain(x, temb)
        hidden_states = block.before_conv2(x, temb)  # (B, C_out, H, W)
        shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
        if not last.takes(hidden_states, shortcut):
            return divided(shortcut + block.conv2(hidden_states), block.scale_factor)
        return divided(last.added_to(shortcut, hidden_states), block.scale_factor)


class PackedLinear(Rewrite):
    """The forward of a Linear: (…, C) -> (…, C')."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer)
        self.packed = Derived(pack_linear)

    def __call__(self, x):
        weight, bias = self.layer.weight, self.layer.bias
        if x.shape[-1] != weight.shape[1] or not (pays(x, weight) and takes(x, weight, bias)):
            return self.plain(x)
        return linear(x, self.packed(weight, more=(rows_of(x),)), bias)


def pack_conv(weight, shape, padding, stride, dilation, groups):
    """weight (C', C / groups, h, w) for inputs of shape (B, C, H, W): an opaque tensor."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, list(shape)
    )


def conv(x, packed, bias, padding, stride, dilation, groups, other=None):
    """x (B, C, H, W) convolved, plus other, if given, of the result's shape; the result is channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    options = padding, stride, dilation, groups
    if other is None:
        return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *options, *ALONE)
    other = other.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise(
        x, other, packed, bias, *options, "add", 1.0, None, [], None
    )


def pack_linear(weight, rows):
    """weight (N, K) for inputs of this number of rows: an opaque tensor."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def linear(x, packed, bias):
    """x (…, K) times a packed (N, K), plus bias (N,) or None -> (…, N)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, *ALONE)


def rows_of(x) -> int:
    """The number of rows of x (…, K) as a matrix."""
    return x.numel() // x.shape[-1]
