"""AutoencoderKL: pictures to latents and back, 8 times smaller in height and width in Stable Diffusion.

Read `AutoencoderKL.encode` and `decode`, then `Encoder` and `Decoder`. The variational autoencoder of latent
diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.1 and appendix G), without its discriminator.
"""

from functools import partial
from typing import ClassVar

import torch
from torch import nn

from minidiff.backends import Portable
from minidiff.checkpoints.single_file import SingleFileModel
from minidiff.models.layers import (
    AttentionBlock,
    GroupNorm,
    MidBlock2D,
    Output,
    ResnetBlock2D,
    Upsample2D,
)
from minidiff.models.levels import check_levels, down_path
from minidiff.models.options import check_options
from minidiff.models.tiling import Pieces

EPS = 1e-6  # of every group norm in a VAE; its config has no key for it


class AutoencoderKL(Pieces, Portable, SingleFileModel):
    """Encodes pictures as normal distributions over latents, and decodes latents.

    Pictures are (B, in_channels, H, W) in [-1, 1], latents (B, latent_channels, H/f, W/f), f = 2^(levels -
    1). scaling_factor and shift_factor are for the caller: a U-Net sees (latents - shift_factor) *
    scaling_factor. 0.18215 is 1 / the standard deviation of the latents of Stable Diffusion's first training
    batch, so that they have about unit variance (diffusers #437). sample_size and force_upcast (the weights
    overflow in float16) are notes for the caller too. Raises ValueError for a value that is not implemented.
    For pictures that exceed the memory there are enable_tiling and enable_slicing: see tiling.py.
    """

    single_file_part = "vae"
    fixed_options: ClassVar = {"latents_mean": None, "latents_std": None}

    def __init__(
        self, *, in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), block_out_channels=(64,), layers_per_block=1, act_fn="silu",
        latent_channels=4, norm_num_groups=32, sample_size=32, scaling_factor=0.18215, shift_factor=None,
        force_upcast=True, use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True,
    ):  # fmt: skip
        super().__init__()
        check_options(self)
        check_levels("AutoencoderKL", block_out_channels,
                     down_block_types=(down_block_types, ["DownEncoderBlock2D"]),
                     up_block_types=(up_block_types, ["UpDecoderBlock2D"]))  # fmt: skip
        shape = (block_out_channels, layers_per_block, norm_num_groups, act_fn, mid_block_add_attention)
        self.encoder = Encoder(in_channels, 2 * latent_channels, *shape)  # 2: mean and log variance
        self.decoder = Decoder(latent_channels, out_channels, *shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self._set_tile_sizes(sample_size, 2 ** (len(block_out_channels) - 1))

    def encode(self, x: torch.Tensor, return_dict: bool = True):
        """Pictures (B, in_channels, H, W) in [-1, 1] -> Output with latent_dist, a DiagonalGaussian."""
        pieces = self.use_tiling or self.use_slicing
        latent_dist = DiagonalGaussian(self._in_pieces(self._encode, x) if pieces else self._encode(x))
        return Output(latent_dist=latent_dist) if return_dict else (latent_dist,)

    def _encode(self, x):
        parameters = self.encoder(x)  # (B, 2 * latent_channels, H/f, W/f)
        return parameters if self.quant_conv is None else self.quant_conv(parameters)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator=None):
        """Latents (B, latent_channels, h, w) -> Output with sample (B, out_channels, f h, f w).

        generator is not used: nothing is drawn. Raises ValueError if the picture is not finite: it would be
        black. That is how weights that overflow in float16 show themselves (SDXL's: diffusers #7188).
        """
        pieces = self.use_tiling or self.use_slicing
        sample = self._in_pieces(self._decode, z) if pieces else self._decode(z)
        if not torch.isfinite(sample).all():
            self._explain_overflow(z, sample)
        return Output(sample=sample) if return_dict else (sample,)

    def _decode(self, z):
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def forward(self, sample: torch.Tensor, sample_posterior=False, return_dict: bool = True, generator=None):
        """Pictures encoded and decoded, through the mean, or with sample_posterior through a drawn latent."""
        latent_dist = self.encode(sample).latent_dist
        z = latent_dist.sample(generator) if sample_posterior else latent_dist.mode()
        return self.decode(z, return_dict)

    def _explain_overflow(self, z, sample):
        if not torch.isfinite(z).all():
            raise ValueError("AutoencoderKL.decode: the latents hold NaN or infinity already; look for the "
                             "step of the loop, or the model, that made them")  # fmt: skip
        count = int((~torch.isfinite(sample)).sum())
        raise ValueError(f"AutoencoderKL.decode: {count} of {sample.numel()} values are not finite in "
                         f"{sample.dtype}, where these weights overflow; decode in float32: "
                         "vae.to(torch.float32).decode(latents.float())")  # fmt: skip


class DiagonalGaussian:
    """A normal distribution per entry of a latent: mean, logvar, std, var (B, latent_channels, h, w)."""

    def __init__(self, parameters):
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)  # std between 3e-7 and 2e4: neither 0 nor infinite
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def mode(self) -> torch.Tensor:
        """The most likely latent: the mean."""
        return self.mean

    def sample(self, generator=None) -> torch.Tensor:
        """A drawn latent. generator: a torch.Generator, a list of one per picture, or None: global."""
        return self.mean + self.std * _randn_like(self.mean, generator)

    def kl(self) -> torch.Tensor:
        """Divergence from the standard normal, (B,) (Kingma & Welling 2013, arXiv 1312.6114, appendix B)."""
        return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))


def _randn_like(x, generator):
    """Standard normal numbers like x, drawn where generator lives: a seed means the same wherever x is."""
    if isinstance(generator, list | tuple) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, list | tuple):
        if len(generator) != len(x):
            raise ValueError(f"sample: {len(generator)} generators for {len(x)} pictures; give one for each")
        return torch.cat([_randn_like(row, g) for row, g in zip(x.split(1), generator, strict=True)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, H/f, W/f): levels of resnets and downsamplers, a middle."""

    def __init__(self, in_channels, out_channels, block_channels, num_layers, groups, act_fn, attend):
        super().__init__()
        resnet = partial(ResnetBlock2D, groups=groups, eps=EPS, act_fn=act_fn)
        levels, last = len(block_channels), block_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, block_channels[0], 3, padding=1)
        layers, attentions = [num_layers] * levels, [None] * levels
        self.down_blocks, _ = down_path(resnet, attentions, block_channels, layers, padding=0)
        self.mid_block = _mid_block(last, resnet, groups, attend)
        self.conv_norm_out = GroupNorm(groups, last, EPS, "silu")
        self.conv_out = nn.Conv2d(last, out_channels, 3, padding=1)

    def forward(self, x):
        hidden_states = self.conv_in(x)
        for block in self.down_blocks:
            hidden_states, _ = block(hidden_states)  # no skips: the latent must hold everything
        hidden_states = self.mid_block(hidden_states)
        return self.conv_out(self.conv_norm_out(hidden_states))


class Decoder(nn.Module):
    """(B, in_channels, h, w) -> (B, out_channels, f h, f w): the encoder's mirror, with one more resnet."""

    def __init__(self, in_channels, out_channels, block_channels, num_layers, groups, act_fn, attend):
        super().__init__()
        resnet = partial(ResnetBlock2D, groups=groups, eps=EPS, act_fn=act_fn)
        before = block_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, before, 3, padding=1)
        self.mid_block = _mid_block(before, resnet, groups, attend)
        self.up_blocks = nn.ModuleList()
        for level, channels in reversed(list(enumerate(block_channels))):
            resnets = [resnet(before if i == 0 else channels, channels) for i in range(num_layers + 1)]
            self.up_blocks.append(DecoderBlock(resnets, Upsample2D(channels) if level > 0 else None))
            before = channels
        self.conv_norm_out = GroupNorm(groups, before, EPS, "silu")
        self.conv_out = nn.Conv2d(before, out_channels, 3, padding=1)

    def forward(self, z):
        hidden_states = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            hidden_states = block(hidden_states)
        return self.conv_out(self.conv_norm_out(hidden_states))


class DecoderBlock(nn.Module):
    """One level of the decoder: resnets, then the upsampler: (B, C_in, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, resnets, upsampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, hidden_states):
        for layer in (*self.resnets, *self.upsamplers):
            hidden_states = layer(hidden_states)
        return hidden_states


def _mid_block(channels, resnet, groups, attend):
    """Two resnets; between them, if attend, self-attention with one head as wide as all channels."""
    attentions = [AttentionBlock(channels, groups=groups, eps=EPS)] if attend else []
    return MidBlock2D([resnet(channels, channels) for _ in range(2)], attentions)
