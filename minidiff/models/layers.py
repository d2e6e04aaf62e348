"""The layers that the models share: group norm, attention, residual blocks, resampling, embeddings.

Attributes are named as the tensors in published checkpoints. Read `ResnetBlock2D` and `Attention` first; a
level of a U-Net (`DownBlock2D`, `UpBlock2D`) is a row of them. Papers: DDPM (Ho et al. 2020, arXiv
2006.11239, appendix B), attention (Vaswani et al. 2017, arXiv 1706.03762), scale and shift by time (Dhariwal
& Nichol 2021, arXiv 2105.05233).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from minidiff import ops

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu}


class Output(dict):
    """What a model returns: a dict with attributes and positions, out.sample is out["sample"] and out[0]."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this output has no {name!r}; it has {', '.join(self)}") from None

    def __getitem__(self, key):
        return self.to_tuple()[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def to_tuple(self) -> tuple:
        """The values in order, as with return_dict=False."""
        return tuple(self.values())


class GroupNorm(nn.Module):
    """Group norm of x (B, C, H, W) plus temb (B, C), if given; then an activation if act_fn names one."""

    op = "group_norm"

    def __init__(self, num_groups, channels, eps, act_fn=None):
        super().__init__()
        if channels % num_groups:
            raise ValueError(f"group_norm: {channels} channels can't be split into {num_groups} groups; "
                             "norm_num_groups must divide the channels")  # fmt: skip
        self.num_groups, self.eps, self.backend = num_groups, eps, "torch"
        self.silu = act_fn in ("silu", "swish")  # kernels fuse it
        self.act = None if self.silu else activation(act_fn)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x, temb=None):
        y = ops.group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps, self.silu, self.backend, temb
        )
        return y if self.act is None else self.act(y)


def activation(name):
    """The function called name in a config's act_fn; None for None."""
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"act_fn={name!r} is not implemented; minidiff knows {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.get(name)


class Attention(nn.Module):
    """Multi-head attention; self-attention if encoder_hidden_states is None.

    hidden_states (B, T, C), encoder_hidden_states (B, S, E), mask as in ops.attention -> (B, T, C)
    """

    op = "attention"

    def __init__(self, channels, num_heads, encoder_channels=None, qkv_bias=False):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"attention: {channels} channels can't be split into {num_heads} heads")
        self.num_heads, self.backend = num_heads, "torch"
        source_channels = encoder_channels or channels
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(source_channels, channels, bias=qkv_bias)
        self.to_v = nn.Linear(source_channels, channels, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list: checkpoints say to_out.0

    def forward(self, hidden_states, encoder_hidden_states=None, mask=None):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = self.heads(self.to_q(hidden_states))  # (B, heads, T, D)
        k = self.heads(self.to_k(source))  # (B, heads, S, D)
        v = self.heads(self.to_v(source))  # (B, heads, S, D)
        return self.attend(q, k, v, mask)

    def attend(self, q, k, v, mask=None):
        """What follows the projections: q (B, heads, T, D), k and v (B, heads, S, D) -> (B, T, C)."""
        out = ops.attention(q, k, v, mask, backend=self.backend)  # (B, heads, T, D)
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # (B, T, C)

    def heads(self, x):
        """(B, T, C) -> (B, heads, T, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class AttentionBlock(Attention):
    """Self-attention between pixels, with its own norm and residual: (B, C, H, W) -> (B, C, H, W).

    head_dim None: one head. groups None: no norm. scale_factor divides the sum of input and result.
    """

    def __init__(self, channels, head_dim=None, *, groups, eps, scale_factor=1.0):
        head_dim = head_dim or channels
        if channels % head_dim:
            raise ValueError(f"attention: {channels} channels can't be split into heads of {head_dim}; "
                             "attention_head_dim must divide the channels")  # fmt: skip
        super().__init__(channels, channels // head_dim, qkv_bias=True)
        self.scale_factor = scale_factor
        self.group_norm = None if groups is None else GroupNorm(groups, channels, eps)

    def forward(self, x):
        hidden_states = x if self.group_norm is None else self.group_norm(x)
        hidden_states = super().forward(hidden_states.flatten(2).transpose(1, 2))  # (B, H*W, C)
        hidden_states = hidden_states.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)
        return divided(x + hidden_states, self.scale_factor)


class ResnetBlock2D(nn.Module):
    """Two 3 × 3 convolutions, norm and activation before each, with a residual; time enters in between.

    x (B, C_in, H, W), temb (B, temb_channels) or None -> (B, C_out, H, W). Time is added to the channels, or
    with scale_shift scales and shifts them after the second norm. scale_factor divides the sum of input and
    result.
    """

    def __init__(self, in_channels, out_channels, *, temb_channels=None, groups, eps, act_fn="silu",
                 scale_shift=False, scale_factor=1.0):  # fmt: skip
        super().__init__()
        self.act, self.scale_shift, self.scale_factor = activation(act_fn), scale_shift, scale_factor
        self.norm1 = GroupNorm(groups, in_channels, eps, act_fn)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps, None if scale_shift else act_fn)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, temb=None):
        hidden_states = self.conv2(self.before_conv2(x, temb))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return divided(x + hidden_states, self.scale_factor)

    def before_conv2(self, x, temb=None):
        """What the second convolution gets: (B, C_out, H, W)."""
        hidden_states = self.conv1(self.norm1(x))  # (B, C_out, H, W)
        if temb is not None:
            temb = self.time_emb_proj(self.act(temb))  # (B, C_out or 2 C_out)
        if self.scale_shift:
            scale, shift = temb[:, :, None, None].chunk(2, dim=1)
            return self.act(self.norm2(hidden_states) * (1 + scale) + shift)
        return self.norm2(hidden_states, temb)


def divided(x, scale_factor):
    """x / scale_factor; 1, which nearly all models have, takes no pass over x."""
    return x if scale_factor == 1 else x / scale_factor


class Downsample2D(nn.Module):
    """Halves height and width with a strided convolution: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)).

    padding 1 pads all four sides; padding 0 only right and bottom, as DDPM's U-Net and every VAE do.
    """

    def __init__(self, channels, padding=1):
        super().__init__()
        self.one_sided = padding == 0
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.one_sided else x)


class Upsample2D(nn.Module):
    """Repeats pixels, then convolves: (B, C, H, W) -> (B, C, 2H, 2W), or size (height, width) if given."""

    op, backend = "upsample_conv", "torch"

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        size = (2 * x.shape[2], 2 * x.shape[3]) if size is None else tuple(size)
        if self.backend == "torch":
            return self.conv(F.interpolate(x, size=size, mode="nearest"))
        return ops.upsample_conv(x, size, self.conv.weight, self.conv.bias, self.backend)


def timestep_embedding(timesteps, dim, flip_sin_to_cos, freq_shift):
    """Sines and cosines of the timesteps at dim / 2 frequencies from 1 to 1/10000: (B,) -> (B, dim), float32.

    Vaswani et al. 2017, section 3.5. flip_sin_to_cos puts the cosines first. The exponents run from 0 to
    (half - 1) / (half - freq_shift): freq_shift 1 reaches 1/10000, 0 stops just before.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(exponent / (half - freq_shift))
    angles = timesteps[:, None].float() * frequencies  # (B, half)
    waves = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, dim=-1), (0, dim % 2))  # an odd dim ends with a 0


class TimestepEmbedding(nn.Module):
    """Two linear layers: (B, in_channels) -> (B, dim). condition: None, or (B, cond_proj_dim) to be added."""

    def __init__(self, in_channels, dim, act_fn="silu", cond_proj_dim=None):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, dim)
        self.cond_proj = None if cond_proj_dim is None else nn.Linear(cond_proj_dim, in_channels, bias=False)
        self.act = activation(act_fn)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x, condition=None):
        if condition is not None and self.cond_proj is None:
            raise ValueError("timestep_cond was given to a model without time_cond_proj_dim: leave it out")
        if condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(self.act(self.linear_1(x)))


class DownBlock2D(nn.Module):
    """One level on the way down: resnets, each followed by its attention if it has one, then the downsampler.

    hidden_states (B, C_in, H, W), temb (B, D); context: what the attentions take besides hidden_states. ->
    hidden_states (B, C, H/2, W/2) and the skips: every intermediate result, for the level's mirror on the way
    up.
    """

    def __init__(self, resnets, attentions=(), downsampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, hidden_states, temb=None, *context):
        skips = []
        for i, resnet in enumerate(self.resnets):
            hidden_states = resnet(hidden_states, temb)
            if self.attentions:
                hidden_states = self.attentions[i](hidden_states, *context)
            skips.append(hidden_states)
        for downsample in self.downsamplers:  # none at the lowest level
            hidden_states = downsample(hidden_states)
            skips.append(hidden_states)
        return hidden_states, skips


class MidBlock2D(nn.Module):
    """The lowest level: a resnet, then pairs of attention and resnet: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, resnets, attentions=()):
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)

    def forward(self, hidden_states, temb=None, *context):
        hidden_states = self.resnets[0](hidden_states, temb)
        for i, resnet in enumerate(self.resnets[1:]):
            if self.attentions:
                hidden_states = self.attentions[i](hidden_states, *context)
            hidden_states = resnet(hidden_states, temb)
        return hidden_states


class UpBlock2D(nn.Module):
    """One level on the way up, DownBlock2D's mirror: every resnet also sees the newest of the skips.

    hidden_states (B, C_in, H, W), temb (B, D); skips: a list, of which one entry per resnet is taken off the
    end. -> (B, C, 2H, 2W), or the size of the next skip where H or W was odd on the way down.
    """

    def __init__(self, resnets, attentions=(), upsampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, hidden_states, skips, temb, *context):
        for i, resnet in enumerate(self.resnets):
            hidden_states = resnet(torch.cat([hidden_states, skips.pop()], dim=1), temb)
            if self.attentions:
                hidden_states = self.attentions[i](hidden_states, *context)
        for upsample in self.upsamplers:  # none at the top level
            hidden_states = upsample(hidden_states, skips[-1].shape[2:])
        return hidden_states


def as_timesteps(timestep, sample):
    """timestep, a number, NumPy scalar, 0-d or (B,) tensor, as (B,) on the device of sample (B, …).

    Numbers become float32 (Apple's GPU has no float64); a tensor keeps its dtype.
    """
    dtype = timestep.dtype if torch.is_tensor(timestep) else torch.float32
    timesteps = torch.as_tensor(timestep, dtype=dtype, device=sample.device)
    if timesteps.numel() not in (1, len(sample)):
        raise ValueError(f"timestep has {timesteps.numel()} entries for a batch of {len(sample)}; "
                         "give one number, or one per picture")  # fmt: skip
    return timesteps.flatten().expand(len(sample))


def embed_class(class_embedding, class_labels, temb):
    """temb (B, D) plus the embedding of class_labels, int (B,). Raises ValueError if only one is there."""
    if class_embedding is None and class_labels is None:
        return temb
    if class_embedding is None:
        raise ValueError("this model knows no classes (its num_class_embeds is None): leave class_labels out")
    if class_labels is None:
        raise ValueError("this model needs class_labels, int (batch,): it was built with num_class_embeds="
                         f"{class_embedding.num_embeddings}")  # fmt: skip
    return temb + class_embedding(class_labels).to(temb.dtype)
