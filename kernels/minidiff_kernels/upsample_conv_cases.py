"""The folded upsample convolution's cases: those of Stable Diffusion in float16, and other dtypes."""

import torch
import torch.nn.functional as F
import triton.language as tl

from minidiff_kernels.case import TARGETS, KernelCase, specialized
from minidiff_kernels.products import blocks
from minidiff_kernels.shapes import UPSAMPLE_CONV
from minidiff_kernels.upsample_conv import (
    FOLD_BLOCK,
    UNSPECIALIZED,
    _fold,
    _launch,
    _phase_conv,
    configs,
    fold,
    pick,
    upsample_conv,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCES = {"fp16": 4e-3, "bf16": 3e-2, "fp32": 1e-5}  # as in the tests
CANDIDATES = [  # blocks for sm_90 beside those that are launched, to time them
    blocks(128, 256, 64, 8, 4),
    blocks(128, 128, 64, 8, 4),
    blocks(128, 64, 64, 4, 4),
    blocks(64, 128, 64, 4, 4),
]
OTHERS = [((1, 640, 32, 32), "bf16"), ((1, 640, 32, 32), "fp32"), ((1, 100, 30, 31), "fp16")]


def _case(shape, where, dtype="fp16") -> KernelCase:
    batch, channels, height, width = shape
    pixels = height * width
    numbers = {"M": batch * pixels, "N": channels, "K": channels, "height": height, "width": width}
    strides = {"stride_xb": pixels * channels, "stride_xh": width * channels, "stride_xw": channels}
    names = ("x_ptr", "folded_ptr", "bias_ptr", "y_ptr")
    given = specialized(dict.fromkeys(names, f"*{dtype}"), numbers | strides, UNSPECIALIZED)
    given["constexprs"]["ACC"] = tl.float32
    found = [(t, config) for t in TARGETS for config in configs(DTYPES[dtype], t, even=channels % 64 == 0)]
    found += [("sm_90", config) for config in CANDIDATES if where and channels % config["BLOCK_N"] == 0]
    itemsize = DTYPES[dtype].itemsize
    name = ["upsample_conv", f"c{channels}", f"{height}x{width}", f"b{batch}"]
    return KernelCase(
        name="/".join(name + [dtype] * (dtype != "fp16")),
        kernel=_phase_conv,
        configs=[{"targets": (t,)} | config for t, config in found],
        op="upsample_conv",
        shape=(*shape, channels),
        dtype=dtype,
        where=where,
        make_inputs=lambda device: _inputs(shape, dtype, device),
        tiny_inputs=lambda device: _inputs((1, 64 + channels % 64, 5, 7), dtype, device),
        run=upsample_conv,
        launch=lambda config, x, weight, bias, folded: _launch(x, folded, bias, config),
        pick=lambda device: pick(DTYPES[dtype], device, batch * pixels, channels, channels),
        reference=reference,
        flops=32 * batch * pixels * channels**2,
        bytes=(5 * batch * pixels * channels + 16 * channels**2) * itemsize,
        atol=TOLERANCES[dtype],
        rtol=TOLERANCES[dtype],
        **given,
    )


def _fold_case(channels, dtype="fp16", last=False) -> KernelCase:
    """The kernel that folds weights, which runs before the others; it is only compiled."""
    numbers = {"pairs": channels**2, "K": channels}
    strides = (9 * channels, 1, 3 * channels, channels) if last else (9 * channels, 9, 3, 1)
    numbers |= {f"stride_{axis}": stride for axis, stride in zip("nkyx", strides, strict=True)}
    given = specialized(dict.fromkeys(("w_ptr", "folded_ptr"), f"*{dtype}"), numbers)
    given["constexprs"]["ACC"] = tl.float32
    others = [dtype] * (dtype != "fp16") + ["channels_last"] * last
    return KernelCase(name="/".join(["upsample_conv", f"c{channels}", "fold", *others]), kernel=_fold,
                      configs=[{"BLOCK": FOLD_BLOCK}], op="upsample_conv", dtype=dtype,
                      shape=(channels, channels, 3, 3), **given)  # fmt: skip


def _inputs(shape, dtype, device):
    """x in channels_last; weights as large as those of trained layers: results deviate by about 1."""
    channels = shape[1]
    options = {"dtype": DTYPES[dtype], "device": device, "generator": torch.Generator(device).manual_seed(0)}
    x = torch.randn(shape, **options).contiguous(memory_format=torch.channels_last)
    weight = torch.randn((channels, channels, 3, 3), **options) * (9 * channels) ** -0.5
    bias = torch.randn(channels, **options) * 0.1
    return {"x": x, "weight": weight, "bias": bias, "folded": fold(weight)}


def reference(x, weight, bias, folded=None) -> torch.Tensor:
    """The doubled picture, convolved, in float64."""
    doubled = F.interpolate(x.double(), scale_factor=2, mode="nearest")
    return F.conv2d(doubled, weight.double(), bias.double(), padding=1)


CASES = [
    *(_case(shape, where) for shape, where in UPSAMPLE_CONV.items()),
    *(_case(shape, "", dtype) for shape, dtype in OTHERS),
    *(_fold_case(channels) for channels in sorted({shape[1] for shape in UPSAMPLE_CONV})),
    *(_fold_case(shape[1], dtype) for shape, dtype in OTHERS),
    _fold_case(640, last=True),
]
