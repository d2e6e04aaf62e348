"""Tiny Stable Diffusion and DDPM checkpoints with random weights, written by diffusers, for both libraries to load."""

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
    tokens = alphabet + [symbol + "</w>" for symbol in alphabet] + [merge.replace(" ", "") for merge in MERGES]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = minidiff.CLIPTokenizer({token: i for i, token in enumerate(tokens)}, MERGES)
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1, pad_token_id=len(tokens) - 1,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=8, scaling_factor=0.3,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    config = dict(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=32, layers_per_block=1,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    parts = {"vae": vae, "text_encoder": text_encoder, "unet": diffusers.UNet2DConditionModel(**config | unet)}
    parts["scheduler"] = scheduler or diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS)
    for model in (vae, text_encoder, parts["unet"]):
        shake(model)
    theirs = diffusers.StableDiffusionPipeline(
        **parts, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    index = minidiff.checkpoints.layout.read_json(folder / "model_index.json")
    minidiff.config.write_json(folder / "model_index.json", index | {"tokenizer": ["transformers", "CLIPTokenizer"]})
    return folder


def write_ddpm(folder, flat=False, **config):
    """A DDPM checkpoint for pictures of 8 x 12; flat is the oldest layout, with all files in one folder."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        **dict(
            sample_size=(8, 12), block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
            attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        | config
    )  # fmt: skip
    pipeline = diffusers.DDPMPipeline(shake(unet), diffusers.DDPMScheduler())
    pipeline.save_pretrained(folder)
    if flat:
        for part in (pipeline.unet, pipeline.scheduler):
            part.save_pretrained(folder)
    return folder


def shake(model):
    """model with weights that differ from one another: norms start as 1 and 0, where a mix-up would stay unseen."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model.eval()


def load_both(name, folder):
    """The pipeline class called name from folder twice, (minidiff's, diffusers'), in float32, without progress bars."""
    ours = getattr(minidiff, name).from_pretrained(folder)
    theirs = getattr(diffusers, name).from_pretrained(folder, dtype=torch.float32)
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
    return ours, theirs


def generator(seed=0):
    """A torch.Generator on the CPU."""
    return torch.Generator().manual_seed(seed)
