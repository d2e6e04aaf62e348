"""AutoencoderKL against diffusers: encoder, decoder, distribution of latents, every option, errors."""

import inspect

import diffusers
import pytest
import torch
from parity import assert_close, twins

from minidiff import AutoencoderKL, ops
from minidiff.models.vae import DiagonalGaussian

TINY = {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4, "sample_size": 16}  # fmt: skip
OPTIONS = {
    "plain": {},
    "one level": {"block_out_channels": (8,), "down_block_types": ("DownEncoderBlock2D",),
                  "up_block_types": ("UpDecoderBlock2D",)},
    "three levels, two layers": {"block_out_channels": (8, 8, 16), "layers_per_block": 2,
                                 "down_block_types": ("DownEncoderBlock2D",) * 3,
                                 "up_block_types": ("UpDecoderBlock2D",) * 3},
    "no attention": {"mid_block_add_attention": False},
    "no quant convs": {"use_quant_conv": False, "use_post_quant_conv": False},
    "channels": {"in_channels": 1, "out_channels": 2, "latent_channels": 3},
    "gelu": {"act_fn": "gelu"},
    "notes for the caller": {"scaling_factor": 0.13025, "shift_factor": 0.1, "force_upcast": False},
}  # fmt: skip
DTYPES = {torch.float64: 1e-9, torch.float32: 2e-5}


def normal(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_autoencoder_equals_diffusers(option, dtype):
    config = TINY | OPTIONS[option]
    ours, theirs = twins("AutoencoderKL", dtype, **config)
    x = normal(2, config.get("in_channels", 3), 12, 20, dtype=dtype)
    encoded, expected = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    for name in ("mean", "logvar", "std", "var"):
        assert_close(getattr(encoded, name), getattr(expected, name), atol=DTYPES[dtype])
    z = encoded.mode()
    assert_close(ours.decode(z).sample, theirs.decode(z).sample, atol=DTYPES[dtype])
    assert_close(ours(x).sample, theirs(x).sample, atol=DTYPES[dtype])


@pytest.mark.parametrize("size", [(9, 15), (7, 6)], ids=str)
def test_odd_sizes_equal_diffusers(size):
    ours, theirs = twins("AutoencoderKL", **TINY)
    x = normal(2, 3, *size)
    z = theirs.encode(x).latent_dist.mean
    assert_close(ours.encode(x).latent_dist.mean, z, atol=1e-9)
    assert_close(ours.decode(z).sample, theirs.decode(z).sample, atol=1e-9)


def test_a_latent_is_drawn_as_in_diffusers():
    ours, theirs = twins("AutoencoderKL", torch.float32, **TINY)
    encoded, expected = (m.encode(normal(2, 3, 8, 8).float()).latent_dist for m in (ours, theirs))
    seed = torch.Generator().manual_seed
    assert_close(encoded.sample(seed(3)), expected.sample(seed(3)), atol=2e-5)
    assert_close(encoded.sample(generator=[seed(3)]), expected.sample([seed(3)]), atol=2e-5)
    torch.manual_seed(4)
    drawn = encoded.sample()
    torch.manual_seed(4)
    assert_close(drawn, expected.sample(), atol=2e-5)
    pair = [torch.Generator().manual_seed(i) for i in (1, 2)]
    again = [torch.Generator().manual_seed(i) for i in (1, 2)]
    assert_close(encoded.sample(pair), expected.sample(again), atol=2e-5)


def test_a_latent_drawn_in_a_batch_equals_the_one_drawn_alone():
    latent_dist = DiagonalGaussian(normal(2, 8, 3, 3))
    batch = latent_dist.sample([torch.Generator().manual_seed(i) for i in (1, 2)])
    alone = DiagonalGaussian(normal(2, 8, 3, 3)[1:]).sample(torch.Generator().manual_seed(2))
    assert_close(batch[1:], alone)


def test_the_divergence_equals_diffusers_and_the_variance_is_clamped():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    parameters = 20 * normal(2, 8, 3, 3)
    ours, theirs = DiagonalGaussian(parameters), DiagonalGaussianDistribution(parameters)
    assert (ours.logvar.min(), ours.logvar.max()) == (-30, 20)
    assert_close(ours.kl(), theirs.kl(), rtol=1e-12)


def test_results_come_as_outputs_and_as_tuples():
    ours, theirs = twins("AutoencoderKL", **TINY)
    x = normal(1, 3, 8, 8)
    (latent_dist,) = ours.encode(x, return_dict=False)
    (sample,) = ours.decode(latent_dist.mean, return_dict=False, generator=torch.Generator())
    assert_close(sample, ours.decode(latent_dist.mean)["sample"])
    assert_close(ours(x, return_dict=False)[0], sample)
    seed = torch.Generator().manual_seed
    drawn = ours(x, sample_posterior=True, generator=seed(1)).sample
    assert_close(drawn, theirs(x, sample_posterior=True, generator=seed(1)).sample, atol=1e-9)


def test_the_signature_is_diffusers():
    pair = (AutoencoderKL, diffusers.AutoencoderKL)
    ours, theirs = (inspect.signature(c.__init__).parameters for c in pair)
    known = {name: p.default for name, p in ours.items()} | AutoencoderKL.fixed_options
    assert known == {name: p.default for name, p in theirs.items()}
    assert all(p.kind is p.KEYWORD_ONLY for name, p in ours.items() if name != "self")
    config = {k: v for k, v in diffusers.AutoencoderKL(**TINY).config.items() if k != "_use_default_values"}
    assert AutoencoderKL.from_config(config).config.block_out_channels == (8, 16)


def test_every_weight_gets_a_gradient_and_it_equals_diffusers():
    ours, theirs = twins("AutoencoderKL", **TINY)
    for model in (ours.train(), theirs.train()):
        model(normal(2, 3, 8, 8)).sample.square().mean().backward()
    theirs = dict(theirs.named_parameters())
    assert not [name for name, weight in ours.named_parameters() if weight.grad is None]
    for name, weight in ours.named_parameters():
        assert_close(weight.grad, theirs[name].grad, atol=1e-9)


@pytest.mark.parametrize("whole", [True, False])
def test_bfloat16_and_channels_last_are_kept(whole):
    model = AutoencoderKL(**TINY).to(memory_format=torch.channels_last)
    model = model.bfloat16() if whole else model
    x = normal(2, 3, 16, 16, dtype=model.dtype).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        out = model(x).sample
    out.float().mean().backward()
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_backends_agree():
    model = AutoencoderKL(**TINY).double().eval()
    expected = model(normal(2, 3, 8, 8)).sample
    ops.use_backend(model, attention="reference", group_norm="reference")
    assert_close(model(normal(2, 3, 8, 8)).sample, expected, atol=1e-12)


def test_a_picture_that_is_not_finite_is_an_error_with_the_remedy():
    model = AutoencoderKL(**TINY).half()
    with torch.no_grad():
        model.decoder.conv_out.bias.fill_(65504).mul_(2)
    message = r"768 of 768 values are not finite in torch.float16, .* decode in float32: vae.to\("
    with pytest.raises(ValueError, match=message):
        model.decode(torch.zeros(1, 4, 8, 8).half())
    with pytest.raises(ValueError, match="the latents hold NaN or infinity already"):
        model.decode(torch.full((1, 4, 8, 8), float("nan")).half())


@pytest.mark.parametrize(("config", "message"), [
    ({"latents_mean": [0.0]}, "latents_mean=.* is not implemented; minidiff knows only latents_mean=None"),
    ({"down_block_types": ("DownEncoderBlock2D",)}, "down_block_types has 1 entries, block_out_channels has"),
    ({"up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")}, "up_block_types='AttnUpDecoderBlock2"),
    ({"norm_num_groups": 3}, "8 channels can't be split into 3 groups"),
    ({"act_fn": "elu"}, "act_fn='elu' is not implemented"),
])  # fmt: skip
def test_an_option_that_is_not_implemented_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKL(**TINY | config)


def test_a_list_of_generators_has_one_per_picture():
    with pytest.raises(ValueError, match="3 generators for 2 pictures; give one for each"):
        DiagonalGaussian(normal(2, 8, 3, 3)).sample([torch.Generator()] * 3)
