"""minidiff.optimize: what is rewritten equals the plain model, follows its weights, and can be undone.

The tables of options are those of the models' own tests. What a GPU would run is installed by hand, on CPU
tensors in Triton's interpreter.
"""

import copy
import logging
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import minidiff_kernels
import pytest
import test_clip
import test_unet
import test_unet_ddpm
import test_vae
import tiny_pipelines
import torch
import torch.nn.functional as F
from parity import assert_close, share_weights, twins
from test_structure import tiny_pipeline
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import minidiff
from minidiff import backends, optimization
from minidiff.models.layers import Attention, GroupNorm, Upsample2D
from minidiff.models.unet import GEGLU
from minidiff.optimization import layers, norms, onednn, winograd
from minidiff.optimization.rewrite import rewrite_of

normal = test_unet.normal
CLIPS = {name: (name, {}) for name in test_clip.CLASSES} | {"gelu": ("CLIPTextModel", {"hidden_act": "gelu"})}
TABLES = {"unet": test_unet, "ddpm": test_unet_ddpm, "vae": test_vae}
QUICK = [("unet", "Stable Diffusion 1"), ("ddpm", "scale and shift"), ("vae", "plain")]
QUICK += [("clip", "CLIPTextModel")]
FEW = [*QUICK, pytest.param("unet", "lists per level", marks=pytest.mark.slow)]
CASES = [(kind, option) for kind, table in TABLES.items() for option in table.OPTIONS]
CASES += [("clip", option) for option in CLIPS]
CASES = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
NAMES = {"unet": "UNet2DConditionModel", "ddpm": "UNet2DModel", "vae": "AutoencoderKL"}


@pytest.fixture(autouse=True)
def small_models_are_packed_too(monkeypatch):
    monkeypatch.setattr(onednn, "LEAST", 0)
    monkeypatch.setattr(norms, "PIECE", 64)


def pair(kind, option, dtype=torch.float32):
    """(minidiff's, the oracle's) model of a case, with the same weights."""
    if kind == "clip":
        name, options = CLIPS[option]
        return test_clip.twins(name, dtype, **options)
    config = TABLES[kind].TINY | TABLES[kind].OPTIONS[option]
    return twins(NAMES[kind], dtype, **config)


def outputs(model, kind, option, dtype=torch.float32, batch=2, size=(8, 12)):
    """The tensors that a model of a case, ours or the oracle's, returns for inputs of this batch and size."""
    if kind == "clip":
        out = model(test_clip.prompt_ids(batch), test_clip.MASKS["hole"][:1].expand(batch, -1).long())
        return [out[0], out[1]]
    config = TABLES[kind].TINY | TABLES[kind].OPTIONS[option]
    sample = normal(batch, config.get("in_channels", 4 if kind == "unet" else 3), *size, dtype=dtype)
    if kind == "vae":
        mean = model.encode(sample).latent_dist.mean
        return [mean, model.decode(mean).sample]
    timestep = torch.arange(3, 3 + batch)
    labels = torch.arange(batch) if config.get("num_class_embeds") else None
    if kind == "ddpm":
        return [model(sample, timestep, labels).sample]
    _, conditions = test_unet.inputs(config, dtype)
    conditions = {name: rows(value, batch) for name, value in conditions.items()}
    return [model(sample, timestep, normal(batch, 7, 6, dtype=dtype, seed=2), **conditions).sample]


def rows(value, batch):
    """A condition for two pictures as one for `batch`."""
    if isinstance(value, dict):
        return {name: rows(entry, batch) for name, entry in value.items()}
    return value[torch.arange(batch) % 2]


def assert_all_close(ours, theirs, atol):
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "option"), CASES)
def test_an_optimized_model_equals_the_oracle(kind, option):
    ours, theirs = pair(kind, option)
    plain = outputs(ours, kind, option)
    found = outputs(minidiff.optimize(ours), kind, option)
    assert_all_close(found, outputs(theirs, kind, option), atol=2e-5)
    assert_all_close(found, plain, atol=2e-5)
    for mine, other in zip(found, plain, strict=True):
        assert (mine.dtype, mine.stride()) == (other.dtype, other.stride())


@torch.no_grad()
@pytest.mark.parametrize(("kind", "option"), FEW)
def test_rewrites_are_exact_in_float64_and_no_less_exact_in_bfloat16(kind, option):
    model = pair(kind, option, torch.float64)[0]
    expected = outputs(model, kind, option, torch.float64)
    assert_all_close(outputs(minidiff.optimize(model), kind, option, torch.float64), expected, atol=1e-12)
    plain, model = optimization.restore(model).bfloat16(), copy.deepcopy(model)
    minidiff.optimize(model)
    for mine, other, exact in zip(
        *(outputs(m, kind, option, torch.bfloat16) for m in (model, plain)), expected, strict=True
    ):
        assert (mine.double() - exact).norm() <= 1.5 * (other.double() - exact).norm()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "option"), FEW)
def test_sizes_may_change_between_calls_and_back(kind, option):
    model = pair(kind, option)[0]
    sizes = [(2, (8, 12)), (1, (7, 9)) if kind != "ddpm" else (1, (6, 2)), (3, (8, 12)), (2, (8, 12))]
    expected = [outputs(model, kind, option, batch=batch, size=size) for batch, size in sizes]
    minidiff.optimize(model)
    for (batch, size), plain in zip(sizes, expected, strict=True):
        assert_all_close(outputs(model, kind, option, batch=batch, size=size), plain, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (9, 15), (16, 8), (33, 10)], ids=str)
def test_winograd_errs_little_more_than_a_direct_convolution(size, bias, monkeypatch):
    torch.manual_seed(0)
    plain = nn.Conv2d(256, 320, 3, padding=1, bias=bias)
    model, taken = nn.Sequential(copy.deepcopy(plain)), []
    conv = winograd.conv
    monkeypatch.setattr(winograd, "conv", lambda *args: taken.append(1) or conv(*args))
    x = normal(2, 256, *size, dtype=torch.float32)
    direct, found = plain(x), minidiff.optimize(model, winograd=True)(x)
    expected = plain.double()(x.double())
    assert taken == [1]
    assert (found - expected).norm() <= 3 * (direct - expected).norm()
    small = x[:, :, :7]
    assert_close(model(small), plain(small.double()), atol=2e-5)
    assert taken == [1]
    assert_close(minidiff.optimize(model)(x), expected, atol=2e-5)
    assert taken == [1]  # without the option again


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 16)], ids=str)
def test_a_folded_upsampling_equals_the_plain_one(size):
    plain = Upsample2D(8)
    x = normal(2, 8, *size)
    integers = plain.conv.weight.double().mul(100).round()
    doubled = F.conv2d(F.interpolate(x.mul(8).round(), scale_factor=2), integers, padding=1)
    small = F.pad(x.mul(8).round(), (1, 1, 1, 1))
    for (p, q), kernel in zip(layers.PHASES, layers.fold(integers), strict=True):
        seen = small[:, :, p : p + size[0] + 1, q : q + size[1] + 1]
        assert_close(F.conv2d(seen, kernel), doubled[:, :, p::2, q::2])  # integers: exactly
    model = minidiff.optimize(nn.Sequential(copy.deepcopy(plain)))[0]
    assert isinstance(rewrite_of(model), layers.FoldedUpsample)
    x = x.float()
    assert_close(model(x), plain(x), atol=2e-6)
    odd = (2 * size[0] + 1, 2 * size[1])
    assert_close(model(x, odd), plain(x, odd), atol=2e-6)


def on_a_gpu(layer):
    """The layer with the rewrite that it gets on a GPU."""
    device = torch.device("cpu")
    if isinstance(layer, GEGLU):
        layers.KernelGEGLU(layer, backends.kernel("geglu_linear", device)).install()
    else:
        layers.KernelUpsample(layer, minidiff_kernels.upsample_conv, minidiff_kernels.fold).install()
    return layer


@torch.no_grad()
@pytest.mark.parametrize("piece", [64, 2**16])  # several walks, and copies
@pytest.mark.parametrize("act_fn", [None, "silu", "mish"])
@pytest.mark.parametrize("with_temb", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4e-5), (torch.bfloat16, 0.08)], ids=str
)
def test_norms_of_channels_last_pictures_do_not_cancel(
    monkeypatch, dtype, tolerance, with_temb, act_fn, piece
):
    monkeypatch.setattr(norms, "PIECE", piece)
    torch.manual_seed(0)
    plain = GroupNorm(4, 12, 1e-5, act_fn).double()
    torch.nn.init.normal_(plain.weight)
    torch.nn.init.normal_(plain.bias)
    x = normal(2, 12, 19, 14) + (100 if dtype != torch.bfloat16 else 3)
    temb = normal(2, 12) if with_temb else None
    x, temb = (t if t is None else t.to(dtype) for t in (x, temb))
    x = x.to(memory_format=torch.channels_last)
    layer = minidiff.optimize(copy.deepcopy(plain).to(dtype))
    weights = copy.deepcopy(layer).double()
    expected = optimization.restore(weights).forward(
        x.double().contiguous(), temb if temb is None else temb.double()
    )
    y = layer(x, temb)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected, atol=tolerance)
    if dtype == torch.float32:
        exact = F.group_norm(x.double(), 4)
        assert (F.group_norm(x, 4) - exact).abs().max() > 10 * tolerance  # what is avoided


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (1, 6, 1, 1), (0, 6, 2, 2)], ids=str)
def test_a_convolution_of_single_pixels_as_a_product_equals_the_plain_one(shape, order):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 4, 1, dtype=torch.float64)
    product = copy.deepcopy(plain)
    assert layers.is_pointwise(plain) and not layers.is_pointwise(nn.Conv2d(6, 4, 3))
    layers.PointwiseConv(product).install()
    x = normal(*shape).to(memory_format=order)
    results = []
    for layer in (product, plain):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, layer.weight.grad, layer.bias.grad))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, atol=1e-13)
    if order is torch.channels_last:
        assert results[0][0].is_contiguous(memory_format=order)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_rewritten_for_a_gpu_equals_the_plain_models(monkeypatch):
    monkeypatch.setattr(optimization, "_for_cpu", lambda layer, last, _: optimization._for_gpu(layer, last))
    pipe = tiny_pipeline()
    inputs = normal(1, 4, 8, 8).float(), 3, normal(1, 5, 12).float()
    expected = [pipe.unet(*inputs).sample, pipe.vae.decode(inputs[0]).sample]
    for model in pipe.models:
        model.to(memory_format=torch.channels_last)
        backends.use_backend(model, attention="triton", group_norm="triton")
    minidiff.optimize(pipe)
    found = Counter(type(rewrite_of(layer)).__name__ for model in pipe.models for layer in model.modules())
    for kind in ("JoinedAttention", "KernelGEGLU", "KernelUpsample", "PointwiseConv", "TimePart", "LastConv"):
        assert found[kind] > 0, kind
    results = [pipe.unet(*inputs).sample, pipe.vae.decode(inputs[0]).sample]
    for ours, plain in zip(results, expected, strict=True):
        assert_close(ours, plain, atol=2e-5)


KERNELS = {
    "geglu": (lambda: GEGLU(8, 16), (2, 5, 8), "proj"),
    "upsample": (lambda: Upsample2D(8), (2, 8, 3, 5), "conv"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_layers_with_kernels_equal_plain_ones_and_step_aside(name):
    make, shape, inner = KERNELS[name]
    torch.manual_seed(0)
    plain = make()
    layer, x = on_a_gpu(copy.deepcopy(plain)), normal(*shape, dtype=torch.float32)
    weights = [getattr(one, inner).weight for one in (plain, layer)]
    for _ in range(2):  # before and after a change in place
        with torch.no_grad():
            assert_close(layer(x), plain(x), atol=2e-6)
            for weight in weights:
                weight.mul_(2)
    for one in (layer, plain):
        one(x).square().sum().backward()
    assert_close(weights[1].grad, weights[0].grad, atol=1e-4)
    seconds = []
    for one in (layer, plain):
        leaf = x.clone().requires_grad_()
        first = torch.autograd.grad(one(leaf).square().sum(), leaf, create_graph=True)[0]
        seconds.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert_close(*seconds, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
    with torch.no_grad():
        backends.use_backend(layer, geglu="reference", upsample_conv="reference")
        assert_close(layer(x), plain(x), atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_joined_attention_equals_the_plain_one(bias):
    plain = Attention(8, 2, qkv_bias=bias)
    model = minidiff.optimize(nn.Sequential(copy.deepcopy(plain)))[0]
    assert isinstance(rewrite_of(model), layers.JoinedAttention)
    x, text = normal(2, 5, 8).float(), normal(2, 3, 8, seed=2).float()
    for given in (
        (),
        (None, torch.tensor([[[[True, False, True, True, True]]]])),
        (text,),
        (text, normal(1, 1, 5, 3).float()),
    ):
        assert_close(model(x, *given), plain(x, *given), atol=1e-6)


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = ["conv_in", "time_embedding.linear_1", "mid_block.resnets.0.time_emb_proj", "conv_norm_out",
          "up_blocks.0.upsamplers.0.conv", f"{BLOCK}.attn1.to_v", f"{BLOCK}.attn2.to_k"]  # fmt: skip
CHANGES = ["in place", *(pytest.param(how, marks=pytest.mark.slow) for how in (
    "inference mode", "loading", "assigning", "rounding", "another tensor"))]  # fmt: skip
INPUT = {
    "sample": normal(1, 4, 6, 4).float(),
    "timestep": 3,
    "encoder_hidden_states": normal(1, 5, 6, seed=2).float(),
}


def unet(**options):
    torch.manual_seed(0)
    model = minidiff.UNet2DConditionModel(**test_unet.TINY | options).eval()
    return share_weights(model, copy.deepcopy(model), torch.float32)[0]


def change_weight(model, name, how):
    """Triples the weight of the layer of this name, or rounds all."""
    weight = model.get_submodule(name).weight
    if how == "rounding":
        model.bfloat16().float()
    elif how == "another tensor":
        weight.data = weight * 3
    elif how in ("loading", "assigning"):
        loaded = {key: value.clone() for key, value in model.state_dict().items()}
        loaded[f"{name}.weight"] *= 3
        model.load_state_dict(loaded, assign=how == "assigning")
    else:
        with torch.inference_mode() if how == "inference mode" else torch.no_grad():
            weight.mul_(3)


@torch.no_grad()
@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", LAYERS)
def test_the_next_call_uses_new_weights(name, how):
    model = minidiff.optimize(unet())
    before = model(**INPUT).sample
    change_weight(model, name, how)
    after = model(**INPUT).sample
    expected = optimization.restore(model)(**INPUT).sample
    assert (expected - before).abs().max() > 1e-4
    assert_close(after, expected, atol=1e-5)


@torch.no_grad()
def test_weights_that_come_back_to_their_address_are_not_taken_for_the_old_ones():
    model = minidiff.optimize(unet())
    model(**INPUT)
    keys = rewrite_of(model).keys
    weights = [linear.weight.data_ptr() for layer in keys.layers for linear in (layer.to_k, layer.to_v)]
    assert [
        weight.data_ptr() for weight in keys.weights
    ] == weights  # held: nothing else gets these addresses
    model.bfloat16().float()
    assert not set(weights) & {weight.data_ptr() for weight in model.parameters()}


@torch.no_grad()
def test_weights_of_inference_mode_are_taken_as_they_are(caplog):
    with torch.inference_mode():
        model = unet(only_cross_attention=(False, True))
        optimization.restore(minidiff.optimize(model))
    assert "weights made under torch.inference_mode count no changes" in caplog.text
    minidiff.optimize(model)
    model(**INPUT)
    with torch.inference_mode():
        for weight in model.parameters():
            weight.mul_(1.1)
        after = model(**INPUT).sample
        assert_close(after, optimization.restore(model)(**INPUT).sample, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # packed, and joined but not packed
def test_what_inference_mode_began_goes_on_outside(dtype):
    model = minidiff.optimize(unet().to(dtype))
    given = {name: value.to(dtype) if torch.is_tensor(value) else value for name, value in INPUT.items()}
    with torch.inference_mode():
        model(**given)
    model.conv_in.weight.mul_(2)
    model.mid_block.resnets[0].time_emb_proj.weight.mul_(2)
    model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.mul_(2)
    given["encoder_hidden_states"] = normal(1, 5, 6, seed=3).to(dtype)
    found = model(**given).sample
    assert_close(found, optimization.restore(model)(**given).sample, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unet", "ddpm", "vae", "clip"])
def test_restore_leaves_nothing_and_weights_are_as_they_were(kind, tmp_path):
    option = next(option for name, option in QUICK if name == kind)
    model = pair(kind, option)[0]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    members = [set(layer.__dict__) for layer in model.modules()]
    expected = outputs(model, kind, option)
    model.save_pretrained(tmp_path / "plain")
    minidiff.optimize(minidiff.optimize(model))
    outputs(model, kind, option)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "optimized")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "optimized" / file.name).read_bytes()
    optimization.restore(model)
    assert [set(layer.__dict__) for layer in model.modules()] == members
    assert all(map(torch.equal, outputs(model, kind, option), expected))


@torch.no_grad()
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_optimized_and_independent(duplicate):
    model = minidiff.optimize(unet())
    with torch.enable_grad():
        text = normal(1, 5, 6).float().requires_grad_() * 2  # no leaf: it can't be copied itself
    given = INPUT | {"encoder_hidden_states": text}
    expected = model(**given).sample
    other = duplicate(model)
    for weight in model.parameters():
        weight.mul_(1.5)
    assert torch.equal(other(**given).sample, expected)
    assert type(rewrite_of(other)) is type(rewrite_of(model))
    assert_close(model(**given).sample, optimization.restore(model)(**given).sample, atol=1e-4)


def step_gradients(model, what):
    """The gradients of what is asked for in a step of a U-Net, which looks at a text."""
    given = {name: value.clone() if torch.is_tensor(value) else value for name, value in INPUT.items()}
    wanted = [given[what].requires_grad_()] if what in given else list(model.parameters())
    model.requires_grad_(what == "weights")
    model(**given).sample.square().sum().backward()
    return [one.grad for one in wanted]


@pytest.mark.parametrize("what", ["weights", "sample", "encoder_hidden_states"])
def test_gradients_are_those_of_the_plain_model(what):
    model = minidiff.optimize(unet())
    with torch.no_grad():
        model(**INPUT)
    found = step_gradients(model, what)
    model.zero_grad()
    for mine, plain in zip(found, step_gradients(optimization.restore(model), what), strict=True):
        assert_close(mine, plain, rtol=1e-5, atol=1e-5)


class Adapter(nn.Module):
    """A layer with a small trainable addition, in the place of the layer or as a hook on it."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.up = layer, nn.Parameter(torch.randn(layer.out_features, layer.in_features))

    @property
    def weight(self):
        return self.layer.weight

    def forward(self, x):
        return self.layer(x) + F.linear(x, self.up)

    def hook(self, layer, args, result):
        return result + F.linear(args[0], self.up)


@pytest.mark.parametrize("how", ["hook", "module"])
@pytest.mark.parametrize("name", ["attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.0.proj"])
def test_adapters_on_layers_are_used_and_trained(name, how):
    model = minidiff.optimize(unet().requires_grad_(False))
    with torch.inference_mode():
        kept = model(**INPUT).sample
    parent, _, child = name.rpartition(".")
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    layer = block.get_submodule(name)
    on_a_gpu(block.ff.net[0])
    adapter = Adapter(layer)
    if how == "hook":
        layer.register_forward_hook(adapter.hook)
    else:
        setattr(block.get_submodule(parent), child, adapter)

    def step():
        adapter.up.grad = None
        sample = model(**INPUT).sample
        sample.square().sum().backward()
        with torch.no_grad():
            return [sample.detach(), adapter.up.grad, model(**INPUT).sample]

    found = step()
    assert (found[0] - kept).abs().max() > 1e-4
    for mine, plain in zip(found, (optimization.restore(model), step())[1], strict=True):
        assert_close(mine, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hooks_are_called_as_in_the_plain_model():
    model, calls = unet(), []
    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
        layer.register_forward_pre_hook(lambda *_, name=name: calls.append(f"before {name}"))
    expected = model(**INPUT).sample
    plain = calls.copy()
    calls.clear()
    assert_close(minidiff.optimize(model)(**INPUT).sample, expected, atol=2e-5)
    assert calls == plain


@torch.no_grad()
@pytest.mark.parametrize("name", ["mid_block", "mid_block.resnets.0", "mid_block.resnets.0.time_emb_proj"])
def test_a_hook_may_change_the_time_on_its_way(name):
    model = unet()

    def change(layer, args):
        return tuple(2 * x if torch.is_tensor(x) and x.ndim == 2 else x for x in args)

    before = model(**INPUT).sample
    model.get_submodule(name).register_forward_pre_hook(change)
    expected = model(**INPUT).sample
    assert (expected - before).abs().max() > 1e-4
    assert_close(minidiff.optimize(model)(**INPUT).sample, expected, atol=2e-5)


def test_forward_mode_gradients_are_those_of_the_plain_model():
    model = unet().requires_grad_(False)
    backends.use_backend(model, attention="reference")  # torch's has no forward mode

    def step(sample):
        return model(sample, 3, INPUT["encoder_hidden_states"]).sample

    def product():
        return torch.func.jvp(step, (INPUT["sample"],), (torch.ones(1, 4, 6, 4),))[1]

    expected = product()
    minidiff.optimize(model)
    assert expected.abs().max() > 0.01
    assert_close(product(), expected, atol=2e-5)


@torch.no_grad()
def test_autocast_does_what_it_does_in_the_plain_model():
    model = unet()
    plain = model(**INPUT).sample
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**INPUT).sample
    minidiff.optimize(model)
    for first in (True, False, False):  # in and out again, with the same text
        if not first:
            assert_close(model(**INPUT).sample, plain, atol=2e-5)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**INPUT).sample
        assert found.dtype == expected.dtype == torch.bfloat16
        assert (found - plain).norm() <= 1.5 * (expected - plain).norm()


@torch.no_grad()
def test_blocks_work_alone_also_after_a_step_and_after_one_that_failed():
    model = unet()
    x, temb, text = normal(1, 16, 3, 2).float(), normal(1, 32).float(), normal(1, 5, 6, seed=4).float()

    def alone():
        attention = model.mid_block.attentions[0].transformer_blocks[0].attn2
        down = model.down_blocks[0](normal(1, 8, 6, 4).float(), temb, text)[0]
        return [model.mid_block(x, temb, text), down, attention(normal(1, 3, 16).float(), text)]

    expected, step = alone(), model(**INPUT).sample
    minidiff.optimize(model)
    assert_all_close(alone(), expected, atol=1e-5)
    assert_close(model(**INPUT).sample, step, atol=1e-5)
    assert_all_close(alone(), expected, atol=1e-5)
    fails = model.up_blocks[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**INPUT)
    fails.remove()
    assert_all_close(alone(), expected, atol=1e-5)
    assert_close(model(**INPUT).sample, step, atol=1e-5)


class Operations(TorchDispatchMode):
    """Notes the names of operations, and the shapes of pictures that are copied into another order."""

    def __init__(self):
        super().__init__()
        self.names, self.reordered = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.name().split("::")[1])
        if (
            self.names[-1] in ("clone", "_to_copy")
            and args[0].ndim == 4
            and args[0].stride() != result.stride()
        ):
            self.reordered.append(tuple(args[0].shape[1:]))
        return result


@torch.no_grad()
@pytest.mark.parametrize("option", ["Stable Diffusion 1", "Stable Diffusion 2"])
def test_a_step_packs_once_and_reorders_pictures_at_its_ends_only(option):
    if not onednn.usable(torch.float32):
        pytest.skip("this PyTorch packs no weights")
    config = test_unet.TINY | test_unet.OPTIONS[option]
    model, ((sample, timestep, text), _) = (
        minidiff.optimize(unet(**config)),
        test_unet.inputs(config, torch.float32),
    )
    steps = []
    for _ in range(3):
        with Operations() as operations:
            model(sample, timestep, text)
        steps.append(operations)
    packed = [sum(name.startswith("_reorder") for name in step.names) for step in steps]
    layers = [rewrite_of(layer) for layer in model.modules()]
    single = sum(isinstance(one, onednn.PackedConv | onednn.PackedLinear) for one in layers)
    joined = sum(type(one).__name__ == "JoinedAttention" for one in layers)
    assert packed == [single + joined + 1 + 4, 0, 0]  # the times of all blocks, and four phases of upsampling
    products = {
        "convolution",
        "linear",
        "addmm",
        "mm",
        "bmm",
        "_convolution",
        "mkldnn_convolution",
        "baddbmm",
    }
    assert not products & set(steps[2].names)
    first, *inside, last = steps[2].reordered
    assert (first, last) == ((4, 8, 12), (4, 8, 12))
    assert inside == [(16, 5, 7)] * 4  # what the phases of upsampling see


# What is asked for wrongly, and what is not there -----------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, nn.Identity(), minidiff.StableDiffusionPipeline, "unet"], ids=repr)
def test_optimize_names_what_it_can_not_take(wrong):
    with pytest.raises(TypeError, match="expected a model with weights, or a pipeline, not a "):
        minidiff.optimize(wrong)


@torch.no_grad()
def test_inputs_that_do_not_fit_get_the_plain_errors_and_unusual_ones_work():
    torch.manual_seed(0)
    plain = [nn.Conv2d(4, 8, 3, padding=1), nn.Linear(6, 5)]
    conv, linear = minidiff.optimize(nn.ModuleList(copy.deepcopy(plain)))
    for layer, wrong in ((conv, torch.ones(1, 3, 4, 4)), (linear, torch.ones(2, 5))):
        with pytest.raises(RuntimeError, match=r"channels|shapes cannot be multiplied"):
            layer(wrong)
    assert_close(conv(torch.ones(4, 5, 5)), plain[0](torch.ones(4, 5, 5)), atol=1e-6)
    assert_close(linear(torch.ones(6)), plain[1](torch.ones(6)), atol=1e-6)
    assert linear(torch.ones(0, 6)).shape == (0, 5)
    for layer in (conv, plain[0]):
        layer.padding_mode = "circular"  # for pictures that tile, people set it in every layer
    x = normal(1, 4, 5, 6).float()
    assert_close(conv(x), plain[0](x), atol=1e-6)
    upsample = minidiff.optimize(Upsample2D(4))
    upsample.conv.padding_mode = "circular"
    assert_close(upsample(x), optimization.restore(upsample)(x), atol=1e-6)
    on_a_gpu(upsample)
    assert_close(upsample(x), optimization.restore(upsample)(x), atol=1e-6)
    same = minidiff.optimize(nn.Sequential(nn.Conv2d(4, 4, 3, padding="same")))
    assert_close(same(x), optimization.restore(same)(x), atol=1e-6)


@torch.no_grad()
def test_a_forward_that_somebody_put_in_a_layer_stays():
    model = unet()
    model.conv_in.forward = lambda x: torch.zeros(1, 8, 6, 4)
    expected = model(**INPUT).sample
    assert_close(minidiff.optimize(model)(**INPUT).sample, expected, atol=2e-5)
    assert_close(optimization.restore(model)(**INPUT).sample, expected)


@torch.no_grad()
def test_without_onednn_and_in_float16_there_is_one_notice_and_the_same_result(monkeypatch, caplog):
    pipe = tiny_pipeline()
    expected = pipe.unet(normal(1, 4, 8, 8).float(), 3, normal(1, 5, 12).float()).sample
    monkeypatch.setattr(onednn, "usable", lambda dtype: False)
    with caplog.at_level(logging.WARNING):
        minidiff.optimize(pipe)
    assert [record.getMessage()[:50] for record in caplog.records] == [
        "optimize: products in torch.float32 are not packed"
    ]
    found = pipe.unet(normal(1, 4, 8, 8).float(), 3, normal(1, 5, 12).float()).sample
    assert_close(found, expected, atol=2e-5)
    monkeypatch.undo()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        minidiff.optimize(pipe.to(torch.float16))
    assert len(caplog.records) == 1
    assert_close(pipe.unet(normal(1, 4, 8, 8).half(), 3, normal(1, 5, 12).half()).sample, expected, atol=0.02)


# Pipelines --------------------------------------------------------------------------------------------------

PIPELINES = {
    "DDPMPipeline": tiny_pipelines.write_ddpm,
    "StableDiffusionPipeline": tiny_pipelines.write_stable_diffusion,
    "StableDiffusionXLPipeline": tiny_pipelines.write_stable_diffusion_xl,
    "StableDiffusionImg2ImgPipeline": tiny_pipelines.write_stable_diffusion,
    "StableDiffusionInpaintPipeline": tiny_pipelines.write_stable_diffusion,
}


def draw(pipe, name):
    """Pictures (N, H, W, C) of a tiny pipeline."""
    options = {"num_inference_steps": 4, "generator": tiny_pipelines.generator(), "output_type": "np"}
    if name == "DDPMPipeline":
        return pipe(batch_size=2, **options).images
    options |= {"prompt": ["a red ball", "a ball"], "negative_prompt": ["red"] * 2}
    if name in ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"):
        options["image"] = torch.rand(2, 3, 16, 16, generator=tiny_pipelines.generator(1))
        options["strength"] = 0.8
    if name == "StableDiffusionInpaintPipeline":
        options |= {
            "mask_image": (torch.arange(16) > 6).float().expand(2, 1, 16, 16),
            "height": 16,
            "width": 16,
        }
    return pipe(**options).images


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_an_optimized_pipeline_draws_the_same_pictures(name, tmp_path):
    pipe = getattr(minidiff, name).from_pretrained(PIPELINES[name](tmp_path))
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe, name)
    assert minidiff.optimize(pipe, winograd=True) is pipe
    assert all(any(map(rewrite_of, model.modules())) for model in pipe.models)
    for _ in range(2):
        assert_close(draw(pipe, name), plain, atol=1e-4)
    if name == "StableDiffusionPipeline":
        other = minidiff.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        found = draw(other, "StableDiffusionImg2ImgPipeline")
        for model in pipe.models:
            optimization.restore(model)
        assert_close(found, draw(other, "StableDiffusionImg2ImgPipeline"), atol=1e-4)


@pytest.mark.parametrize("kind", ["vae", "clip"])
def test_models_without_a_step_may_be_called_by_several_threads(kind):
    option = next(option for name, option in QUICK if name == kind)
    model = pair(kind, option)[0]

    @torch.no_grad()
    def call(batch):
        return [outputs(model, kind, option, batch=batch) for _ in range(5)]

    expected = {batch: call(batch)[0] for batch in (1, 2, 3)}
    minidiff.optimize(model)
    with ThreadPoolExecutor(3) as pool:
        for batch, results in zip((1, 2, 3, 1), pool.map(call, (1, 2, 3, 1)), strict=True):
            for found in results:
                assert_all_close(found, expected[batch], atol=2e-5)
