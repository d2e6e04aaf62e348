"""Trains the miniature's AutoencoderKL: pictures to 16 x 16 latents of 4 channels and back.

Loss: L1 + L2 + half the L1 of horizontal and vertical differences (edges) + a little KL (Rombach et al. 2022,
section 3.1, without the discriminator and the perceptual term). Most steps see crops around the solids.
"""

import torch
from torch import nn

from minidiff.models import AutoencoderKL

CONFIG = {
    "block_out_channels": (32, 48, 96, 96),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 128,
    "force_upcast": False,
}
CROP, CROPS, WHOLE = 64, 16, 4  # pixels of a crop, crops a step, whole pictures a step
KL_WEIGHT = 1e-4


def new_autoencoder() -> AutoencoderKL:
    """The untrained model, started so that signals keep their size: 6 dB better after 500 steps than torch's
    start.
    """
    vae = AutoencoderKL(**CONFIG)
    start_small(vae)
    nn.init.constant_(
        vae.quant_conv.bias[CONFIG["latent_channels"] :], -5.0
    )  # log variance: nearly exact at first
    return vae


def start_small(model):
    """Fan-in initialisation with zero biases; each residual branch's last convolution starts ten times
    smaller.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            if name.endswith(("conv2", "to_out.0", "proj_out", "ff.net.2")):
                layer.weight.data *= 0.1


def reconstruction_loss(pictures):
    """The loss of one step as Trainer wants it. pictures: (N, 128, 128, 3) uint8 array."""

    def loss_of(vae, generator, step):
        x = picture_batch(pictures, generator, vae.device, vae.dtype, whole=step % 5 == 0)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        error = (y - x).float()
        edges = sum(error.diff(dim=d).abs().mean() for d in (2, 3))
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + KL_WEIGHT * kl

    return loss_of


def picture_batch(pictures, generator, device, dtype, whole=True, count=None):
    """(B, 3, S, S) pictures in [-1, 1]: whole ones, or crops that mostly lie around the middle, where the
    solids are.
    """
    count = count or (WHOLE if whole else CROPS)
    rows = torch.randint(len(pictures), (count,), generator=generator).numpy()
    x = torch.from_numpy(pictures[rows])  # (B, 128, 128, 3)
    if not whole:
        span = x.shape[1] - CROP
        y0, x0 = ((torch.randn(2, count, generator=generator) * 0.22 + 0.5).clamp(0, 1) * span).long()
        x = torch.stack([p[i : i + CROP, j : j + CROP] for p, i, j in zip(x, y0, x0, strict=True)])
    x = x.permute(0, 3, 1, 2).to(device, dtype, memory_format=torch.channels_last)
    return x / 127.5 - 1


def psnr(vae, pictures) -> float:
    """Peak signal-to-noise ratio in dB of pictures (N, S, S, 3) uint8 through the mean latent and back."""
    with torch.no_grad():
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    return float(-10 * torch.log10(((y - x).float() / 2).square().mean()))
