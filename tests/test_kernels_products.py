"""GEGLU and the folded upsample convolution, interpreted on a CPU, against the formulas in float64."""

import sys

import pytest
import torch
import torch.nn.functional as F
from minidiff_kernels import fold, geglu, geglu_linear, upsample_conv
from minidiff_kernels.geglu_cases import reference as geglu_reference
from minidiff_kernels.products import choose
from minidiff_kernels.upsample_conv_cases import reference as upsample_reference
from parity import assert_close

TOLERANCES = {  # of values around 1, 3 to 10 × what was measured
    torch.float64: 1e-13,  # rounding only
    torch.float32: 6e-6,
    torch.bfloat16: 3e-2,  # 8 bits: the result alone is rounded by 4e-3, folded weights once more
    torch.float16: 4e-3,  # 11 bits
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def normal(*shapes, dtype=torch.float64):
    """Tensors that are rounded to dtype, so that the reference sees the same numbers."""
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def linear(x_shape, n, dtype=torch.float64):
    k = x_shape[-1]
    x, weight, bias = normal(x_shape, (2 * n, k), (2 * n,), dtype=dtype)
    return x, weight * k**-0.5, bias


def picture(shape, n, dtype=torch.float64, layout=torch.channels_last):
    k = shape[1]
    x, weight, bias = normal(shape, (n, k, 3, 3), (n,), dtype=dtype)
    return x.contiguous(memory_format=layout), weight * (9 * k) ** -0.5, bias


def check(y, theirs, dtype):
    assert y.dtype == dtype
    assert_close(y, theirs, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(2,), (3, 5, 14), (9, 2 * 300)], ids=str)
def test_geglu_equals_the_formula(shape, dtype):
    (x,) = normal(shape, dtype=dtype)
    check(geglu(x), geglu_reference(x), dtype)


def test_geglu_reads_views_and_takes_nothing():
    (x,) = normal((4, 7, 13), dtype=torch.float32)
    for view in (x[:, :, 1:], x[::2, 1:, :12], x[:, :6].mT):
        check(geglu(view), geglu_reference(view), torch.float32)
    assert geglu(x[:0, :, 1:]).shape == (0, 7, 6)


def test_infinities_and_nan_come_out_of_geglu_as_out_of_torch():
    x = torch.tensor([[1.0, value] for value in (torch.inf, -torch.inf, torch.nan, 0.0, -60.0)])
    value, gate = x.chunk(2, dim=-1)
    assert_close(geglu(x), value * F.gelu(gate), atol=1e-7)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("shape", "n"), [((1, 1), 1), ((3, 23, 70), 45), ((65, 64), 33)], ids=str)
def test_geglu_with_its_product_equals_the_formula(shape, n, dtype):
    x, weight, bias = linear(shape, n, dtype)
    check(geglu_linear(x, weight, bias), geglu_reference(x, weight, bias), dtype)


def test_geglu_with_its_product_reads_views_and_needs_no_bias():
    x, weight, bias = linear((5, 2, 34), 9, torch.float32)
    theirs = geglu_reference(x[:, 1, 1:], weight[:, 1:], 0 * bias)
    check(geglu_linear(x[:, 1, 1:], weight[:, 1:]), theirs, torch.float32)
    check(geglu_linear(x, weight.T.contiguous().T, bias), geglu_reference(x, weight, bias), torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_upsample_conv_equals_the_doubled_pictures_convolution(layout, dtype):
    x, weight, bias = picture((2, 37, 5, 7), 41, dtype, layout)
    y = upsample_conv(x, weight, bias)
    assert y.is_contiguous(memory_format=layout)
    check(y, upsample_reference(x, weight, bias), dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 64, 1, 9), (3, 5, 9, 1)], ids=str)
def test_upsample_conv_has_edges_on_all_sides(shape):
    x, weight, bias = picture(shape, 3, torch.float32)
    check(upsample_conv(x, weight, bias), upsample_reference(x, weight, bias), torch.float32)


def test_upsample_conv_reads_views_and_needs_no_bias():
    x, weight, bias = picture((3, 9, 6, 8), 4, torch.float32)
    for view in (x[:, 1:], x[::2, :8, 1:, ::3], x[:, :8].mT):
        theirs = upsample_reference(view, weight[:, 1:], 0 * bias)
        check(upsample_conv(view, weight[:, 1:]), theirs, torch.float32)
    assert upsample_conv(x[:0], weight, bias).shape == (0, 4, 12, 16)


def test_upsample_conv_takes_weights_that_were_folded_before():
    x, weight, bias = picture((1, 4, 3, 3), 5)
    folded = fold(weight)
    assert folded.shape == (2, 2, 2, 2, 5, 4)
    assert_close(folded[0, 1, 1, 0], (weight[:, :, 1:, :2]).sum((2, 3)), atol=1e-15)
    assert_close(upsample_conv(x, weight, bias, folded), upsample_conv(x, weight, bias))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_weights_are_folded_in_float32(dtype):
    (weight,) = normal((23, 30, 3, 3), dtype=dtype)
    weight = weight[:, 2:].contiguous(memory_format=torch.channels_last)
    wide = weight.to(torch.promote_types(dtype, torch.float32))
    for p, rows in enumerate(([[0], [1, 2]], [[0, 1], [2]])):
        for q, columns in enumerate(([[0], [1, 2]], [[0, 1], [2]])):
            taps = [wide[:, :, y].sum(2)[:, :, x].sum(2).to(dtype) for y in rows for x in columns]
            assert_close(fold(weight)[p, q].flatten(0, 1), torch.stack(taps), rtol=torch.finfo(dtype).eps)


def test_infinities_spoil_what_they_reach():
    x, weight, bias = picture((1, 2, 5, 5), 2)
    x[0, 1, 2, 2] = torch.inf
    y = upsample_conv(x, weight.abs(), bias)
    expected = torch.zeros(10, 10, dtype=torch.bool)
    expected[3:7, 3:7] = True
    assert torch.equal(y[0, 0].isinf(), expected)
    assert torch.equal(y[0, 1].isinf(), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_the_gradients_pass_gradcheck(bias):
    x, weight, b = (tensor.requires_grad_() for tensor in picture((1, 2, 2, 3), 2))
    inputs = [x, weight, b] if bias else [x, weight]
    assert torch.autograd.gradcheck(upsample_conv, inputs, fast_mode=True)
    x, weight, b = (tensor.requires_grad_() for tensor in linear((3, 4), 2))
    inputs = [x, weight, b] if bias else [x, weight]
    assert torch.autograd.gradcheck(geglu_linear, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(geglu, [x], fast_mode=True)


def test_the_gradient_of_geglu_is_that_of_the_error_function():
    inputs = [3 * tensor for tensor in linear((5, 4), 3)]  # gradcheck lets 1e-3 pass: GELU with tanh, too
    value, gate = F.linear(*[tensor.requires_grad_() for tensor in inputs]).chunk(2, dim=-1)
    formula = value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    expected = torch.autograd.grad(formula.sum(), inputs)
    for y in (geglu_linear(*inputs), geglu(F.linear(*inputs))):
        for ours, theirs in zip(torch.autograd.grad(y.sum(), inputs), expected, strict=True):
            check(ours, theirs, torch.float64)


def test_the_largest_blocks_that_fill_the_gpu_are_chosen():
    large, small = {"BLOCK_M": 128, "BLOCK_N": 256}, {"BLOCK_M": 64, "BLOCK_N": 64}
    assert choose([large, small], 8192, 1280, tiles=132) is large
    assert choose([large, small], 512, 1280, tiles=132) is small
    assert choose([large, small], 8192, 640, tiles=132) is small  # half of the last block would be idle


ONES = {"x": torch.ones(2, 6, 4, 4), "weight": torch.ones(5, 6, 3, 3), "bias": torch.ones(5)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 5, 4, 4)}, ValueError, r"x \(2, 5, 4, 4\) and weight \(5, 6, 3, 3\) don't fit"),
        ({"weight": torch.ones(5, 6, 1, 1)}, ValueError, r"expected \(B, K, H, W\) and \(N, K, 3, 3\)"),
        ({"bias": torch.ones(6)}, ValueError, r"bias has shape \(6,\); expected \(5,\)"),
        ({"folded": torch.ones(4)}, ValueError, r"folded has shape \(4,\); expected \(2, 2, 2, 2, 5, 6\)"),
        ({"bias": torch.ones(5).half()}, TypeError, "tensors are torch.float16, torch.float32; cast them"),
        ({"x": torch.ones(2, 6, 4, 4).int()}, TypeError, "x is torch.int32; expected float16"),
    ],
)
def test_upsample_conv_refuses_what_does_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        upsample_conv(**ONES | change)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 4), (6, 5)), r"x \(3, 4\) and weight \(6, 5\) don't fit; expected \(..., K\) and \(2N, K\)"),
        (((3, 4), (5, 4)), r"x \(3, 4\) and weight \(5, 4\) don't fit"),
        (((3, 4), (6, 4), (3,)), r"bias has shape \(3,\); expected \(6,\)"),
    ],
)
def test_geglu_with_its_product_refuses_what_does_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        geglu_linear(*normal(*shapes))


def test_geglu_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"geglu: x has shape \(3, 5\); expected \(..., 2C\)"):
        geglu(torch.ones(3, 5))
    with pytest.raises(TypeError, match=r"x is torch.float32, weight torch.float16, bias None; cast them"):
        geglu_linear(torch.ones(3, 4), torch.ones(6, 4).half())


@pytest.mark.parametrize("call", [
    lambda: geglu(torch.ones(3, 4)), lambda: geglu_linear(torch.ones(3, 4), torch.ones(6, 4)),
    lambda: upsample_conv(**ONES),
])  # fmt: skip
def test_the_kernels_need_a_gpu_or_the_interpreter(call, monkeypatch):
    monkeypatch.setattr(sys.modules["minidiff_kernels.launch"], "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="Triton got a tensor on cpu"):
        call()
