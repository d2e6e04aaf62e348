"""The group norm kernels, interpreted on a CPU, against the formula in float64."""

import math
import sys

import pytest
import torch
from minidiff_kernels import group_norm
from minidiff_kernels.group_norm_cases import CASES, reference
from parity import assert_close

module = sys.modules["minidiff_kernels.group_norm"]
TOLERANCES = {  # of values around 1, 3 to 10 × what was measured, at any mean
    torch.float64: 1e-13,  # rounding only
    torch.float32: 6e-6,
    torch.bfloat16: 2e-2,  # 8 bits: the result alone is rounded by 4e-3
    torch.float16: 2e-3,  # 11 bits
}
ONE_BLOCK = [(2, 12, 5, 7, 4), (1, 60, 3, 3, 6), (2, 20, 1, 1, 2), (1, 9, 4, 8, 1)]  # B, C, H, W, groups
SEVERAL = [
    (2, 6, 15, 22, 2),
    (1, 70, 5, 9, 1),
]  # with small_blocks: chunks of several tiles, cut off at the end
VIEWS = ["channels", "channels from 1", "columns", "every other column", "batch", "turned"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
small_blocks = pytest.mark.usefixtures("small_blocks")


@pytest.fixture(name="small_blocks")
def _small_blocks(monkeypatch):
    """Blocks so small that little pictures are cut as real ones are."""
    for name, value in {"ONE_BLOCK": 512, "TILE": 128, "MAX_BLOCKS": 6}.items():
        monkeypatch.setattr(module, name, value)


def test_small_blocks_cut_in_all_ways(small_blocks):
    for *shape, groups in ONE_BLOCK:
        assert module.blocks(shape[1], shape[2] * shape[3], groups, True).chunk_pixels is None
    several = module.blocks(6, 15 * 22, 2, True)
    assert (several.BLOCK_N, several.chunk_pixels) == (16, 64)
    assert module.blocks(70, 45, 1, True).BLOCK_C == 64
    assert module.blocks(70, 45, 1, False).BLOCK_C == 2


def test_real_blocks_equal_the_formula():
    x, weight, bias, temb = normal((1, 70, 23, 24), torch.float32, layout=torch.channels_last)
    assert module.blocks(70, 23 * 24, 2, True) == (32, 64, 8, 32)
    check(group_norm(x, 2, weight, bias, 1e-5, True, temb), expected(x, 2, weight, bias, True, temb), x.dtype)


def normal(shape, dtype=torch.float64, mean=0.0, std=1.0, layout=torch.contiguous_format):
    """x, weight, bias and temb; x is rounded to dtype, so that the reference sees the same numbers."""
    torch.manual_seed(0)
    x = mean + std * torch.randn(shape, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1]).to(dtype)
    return x.to(dtype).contiguous(memory_format=layout), weight, bias, torch.randn(shape[:2]).to(dtype)


def expected(x, groups, weight, bias, silu=False, temb=None):
    return reference(x, weight, bias, groups, silu, temb)


def check(y, theirs, dtype):
    assert y.dtype == dtype
    assert_close(y, theirs, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@small_blocks
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", ONE_BLOCK + SEVERAL, ids=str)
def test_group_norm_equals_the_formula(shape, layout, silu):
    *shape, groups = shape
    x, weight, bias, temb = normal(shape, torch.float32, layout=layout)
    y = group_norm(x, groups, weight, bias, 1e-5, silu, temb)
    assert y.is_contiguous(memory_format=layout)
    check(y, expected(x, groups, weight, bias, silu, temb), torch.float32)


@small_blocks
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [ONE_BLOCK[0], SEVERAL[1]], ids=str)
def test_every_dtype_equals_the_formula(shape, dtype):
    *shape, groups = shape
    x, weight, bias, _ = normal(shape, dtype, mean=3, std=2, layout=torch.channels_last)
    check(group_norm(x, groups, weight, bias, 1e-5, True), expected(x, groups, weight, bias, True), dtype)


@small_blocks
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("mean", [30, 1e4, "1e4 after a first tile of 0"])
@pytest.mark.parametrize("shape", [ONE_BLOCK[0], SEVERAL[1]], ids=str)
def test_the_variance_does_not_cancel_far_from_zero(shape, mean, layout, dtype):
    *shape, groups = shape
    std = 64 if dtype == torch.float16 and mean != 30 else 2  # float16 has steps of 8 at 1e4
    x, weight, bias, temb = normal(shape, dtype, 30 if mean == 30 else 1e4, std, layout)
    if isinstance(mean, str):
        x[:, :, :2] = 0.0
    y = group_norm(x, groups, weight, bias, 1e-5, temb=temb)
    check(y, expected(x, groups, weight, bias, temb=temb), dtype)


@small_blocks
@pytest.mark.parametrize("shape", [(1, 4, 5, 5), (1, 4, 15, 22)], ids=str)
def test_equal_numbers_come_out_as_the_bias(shape):
    bias = torch.randn(4)
    y = group_norm(torch.full(shape, 0.1), 1, torch.ones(4), bias, 1e-6)
    assert torch.equal(y, bias[:, None, None].expand(shape))


@small_blocks
@pytest.mark.parametrize("shape", [ONE_BLOCK[0], SEVERAL[0]], ids=str)
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_weight_and_bias_may_be_left_out(shape, weight, bias):
    *shape, groups = shape
    x, w, b, _ = normal(shape, torch.float32)
    y = group_norm(x, groups, w if weight else None, b if bias else None, 1e-5)
    theirs = expected(x, groups, w if weight else torch.ones_like(w), b if bias else torch.zeros_like(b))
    check(y, theirs, torch.float32)


@small_blocks
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_where_they_are(view, layout, wide):
    side = 22 if wide else 6
    x, weight, bias, _ = normal((3, 8, side, side), torch.float32, mean=5, layout=layout)
    views = {
        "channels": x[:, 2:6],
        "channels from 1": x[:, 1:5],  # not at a multiple of 16 bytes
        "columns": x[:, :4, :, 1:],
        "every other column": x[:, :4, :, ::2],
        "batch": x[:, :4].expand(3, 4, side, side)[::2],
        "turned": x[:, :4].mT,
    }
    x = views[view][:2]
    check(group_norm(x, 2, weight[:4], bias[:4], 1e-5), expected(x, 2, weight[:4], bias[:4]), torch.float32)


def test_other_ranks_are_normalized_too():
    x, weight, bias, _ = normal((2, 6, 5), torch.float32)
    theirs = torch.group_norm(x.double(), 3, weight.double(), bias.double())
    check(group_norm(x, 3, weight, bias, 1e-5), theirs, torch.float32)
    assert group_norm(x[:0], 3, weight, bias, 1e-5).shape == (0, 6, 5)
    assert group_norm(x[:, :, :0], 3, weight, bias, 1e-5).shape == (2, 6, 0)


@pytest.mark.parametrize("channels", [32, 320, 960, 2560])
def test_the_channels_of_the_models_equal_the_formula(channels):
    x, weight, bias, temb = normal((1, channels, 2, 3), torch.float16, mean=3, layout=torch.channels_last)
    theirs = expected(x, 32, weight, bias, True, temb)
    check(group_norm(x, 32, weight, bias, 1e-5, True, temb), theirs, torch.float16)


@small_blocks
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("at", ["the first pixel", "the last pixel"])
@pytest.mark.parametrize("shape", [ONE_BLOCK[0], SEVERAL[0]], ids=str)
def test_infinities_spoil_their_group_alone_as_in_torch(shape, at, silu, value):
    *shape, groups = shape
    x, weight, bias, _ = normal(shape, torch.float32)
    x[0, -1][(0, 0) if at == "the first pixel" else (-1, -1)] = value
    y = group_norm(x, groups, weight, bias, 1e-5, silu)
    theirs = torch.group_norm(x, groups, weight, bias, 1e-5)
    theirs = torch.nn.functional.silu(theirs) if silu else theirs
    assert torch.equal(y.isnan(), theirs.isnan())
    assert y.isnan().sum() == y[0].numel() // groups
    assert_close(y, theirs, atol=1e-5, rtol=1e-5)


def test_infinite_results_of_silu_are_torchs():
    x, weight, bias = torch.zeros(1, 3, 2, 2), torch.ones(3), torch.tensor([math.inf, -math.inf, -1e30])
    theirs = torch.nn.functional.silu(torch.group_norm(x, 3, weight, bias, 1e-5))
    assert torch.equal(group_norm(x, 3, weight, bias, 1e-5, True).nan_to_num(1), theirs.nan_to_num(1))


@small_blocks
@pytest.mark.parametrize("shape", [ONE_BLOCK[0], SEVERAL[0]], ids=str)
def test_a_picture_has_the_same_bits_alone_and_in_a_batch(shape):
    *shape, groups = shape
    x, weight, bias, _ = normal(shape, torch.float32, mean=3, layout=torch.channels_last)
    y = group_norm(x, groups, weight, bias, 1e-5, True)
    assert torch.equal(y[1:], group_norm(x[1:], groups, weight, bias, 1e-5, True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("options", [{}, {"silu": True}, {"silu": True, "temb": True}], ids=str)
def test_the_gradient_passes_gradcheck(options, layout):
    x, weight, bias, temb = normal((2, 4, 2, 3), layout=layout)
    inputs = [x, weight, bias] + [temb] * options.get("temb", False)
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def call(x, weight, bias, temb=None):
        return group_norm(x, 2, weight, bias, 1e-5, options.get("silu", False), temb)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_only_asked_for_gradients_are_computed():
    x, weight, bias, _ = normal((1, 4, 2, 2), torch.float16)
    weight.requires_grad_()
    group_norm(x, 2, weight, bias, 1e-5).sum().backward()
    assert weight.grad.dtype == torch.float16
    assert x.grad is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_groups": 4}, ValueError, "6 channels can't be split into 4 groups; num_groups must divide"),
        ({"num_groups": 0}, ValueError, "6 channels can't be split into 0 groups"),
        ({"weight": torch.ones(5)}, ValueError, r"weight has shape \(5,\); expected \(6,\)"),
        ({"temb": torch.ones(1, 6)}, ValueError, r"temb has shape \(1, 6\); expected \(2, 6\)"),
        ({"x": torch.ones(6)}, ValueError, r"x has shape \(6,\); expected \(B, C, ...\)"),
        ({"x": torch.ones(2, 6, 2, 2, dtype=torch.int64)}, TypeError, "x is torch.int64; expected float16"),
        ({"bias": torch.ones(6, device="meta")}, ValueError, "bias is on meta, the first tensor on cpu"),
    ],
)  # fmt: skip
def test_group_norm_refuses_what_does_not_fit(change, error, message):
    arguments = {"x": torch.ones(2, 6, 2, 2), "num_groups": 3, "weight": torch.ones(6), "bias": torch.ones(6)}
    with pytest.raises(error, match=message):
        group_norm(**arguments | change, eps=1e-5)


def test_the_kernels_need_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(sys.modules["minidiff_kernels.launch"], "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="group_norm: Triton got a tensor on cpu"):
        group_norm(torch.ones(2, 6, 2, 2), 3, None, None, 1e-5)


class Launches:
    """Records, in place of the kernels, how they would be launched."""

    def __init__(self, monkeypatch):
        self.seen = {}
        for name in ("_norm_one_block", "_moments", "_tables", "_apply"):
            kernel = getattr(module, name)
            monkeypatch.setattr(module, name, self.recorder(kernel))

    def recorder(self, kernel):
        seen = self.seen

        class Recorder:
            def __getitem__(self, grid):
                def record(*arguments, **keywords):
                    seen[kernel.__name__] = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords

                return record

        return Recorder()


NAMES = sorted(case.name for case in CASES if case.run is not None and case.shape[0] < 8)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compiled_is_what_is_launched(name, monkeypatch):
    launches, cases = Launches(monkeypatch), [case for case in CASES if case.name.startswith(name)]
    cases = [case for case in cases if case.name in (name, f"{name}/moments", f"{name}/tables")]
    with torch.device("meta"):
        (run,) = (case for case in cases if case.run is not None)
        inputs = meta_inputs(run)
        module._launch(inputs.pop("x"), **inputs)
    assert set(launches.seen) == {case.kernel.__name__ for case in cases}
    for case in cases:
        given = launches.seen[case.kernel.__name__]
        compiled = case.constexprs | case.configs[0]
        assert {key: given[key] for key in compiled} == compiled
        numbers = {key for key in case.signature if isinstance(given[key], int)}
        assert numbers == {key for key, kind in case.signature.items() if kind == "i32"}
        if case.kernel.__name__ != "_tables":
            assert {key for key in numbers if given[key] % 16 == 0} == numbers & set(case.aligned)
            assert 1 not in [given[key] for key in numbers]


def meta_inputs(case):
    """The arguments of _launch for a case, without data."""
    last = "nchw" not in case.name
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[case.dtype]
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(case.shape, dtype=dtype).contiguous(memory_format=layout)
    temb = torch.empty(case.shape[:2], dtype=dtype) if "temb" in case.name else None
    weight, bias = torch.empty(2, case.shape[1], dtype=dtype)
    return {"x": x, "num_groups": 32, "weight": weight, "bias": bias, "eps": 1e-5,
            "silu": case.name.startswith("groupnorm_silu"), "temb": temb}  # fmt: skip
