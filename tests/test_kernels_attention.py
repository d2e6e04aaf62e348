"""The attention kernels, interpreted on a CPU, against the formula in float64."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from minidiff_kernels.attention import attention
from minidiff_kernels.attention_blocks import split
from parity import assert_close

from minidiff import ops

TOLERANCES = {  # of values around 1, 3 to 10 × what was measured
    torch.float64: 1e-14,  # rounding only
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,  # 8 bits: the result alone is rounded by 4e-3
    torch.float16: 2e-3,  # 11 bits; weights are rounded too, before they meet v
}
SHORT = [  # B, heads, T, S, D; keys that stay on chip: 1 or 2 tiles of them, heads of 1 or 2 tiles
    (2, 3, 5, 7, 40),
    (1, 2, 77, 77, 64),
    (2, 1, 140, 77, 80),
    (1, 1, 65, 96, 160),
    (1, 2, 1, 1, 3),
]
TILED = [  # keys in blocks; 512 and 320 in two slices of columns
    (1, 2, 150, 200, 40),
    (1, 1, 1, 192, 64),
    (2, 1, 130, 129, 80),
    (1, 1, 65, 128, 160),
    (1, 1, 33, 70, 512),
    (1, 1, 5, 129, 320),
]


def qkv(shape, dtype=torch.float64):
    """q, k and v as the models make them: heads are parts of a token's channels."""
    batch, heads, queries, keys, size = shape
    torch.manual_seed(0)
    lengths = (queries, keys, keys)
    return [torch.randn(batch, n, heads * size).to(dtype).unflatten(2, (heads, size)).transpose(1, 2)
            for n in lengths]  # fmt: skip


def formula(q, k, v, bias=0.0):
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1]) + bias
    return torch.softmax(scores, dim=-1) @ v.double()


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched, in order."""
    names, module = [], sys.modules["minidiff_kernels.attention"]

    def recording(name, kernel):
        class Kernel:
            def __getitem__(self, grid):
                names.append(name)
                return kernel[grid]

        return Kernel()

    for name in ("short", "tiled"):
        monkeypatch.setattr(
            module, f"_attention_{name}", recording(name, getattr(module, f"_attention_{name}"))
        )
    return names


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHORT + TILED, ids=str)
def test_attention_equals_the_formula(shape, dtype, launched):
    q, k, v = qkv(shape, dtype)
    out = attention(q, k, v)
    assert out.dtype == dtype
    assert_close(out, formula(q, k, v), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert launched == ["short" if shape in SHORT else "tiled"]


@pytest.mark.parametrize("shape", [(1, 1, 2047, 77, 16), (1, 1, 300, 1000, 16), (1, 1, 3, 4095, 16)], ids=str)
def test_attention_of_many_tokens_equals_the_formula(shape):
    q, k, v = qkv(shape)
    assert_close(attention(q, k, v), formula(q, k, v), atol=1e-14)


@pytest.mark.parametrize("size", [8, 16, 24, 48, 72, 96, 112, 120, 128, 144, 192, 200, 256, 257, 384, 511])
def test_heads_of_every_size_are_cut_into_tiles(size):
    q, k, v = qkv((1, 1, 3, 131, size))
    assert_close(attention(q, k, v), formula(q, k, v), atol=1e-14)


def test_tiles_are_powers_of_two_with_little_left_over():
    assert [split(n) for n in (40, 64, 77, 80, 160, 512)] == [
        (32, 16),
        (64, 0),
        (64, 16),
        (64, 16),
        (128, 32),
        (512, 0),
    ]
    for size in range(1, 513):
        tiles = [tile for tile in split(size) if tile]
        assert all(tile >= 16 and tile & (tile - 1) == 0 for tile in tiles)
        assert size <= sum(tiles) <= max(16, 1 << (size - 1).bit_length())
    assert sum(sum(split(n)) for n in range(1, 513)) < 0.9 * sum(
        1 << (n - 1).bit_length() for n in range(1, 513)
    )


LAYOUTS = {  # how a tensor may lie in memory
    "contiguous": lambda x: x.contiguous(),
    "of a fused projection": lambda x: torch.cat([x.transpose(1, 2)] * 3, dim=2).transpose(1, 2)[
        :, x.shape[1] : -x.shape[1]
    ],
    "tokens last": lambda x: x.mT.contiguous().mT,
    "every second number": lambda x: torch.stack([x, x], dim=-1).flatten(3)[..., ::2],
    "at an odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "one picture expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("keys", [77, 150])
@pytest.mark.parametrize("first", range(len(LAYOUTS)))
def test_strides_do_not_matter(first, keys):
    layouts = [*LAYOUTS.values(), *LAYOUTS.values()][first : first + 3]  # q, k and v have one each
    q, k, v = (layout(x) for layout, x in zip(layouts, qkv((2, 2, 20, keys, 5), torch.float32), strict=True))
    assert_close(attention(q, k, v), formula(q, k, v), atol=2e-6)


def test_the_result_joins_its_heads_without_a_copy():
    out = attention(*qkv((2, 3, 5, 7, 8)))
    tokens = out.transpose(1, 2).flatten(2)  # (B, T, heads * D), as the next projection takes it
    assert tokens.data_ptr() == out.data_ptr() and tokens.is_contiguous()


MASKS = {  # shapes that broadcast to (B, heads, T, S)
    "all": lambda b, h, t, s: (b, h, t, s),
    "pictures": lambda b, h, t, s: (b, 1, 1, s),
    "heads": lambda b, h, t, s: (h, t, 1),
    "tokens": lambda b, h, t, s: (t, s),
    "keys": lambda b, h, t, s: (s,),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(2, 3, 70, 77, 40), (2, 2, 70, 130, 16)], ids=str)
@pytest.mark.slow
def test_masks_equal_the_formula(shape, kind, dtype):
    q, k, v = qkv(shape)
    mask = torch.randn(MASKS[kind](*shape[:4]), dtype=torch.float64)
    mask = mask > -1 if dtype == torch.bool else (2 * mask).to(dtype)
    mask[..., 0] = 1
    bias = torch.where(mask, 0.0, -math.inf).double() if dtype == torch.bool else mask.double()
    assert_close(attention(q, k, v, mask), formula(q, k, v, bias), atol=1e-14)


@pytest.mark.parametrize("keys", [77, 130])
def test_masks_with_strides_of_their_own(keys):
    q, k, v = qkv((2, 2, 70, keys, 16))
    mask = torch.rand(keys, 70) > 0.3
    expected = formula(q, k, v, torch.where(mask.T, 0.0, -math.inf).double())
    assert_close(attention(q, k, v, mask.T), expected, atol=1e-14)
    mask = torch.rand(2, 1, 70, 2 * keys).mul(3)[..., ::2]
    assert_close(attention(q, k, v, mask), formula(q, k, v, mask), atol=1e-14)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("keys", [77, 150])
def test_a_row_that_may_look_nowhere_gives_zero(keys, dtype):
    q, k, v = qkv((2, 1, 70, keys, 40), dtype)
    allowed = torch.rand(70, keys) > 0.5
    allowed[3], allowed[:40, :64], allowed[:, 0] = False, False, True  # the first block of keys has little
    allowed[3, 0] = False
    bias = torch.zeros(70, keys).masked_fill(~allowed, -math.inf)
    expected = formula(q, k, v, bias.double()).nan_to_num(0.0)
    for mask in (allowed, bias):
        out = attention(q, k, v, mask)
        assert not out[:, :, 3].any()
        assert_close(out, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [77, 150])
def test_the_lowest_number_hides_keys_unless_it_hides_all(keys, dtype):
    q, k, v = qkv((1, 1, 5, keys, 16), torch.float32)
    mask = torch.zeros(5, keys, dtype=dtype)
    mask[:, 3:] = torch.finfo(dtype).min
    mask[2] = torch.finfo(dtype).min  # nothing is above the rest: equal weights, as in PyTorch
    assert_close(attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask.float()), atol=2e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("keys", [77, 150])
def test_nan_and_infinity_spread_as_in_pytorch(keys):
    shape = (1, 6, 4, keys, 16)
    q, k, v = qkv(shape, torch.float32)
    k = k.abs()
    q[0, 0, 1, 2] = math.nan  # one row
    k[0, 1, 70, 2] = math.nan  # all rows
    v[0, 2, 70, 2] = math.nan  # one column
    q[0, 3, 1], q[0, 3, 2] = math.inf, -math.inf  # scores all inf: NaN; all -inf: they look nowhere
    k[0, 4, 70] = math.inf  # rows whose score is inf, and, with a sum of inf and -inf, NaN
    v[0, 5, 70, 2] = math.inf
    expected = F.scaled_dot_product_attention(q, k, v)
    expected[0, 3, 2] = 0
    assert_close(attention(q, k, v), expected, atol=2e-6)


@pytest.mark.parametrize("keys", [77, 150])
def test_a_key_that_a_mask_hides_may_hold_nan(keys):
    q, k, v = qkv((1, 1, 4, keys, 16))
    k[0, 0, 70] = math.nan
    mask = torch.ones(keys, dtype=torch.bool)
    mask[70] = False
    expected = formula(q, k.nan_to_num(0.0), v, torch.zeros(keys).masked_fill(~mask, -math.inf))
    assert_close(attention(q, k, v, mask), expected, atol=1e-14)


@pytest.mark.parametrize("keys", [9, 150])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_scores_do_not_overflow(dtype, keys):
    q, k, v = qkv((1, 2, 9, keys, 64), dtype)
    q, k = 64 * q, 64 * k  # scores up to 1e6 before the scale; float16 ends at 65504
    tolerance = (
        10 * TOLERANCES[dtype] if dtype == torch.float32 else TOLERANCES[dtype]
    )  # the scores' own rounding
    assert_close(attention(q, k, v), formula(q, k, v), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("position", [0, 63, 70])  # in the first tile of keys, at its end, in the second
@pytest.mark.parametrize("keys", [77, 150])
def test_the_highest_score_may_stand_anywhere(keys, position):
    q, k, v = qkv((1, 2, 9, keys, 16))
    k[:, :, position] *= 1000  # exp would overflow if another score were taken for the highest
    assert_close(attention(q, k, v), formula(q, k, v), atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 8), (2, 2, 0, 4, 8), (2, 0, 3, 4, 8)], ids=str)
def test_nothing_in_gives_nothing_out(shape):
    assert attention(*qkv(shape)).shape == (*shape[:3], shape[4])


def test_without_keys_the_result_is_zero():
    out = attention(*qkv((2, 2, 3, 0, 8)))
    assert_close(out, torch.zeros(2, 2, 3, 8))


@pytest.mark.parametrize("keys", [5, pytest.param(130, marks=pytest.mark.slow)])
def test_gradients_are_right(keys):
    q, k, v = (x.requires_grad_() for x in qkv((1, 2, 3, keys, 4)))
    bias = torch.randn(2, 3, 1, dtype=torch.float64, requires_grad=True)
    allowed = torch.rand(3, keys) > 0.4
    assert torch.autograd.gradcheck(attention, (q, k, v), fast_mode=True)
    assert torch.autograd.gradcheck(attention, (q, k, v, bias), fast_mode=True)
    assert torch.autograd.gradcheck(attention, (q, k, v, allowed), fast_mode=True)


def test_gradients_stop_where_none_is_asked_for():
    q, k, v = qkv((1, 2, 3, 5, 4))
    attention(q, k.requires_grad_(), v).sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad


def test_a_row_that_may_look_nowhere_has_no_gradient():
    q, k, v = (x.requires_grad_() for x in qkv((1, 1, 3, 5, 4)))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    attention(q, k, v, mask).sum().backward()
    assert not q.grad[0, 0, 1].any() and all(x.grad.isfinite().all() for x in (q, k, v))


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


X = zeros(1, 2, 3, 8)
REFUSED = [
    ((X[0], X[0], X[0]), ValueError, r"q \(2, 3, 8\), k \(2, 3, 8\), v \(2, 3, 8\) don't fit; expected"),
    ((X, X[..., :4], X[..., :4]), ValueError, r"k \(1, 2, 3, 4\), v \(1, 2, 3, 4\) don't fit"),
    ((X, X, X[:, :, :2]), ValueError, "don't fit"),
    ((X, X[:, :1], X[:, :1]), ValueError, "don't fit"),
    ((X, X.half(), X), TypeError, "q is torch.float32, k torch.float16, v torch.float32; cast them to one"),
    ((X.int(), X.int(), X.int()), TypeError, "q is torch.int32; expected float16"),
    ((zeros(1, 1, 2, 513),) * 3, ValueError, 'heads of 513 numbers; .* take 1 to 512. Use backend="torch"'),
    ((zeros(1, 1, 2, 0),) * 3, ValueError, "heads of 0 numbers"),
    ((X, X, X, zeros(3, 4)), ValueError, r"mask \(3, 4\) does not broadcast to .* = \(1, 2, 3, 3\)"),
    ((X, X, X, zeros(2, 2, 3, 3)), ValueError, r"mask \(2, 2, 3, 3\) does not broadcast"),
    ((X, X, X, zeros(1, 1, 2, 3, 3)), ValueError, "does not broadcast"),
    ((X, X, X, zeros(3, 3, device="meta")), ValueError, "mask is on meta, q on cpu; move them to one device"),
    ((X, X, X, zeros(3, 3, dtype=torch.cfloat)), TypeError, "mask is torch.complex64; expected bool or numb"),
    ((X.to("meta"),) * 3, RuntimeError, 'a tensor on meta. Use backend="torch", or set TRITON_INTERPRET=1'),
]


@pytest.mark.parametrize(("arguments", "error", "text"), REFUSED)
def test_what_does_not_fit_is_named(arguments, error, text):
    with pytest.raises(error, match="attention: .*" + text):
        attention(*arguments)


def test_ops_calls_the_kernel():
    q, k, v = qkv(SHORT[0])
    mask = torch.rand(2, 1, 5, 7) > 0.2
    expected = ops.attention(q, k, v, mask, backend="reference")
    assert_close(ops.attention(q, k, v, mask, backend="triton"), expected, atol=1e-14)


@pytest.mark.slow
def test_a_cpu_is_refused_where_triton_does_not_interpret():
    code = "import torch, minidiff_kernels as m; m.attention(*torch.zeros(3, 1, 1, 2, 8))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert 'RuntimeError: attention: Triton got a tensor on cpu. Use backend="torch", or set' in run.stderr
