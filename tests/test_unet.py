"""UNet2DConditionModel against diffusers: whole tiny models, every option, odd sizes, gradients, errors."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from parity import assert_close, twins

from minidiff import UNet2DConditionModel, backends, ops

TINY = {"block_out_channels": (8, 16), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": 6, "attention_head_dim": 2, "sample_size": 8}  # fmt: skip
DEEP = {"block_out_channels": (8, 8, 16),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",)}  # fmt: skip
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
      "projection_class_embeddings_input_dim": 5 + 6 * 8, "use_linear_projection": True}  # fmt: skip
OPTIONS = {
    "Stable Diffusion 1": {},
    "Stable Diffusion 2": {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "scores in float32": {"upcast_attention": True},
    "SDXL": DEEP | XL | {"transformer_layers_per_block": (1, 2, 3), "attention_head_dim": (1, 2, 4)},
    "inpainting": {"in_channels": 9},
    "three levels, two layers": DEEP | {"layers_per_block": 2},
    "lists per level": DEEP | {"layers_per_block": (1, 2, 1), "only_cross_attention": (True, False, True)},
    "text per level": {"cross_attention_dim": (6, 6), "transformer_layers_per_block": 2},
    "only cross attention": {"only_cross_attention": True},
    "guidance embedding": {"time_cond_proj_dim": 5},
    "classes": {"num_class_embeds": 4},
    "no middle": {"mid_block_type": None},
    "scaled middle": {"mid_block_scale_factor": 1.7},
    "gelu": {"act_fn": "gelu"},
    "centred input": {"center_input_sample": True},
    "time of DDPM": {"flip_sin_to_cos": False, "freq_shift": 1},
    "padding of DDPM": {"downsample_padding": 0},
    "eps": {"norm_eps": 1e-2},
    "output channels": {"out_channels": 8},
}
DTYPES = {torch.float64: 1e-9, torch.float32: 2e-5}


def normal(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(config, dtype=torch.float64, size=(8, 12)):
    """sample, timestep, text, and the conditions that config asks for."""
    conditions = {}
    if config.get("addition_embed_type"):
        time_ids = torch.tensor([[1024, 512, 0, 0, 1024.0, 768]]).expand(2, 6)
        conditions["added_cond_kwargs"] = {"text_embeds": normal(2, 5, dtype=dtype), "time_ids": time_ids}
    if config.get("time_cond_proj_dim"):
        conditions["timestep_cond"] = normal(2, 5, dtype=dtype)
    if config.get("num_class_embeds"):
        conditions["class_labels"] = torch.tensor([3, 0])
    sample = normal(2, config.get("in_channels", 4), *size, dtype=dtype)
    return (sample, torch.tensor([3, 981]), normal(2, 7, 6, dtype=dtype, seed=2)), conditions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_unet_equals_diffusers(option, dtype):
    config = TINY | OPTIONS[option]
    ours, theirs = twins("UNet2DConditionModel", dtype, **config)
    args, conditions = inputs(config, dtype)
    out = ours(*args, **conditions).sample
    assert out.dtype == dtype
    assert_close(out, theirs(*args, **conditions).sample, atol=DTYPES[dtype])


@pytest.mark.parametrize("option", ["Stable Diffusion 1", "three levels, two layers"])
@pytest.mark.parametrize("size", [(7, 9), (5, 10), (9, 4)], ids=str)
def test_odd_sizes_equal_diffusers(size, option):
    config = TINY | OPTIONS[option]
    ours, theirs = twins("UNet2DConditionModel", **config)
    args, _ = inputs(config, size=size)
    assert_close(ours(*args).sample, theirs(*args).sample, atol=1e-9)


TIMESTEPS = [0, 999, 7.5, np.int64(981), np.float64(7.5), torch.tensor(3), torch.tensor(7.5),
             torch.tensor([5]), torch.tensor([5.5, 900])]  # fmt: skip


@pytest.mark.parametrize("timestep", TIMESTEPS, ids=repr)
def test_every_kind_of_timestep_equals_diffusers(timestep):
    ours, theirs = twins("UNet2DConditionModel", **TINY)
    (sample, _, text), _ = inputs(TINY)
    assert_close(ours(sample, timestep, text).sample, theirs(sample, timestep, text).sample, atol=1e-9)


def test_a_fraction_in_a_numpy_float32_timestep_is_kept():  # diffusers cuts it off: it is no Python float
    ours, theirs = twins("UNet2DConditionModel", **TINY)
    (sample, _, text), _ = inputs(TINY)
    assert_close(ours(sample, np.float32(7.5), text).sample, theirs(sample, 7.5, text).sample, atol=1e-9)


def test_masks_equal_diffusers():
    config = TINY | {"block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",),
                     "up_block_types": ("CrossAttnUpBlock2D",)}  # fmt: skip
    ours, theirs = twins("UNet2DConditionModel", **config)
    args, _ = inputs(config, size=(3, 5))
    masks = {"encoder_attention_mask": torch.tensor([[1, 1, 0, 1, 0, 0, 0], [1] * 7]),
             "attention_mask": (torch.arange(15) % 3 > 0).expand(2, 15).long()}  # fmt: skip
    expected = theirs(*args, **masks).sample
    assert (ours(*args).sample - expected).abs().max() > 1e-3
    assert_close(ours(*args, **masks).sample, expected, atol=1e-9)


def test_residuals_of_a_controlnet_equal_diffusers():
    ours, theirs = twins("UNet2DConditionModel", **TINY)
    args, _ = inputs(TINY)
    shapes = [(2, 8, 8, 12)] * 2 + [(2, 8, 4, 6), (2, 16, 4, 6)]
    residuals = {"down_block_additional_residuals": [normal(*s, seed=i) for i, s in enumerate(shapes)],
                 "mid_block_additional_residual": normal(2, 16, 4, 6, seed=9)}  # fmt: skip
    assert_close(ours(*args, **residuals).sample, theirs(*args, **residuals).sample, atol=1e-9)


def test_results_come_as_outputs_and_as_tuples():
    model = UNet2DConditionModel(**TINY)
    args, _ = inputs(TINY, torch.float32)
    out = model(*args)
    assert_close(model(*args, return_dict=False)[0], out["sample"])
    assert_close(out[0], out.sample)


def test_the_signature_is_diffusers():
    pair = (UNet2DConditionModel, diffusers.UNet2DConditionModel)
    ours, theirs = (inspect.signature(c.__init__).parameters for c in pair)
    known = {name: p.default for name, p in ours.items()} | UNet2DConditionModel.fixed_options
    assert known == {name: p.default for name, p in theirs.items()}
    assert all(p.kind is p.KEYWORD_ONLY for name, p in ours.items() if name != "self")
    ours, theirs = (list(inspect.signature(c.forward).parameters) for c in pair)
    assert ours == theirs
    config = {k: v for k, v in diffusers.UNet2DConditionModel(**TINY).config.items() if k[0] != "_"}
    assert UNet2DConditionModel.from_config(config).config.cross_attention_dim == 6


@pytest.mark.parametrize("option", ["Stable Diffusion 1", "SDXL"])
def test_every_weight_gets_a_gradient_and_it_equals_diffusers(option):
    config = TINY | OPTIONS[option]
    ours, theirs = twins("UNet2DConditionModel", **config)
    args, conditions = inputs(config)
    for model in (ours.train(), theirs.train()):
        model(*args, **conditions).sample.square().mean().backward()
    theirs = dict(theirs.named_parameters())
    assert not [name for name, weight in ours.named_parameters() if weight.grad is None]
    for name, weight in ours.named_parameters():
        assert_close(weight.grad, theirs[name].grad, atol=1e-9)


@pytest.mark.parametrize("option", ["Stable Diffusion 1", "SDXL"])
@pytest.mark.parametrize("whole", [True, False])
def test_bfloat16_and_channels_last_are_kept(whole, option):
    config = TINY | OPTIONS[option]
    model = UNet2DConditionModel(**config).to(memory_format=torch.channels_last)
    model = model.bfloat16() if whole else model
    (sample, timestep, text), conditions = inputs(config, model.dtype)
    sample = sample.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        out = model(sample, timestep, text, **conditions).sample
    out.float().mean().backward()
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_stays_close_to_float32():
    ours, theirs = twins("UNet2DConditionModel", torch.float32, **TINY)
    args, _ = inputs(TINY, torch.float32)
    expected = theirs(*args).sample
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_close(ours(*args).sample.float(), expected, atol=0.1)


def test_backends_agree():
    model, _ = twins("UNet2DConditionModel", **TINY)
    args, _ = inputs(TINY)
    expected = model(*args).sample
    ops.use_backend(model, **dict.fromkeys(backends.OPERATIONS, "reference"))
    assert {layer.backend for layer in model.modules() if hasattr(layer, "backend")} == {"reference"}
    assert_close(model(*args).sample, expected, atol=1e-12)


@pytest.mark.parametrize(("config", "message"), [
    ({"dual_cross_attention": True}, "dual_cross_attention=True is not implemented; minidiff knows only"),
    ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift='scale_shift' is not implemented"),
    ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type='UNetMidBlock2D' is not implemented; minidiff kn"),
    ({"addition_embed_type": "image"}, "addition_embed_type='image' is not implemented; minidiff knows None"),
    ({"addition_embed_type": "text_time"}, "'text_time' needs addition_time_embed_dim and projection_class_"),
    ({"down_block_types": ("DownBlock2D", "KDownBlock2D")}, "down_block_types='KDownBlock2D' is not impleme"),
    ({"up_block_types": ("UpBlock2D",)}, "up_block_types has 1 entries, block_out_channels has 2; give one"),
    ({"attention_head_dim": (1, 2, 4)}, r"attention_head_dim=\(1, 2, 4\) is not implemented; give one value"),
    ({"transformer_layers_per_block": [[1], [1]]}, r"transformer_layers_per_block=\[\[1\], \[1\]\] is not i"),
    ({"attention_head_dim": 3}, "8 channels can't be split into 3 heads"),
    ({"norm_num_groups": 5}, "8 channels can't be split into 5 groups"),
    ({"act_fn": "elu"}, "act_fn='elu' is not implemented"),
])  # fmt: skip
def test_an_option_that_is_not_implemented_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel(**TINY | config)


@pytest.mark.parametrize(("option", "given", "message"), [
    ("classes", {}, r"needs class_labels, int \(batch,\): it was built with num_class_embeds=4"),
    ("Stable Diffusion 1", {"class_labels": torch.tensor([1, 2])}, "knows no classes .* leave class_labels"),
    ("Stable Diffusion 1", {"timestep_cond": normal(2, 5).float()}, "timestep_cond was given to a model wit"),
    ("Stable Diffusion 1", {"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs is not imple"),
    ("Stable Diffusion 1", {"down_intrablock_additional_residuals": [0]}, "intrablock_additional_residuals"),
    ("Stable Diffusion 1", {"down_block_additional_residuals": [0]}, "1 down_block_additional_residuals for"),
    ("SDXL", {}, "addition_embed_type='text_time' needs text_embeds and time_ids in added_cond_kwargs"),
    ("SDXL", {"added_cond_kwargs": {"text_embeds": 0}}, "needs time_ids in added_cond_kwargs"),
])  # fmt: skip
def test_a_condition_that_is_missing_or_useless_is_named(option, given, message):
    config = TINY | OPTIONS[option]
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel(**config)(*inputs(config, torch.float32)[0], **given)
