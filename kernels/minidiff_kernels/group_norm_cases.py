"""Group norm's cases: all of Stable Diffusion's in float16 and channels_last, and one of every other way.

Where a group does not fit in one block there are three launches and three cases: NAME/moments and NAME/tables
are compiled; the third, NAME, is compiled too, and run, tested and timed for all of them.
"""

import torch
import triton.language as tl

from minidiff_kernels.case import KernelCase, specialized
from minidiff_kernels.group_norm import (
    TABLE_BLOCK,
    UNSPECIALIZED,
    Blocks,
    _apply,
    _launch,
    _moments,
    _norm_one_block,
    _tables,
    blocks,
    chunked,
    group_norm,
)
from minidiff_kernels.shapes import GROUP_NORM

GROUPS, EPS = 32, 1e-5
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCES = {"fp16": 2e-3, "bf16": 2e-2, "fp32": 1e-5}  # as in the tests
# Blocks for sm_90 beside those that are launched, to time them: pixels and channels of a tile, warps, and the
# most blocks of a picture; or the warps of a block that has a group.
CANDIDATES = (
    *((16, 64, 4, 512), (16, 64, 4, 1024), (32, 64, 4, 512), (32, 64, 8, 256), (32, 64, 8, 1024)),
    (64, 64, 8, 512),
)
WARPS = (4, 8, 16)
OTHERS = [  # shape, dtype, channels_last, temb
    *(((2, channels, side, side, True), "fp16", True, True)
      for channels, side in ((320, 64), (1280, 16), (1280, 8))),
    *(((2, channels, side, side, True), "fp16", False, False)
      for channels, side in ((128, 512), (320, 64), (640, 32), (1280, 16), (2560, 16), (2560, 8))),
    *(((1, channels, side, side, True), "fp32", last, False)
      for last in (True, False) for channels, side in ((128, 512), (640, 32), (2560, 16))),
    *(((1, channels, side, side, True), "bf16", True, False) for channels, side in ((128, 512), (1280, 8))),
]  # fmt: skip


def _cases(shape, where, dtype="fp16", last=True, temb=False):
    """The cases of one shape, one or three."""
    batch, channels, height, width, silu = shape
    pixels, per_group = height * width, channels // GROUPS
    cut = blocks(channels, pixels, GROUPS, last)
    choices = [cut, *(_candidates(cut, channels, pixels) if where else ())]
    name = _name(shape, dtype, last, temb)
    common = {"op": "group_norm", "shape": shape[:4], "dtype": dtype, "where": where}
    steps = (channels, 1) if last else (1, pixels)
    numbers = {"channels": channels, "pixels": pixels}
    numbers |= {f"stride_{x}{axis}": step for x in "xy"
                for axis, step in zip("bnc", (channels * pixels, *steps), strict=True)}  # fmt: skip
    types = dict.fromkeys(("x_ptr", "y_ptr", "weight_ptr", "bias_ptr"), f"*{dtype}")
    types |= {"temb_ptr": f"*{dtype}" if temb else None}
    constants = {"PER_GROUP": per_group, "EPS": EPS, "SILU": silu, "ACC": tl.float32}

    def case(suffix, kernel, configs, **others):
        names = kernel.arg_names
        given = [{name: table[name] for name in names if name in table} for table in (types, numbers)]
        given = specialized(*given, UNSPECIALIZED if kernel is _tables else ())
        given["constexprs"] |= {name: value for name, value in constants.items() if name in names}
        return KernelCase(name=name + suffix, kernel=kernel, configs=configs, **given, **common, **others)

    run = {
        "make_inputs": lambda device: _inputs(shape, GROUPS, dtype, last, temb, device),
        "tiny_inputs": lambda device: _tiny(per_group, pixels, cut, dtype, last, temb, silu, device),
        "run": _run,
        "launch": lambda config, **inputs: _run(**inputs, cut=Blocks(**config)),
        "pick": lambda device: cut._asdict(),
        "choices": (cut._asdict(), *(choice._asdict() | {"targets": ("sm_90",)} for choice in choices[1:])),
        "reference": reference,
        "flops": 12 * batch * channels * pixels,
        "bytes": (2 if cut.chunk_pixels is None else 3) * batch * channels * pixels * DTYPES[dtype].itemsize,
        "atol": TOLERANCES[dtype],
        "rtol": TOLERANCES[dtype],
    }
    if cut.chunk_pixels is None:
        return [case("", _norm_one_block, _tiles(choices, 1), **run)]
    numbers |= {
        "per_group": per_group,
        "chunk_pixels": cut.chunk_pixels,
        "chunks": -(-pixels // cut.chunk_pixels),
    }
    types |= dict.fromkeys(("mean_ptr", "squares_ptr", "table_ptr"), "*fp32")
    return [
        case("/moments", _moments, _tiles(choices, 1)),
        case("/tables", _tables, [{"BLOCK": TABLE_BLOCK, "num_warps": 4}]),
        case("", _apply, _tiles(choices, 2), **run),
    ]


def _tiles(choices, factor):
    """The tiles of a pass: of each choice, factor times as high; that of the first for all targets."""
    found = {}
    for number, (height, *tile, _) in enumerate(choices):
        found.setdefault((factor * height, *tile), {"targets": ("sm_90",)} if number else {})
    return [dict(zip(("BLOCK_N", "BLOCK_C", "num_warps"), tile, strict=True)) | targets
            for tile, targets in found.items()]  # fmt: skip


def _candidates(cut, channels, pixels):
    if cut.chunk_pixels is None:
        fitting = [warps for warps in WARPS if 2048 * warps >= cut.BLOCK_N * cut.BLOCK_C]  # 64 a thread
        return [cut._replace(num_warps=warps) for warps in fitting if warps != cut.num_warps]
    others = [chunked(channels, pixels, *candidate) for candidate in CANDIDATES]
    return [other for other in dict.fromkeys(others) if other != cut]


def _name(shape, dtype, last, temb):
    batch, channels, height, width, silu = shape
    kind = "groupnorm_silu" if silu else "groupnorm"
    others = [dtype] * (dtype != "fp16") + ["nchw"] * (not last) + ["temb"] * temb
    return "/".join([kind, f"c{channels}", f"{height}x{width}", f"b{batch}", *others])


def _tiny(per_group, pixels, cut, dtype, last, temb, silu, device):
    """Two groups of one block, or one group with as few pixels as do not fit into one."""
    if cut.chunk_pixels is None:
        return _inputs((1, 2 * per_group, 1, pixels, silu), 2, dtype, last, temb, device)
    few = next(n for n in (1 << i for i in range(18)) if blocks(per_group, n + 1, 1, last).chunk_pixels)
    return _inputs((1, per_group, 1, few + 1, silu), 1, dtype, last, temb, device)


def _inputs(shape, num_groups, dtype, last, temb, device):
    batch, channels, height, width, silu = shape
    options = {"dtype": DTYPES[dtype], "device": device, "generator": torch.Generator(device).manual_seed(0)}
    x = torch.randn((batch, channels, height, width), **options).mul_(2).add_(3)
    weight, bias = torch.randn((2, channels), **options)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    added = {"temb": torch.randn((batch, channels), **options)} if temb else {}
    return {"x": x, "weight": weight, "bias": bias, "num_groups": num_groups, "silu": silu, **added}


def _run(x, weight, bias, num_groups, silu, temb=None, cut=None):
    if cut is not None:
        return _launch(x, num_groups, weight, bias, EPS, silu, temb, cut)
    return group_norm(x, num_groups, weight, bias, EPS, silu, temb)


def reference(x, weight, bias, num_groups, silu, temb=None) -> torch.Tensor:
    """The formula in float64; two passes, so that nothing cancels."""
    per_channel = (1, -1, 1, 1)
    y = x.double() if temb is None else x.double() + temb.double()[:, :, None, None]
    groups = y.reshape(len(x), num_groups, -1)  # (B, G, C/G * H * W)
    variance, mean = torch.var_mean(groups, -1, correction=0, keepdim=True)
    y = ((groups - mean) / torch.sqrt(variance + EPS)).reshape(x.shape)
    y = y * weight.double().reshape(per_channel) + bias.double().reshape(per_channel)
    return y * torch.sigmoid(y) if silu else y


CASES = [
    *(case for shape, where in GROUP_NORM.items() for case in _cases(shape, where)),
    *(case for shape, *others in OTHERS for case in _cases(shape, "", *others)),
]
