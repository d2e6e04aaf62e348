"""The original layout of Stable Diffusion's single files: which tensor there is which one here, as tables.

A file in this layout (of CompVis's latent diffusion, and of Stability's generative models after it) holds all
parts, and PREFIXES say which name belongs to which part. What follows the prefix is looked up in the part's
table. A row is (name there, name here), with a third entry where the tensor changes too. In a row {i} and {j}
are numbers and * is the rest of a name; {down}, {up} and the others are numbers that `_places` works out. The
first row that fits counts, and those that begin as it does; a name that no row fits is an error. All is done
with names, so nothing here imports torch.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from minidiff.checkpoints.errors import CheckpointError


def as_linear(tensor):
    """(C, C, 1, 1) or (C, C, 1) -> (C, C): a 1 x 1 convolution is a linear layer on each pixel."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def transposed(tensor):
    """(A, B) -> (B, A), in memory too."""
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor


def third(number):
    """The function (3 C, ...) -> (C, ...) that gives the third of that number, from 0."""
    return lambda tensor: tensor.tensor_split(3)[number] if tensor.ndim else tensor


class Source(NamedTuple):
    """Where a tensor comes from: its name in the file, and what happens to it, None if nothing."""

    name: str
    change: Callable | None


def _inside(there, here, rows):
    """The rows of something that is built alike in several places, such as a resnet, at one of them."""
    return tuple((f"{there}.{row[0]}", f"{here}.{row[1]}", *row[2:]) for row in rows)


UNET_RESNET = (
    ("in_layers.0.*", "norm1.*"),
    ("in_layers.2.*", "conv1.*"),
    ("emb_layers.1.*", "time_emb_proj.*"),
    ("out_layers.0.*", "norm2.*"),
    ("out_layers.3.*", "conv2.*"),
    ("skip_connection.*", "conv_shortcut.*"),
)
UNET_ATTENTION = tuple(
    (f"{name}.*", f"{name}.*") for name in ("norm", "proj_in", "transformer_blocks", "proj_out")
)
UNET = (
    ("time_embed.0.*", "time_embedding.linear_1.*"),
    ("time_embed.2.*", "time_embedding.linear_2.*"),
    ("label_emb.0.0.*", "add_embedding.linear_1.*"),  # XL: size, crop and the whole text's vector
    ("label_emb.0.2.*", "add_embedding.linear_2.*"),
    ("input_blocks.0.0.*", "conv_in.*"),
    ("input_blocks.{i}.0.op.*", "down_blocks.{down}.downsamplers.0.conv.*"),
    *_inside("input_blocks.{i}.0", "down_blocks.{down}.resnets.{down_layer}", UNET_RESNET),
    *_inside("input_blocks.{i}.1", "down_blocks.{down}.attentions.{down_layer}", UNET_ATTENTION),
    *_inside("middle_block.0", "mid_block.resnets.0", UNET_RESNET),
    *_inside("middle_block.1", "mid_block.attentions.0", UNET_ATTENTION),
    *_inside("middle_block.2", "mid_block.resnets.1", UNET_RESNET),
    ("output_blocks.{i}.1.conv.*", "up_blocks.{up}.upsamplers.0.conv.*"),  # at a level without attention
    ("output_blocks.{i}.2.conv.*", "up_blocks.{up}.upsamplers.0.conv.*"),
    *_inside("output_blocks.{i}.0", "up_blocks.{up}.resnets.{up_layer}", UNET_RESNET),
    *_inside("output_blocks.{i}.1", "up_blocks.{up}.attentions.{up_layer}", UNET_ATTENTION),
    ("out.0.*", "conv_norm_out.*"),
    ("out.2.*", "conv_out.*"),
)

VAE_RESNET = (
    ("norm1.*", "norm1.*"),
    ("conv1.*", "conv1.*"),
    ("norm2.*", "norm2.*"),
    ("conv2.*", "conv2.*"),
    ("nin_shortcut.*", "conv_shortcut.*"),
)
VAE_MIDDLE = (
    *_inside("block_1", "resnets.0", VAE_RESNET),
    ("attn_1.norm.*", "attentions.0.group_norm.*"),
    ("attn_1.q.*", "attentions.0.to_q.*", as_linear),
    ("attn_1.k.*", "attentions.0.to_k.*", as_linear),
    ("attn_1.v.*", "attentions.0.to_v.*", as_linear),
    ("attn_1.proj_out.*", "attentions.0.to_out.0.*", as_linear),
    *_inside("block_2", "resnets.1", VAE_RESNET),
)
VAE = (
    ("encoder.conv_in.*", "encoder.conv_in.*"),
    *_inside("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}", VAE_RESNET),
    ("encoder.down.{i}.downsample.conv.*", "encoder.down_blocks.{i}.downsamplers.0.conv.*"),
    *_inside("encoder.mid", "encoder.mid_block", VAE_MIDDLE),
    ("encoder.norm_out.*", "encoder.conv_norm_out.*"),
    ("encoder.conv_out.*", "encoder.conv_out.*"),
    ("quant_conv.*", "quant_conv.*"),
    ("post_quant_conv.*", "post_quant_conv.*"),
    ("decoder.conv_in.*", "decoder.conv_in.*"),
    *_inside("decoder.mid", "decoder.mid_block", VAE_MIDDLE),
    # there they are numbered from the highest resolution on, here in the order in which they run
    *_inside("decoder.up.{i}.block.{j}", "decoder.up_blocks.{from_the_end}.resnets.{j}", VAE_RESNET),
    ("decoder.up.{i}.upsample.conv.*", "decoder.up_blocks.{from_the_end}.upsamplers.0.conv.*"),
    ("decoder.norm_out.*", "decoder.conv_norm_out.*"),
    ("decoder.conv_out.*", "decoder.conv_out.*"),
)

CLIP = (("*", "*"),)  # transformers' own names, as here

OPEN_CLIP_LAYER = (
    ("ln_1.*", "layer_norm1.*"),
    # three matrices in one, and three biases in one
    ("attn.in_proj_*", "self_attn.q_proj.*", third(0)),
    ("attn.in_proj_*", "self_attn.k_proj.*", third(1)),
    ("attn.in_proj_*", "self_attn.v_proj.*", third(2)),
    ("attn.out_proj.*", "self_attn.out_proj.*"),
    ("ln_2.*", "layer_norm2.*"),
    ("mlp.c_fc.*", "mlp.fc1.*"),
    ("mlp.c_proj.*", "mlp.fc2.*"),
)
OPEN_CLIP = (  # the text encoder of Stable Diffusion 2, and the second one of XL
    ("token_embedding.*", "text_model.embeddings.token_embedding.*"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *_inside("transformer.resblocks.{i}", "text_model.encoder.layers.{i}", OPEN_CLIP_LAYER),
    ("ln_final.*", "text_model.final_layer_norm.*"),
    ("text_projection", "text_projection.weight", transposed),  # there x @ w, here a linear layer: x @ w.T
)

PREFIXES = (  # (prefix, part, table)
    ("model.diffusion_model.", "unet", UNET),
    ("first_stage_model.", "vae", VAE),
    ("cond_stage_model.transformer.", "text_encoder", CLIP),  # Stable Diffusion 1
    ("cond_stage_model.model.", "text_encoder", OPEN_CLIP),  # Stable Diffusion 2
    ("conditioner.embedders.0.transformer.", "text_encoder", CLIP),  # XL
    ("conditioner.embedders.1.model.", "text_encoder_2", OPEN_CLIP),
)
ALONE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # names of a VAE without a prefix

EMA = "model_ema.diffusion_model"  # running averages of the U-Net's weights, under names without dots

IGNORED = (  # (names, why they are not needed)
    (
        r"betas|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|sqrt_recip(m1)?_alphas_cumprod"
        r"|posterior_(variance|log_variance_clipped|mean_coef[12])|logvar|denoiser\.sigmas",
        "the noise schedule, which the scheduler works out from its config",
    ),
    (r"scale_factor", "the VAE's scaling_factor, which stands in its config"),
    (r"v_pred|ztsnr", "marks of what the model predicts, without a value; kinds.py looks for them"),
    (r"model_ema\..+", "counters of the running averages, and the averages (see EMA)"),
    (r"(first_stage_model\.)?loss\..+", "the VAE's discriminator and perceptual loss, for training"),
    (
        r"(cond_stage_model|conditioner\.embedders\.[01])\.(transformer\.|model\.)?logit_scale",
        "the temperature of CLIP's training",
    ),
    (
        r"(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?text_projection(\.weight)?",
        "the projection of CLIP ViT-L/14, which is not used",
    ),
    (r".+\.embeddings\.position_ids", "0, 1, 2, ...: a constant"),
    (
        r"cond_stage_model\.model\.(text_projection|transformer\.resblocks\.23\..+)",
        "Stable Diffusion 2 takes what the last but one of 24 layers gives",
    ),
)

FOREIGN = (  # names that other files have, for a better error
    (r".*lora_(up|down|A|B)\..+|lora_(unet|te\d?)_.+", "a LoRA, which changes a model and is none"),
    (r"control_model\..+|.*controlnet_.+", "a ControlNet"),
    (r"emb_params|string_to_param.*|clip_[lg]", "a textual inversion: a token, not a model"),
    (r".*(joint_blocks|double_blocks|single_blocks)\..+", "a transformer (Stable Diffusion 3, FLUX, ...)"),
    (
        r"((down|up|mid)_blocks?\..+|.*(encoder|decoder)\.(down|up|mid)_blocks?\..+|conv_in\.weight"
        r"|(text_model\.)?(embeddings|encoder\.layers)\..+)",
        "one part in diffusers' layout: put it into a folder with its config.json, and load that with "
        "from_pretrained",
    ),
    (r"input_blocks\..+", "a U-Net without the prefix model.diffusion_model."),
)

NUMBER = "([0-9]{1,6})"


def is_ignored(name: str) -> bool:
    """Whether a file's name is one of those that are not needed."""
    return any(pattern.fullmatch(name) for pattern in _ignored())


def convert(names, prefix: str, table: tuple, where) -> dict[str, Source]:
    """{name here: where it comes from} for the names of one part; without the prefix they are in the table.

    CheckpointError, beginning with where, for names that no row fits, and for two that are the same here.
    """
    shorter = {name.removeprefix(prefix): name for name in names}
    places, found, unknown = _places(shorter), {}, []
    for short, name in shorter.items():
        rows = _rows_for(short, table)
        if not rows:
            unknown.append(name)
        for here, change, groups in rows:
            ours = here.format_map(places(groups))
            if ours in found:
                raise CheckpointError(f"{where}: {found[ours].name} and {name} are the same tensor, {ours}")
            found[ours] = Source(name, change)
    if unknown:
        raise unknown_names(unknown, where)
    return found


def unknown_names(names, where) -> CheckpointError:
    """The error for names that have no meaning in this layout."""
    listed = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    what = _foreign(names)
    return CheckpointError(f"{where} has {len(names)} tensors that no model here has: {listed}"
                           f"{what and f'; it is {what}'}")  # fmt: skip


def explain(names) -> str:
    """What a file is that is no single file of Stable Diffusion, from its tensors' names."""
    listed = ", ".join(sorted(names)[:4]) or "none"
    return f"it is {_foreign(names)}" if _foreign(names) else f"its tensors are {listed}, ..."


def _foreign(names):
    """What a file with these names is in the words of FOREIGN; empty if nothing there."""
    fitting = (what for pattern, what in FOREIGN if any(re.fullmatch(pattern, n, re.DOTALL) for n in names))
    return next(fitting, "")


def _rows_for(name, table):
    """(template of the name here, change, groups) of the first row that fits, and of all with its pattern."""
    fitting = ((pattern, pattern.fullmatch(name)) for pattern in _compiled(table))
    pattern, match = next(((p, m) for p, m in fitting if m), (None, None))
    return [] if match is None else [(*row, match.groupdict()) for row in _compiled(table)[pattern]]


@functools.cache
def _compiled(table):
    """{pattern: [(template of the name here, change or None), ...]} in the order of the table."""
    rows = {}
    for there, here, *change in table:
        pattern = re.escape(there).replace(r"\{i\}", f"(?P<i>{NUMBER})").replace(r"\{j\}", f"(?P<j>{NUMBER})")
        pattern = re.compile(pattern.replace(r"\*", "(?P<rest>.+)"), re.DOTALL)  # equal texts, equal patterns
        rows.setdefault(pattern, []).append((here.replace("*", "{rest}"), change[0] if change else None))
    return rows


@functools.cache
def _ignored():
    return tuple(re.compile(pattern, re.DOTALL) for pattern, _ in IGNORED)


def _places(names):
    """A function from a match's groups to all numbers that a row may use, for the sizes of this model.

    A U-Net's blocks are numbered straight through there, and by level and layer here. A level has as many of
    them as come before the first one that shrinks the picture, itself included, conv_in not.
    """
    shrinking = [int(m[1]) for m in (re.match(rf"input_blocks\.{NUMBER}\.0\.op\.", n) for n in names) if m]
    blocks = [int(m[1]) for m in (re.match(rf"input_blocks\.{NUMBER}\.", n) for n in names) if m]
    per_level = max(1, min(shrinking, default=max(blocks, default=0) + 1))
    ups = [int(m[1]) for m in (re.match(rf"decoder\.up\.{NUMBER}\.", n) for n in names) if m]
    last = max(ups, default=0)

    def places(groups):
        i = int(groups.get("i") or 0)
        (down, down_layer), (up, up_layer) = divmod(i - 1, per_level), divmod(i, per_level)
        numbers = {"down": down, "down_layer": down_layer, "up": up, "up_layer": up_layer}
        return groups | numbers | {"from_the_end": last - i}

    return places


def ema_name(name: str) -> str:
    """What the running average of a U-Net's weight is called: all dots are left out."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")
