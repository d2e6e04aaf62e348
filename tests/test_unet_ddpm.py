"""UNet2DModel against diffusers: whole tiny models, every option, odd sizes, gradients, errors."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from parity import assert_close, twins

from minidiff import UNet2DModel, ops

TINY = {"block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "norm_num_groups": 4,
        "attention_head_dim": 4, "sample_size": 8}  # fmt: skip
OPTIONS = {
    "plain": {},
    "ddpm": {"attention_head_dim": None, "norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False,
             "downsample_padding": 0},
    "three levels, two layers": {"block_out_channels": (8, 8, 16), "layers_per_block": 2,
                                 "down_block_types": ("AttnDownBlock2D",) * 2 + ("DownBlock2D",),
                                 "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "scaled middle": {"mid_block_scale_factor": 1.7},
    "no attention in the middle": {"add_attention": False},
    "no middle": {"mid_block_type": None},
    "mish": {"act_fn": "mish"},
    "scale and shift with relu": {"resnet_time_scale_shift": "scale_shift", "act_fn": "relu"},
    "centred input": {"center_input_sample": True},
    "classes": {"num_class_embeds": 4},
    "learned time": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "noise level": {"time_embedding_type": "fourier"},
    "channels": {"in_channels": 1, "out_channels": 6},
    "eps": {"norm_eps": 1e-2},
}  # fmt: skip
DTYPES = {torch.float64: 1e-9, torch.float32: 2e-5}


def normal(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_unet_equals_diffusers(option, dtype):
    config = TINY | OPTIONS[option]
    ours, theirs = twins("UNet2DModel", dtype, **config)
    sample = normal(2, config.get("in_channels", 3), 8, 12, dtype=dtype)
    labels = torch.tensor([3, 0]) if config.get("num_class_embeds") else None
    timestep = torch.tensor([3, 981])
    out = ours(sample, timestep, labels).sample
    assert out.dtype == dtype
    assert_close(out, theirs(sample, timestep, labels).sample, atol=DTYPES[dtype])


TIMESTEPS = [0, 999, 7.5, np.int64(981), np.float64(7.5), torch.tensor(3), torch.tensor(7.5),
             torch.tensor([5]), torch.tensor([5.5, 900])]  # fmt: skip


@pytest.mark.parametrize("timestep", TIMESTEPS, ids=repr)
@pytest.mark.parametrize("kind", ["positional", "fourier", "learned"])
def test_every_kind_of_timestep_equals_diffusers(kind, timestep):
    if kind == "learned" and torch.is_tensor(timestep) and timestep.is_floating_point():
        pytest.skip("a table has no row for a fraction")
    if kind == "fourier" and not torch.is_tensor(timestep) and timestep == 0:
        pytest.skip("0 is no noise level: the result is divided by it")
    ours, theirs = twins("UNet2DModel", **TINY, time_embedding_type=kind, num_train_timesteps=1000)
    sample = normal(2, 3, 8, 8)
    assert_close(ours(sample, timestep).sample, theirs(sample, timestep).sample, atol=1e-9)


def test_a_numpy_float32_timestep_is_cut_off_too():  # diffusers fails at it
    model, sample = UNet2DModel(**TINY), normal(2, 3, 8, 8).float()
    assert_close(model(sample, np.float32(7.5)).sample, model(sample, 7).sample)


@pytest.mark.parametrize("timestep", [0.02, 50.0])
def test_noise_levels_equal_diffusers(timestep):
    ours, theirs = twins("UNet2DModel", time_embedding_type="fourier", **TINY)
    sample, level = normal(2, 3, 8, 8), torch.tensor(timestep, dtype=torch.float64)
    assert_close(ours(sample, level).sample, theirs(sample, level).sample, rtol=1e-9, atol=1e-9)


def test_odd_sizes_work():  # in diffusers they fail; this is what its UNet2DConditionModel does with them
    assert UNet2DModel(**TINY)(normal(1, 3, 7, 9).float(), 3).sample.shape == (1, 3, 7, 9)


def test_results_come_as_outputs_and_as_tuples():
    model, sample = UNet2DModel(**TINY), normal(2, 3, 8, 8).float()
    out = model(sample, 3)
    assert_close(model(sample, 3, return_dict=False)[0], out["sample"])


def test_the_signature_is_diffusers():
    pair = (UNet2DModel, diffusers.UNet2DModel)
    ours, theirs = (inspect.signature(c.__init__).parameters for c in pair)
    known = {name: p.default for name, p in ours.items()} | UNet2DModel.fixed_options
    assert known == {name: p.default for name, p in theirs.items()}
    assert all(p.kind is p.KEYWORD_ONLY for name, p in ours.items() if name != "self")
    ours, theirs = (list(inspect.signature(c.forward).parameters) for c in pair)
    assert ours == theirs
    config = {k: v for k, v in diffusers.UNet2DModel(**TINY).config.items() if k[0] != "_"}
    assert UNet2DModel.from_config(config).config.attention_head_dim == 4


@pytest.mark.parametrize("option", ["plain", "scale and shift"])
def test_every_weight_gets_a_gradient_and_it_equals_diffusers(option):
    ours, theirs = twins("UNet2DModel", **TINY | OPTIONS[option])
    for model in (ours.train(), theirs.train()):
        model(normal(2, 3, 8, 8), torch.tensor([3, 981])).sample.square().mean().backward()
    theirs = dict(theirs.named_parameters())
    assert not [name for name, weight in ours.named_parameters() if weight.grad is None]
    for name, weight in ours.named_parameters():
        assert_close(weight.grad, theirs[name].grad, atol=1e-9)


@pytest.mark.parametrize("whole", [True, False])
def test_bfloat16_and_channels_last_are_kept(whole):
    model = UNet2DModel(**TINY).to(memory_format=torch.channels_last)
    model = model.bfloat16() if whole else model
    sample = normal(2, 3, 8, 8, dtype=model.dtype).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        out = model(sample, torch.tensor([3, 981])).sample
    out.float().mean().backward()
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_backends_agree():
    model, _ = twins("UNet2DModel", **TINY)
    expected = model(normal(2, 3, 8, 8), 3).sample
    ops.use_backend(model, attention="reference", group_norm="reference")
    assert_close(model(normal(2, 3, 8, 8), 3).sample, expected, atol=1e-12)


@pytest.mark.parametrize(("config", "message"), [
    ({"downsample_type": "resnet"}, "downsample_type='resnet' is not implemented; minidiff knows only downs"),
    ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not implemented"),
    ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial' is not implemented; minidif"),
    ({"time_embedding_type": "sines"}, "time_embedding_type='sines' is not implemented; minidiff knows 'pos"),
    ({"time_embedding_type": "learned"}, "time_embedding_type='learned' needs num_train_timesteps"),
    ({"mid_block_type": "UNetMidBlock1D"}, "mid_block_type='UNetMidBlock1D' is not implemented; minidiff kn"),
    ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "down_block_types='SkipDownBlock2D' is not i"),
    ({"up_block_types": ("UpBlock2D",)}, "up_block_types has 1 entries, block_out_channels has 2"),
    ({"attention_head_dim": 5}, "16 channels can't be split into heads of 5; attention_head_dim must divide"),
])  # fmt: skip
def test_an_option_that_is_not_implemented_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        UNet2DModel(**TINY | config)


def test_labels_that_are_missing_or_useless_are_named():
    sample = normal(2, 3, 8, 8).float()
    with pytest.raises(ValueError, match="this model needs class_labels"):
        UNet2DModel(**TINY, num_class_embeds=4)(sample, 3)
    with pytest.raises(ValueError, match="this model knows no classes"):
        UNet2DModel(**TINY)(sample, 3, torch.tensor([1, 2]))
