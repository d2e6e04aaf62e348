"""UNet2DModel: predicts the noise in a picture from the picture and the time; the network of DDPM.

Read `UNet2DModel.forward`; everything below it is in `layers.py`. Denoising diffusion probabilistic models
(Ho et al. 2020, arXiv 2006.11239, appendix B); scale and shift by time as in Dhariwal & Nichol 2021 (arXiv
2105.05233); Fourier features and the division by the noise level as in Song et al. 2021 (arXiv 2011.13456,
appendix C).
"""

import math
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from minidiff.backends import Portable
from minidiff.checkpoints.load import PretrainedModel
from minidiff.models.layers import (
    AttentionBlock,
    GroupNorm,
    MidBlock2D,
    Output,
    ResnetBlock2D,
    TimestepEmbedding,
    as_timesteps,
    embed_class,
    timestep_embedding,
)
from minidiff.models.levels import check_choice, check_given, check_levels, down_path, makers_at, up_path
from minidiff.models.options import check_options


class UNet2DModel(Portable, PretrainedModel):
    """Unconditional, or with num_class_embeds class-conditional, U-Net on pictures.

    attention_head_dim is the width of a head; None: one head as wide as all channels.
    resnet_time_scale_shift: "default" (time is added) or "scale_shift". time_embedding_type: "positional"
    (waves of the timestep), "fourier" (waves of the logarithm of a noise level) or "learned" (a table of
    num_train_timesteps rows). Raises ValueError for a value that is not implemented.
    """

    fixed_options: ClassVar = {
        "attn_norm_num_groups": None, "class_embed_type": None, "downsample_type": "conv", "dropout": 0.0,
        "time_embedding_dim": None, "upsample_type": "conv",
    }  # fmt: skip

    def __init__(
        self, *, sample_size=None, in_channels=3, out_channels=3, center_input_sample=False,
        time_embedding_type="positional", freq_shift=0, flip_sin_to_cos=True,
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * 3, mid_block_type="UNetMidBlock2D",
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",), block_out_channels=(224, 448, 672, 896),
        layers_per_block=2, mid_block_scale_factor=1, downsample_padding=1, act_fn="silu",
        attention_head_dim=8, norm_num_groups=32, norm_eps=1e-5, resnet_time_scale_shift="default",
        add_attention=True, num_class_embeds=None, num_train_timesteps=None,
    ):  # fmt: skip
        super().__init__()
        check_options(self)
        check_levels("UNet2DModel", block_out_channels,
                     down_block_types=(down_block_types, ["DownBlock2D", "AttnDownBlock2D"]),
                     up_block_types=(up_block_types, ["UpBlock2D", "AttnUpBlock2D"]))  # fmt: skip
        choice = partial(check_choice, "UNet2DModel")
        choice("resnet_time_scale_shift", resnet_time_scale_shift, "default", "scale_shift")
        scale_shift, fourier = resnet_time_scale_shift == "scale_shift", time_embedding_type == "fourier"
        first, last, temb_channels = block_out_channels[0], block_out_channels[-1], 4 * block_out_channels[0]
        layers = [layers_per_block] * len(block_out_channels)
        resnet = partial(ResnetBlock2D, temb_channels=temb_channels, groups=norm_num_groups, eps=norm_eps,
                         act_fn=act_fn, scale_shift=scale_shift)  # fmt: skip
        attention = partial(AttentionBlock, head_dim=attention_head_dim, groups=norm_num_groups, eps=norm_eps)
        attentions = [partial(attention, channels) for channels in block_out_channels]  # one maker per level

        self.center_input_sample, self.divide_by_time = center_input_sample, fourier
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        choice("time_embedding_type", time_embedding_type, "positional", "fourier", "learned")
        if fourier:
            self.time_proj = FourierProjection(first)
        elif time_embedding_type == "learned":
            check_given("UNet2DModel: time_embedding_type='learned'", num_train_timesteps=num_train_timesteps)
            self.time_proj = nn.Embedding(num_train_timesteps, first)
        else:
            self.time_proj = partial(timestep_embedding, dim=first, flip_sin_to_cos=flip_sin_to_cos,
                                     freq_shift=freq_shift)  # fmt: skip
        self.time_embedding = TimestepEmbedding(2 * first if fourier else first, temb_channels)
        self.class_embedding = nn.Embedding(num_class_embeds, temb_channels) if num_class_embeds else None
        at = makers_at("AttnDownBlock2D", down_block_types, attentions)
        self.down_blocks, skips = down_path(resnet, at, block_out_channels, layers, downsample_padding)
        self.mid_block = None
        if choice("mid_block_type", mid_block_type, None, "UNetMidBlock2D") is not None:
            resnets = [resnet(last, last, scale_factor=mid_block_scale_factor) for _ in range(2)]
            groups = None if scale_shift else norm_num_groups  # as in diffusers, whatever the reason was
            middle = partial(attention, last, groups=groups, scale_factor=mid_block_scale_factor)
            self.mid_block = MidBlock2D(resnets, [middle()] if add_attention else [])
        at = makers_at("AttnUpBlock2D", reversed(up_block_types), attentions)
        self.up_blocks = up_path(resnet, at, block_out_channels, layers, skips)
        self.conv_norm_out = GroupNorm(norm_num_groups, first, norm_eps, "silu")
        self.conv_out = nn.Conv2d(first, out_channels, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep, class_labels=None, return_dict: bool = True):
        """The predicted noise (or v, or x0: as the scheduler's prediction_type says) in sample.

        sample (B, in_channels, H, W); timestep: a number (its fraction is cut off) or a tensor, one or (B,);
        class_labels int (B,), needed with num_class_embeds -> Output with sample (B, out_channels, H, W).
        """
        if self.center_input_sample:
            sample = 2 * sample - 1
        if not torch.is_tensor(timestep):
            timestep = torch.tensor(int(timestep))
        timesteps = as_timesteps(timestep, sample)  # (B,)
        waves = self.time_proj(timesteps).to(sample.dtype)  # (B, block_out_channels[0]), or twice as many
        temb = self.time_embedding(waves)  # (B, 4 * block_out_channels[0])
        temb = embed_class(self.class_embedding, class_labels, temb)

        hidden_states = self.conv_in(sample)  # (B, block_out_channels[0], H, W)
        skips = [hidden_states]
        for block in self.down_blocks:
            hidden_states, more = block(hidden_states, temb)
            skips += more
        if self.mid_block is not None:
            hidden_states = self.mid_block(hidden_states, temb)
        for block in self.up_blocks:
            hidden_states = block(hidden_states, skips, temb)
        sample = self.conv_out(self.conv_norm_out(hidden_states))  # (B, out_channels, H, W)
        if self.divide_by_time:  # timesteps are noise levels then, and the result is a score
            sample = sample / timesteps.to(sample.dtype)[:, None, None, None]
        return Output(sample=sample) if return_dict else (sample,)


class FourierProjection(nn.Module):
    """Sines and cosines of log(x) at num fixed frequencies, random with deviation 16: (B,) -> (B, 2 num)."""

    def __init__(self, num):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num) * 16, requires_grad=False)

    def forward(self, x):
        angles = torch.log(x)[:, None] * self.weight * 2 * math.pi  # (B, num)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
