"""Attention's cases: all of Stable Diffusion's in float16, and one of every other way through the kernels.

The others have masks, other dtypes, other sizes of heads, and keys that end within a block; all are compiled
for every target, so that none of them spills either.
"""

import math

import torch

from minidiff_kernels import launch
from minidiff_kernels.attention import _attention_short, _attention_tiled, _checked_mask, _launch, attention
from minidiff_kernels.attention_blocks import PADDED, blocks_of, config_of, constants_of, is_short
from minidiff_kernels.case import TARGETS, KernelCase
from minidiff_kernels.shapes import ATTENTION, BATCHES, TEXT

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCES = {"fp16": 2e-3, "bf16": 2e-2, "fp32": 3e-6}  # as in the tests
# Blocks for sm_90 beside those that are launched, for heads of 40, 64, … numbers; sweep.py times them.
CANDIDATES = {
    40: [
        (128, 64, 8, 2),
        (128, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (128, 128, 8, 2),
        (64, 128, 4, 2),
        (128, 64, 8, 3, PADDED),
        (128, 64, 4, 2, PADDED),
        (64, 64, 4, 3, PADDED),
        (128, 128, 8, 2, PADDED),
        (64, 128, 4, 2, PADDED),
    ],
    64: [
        (128, 64, 8, 2),
        (128, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (64, 128, 4, 2),
    ],
    80: [(64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2), (64, 32, 4, 3)],
    160: [(128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 4, 3), (64, 64, 4, 3)],
    512: [(128, 16, 8, 2), (64, 32, 8, 3)],
}
CANDIDATES_SHORT = {
    40: [(128, 8, 2), (128, 4, 2), (64, 4, 1), (64, 4, 2, PADDED), (128, 8, 2, PADDED)],
    64: [(128, 8, 2), (128, 4, 2), (64, 4, 1)],
    80: [(128, 8, 2), (64, 8, 2), (64, 4, 2), (64, 4, 1)],
    160: [(128, 8, 1), (64, 4, 2)],
}
OTHERS = [  # shape, dtype, kind of mask
    *(((1, heads, 1000, 1000, size), "fp16", None) for heads, size in ((8, 40), (8, 64), (8, 80), (1, 512))),
    *(((2, 8, 1024, keys, 40), "bf16", None) for keys in (77, 1024)),
    *(((2, 8, 1024, 1000, size), "fp16", "bool") for size in (80, 160, 512)),
    *(((2, 8, 1024, keys, size), "fp16", "float") for keys, size in ((77, 40), (77, 128), (1000, 40))),
    *(((2, 8, 1024, 1024, size), "fp16", None) for size in (8, 128, 192, 256, 320)),
    *(((2, 8, 1024, 128, size), "fp16", None) for size in (64, 128)),
    *(((2, 8, 1024, 1024, size), "fp32", None) for size in (40, 128, 160, 256, 512)),
    ((2, 8, 1024, 77, 80), "fp32", "float"),
]


def _case(shape, where, dtype="fp16", kind=None) -> KernelCase:
    batch, heads, queries, keys, size = shape
    itemsize = DTYPES[dtype].itemsize
    short = is_short(keys, size, itemsize, kind)
    constexprs = constants_of(short, keys, size, kind, 16 // itemsize)
    constexprs |= {"mask_ptr": None} if kind is None else {"stride_ms": 1}
    configs = [(t, blocks_of(short, size, itemsize, kind, t)) for t in TARGETS]
    if dtype == "fp16" and kind is None:
        candidates = CANDIDATES_SHORT if short else CANDIDATES
        configs += [
            ("sm_90", blocks) for blocks in candidates.get(size, ()) if ("sm_90", blocks) not in configs
        ]
    configs = [{"targets": (t,)} | config_of(short, keys, size, blocks) for t, blocks in configs]
    kernel = _attention_short if short else _attention_tiled
    types = {f"{x}_ptr": f"*{dtype}" for x in "qkvo"} | {"mask_ptr": "*u8" if kind == "bool" else f"*{dtype}"}
    names = [name for name in kernel.arg_names if name not in constexprs and name not in configs[0]]
    traffic = itemsize * batch * heads * size * 2 * (queries + keys) + (queries * keys if kind else 0)
    return KernelCase(
        name=_name(shape, dtype, kind),
        kernel=kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs=constexprs,
        aligned=tuple(name for name in names if name in types or (name == "stride_ms" and kind is None)),
        configs=configs,
        op="attention",
        shape=shape,
        dtype=dtype,
        where=where,
        make_inputs=lambda device: _inputs(shape, dtype, kind, device),
        tiny_inputs=lambda device: _inputs(_tiny(shape), dtype, kind, device),
        run=attention,
        launch=lambda config, q, k, v, mask=None: _launch(q, k, v, _checked_mask(mask, q, k), config),
        pick=lambda device: config_of(
            short, keys, size, blocks_of(short, size, itemsize, kind, launch.target(device))
        ),
        reference=reference,
        flops=4 * batch * heads * queries * keys * size,
        bytes=traffic,
        atol=TOLERANCES[dtype],
        rtol=TOLERANCES[dtype],
    )


def _name(shape, dtype, kind):
    batch, heads, queries, keys, size = shape
    what = "self" if keys == queries else f"cross{keys}"
    others = [x for x in (dtype, kind) if x not in ("fp16", None)]
    return "/".join(["attn", what, f"d{size}", f"l{queries}", f"b{batch}h{heads}", *others])


def _tiny(shape):
    """A shape of two heads that takes the same way: blocks of keys that end where a block does, or within."""
    _, heads, queries, keys, size = shape
    return 1, min(heads, 2), min(queries, 70), keys if keys <= 128 else 128 + keys % 128, size


def _inputs(shape, dtype, kind, device):
    """q, k and v as the models make them, with heads that are parts of a token, and a mask of (T, S)."""
    batch, heads, queries, keys, size = shape
    generator = torch.Generator(device).manual_seed(0)
    options = {"dtype": DTYPES[dtype], "device": device, "generator": generator}
    tensors = {name: torch.randn((batch, tokens, heads, size), **options).transpose(1, 2)
               for name, tokens in (("q", queries), ("k", keys), ("v", keys))}  # fmt: skip
    if kind is not None:
        mask = torch.randn((queries, keys), **options)
        tensors["mask"] = mask > -1 if kind == "bool" else mask
    return tensors


def reference(q, k, v, mask=None) -> torch.Tensor:
    """attention in float64, in as many pieces as there are heads, so that the scores need little memory."""
    pairs = [(b, h) for b in range(q.shape[0]) for h in range(q.shape[1])]
    bias = 0.0 if mask is None else mask.double()
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.where(mask, 0.0, -math.inf).double()
    heads = [_head(q[at].double(), k[at].double(), v[at].double(), bias) for at in pairs]
    return torch.stack(heads).view(q.shape)


def _head(q, k, v, bias):
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]) + bias, dim=1) @ v


CLIP = {(batch, heads, TEXT, TEXT, 64): "CLIP text models" for batch in BATCHES for heads in (12, 20)}
CASES = [
    *(_case(shape, where) for shape, where in ATTENTION.items()),
    *(_case(shape, where, kind="bool") for shape, where in CLIP.items()),
    *(_case(shape, "", dtype, kind) for shape, dtype, kind in OTHERS),
]
