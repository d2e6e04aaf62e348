"""UNet2DConditionModel: predicts the noise in a latent, given the time and a text: Stable Diffusion.

Read `UNet2DConditionModel.forward` first, then `Transformer2DModel`, where the pixels look at each other and
at the text. The U-Net of DDPM (Ho et al. 2020, arXiv 2006.11239, appendix B) with the cross-attention of
latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.3 and appendix E.2.1).
"""

from functools import partial
from typing import ClassVar

import torch
from torch import nn

from minidiff import ops
from minidiff.backends import Portable
from minidiff.checkpoints.single_file import SingleFileModel
from minidiff.models.layers import (
    Attention,
    GroupNorm,
    MidBlock2D,
    Output,
    ResnetBlock2D,
    TimestepEmbedding,
    as_timesteps,
    embed_class,
    timestep_embedding,
)
from minidiff.models.levels import (
    check_choice,
    check_given,
    check_levels,
    down_path,
    makers_at,
    per_level,
    up_path,
)
from minidiff.models.options import check_options


class UNet2DConditionModel(Portable, SingleFileModel):
    """Text-conditional U-Net of Stable Diffusion 1, 2, XL, turbo and their inpainting variants.

    Options are diffusers'. layers_per_block, cross_attention_dim, transformer_layers_per_block,
    only_cross_attention and attention_head_dim are one value or a list of one per level. attention_head_dim
    is the *number of heads*: a wrong name too widely used to mend (diffusers #2011). norm_eps is for the
    resnets; the norms of the transformers have 1e-6. upcast_attention asks for attention scores in float32;
    they always are. Raises ValueError for a value that is not implemented.
    """

    single_file_part = "unet"
    fixed_options: ClassVar = {
        "attention_type": "default", "addition_embed_type_num_heads": 64, "class_embed_type": None,
        "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
        "cross_attention_norm": None, "dropout": 0.0, "dual_cross_attention": False, "encoder_hid_dim": None,
        "encoder_hid_dim_type": None, "mid_block_only_cross_attention": None, "num_attention_heads": None,
        "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False, "resnet_time_scale_shift": "default",
        "reverse_transformer_layers_per_block": None, "time_embedding_act_fn": None,
        "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None,
    }  # fmt: skip

    def __init__(
        self, *, sample_size=None, in_channels=4, out_channels=4, center_input_sample=False,
        flip_sin_to_cos=True, freq_shift=0, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn", up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        only_cross_attention=False, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
        downsample_padding=1, mid_block_scale_factor=1, act_fn="silu", norm_num_groups=32, norm_eps=1e-5,
        cross_attention_dim=1280, transformer_layers_per_block=1, attention_head_dim=8,
        use_linear_projection=False, addition_embed_type=None, addition_time_embed_dim=None,
        num_class_embeds=None, upcast_attention=False, time_cond_proj_dim=None,
        projection_class_embeddings_input_dim=None,
    ):  # fmt: skip
        super().__init__()
        check_options(self)
        name = "UNet2DConditionModel"
        check_levels(name, block_out_channels,
                     down_block_types=(down_block_types, ["DownBlock2D", "CrossAttnDownBlock2D"]),
                     up_block_types=(up_block_types, ["UpBlock2D", "CrossAttnUpBlock2D"]))  # fmt: skip
        layers, heads, depths, text_channels, only_cross = per_level(
            name, len(block_out_channels), layers_per_block=layers_per_block,
            attention_head_dim=attention_head_dim, transformer_layers_per_block=transformer_layers_per_block,
            cross_attention_dim=cross_attention_dim, only_cross_attention=only_cross_attention)  # fmt: skip
        first, last, temb_channels = block_out_channels[0], block_out_channels[-1], 4 * block_out_channels[0]
        waves = partial(timestep_embedding, flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift)
        resnet = partial(ResnetBlock2D, temb_channels=temb_channels, groups=norm_num_groups, eps=norm_eps,
                         act_fn=act_fn)  # fmt: skip
        transformers = [partial(Transformer2DModel, *sizes, groups=norm_num_groups, only_cross_attention=only,
                                use_linear_projection=use_linear_projection)
                        for *sizes, only in zip(block_out_channels, heads, depths, text_channels, only_cross,
                                                strict=True)]  # one maker per level  # fmt: skip

        self.center_input_sample, self.add_embedding = center_input_sample, None
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.time_proj = partial(waves, dim=first)
        self.time_embedding = TimestepEmbedding(first, temb_channels, act_fn, time_cond_proj_dim)
        self.class_embedding = nn.Embedding(num_class_embeds, temb_channels) if num_class_embeds else None
        if check_choice(name, "addition_embed_type", addition_embed_type, None, "text_time") is not None:
            check_given(
                f"{name}: addition_embed_type='text_time'", addition_time_embed_dim=addition_time_embed_dim,
                projection_class_embeddings_input_dim=projection_class_embeddings_input_dim)  # fmt: skip
            self.add_time_proj = partial(waves, dim=addition_time_embed_dim)
            self.add_embedding = TimestepEmbedding(projection_class_embeddings_input_dim, temb_channels)
        at = makers_at("CrossAttnDownBlock2D", down_block_types, transformers)
        self.down_blocks, skips = down_path(resnet, at, block_out_channels, layers, downsample_padding)
        self.mid_block = None
        if check_choice(name, "mid_block_type", mid_block_type, None, "UNetMidBlock2DCrossAttn") is not None:
            resnets = [resnet(last, last, scale_factor=mid_block_scale_factor) for _ in range(2)]
            self.mid_block = MidBlock2D(resnets, [transformers[-1](only_cross_attention=False)])
        at = makers_at("CrossAttnUpBlock2D", reversed(up_block_types), transformers)
        self.up_blocks = up_path(resnet, at, block_out_channels, layers, skips)
        self.conv_norm_out = GroupNorm(norm_num_groups, first, norm_eps, act_fn)
        self.conv_out = nn.Conv2d(first, out_channels, 3, padding=1)

    def forward(
        self, sample: torch.Tensor, timestep, encoder_hidden_states: torch.Tensor, class_labels=None,
        timestep_cond=None, attention_mask=None, cross_attention_kwargs=None, added_cond_kwargs=None,
        down_block_additional_residuals=None, mid_block_additional_residual=None,
        down_intrablock_additional_residuals=None, encoder_attention_mask=None, return_dict: bool = True,
    ):  # fmt: skip
        """The predicted noise (or v, or x0: as the scheduler's prediction_type says) in sample.

        sample (B, in_channels, H, W); timestep: a number or (B,), fractions are kept; encoder_hidden_states
        (B, S, cross_attention_dim) -> Output with sample (B, out_channels, H, W). H and W may be odd.
        Optional: class_labels int (B,), needed with num_class_embeds; timestep_cond (B, time_cond_proj_dim);
        added_cond_kwargs with text_embeds (B, E) and time_ids (B, 6), needed with "text_time"; attention_mask
        (B, H*W) and encoder_attention_mask (B, S), 1 = look, 0 = don't; a ControlNet's residuals, one per
        skip and one for the middle. Raises ValueError for a condition that is missing or that this model
        can't use.
        """
        _refuse(cross_attention_kwargs=cross_attention_kwargs,
                down_intrablock_additional_residuals=down_intrablock_additional_residuals)  # fmt: skip
        if self.center_input_sample:
            sample = 2 * sample - 1
        waves = self.time_proj(as_timesteps(timestep, sample)).to(sample.dtype)  # (B, block_out_channels[0])
        temb = self.time_embedding(waves, timestep_cond)  # (B, 4 * block_out_channels[0])
        temb = embed_class(self.class_embedding, class_labels, temb)
        if self.add_embedding is not None:
            temb = temb + self._embed_text_time(added_cond_kwargs or {}, temb)
        masks = _bias(attention_mask, sample), _bias(encoder_attention_mask, sample)
        context = (encoder_hidden_states, *masks)

        hidden_states = self.conv_in(sample)  # (B, block_out_channels[0], H, W)
        skips = [hidden_states]
        for block in self.down_blocks:
            hidden_states, more = block(hidden_states, temb, *context)
            skips += more
        if down_block_additional_residuals is not None:
            skips = _with_residuals(skips, down_block_additional_residuals)
        if self.mid_block is not None:
            hidden_states = self.mid_block(hidden_states, temb, *context)
        if mid_block_additional_residual is not None:
            hidden_states = hidden_states + mid_block_additional_residual
        for block in self.up_blocks:
            hidden_states = block(hidden_states, skips, temb, *context)
        sample = self.conv_out(self.conv_norm_out(hidden_states))  # (B, out_channels, H, W)
        return Output(sample=sample) if return_dict else (sample,)

    def _embed_text_time(self, added_cond_kwargs, temb):
        """SDXL's text vector, picture and crop sizes (Podell et al. 2023, arXiv 2307.01952, section 2.2)."""
        missing = {"text_embeds", "time_ids"} - set(added_cond_kwargs)
        if missing:
            raise ValueError(f"{type(self).__name__} with addition_embed_type='text_time' needs "
                             f"{' and '.join(sorted(missing))} in added_cond_kwargs")  # fmt: skip
        text_embeds, time_ids = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
        waves = self.add_time_proj(time_ids.flatten()).reshape(len(text_embeds), -1)  # (B, 6 dims)
        added = torch.cat([text_embeds, waves], dim=-1)  # (B, projection_class_embeddings_input_dim)
        return self.add_embedding(added.to(temb.dtype))  # (B, 4 * block_out_channels[0])


class Transformer2DModel(nn.Module):
    """Transformer blocks on an image's pixels as tokens, in a residual: (B, C, H, W) -> (B, C, H, W).

    encoder_hidden_states (B, S, encoder_channels); masks as in ops.attention. use_linear_projection: the
    projections at both ends are linear layers (SD 2, SDXL) instead of 1 × 1 convolutions (SD 1), which
    compute the same.
    """

    def __init__(self, channels, num_heads, num_layers, encoder_channels, *, groups,
                 use_linear_projection=False, only_cross_attention=False):  # fmt: skip
        super().__init__()
        self.use_linear_projection = use_linear_projection
        project = nn.Linear if use_linear_projection else partial(nn.Conv2d, kernel_size=1)
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = project(channels, channels)
        block = partial(BasicTransformerBlock, channels, num_heads, encoder_channels, only_cross_attention)
        self.transformer_blocks = nn.ModuleList(block() for _ in range(num_layers))
        self.proj_out = project(channels, channels)

    def forward(self, x, encoder_hidden_states, *masks):
        size, linear = x.shape[2:], self.use_linear_projection
        hidden_states = self.norm(x)
        if not linear:
            hidden_states = self.proj_in(hidden_states)
        hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (B, H*W, C)
        if linear:
            hidden_states = self.proj_in(hidden_states)
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, encoder_hidden_states, *masks)
        if linear:
            hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.transpose(1, 2).unflatten(2, size)  # (B, C, H, W)
        return x + (hidden_states if linear else self.proj_out(hidden_states))


class BasicTransformerBlock(nn.Module):
    """Tokens look at each other, then at the text, then pass a feed-forward layer: (B, T, C) -> (B, T, C).

    text (B, S, encoder_channels). only_cross_attention: they look at the text both times.
    """

    def __init__(self, channels, num_heads, encoder_channels, only_cross_attention):
        super().__init__()
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, num_heads, encoder_channels if only_cross_attention else None)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, num_heads, encoder_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, hidden_states, text, mask=None, text_mask=None):
        source = text if self.only_cross_attention else None
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states), source, mask)
        hidden_states = hidden_states + self.attn2(self.norm2(hidden_states), text, text_mask)
        return hidden_states + self.ff(self.norm3(hidden_states))


class FeedForward(nn.Module):
    """Gated linear unit, four times as wide, and back: (B, T, C) -> (B, T, C)."""

    def __init__(self, channels):
        super().__init__()
        width = 4 * channels
        # net.1 is a dropout for those who train with one; it has no weights
        self.net = nn.Sequential(GEGLU(channels, width), nn.Identity(), nn.Linear(width, channels))

    def forward(self, hidden_states):
        return self.net(hidden_states)


class GEGLU(nn.Module):
    """value · GELU(gate), both linear in x: (…, C) -> (…, width)."""

    op, backend = "geglu", "torch"

    def __init__(self, channels, width):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * width)

    def forward(self, x):
        return ops.geglu(self.proj(x), self.backend)


def _bias(mask, sample):
    """A mask (B, S) of ones and zeros as what is added to attention scores: (B, 1, 1, S), 0 or -10000."""
    return None if mask is None else (1 - mask.to(sample.dtype))[:, None, None, :] * -10000.0


def _with_residuals(skips, residuals):
    if len(residuals) != len(skips):
        raise ValueError(f"UNet2DConditionModel: {len(residuals)} down_block_additional_residuals for "
                         f"{len(skips)} skips; give one per skip")  # fmt: skip
    return [skip + residual for skip, residual in zip(skips, residuals, strict=True)]


def _refuse(**unknown):
    for name, value in unknown.items():
        if value:
            raise ValueError(f"UNet2DConditionModel: {name} is not implemented; leave it out")
