"""Tiny Stable Diffusion and DDPM checkpoints with random weights, written by diffusers, for both to load."""

import json

import diffusers
import tokenizers
import torch
import transformers

import minidiff

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MERGES = ["r e", "re d</w>", "b a", "l l</w>", "ba ll</w>"]


def write_stable_diffusion(folder, scheduler=None, **unet):
    """A Stable Diffusion checkpoint for pictures of 16 x 16, with a vocabulary of bytes and a few words."""
    torch.manual_seed(0)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [symbol + "</w>" for symbol in alphabet]
    tokens += [merge.replace(" ", "") for merge in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = minidiff.CLIPTokenizer({token: i for i, token in enumerate(tokens)}, MERGES)
    end = len(tokens) - 1
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    text_encoder = transformers.CLIPTextModel(config)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=8, scaling_factor=0.3,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    defaults = {
        "sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1,
        "cross_attention_dim": 32, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    unet = diffusers.UNet2DConditionModel(**defaults | unet)
    for model in (vae, text_encoder, unet):
        shake(model)
    scheduler = scheduler or diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS)
    theirs = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=None, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    edit_json(folder / "model_index.json", tokenizer=["transformers", "CLIPTokenizer"])
    return folder


def write_ddpm(folder, flat=False, **config):
    """A DDPM checkpoint for pictures of 8 x 12; flat is the oldest layout, with all files in one folder."""
    torch.manual_seed(0)
    defaults = {
        "sample_size": (8, 12), "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1,
        "attention_head_dim": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    unet = shake(diffusers.UNet2DModel(**defaults | config))
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipeline.save_pretrained(folder)
    if flat:
        unet.save_pretrained(folder)
        pipeline.scheduler.save_pretrained(folder)
    return folder


def shake(model):
    """model with weights that differ from one another: norms start as 1 and 0, which hides a mix-up."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model.eval()


def edit_json(path, **changes):
    """Replaces values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load_both(name, folder):
    """The pipeline class called name twice, (minidiff's, diffusers'), in float32, without progress bars."""
    ours = getattr(minidiff, name).from_pretrained(folder)
    theirs = getattr(diffusers, name).from_pretrained(folder, dtype=torch.float32)
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
    return ours, theirs


def generator(seed=0):
    """A torch.Generator on the CPU."""
    return torch.Generator().manual_seed(seed)
