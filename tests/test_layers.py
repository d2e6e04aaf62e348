"""layers: every block of the models against diffusers' block with the same weights, elementwise."""

import pytest
import torch
from diffusers.models import attention, attention_processor, downsampling, embeddings, resnet, upsampling
from diffusers.models.transformers import transformer_2d
from parity import assert_close, share_weights

from minidiff.models import layers, unet

DTYPES = {torch.float64: 1e-9, torch.float32: 2e-5}  # dtype: tolerance, absolute, of values around 1


def normal(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_fn", ["silu", "swish", "mish", "gelu", "relu"])
@pytest.mark.parametrize("out_channels", [8, 12])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_resnet_block_equals_diffusers(scale_shift, out_channels, act_fn, dtype):
    ours = layers.ResnetBlock2D(8, out_channels, temb_channels=6, groups=4, eps=1e-5, act_fn=act_fn,
                                scale_shift=scale_shift, scale_factor=1.5)  # fmt: skip
    theirs = resnet.ResnetBlock2D(
        in_channels=8, out_channels=out_channels, temb_channels=6, groups=4, eps=1e-5, non_linearity=act_fn,
        time_embedding_norm="scale_shift" if scale_shift else "default", output_scale_factor=1.5)  # fmt: skip
    ours, theirs = share_weights(ours, theirs, dtype)
    x, temb = normal(2, 8, 5, 7, dtype=dtype), normal(2, 6, dtype=dtype, seed=2)
    assert_close(ours(x, temb), theirs(x, temb), atol=DTYPES[dtype])


def test_resnet_block_without_time_equals_diffusers():
    ours = layers.ResnetBlock2D(8, 12, groups=4, eps=1e-6)
    theirs = resnet.ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=None, groups=4, eps=1e-6)
    ours, theirs = share_weights(ours, theirs)
    x = normal(2, 8, 5, 7)
    assert_close(ours(x), theirs(x, None), atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [None, 4])
@pytest.mark.parametrize("groups", [None, 4])
def test_attention_block_equals_diffusers(groups, head_dim, dtype):
    ours = layers.AttentionBlock(16, head_dim, groups=groups, eps=1e-6, scale_factor=1.3)
    theirs = attention_processor.Attention(
        16, heads=16 // (head_dim or 16), dim_head=head_dim or 16, norm_num_groups=groups, eps=1e-6,
        bias=True, residual_connection=True, rescale_output_factor=1.3,
        _from_deprecated_attn_block=True)  # fmt: skip
    ours, theirs = share_weights(ours, theirs, dtype)
    x = normal(2, 16, 5, 3, dtype=dtype) + 3
    assert_close(ours(x), theirs(x), atol=DTYPES[dtype])


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=str)
def test_downsampling_equals_diffusers(size, padding):
    theirs = downsampling.Downsample2D(4, use_conv=True, padding=padding, name="op")
    ours, theirs = share_weights(layers.Downsample2D(4, padding), theirs)
    x = normal(2, 4, *size)
    assert_close(ours(x), theirs(x), atol=1e-12)


@pytest.mark.parametrize("size", [None, (7, 9), (8, 10)], ids=str)
def test_upsampling_equals_diffusers(size):
    ours, theirs = share_weights(layers.Upsample2D(4), upsampling.Upsample2D(4, use_conv=True))
    x = normal(2, 4, 4, 5)
    assert_close(ours(x, size), theirs(x, size), atol=1e-12)


def test_upsampling_does_what_is_done_to_its_convolution():
    ours, theirs = share_weights(layers.Upsample2D(4), upsampling.Upsample2D(4, use_conv=True))
    calls = []
    ours.conv.register_forward_hook(lambda *_: calls.append(1))
    for layer in (ours, theirs):
        layer.conv.padding_mode = "circular"  # for pictures that tile
    x = normal(2, 4, 4, 5)
    assert_close(ours(x), theirs(x), atol=1e-12)
    assert len(calls) == 1


@pytest.mark.parametrize("dim", [8, 7])
@pytest.mark.parametrize("freq_shift", [0, 1])
@pytest.mark.parametrize("flip", [True, False])
def test_timestep_embedding_equals_diffusers(flip, freq_shift, dim):
    timesteps = torch.tensor([0.0, 1.0, 500.25, 999.0])
    ours = layers.timestep_embedding(timesteps, dim, flip, freq_shift)
    theirs = embeddings.get_timestep_embedding(timesteps, dim, flip, freq_shift)
    assert ours.dtype == torch.float32
    assert_close(ours, theirs)


@pytest.mark.parametrize("cond_proj_dim", [None, 3])
def test_time_mlp_equals_diffusers(cond_proj_dim):
    theirs = embeddings.TimestepEmbedding(8, 12, act_fn="gelu", cond_proj_dim=cond_proj_dim)
    ours, theirs = share_weights(layers.TimestepEmbedding(8, 12, "gelu", cond_proj_dim), theirs)
    condition = None if cond_proj_dim is None else normal(2, 3)
    assert_close(ours(normal(2, 8), condition), theirs(normal(2, 8), condition), atol=1e-12)


def test_a_condition_that_the_time_mlp_can_not_take_is_refused():
    with pytest.raises(ValueError, match="timestep_cond was given to a model without time_cond_proj_dim"):
        layers.TimestepEmbedding(8, 12)(normal(2, 8), normal(2, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("only_cross_attention", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_transformer_equals_diffusers(linear, only_cross_attention, dtype):
    ours = unet.Transformer2DModel(16, 2, 2, 6, groups=4, use_linear_projection=linear,
                                   only_cross_attention=only_cross_attention)  # fmt: skip
    theirs = transformer_2d.Transformer2DModel(
        2, 8, in_channels=16, num_layers=2, cross_attention_dim=6, norm_num_groups=4,
        use_linear_projection=linear, only_cross_attention=only_cross_attention)  # fmt: skip
    ours, theirs = share_weights(ours, theirs, dtype)
    x, text = normal(2, 16, 5, 3, dtype=dtype), normal(2, 7, 6, dtype=dtype, seed=2)
    assert_close(ours(x, text), theirs(x, text).sample, atol=DTYPES[dtype])


def test_feed_forward_equals_diffusers():
    ours, theirs = share_weights(unet.FeedForward(8), attention.FeedForward(8))
    assert_close(ours(normal(2, 5, 8)), theirs(normal(2, 5, 8)), atol=1e-12)


@pytest.mark.parametrize("timestep", [7, 7.5, torch.tensor(7.5), torch.tensor([7]), torch.tensor([3, 9])])
def test_timesteps_are_spread_over_the_batch(timestep):
    expected = torch.as_tensor(timestep).expand(2)
    assert_close(layers.as_timesteps(timestep, normal(2, 3, 4, 4)), expected)


def test_timesteps_of_another_batch_are_refused():
    with pytest.raises(ValueError, match="timestep has 3 entries for a batch of 2; give one number, or one"):
        layers.as_timesteps(torch.arange(3), normal(2, 3, 4, 4))


def test_an_output_is_a_dict_with_attributes_and_positions():
    out = layers.Output(sample=1, other=2)
    assert (out.sample, out["sample"], out[0], out[-1], out[:1]) == (1, 1, 1, 2, (1,))
    assert (dict(out), list(out), out.to_tuple()) == ({"sample": 1, "other": 2}, ["sample", "other"], (1, 2))
    with pytest.raises(AttributeError, match="this output has no 'prev_sample'; it has sample, other"):
        _ = out.prev_sample


def test_channels_that_can_not_be_split_are_named():
    with pytest.raises(ValueError, match="10 channels can't be split into 4 groups; norm_num_groups must di"):
        layers.GroupNorm(4, 10, 1e-5)
    with pytest.raises(ValueError, match="10 channels can't be split into 4 heads"):
        layers.Attention(10, 4)
    with pytest.raises(ValueError, match="10 channels can't be split into heads of 4; attention_head_dim mu"):
        layers.AttentionBlock(10, 4, groups=2, eps=1e-5)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="act_fn='elu' is not implemented; minidiff knows silu, swish, mish"):
        layers.GroupNorm(2, 4, 1e-5, "elu")
