"""Trains the miniature's UNet2DConditionModel on latents and frozen text embeddings.

Epsilon prediction (Ho et al. 2020, eq. 14) on Stable Diffusion's noise schedule, weighted by min(SNR, 5) /
SNR (Hang et al. 2023, arXiv 2303.09556); a tenth of the captions is empty, for classifier-free guidance.
"""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from minidiff.models import UNet2DConditionModel
from minidiff.scenes import caption
from minidiff.schedulers import PNDMScheduler
from minidiff.train.autoencoder import start_small
from minidiff.train.data import training_scene
from minidiff.train.loop import fast_dtype
from minidiff.train.text import WIDTH, caption_ids

CONFIG = {
    "sample_size": 16,
    "block_out_channels": (64, 160, 192),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": (2, 5, 6),  # heads, each 32 wide
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER = SCHEDULE | {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
BATCH = 32
EMPTY_SHARE = 0.1
SNR_CAP = 5.0


def new_unet() -> UNet2DConditionModel:
    """The untrained U-Net; it starts by predicting no noise at all."""
    unet = UNet2DConditionModel(**CONFIG)
    start_small(unet)
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def encode_pictures(vae, pictures, batch=64):
    """pictures (N, 128, 128, 3) uint8 -> means and standard deviations of their latents, each (N, 4, 16, 16)
    float16.
    """
    dtype = fast_dtype(vae.device)
    encoder = copy.deepcopy(vae).to(dtype, memory_format=torch.channels_last)
    means, stds = [], []
    with torch.inference_mode():
        for rows in tqdm(torch.from_numpy(pictures).split(batch), desc="latents", mininterval=5):
            x = rows.permute(0, 3, 1, 2).to(vae.device, dtype, memory_format=torch.channels_last) / 127.5 - 1
            posterior = encoder.encode(x).latent_dist
            means.append(posterior.mean.half().cpu())
            stds.append(posterior.std.half().cpu())
    return torch.cat(means), torch.cat(stds)


def latent_scale(means) -> float:
    """scaling_factor: 1 / the root mean square of the latents, so that the U-Net sees unit variance."""
    return float(1 / means.float().square().mean().sqrt())


def noise_loss(latents, text_encoder, vocabulary, scaling_factor):
    """The loss of one step as Trainer wants it. latents: (means, stds) of training pictures 0 to N - 1."""
    means, stds = latents
    signal = torch.from_numpy(PNDMScheduler(**SCHEDULER).alphas_cumprod)  # (1000,)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(
        True
    )  # despite its name for CPUs too: no detour by float32

    def loss_of(unet, generator, step):
        numbers = torch.randint(len(means), (BATCH,), generator=generator)
        x0 = means[numbers].float() + stds[numbers].float() * torch.randn(
            BATCH, *means.shape[1:], generator=generator
        )
        x0 *= scaling_factor
        text = _embeddings(numbers.tolist(), step, text_encoder, vocabulary)
        t = (
            (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH * len(signal)
        ).long()  # stratified
        noise = torch.randn(x0.shape, generator=generator)
        a = signal[t][:, None, None, None]
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
        noisy = noisy.to(unet.device, unet.dtype, memory_format=torch.channels_last)
        with sdpa_kernel(
            SDPBackend.MATH if unet.device.type == "cpu" else list(_FUSED)
        ):  # faster backward on CPUs
            predicted = unet(noisy, t.to(unet.device), text.to(unet.device, unet.dtype)).sample.float()
            error = (predicted.cpu() - noise).square().mean(dim=(1, 2, 3))  # (B,)
            snr = signal[t] / (1 - signal[t])
            return (error * snr.clamp(max=SNR_CAP) / snr).mean()

    return loss_of


_FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def _embeddings(numbers, step, text_encoder, vocabulary):
    """A fresh caption for each picture, or an empty one, as (B, 77, C)."""
    rng = np.random.default_rng([13, step])
    texts = ["" if rng.random() < EMPTY_SHARE else caption(training_scene(n), rng) for n in numbers]
    with torch.no_grad():
        return text_encoder(caption_ids(texts, vocabulary).to(text_encoder.device)).last_hidden_state
