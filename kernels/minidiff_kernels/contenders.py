"""What the kernels are measured against: everything in PyTorch that computes the same, at its best.

`contenders` gives functions without arguments, the slow formula and the fused and compiled versions alike; a
kernel has to beat the fastest of them. Inputs are a case's, with the names that the registry has for each
operation: q, k, v; x, weight, bias.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
LARGEST = 2**31  # bytes of scores in float32, which SDPA's formula writes several times


def contenders(case, inputs: dict, thorough: bool) -> dict[str, Callable]:
    """{name: function} of those that can be tried on inputs; some may still refuse, with a RuntimeError.

    thorough: those that are compiled first, which takes minutes, are among them.
    """
    of_op = {
        "attention": _attention,
        "group_norm": _group_norm,
        "geglu": _geglu,
        "upsample_conv": _upsample_conv,
    }
    found = of_op[case.op](thorough, **inputs)
    return {name: function for name, function in found.items() if thorough or not name.endswith("compiled")}


def yardstick(case) -> str:
    """The contender whose rounding ours is held against: what PyTorch does by default."""
    return {"attention": "SDPA math", "group_norm": "NCHW", "geglu": "eager", "upsample_conv": "NCHW"}[
        case.op
    ]


def compiled(function):
    """function through torch.compile at its most thorough; graphs are taken by who measures."""
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)


def _attention(thorough, q, k, v, mask=None, **_):
    def attend(backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    found = {name: partial(attend, backend) for name, backend in SDPA.items()}
    if 4 * q.shape[:3].numel() * k.shape[2] > LARGEST:
        del found["SDPA math"]
    if mask is None and thorough:
        from torch.nn.attention.flex_attention import flex_attention  # inside: it imports the compiler

        found["FlexAttention compiled"] = partial(compiled(flex_attention), q, k, v)
    return found


def _group_norm(thorough, x, weight, bias, num_groups=32, eps=1e-5, silu=True, temb=None, **_):
    def normalize(x):
        y = x if temb is None else x + temb[:, :, None, None]
        y = F.group_norm(y, num_groups, weight, bias, eps)
        return F.silu(y) if silu else y

    found = {}
    for name, order in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
        found[name] = partial(normalize, x.contiguous(memory_format=order))
        found[f"{name} compiled"] = partial(compiled(normalize), x.contiguous(memory_format=order))
    return found


def _geglu(thorough, x, weight=None, bias=None, **_):
    def gate(x):
        value, gate = (x if weight is None else F.linear(x, weight, bias)).chunk(2, dim=-1)
        return value * F.gelu(gate)

    return {"eager": partial(gate, x), "compiled": partial(compiled(gate), x)}


def _upsample_conv(thorough, x, weight, bias=None, **_):
    def enlarge(x, weight):
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)

    found = {}
    for name, order in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
        ordered = [tensor.contiguous(memory_format=order) for tensor in (x, weight)]
        found[name] = partial(enlarge, *ordered)
        found[f"{name} compiled"] = partial(compiled(enlarge), *ordered)
    return found
