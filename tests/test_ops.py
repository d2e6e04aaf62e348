"""ops: every backend against the formula in float64, the choice of backends, and the errors."""

import math
import sys
import types

import pytest
import torch
from parity import assert_close
from torch import nn

from minidiff import UNet2DModel, ops
from minidiff.models.layers import AttentionBlock

TOLERANCES = {  # of one call with values around 1, about 5 × what was measured
    torch.float64: 1e-13,  # rounding only
    torch.float32: 3e-6,
    torch.bfloat16: 2e-2,  # 8 bits: the result alone is rounded by 4e-3
    torch.float16: 2e-3,  # 11 bits
}
SHAPES = [(2, 3, 5, 7, 40), (1, 2, 77, 77, 64), (2, 1, 65, 9, 80), (1, 2, 1, 33, 160)]  # B, heads, T, S, D


def qkv(shape, dtype=torch.float64):
    batch, heads, queries, keys, size = shape
    torch.manual_seed(0)
    return [torch.randn(batch, heads, length, size, dtype=dtype) for length in (queries, keys, keys)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_the_formula(shape, backend, dtype):
    q, k, v = qkv(shape, dtype)
    weights = torch.softmax(q.double() @ k.double().mT / math.sqrt(shape[-1]), dim=-1)
    out = ops.attention(q, k, v, backend=backend)
    assert out.dtype == dtype
    assert_close(out, weights @ v.double(), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", ["bool", "float", "float16 for float64"])
def test_attention_masks_equal_the_formula(kind, backend):
    q, k, v = qkv(SHAPES[0])
    allowed = torch.rand(2, 1, 5, 7) > 0.4
    allowed[..., 0] = True
    bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -math.inf)
    weights = torch.softmax(q @ k.mT / math.sqrt(40) + bias, dim=-1)
    mask = {"bool": allowed, "float": bias, "float16 for float64": bias.half()}[kind]
    assert_close(ops.attention(q, k, v, mask, backend=backend), weights @ v, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_row_that_may_look_nowhere_gives_zero(backend):
    q, k, v = qkv(SHAPES[0])
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    out = ops.attention(q, k, v, mask, backend=backend)
    assert_close(out[:, :, 2], torch.zeros(2, 3, 40))
    assert_close(out[:, :, :2], ops.attention(q, k, v, backend=backend)[:, :, :2], atol=1e-14)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_attention_scores_beyond_float16_do_not_overflow(backend):
    q, k, v = qkv((1, 2, 9, 9, 64), torch.float16)
    q, k = 64 * q, 64 * k  # scores up to 1e6 before the scale; float16 ends at 65504
    weights = torch.softmax(q.double() @ k.double().mT / 8, dim=-1)
    assert_close(ops.attention(q, k, v, backend=backend), weights @ v.double(), atol=2e-3)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_group_norm_equals_the_formula(memory_format, backend, silu, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 12, 5, 7, dtype=dtype).to(memory_format=memory_format)
    weight, bias = torch.randn(2, 12, dtype=dtype)
    groups = x.double().reshape(2, 4, -1)
    variance, mean = torch.var_mean(groups, -1, keepdim=True, correction=0)
    groups = (groups - mean) / (variance + 1e-5).sqrt()
    expected = groups.reshape(x.shape) * weight.double()[:, None, None] + bias.double()[:, None, None]
    expected = expected * torch.sigmoid(expected) if silu else expected
    out = ops.group_norm(x, 4, weight, bias, 1e-5, silu=silu, backend=backend)
    assert out.dtype == dtype
    assert_close(out, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_group_norm_adds_temb_first(backend):
    torch.manual_seed(0)
    x, temb, (weight, bias) = torch.randn(2, 12, 5, 7), torch.randn(2, 12), torch.randn(2, 12)
    expected = ops.group_norm(x + temb[:, :, None, None], 4, weight, bias, 1e-5, silu=True)
    out = ops.group_norm(x, 4, weight, bias, 1e-5, silu=True, backend=backend, temb=temb)
    assert_close(out, expected, atol=3e-6)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_geglu_equals_the_formula(backend, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 22, dtype=dtype)
    value, gate = x.double().chunk(2, dim=-1)
    expected = value * gate * torch.special.ndtr(gate)
    out = ops.geglu(x, backend=backend)
    assert out.dtype == dtype
    assert_close(out, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("size", [(10, 14), (9, 13)], ids=str)
def test_upsampling_equals_the_formula(size, backend, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 7, dtype=dtype), torch.randn(4, 3, 3, 3, dtype=dtype) / 5
    bias = torch.randn(4, dtype=dtype)
    big = (
        x.double().repeat_interleave(2, 2).repeat_interleave(2, 3)
    )  # without the last row and column: 9 to 5
    rows, columns = ([i * old // new for i in range(new)] for old, new in zip((5, 7), size, strict=True))
    big = big if size == (10, 14) else x.double()[:, :, rows][:, :, :, columns]
    expected = nn.functional.conv2d(big, weight.double(), bias.double(), padding=1)
    out = ops.upsample_conv(x, size, weight, bias, backend=backend)
    assert out.dtype == dtype
    assert_close(out, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_every_operation_runs_as_a_kernel_in_the_interpreter():
    torch.manual_seed(0)
    q, k, v = qkv((1, 2, 3, 4, 40), torch.float32)
    x, weight = torch.randn(1, 8, 3, 5), torch.randn(8, 8, 3, 3) / 8
    vector, temb = torch.randn(8), torch.randn(1, 8)
    calls = [
        (ops.attention, (q, k, v)),
        (ops.group_norm, (x, 2, vector, vector, 1e-5, True)),
        (
            lambda *x, backend: ops.group_norm(*x[:-1], backend=backend, temb=x[-1]),
            (x, 2, vector, vector, 1e-5, temb),
        ),
        (ops.geglu, (temb,)),
        (ops.upsample_conv, (x, (6, 10), weight, vector)),
    ]
    for call, inputs in calls:
        assert_close(call(*inputs, backend="triton"), call(*inputs, backend="reference"), atol=1e-5)


def test_a_kernel_refuses_to_upsample_to_an_odd_size():
    x, weight = torch.zeros(1, 2, 5, 7), torch.zeros(2, 2, 3, 3)
    with pytest.raises(
        ValueError, match=r'"triton" doubles a picture; \(5, 7\) to \(9, 14\) needs backend="torch"'
    ):
        ops.upsample_conv(x, (9, 14), weight, torch.zeros(2), backend="triton")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_group_norm_of_shifted_data_does_not_cancel(backend):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 32, 32) + 100
    one, zero = torch.ones(8), torch.zeros(8)
    expected = nn.functional.group_norm(x.double(), 2, one.double(), zero.double(), 1e-5)
    assert_close(ops.group_norm(x, 2, one, zero, 1e-5, backend=backend), expected, atol=1e-4)


def test_group_norm_keeps_channels_last():
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    out = ops.group_norm(x, 2, torch.ones(8), torch.zeros(8), 1e-5, silu=True)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_are_right(backend):
    q, k, v = (x.requires_grad_() for x in qkv((1, 2, 3, 4, 5)))
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, backend=backend), (q, k, v))
    x, weight, bias = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((2, 4, 2, 3), 4, 4))
    norm = lambda *x: ops.group_norm(x[0], 2, x[1], x[2], 1e-5, silu=True, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(norm, (x, weight, bias))


def test_shapes_that_do_not_fit_are_named():
    q, k, v = qkv((1, 2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"attention: q \(1, 2, 3, 5\), k \(1, 2, 4, 4\), v .* don't fit"):
        ops.attention(q, k[..., :4], v[..., :4])
    with pytest.raises(ValueError, match=r"30 channels can't be split into 32 groups; num_groups must"):
        ops.group_norm(torch.zeros(1, 30, 2, 2), 32, torch.ones(30), torch.zeros(30), 1e-5)


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "minidiff_kernels", None)


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins that record their calls, and a GPU; the environment asks for no interpreter."""
    calls = []
    module = types.ModuleType("minidiff_kernels")
    module.attention = lambda *args: calls.append(args) or "attention"
    module.group_norm = lambda *args: calls.append(args) or "group_norm"
    module.target = lambda device: "sm_90"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "minidiff_kernels", module)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return calls


def test_a_missing_kernel_is_an_error_and_never_replaced(no_kernels):
    q, k, v = qkv((1, 2, 3, 4, 5))
    with pytest.raises(ops.BackendUnavailable, match=r'attention: backend "triton" needs minidiff_kernels'):
        ops.attention(q, k, v, backend="triton")
    with pytest.raises(ops.BackendUnavailable, match=r'group_norm: .*Use backend="torch"'):
        ops.group_norm(torch.zeros(1, 4, 2, 2), 2, torch.ones(4), torch.zeros(4), 1e-5, backend="triton")
    assert ops.available_backends() == ops.available_backends("cuda") == ("reference", "torch")
    assert ops.default_backend("cuda") == ops.default_backend("cpu") == "torch"


def test_kernels_refuse_a_tensor_that_is_not_on_a_gpu(kernels):
    q, k, v = qkv((1, 2, 3, 4, 5))
    with pytest.raises(ops.BackendUnavailable, match=r'a tensor on cpu\. Use backend="torch", or set TRITON'):
        ops.attention(q, k, v, backend="triton")
    assert ops.available_backends() == ("reference", "torch")
    assert ops.available_backends("cuda") == ops.BACKENDS
    assert (ops.default_backend("cpu"), ops.default_backend("cuda:0")) == ("torch", "triton")


def test_kernels_are_called_in_the_interpreter(kernels, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k, v = qkv((1, 2, 3, 4, 5))
    assert ops.attention(q, k, v, backend="triton") == "attention"
    weight, bias = torch.ones(4), torch.zeros(4)
    assert ops.group_norm(q.mT, 2, weight, bias, 1e-5, True, backend="triton") == "group_norm"
    assert [len(call) for call in kernels] == [4, 7]
    assert ops.available_backends() == ops.BACKENDS
    assert ops.available_backends("cuda") == ("reference", "torch")
    with pytest.raises(ops.BackendUnavailable, match=r"a tensor on cuda.* unset TRITON_INTERPRET before"):
        ops.kernel("attention", torch.device("cuda"))


def test_a_gpu_that_is_not_there_or_too_old_is_named(kernels, monkeypatch):
    def refuse(device):
        raise RuntimeError("Tesla V100 has compute capability 7.0; the kernels need 8.0 or newer")

    monkeypatch.setattr(sys.modules["minidiff_kernels"], "target", refuse)
    with pytest.raises(ops.BackendUnavailable, match=r"attention: Tesla V100 has compute capability 7\.0"):
        ops.kernel("attention", torch.device("cuda"))
    assert ops.default_backend("cuda") == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ops.BackendUnavailable, match="attention: there is no GPU for backend"):
        ops.kernel("attention", torch.device("cuda"))


def test_an_unknown_backend_is_named():
    q, k, v = qkv((1, 2, 3, 4, 5))
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose one of reference, torch, triton"):
        ops.attention(q, k, v, backend="cuda")
    with pytest.raises(ValueError, match="unknown backend 'Torch'"):
        ops.group_norm(q.mT, 1, torch.ones(2), torch.zeros(2), 1e-5, backend="Torch")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        ops.use_backend(nn.Linear(1, 1), attention="fast")


def test_use_backend_sets_the_layers_below_or_nothing(no_kernels):
    block = AttentionBlock(8, groups=2, eps=1e-6)
    model = nn.Sequential(block, nn.Linear(1, 1))
    assert ops.use_backend(model, attention="reference") is model
    assert (block.backend, block.group_norm.backend) == ("reference", "torch")
    with pytest.raises(ops.BackendUnavailable):
        ops.use_backend(model, attention="torch", group_norm="triton")
    assert (block.backend, block.group_norm.backend) == ("reference", "torch")
    ops.use_backend(model, group_norm="reference")
    x = torch.randn(2, 8, 3, 5)
    expected = block(x)
    assert_close(ops.use_backend(model, attention="torch", group_norm="torch")[0](x), expected, atol=1e-6)


def test_use_backend_refuses_operations_that_no_layer_has():
    with pytest.raises(TypeError, match="no operation softmax; there are attention, group_norm, geglu"):
        ops.use_backend(nn.Linear(1, 1), softmax="torch")
    with pytest.raises(TypeError, match=r"takes a model, such as pipe\.unet, not a str"):
        ops.use_backend("scenes", attention="torch")


def small_unet():
    levels = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    return UNet2DModel(block_out_channels=(8,), norm_num_groups=2, attention_head_dim=4, **levels)


def versions(model, op):
    return {layer.backend for layer in model.modules() if getattr(layer, "op", None) == op}


def test_a_model_takes_the_default_backend_where_it_is_moved(monkeypatch):
    monkeypatch.setattr("minidiff.backends.default_backend", lambda device: f"default on {device}")
    model = small_unet()
    assert versions(model, "attention") == versions(model, "group_norm") == {"torch"}
    model.to("meta")
    assert versions(model, "attention") == versions(model, "group_norm") == {"default on meta"}
    model = ops.use_backend(small_unet(), attention="reference").to(torch.float64).to("meta")
    assert versions(model, "attention") == {"reference"}
    assert versions(model, "group_norm") == {"default on meta"}


def test_a_chosen_backend_is_refused_where_it_can_not_run_and_nothing_moves(kernels, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = ops.use_backend(small_unet(), attention="triton")
    assert model.to(torch.float64).dtype == torch.float64
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ops.BackendUnavailable, match='attention: backend "triton" got a tensor on meta'):
        model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert ops.use_backend(model, attention="torch").to("meta").device.type == "meta"
