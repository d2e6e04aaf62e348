"""Tiny random checkpoints (Stable Diffusion, SDXL, DDPM), written by diffusers, for both to load."""

import json

import diffusers
import numpy as np
import tokenizers
import torch
import transformers
from parity import assert_close

import minidiff

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MERGES = ["r e", "re d</w>", "b a", "l l</w>", "ba ll</w>"]


def tiny_tokenizer(pad="<|endoftext|>"):
    """minidiff's tokenizer with a vocabulary of bytes and a few words, and how many tokens it has."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [symbol + "</w>" for symbol in alphabet]
    tokens += [merge.replace(" ", "") for merge in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return minidiff.CLIPTokenizer(vocab, MERGES, pad_token=pad), len(tokens)


def tiny_text_config(vocab_size, **changes):
    """The config of a text encoder of three layers, with the end token that ends the vocabulary."""
    end = vocab_size - 1
    defaults = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end,
    }  # fmt: skip
    return transformers.CLIPTextConfig(**defaults | changes)


def tiny_vae(**changes):
    """An autoencoder of two levels."""
    defaults = {
        "block_out_channels": (16, 32), "norm_num_groups": 8, "scaling_factor": 0.3,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    return diffusers.AutoencoderKL(**defaults | changes)


def write_stable_diffusion(folder, scheduler=None, **unet):
    """A Stable Diffusion checkpoint for pictures of 16 x 16."""
    torch.manual_seed(0)
    tokenizer, count = tiny_tokenizer()
    text_encoder = transformers.CLIPTextModel(tiny_text_config(count))
    vae = tiny_vae()
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


def write_stable_diffusion_xl(folder, refiner=False, zeros=True, **unet):
    """An SDXL checkpoint for pictures of 16 x 16; refiner: without the first text encoder."""
    torch.manual_seed(0)
    (first, count), (second, _) = tiny_tokenizer(), tiny_tokenizer(pad="!")
    projection = {"hidden_size": 40, "projection_dim": 24, "hidden_act": "gelu"}
    encoders = {
        "text_encoder": None if refiner else transformers.CLIPTextModel(tiny_text_config(count)),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(tiny_text_config(count, **projection)),
    }
    defaults = {
        "sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1,
        "cross_attention_dim": 40 if refiner else 72, "attention_head_dim": (2, 4),
        "use_linear_projection": True, "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    unet, vae = diffusers.UNet2DConditionModel(**defaults | unet), tiny_vae(scaling_factor=0.13)
    for model in (vae, unet, *filter(None, encoders.values())):
        shake(model)
    theirs = diffusers.StableDiffusionXLPipeline(
        vae=vae, unet=unet, tokenizer=None, tokenizer_2=None, add_watermarker=False, **encoders,
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **BETAS),
        force_zeros_for_empty_prompt=zeros,
    )  # fmt: skip
    theirs.save_pretrained(folder)
    second.save_pretrained(folder / "tokenizer_2")
    entries = {"tokenizer_2": ["transformers", "CLIPTokenizer"]}
    if not refiner:
        first.save_pretrained(folder / "tokenizer")
        entries["tokenizer"] = ["transformers", "CLIPTokenizer"]
    edit_json(folder / "model_index.json", **entries)
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


def switch(both, name, **config):
    """Gives both pipelines the scheduler called name, each its library's, made from the config they have."""
    for pipeline, library in zip(both, (minidiff, diffusers), strict=True):
        pipeline.scheduler = getattr(library, name).from_config(pipeline.scheduler.config, **config)


def embeddings(count, seed=0):
    """Random texts for the tiny U-Net, (count, 77, 32)."""
    return torch.randn(count, 77, 32, generator=generator(seed))


def assert_same_draws(both, prompt, seeds, atol, options):
    """Calls both with generators of the same seeds; compares pictures and where the generators stand.

    seeds: one, or a list with one for each picture. PIL images may be one level apart.
    """
    images, states = [], []
    for pipeline in both:
        own = generator(seeds) if isinstance(seeds, int) else [generator(seed) for seed in seeds]
        images.append(pipeline(prompt, generator=own, **options).images)
        states.append([each.get_state() for each in (own if isinstance(own, list) else [own])])
    if isinstance(images[0], list):
        images = [np.stack([np.array(image) for image in each]) / 255 for each in images]
        atol = 1.01 / 255  # whole levels, one apart, rounded
    assert_close(*images, atol=atol)
    assert images[0].std() > 0.03  # a picture, not a grey nothing
    for ours, theirs in zip(*states, strict=True):
        assert torch.equal(ours, theirs)
    return images[0]
