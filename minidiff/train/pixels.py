"""Trains the unconditional DDPM on pictures shrunk to 32 x 32: epsilon prediction, all timesteps alike (Ho et
al. 2020).
"""

import torch
import torch.nn.functional as F
from torch import nn

from minidiff.models import UNet2DModel
from minidiff.schedulers import DDPMScheduler
from minidiff.train.autoencoder import start_small

SIZE = 32
CONFIG = {
    "sample_size": SIZE,
    "block_out_channels": (32, 64, 80),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 16,  # divides 64 and 80
}
SCHEDULER = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
BATCH = 48


def new_pixel_unet() -> UNet2DModel:
    """The untrained U-Net; it starts by predicting no noise at all."""
    unet = UNet2DModel(**CONFIG)
    start_small(unet)
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def small_pictures(pictures) -> torch.Tensor:
    """(N, 128, 128, 3) uint8 -> (N, 3, 32, 32) uint8, each pixel the mean of 16."""
    parts = [F.avg_pool2d(p.permute(0, 3, 1, 2).float(), 4).round().to(torch.uint8)
             for p in torch.from_numpy(pictures).split(500)]  # fmt: skip
    return torch.cat(parts)


def pixel_loss(pictures):
    """The loss of one step as Trainer wants it. pictures: (N, 3, 32, 32) uint8."""
    signal = torch.from_numpy(DDPMScheduler(**SCHEDULER).alphas_cumprod)

    def loss_of(unet, generator, step):
        x0 = pictures[torch.randint(len(pictures), (BATCH,), generator=generator)].float() / 127.5 - 1
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH * len(signal)).long()
        noise = torch.randn(x0.shape, generator=generator)
        a = signal[t][:, None, None, None]
        noisy = (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(
            unet.device, unet.dtype, memory_format=torch.channels_last
        )
        return F.mse_loss(unet(noisy, t.to(unet.device)).sample.float().cpu(), noise)

    return loss_of
