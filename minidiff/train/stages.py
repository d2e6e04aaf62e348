"""The stages from nothing to the checkpoints that ship, in order; each goes on where it was stopped.

pictures -> vae -> text -> unet (the text-to-image checkpoint `scenes`), ddpm (`scenes-ddpm`), scorer
(`scenes-scorer`). Every stage ends by writing its part into CHECKPOINT folders below the work folder, in half
precision and in diffusers' layout. MINUTES add up to less than four hours on two cores.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from minidiff.config import replacing, write_json
from minidiff.models import AutoencoderKL, CLIPTextModel
from minidiff.schedulers import DDPMScheduler, PNDMScheduler
from minidiff.train import autoencoder, pixels, scorer, text, text_to_image
from minidiff.train.data import CHUNK, PICTURE_SIZE, rendered_pictures
from minidiff.train.loop import Recipe, Trainer

MINUTES = {"pictures": 10.0, "vae": 20.0, "text": 3.0, "unet": 150.0, "ddpm": 45.0, "scorer": 8.0}
LOOK_EVERY = 300.0  # seconds between sample pictures


@dataclass(frozen=True)
class Job:
    """Where and how long: the work folder, the number of training pictures, minutes per stage, rendering
    processes.
    """

    folder: Path
    pictures: int = 24_000
    minutes: dict | None = None
    workers: int = 2

    def recipe(self, stage, learning_rate, **options) -> Recipe:
        """The stage's Recipe with this job's minutes."""
        return Recipe(
            minutes=(self.minutes or {}).get(stage, MINUTES[stage]), learning_rate=learning_rate, **options
        )

    @property
    def scenes(self) -> Path:
        """The text-to-image checkpoint in the making."""
        return self.folder / "scenes"


def run(stage: str, job: Job):
    """Runs one stage to its end; ValueError for an unknown name."""
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; the stages are {', '.join(STAGES)}")
    torch.manual_seed(0)
    STAGES[stage](job)


def make_pictures(job: Job) -> np.ndarray:
    """Renders what is missing; -> (N, 128, 128, 3) uint8."""
    with tqdm(total=math.ceil(job.pictures / CHUNK), desc="pictures", unit="chunk", mininterval=5) as bar:
        return rendered_pictures(
            job.folder / "pictures",
            job.pictures,
            workers=job.workers,
            progress=lambda done: bar.update(done - bar.n),
        )


def train_vae(job: Job):
    """AutoencoderKL -> scenes/vae, with its scaling factor."""
    pictures = make_pictures(job)
    fresh = autoencoder.new_autoencoder().to(memory_format=torch.channels_last)
    trainer = Trainer("vae", fresh, job.folder / "vae", job.recipe("vae", 2e-3, average=0.995, warm_up=0.03))
    vae = trainer.run(
        autoencoder.reconstruction_loss(pictures), LOOK_EVERY, look=_reconstructions(job, pictures)
    )
    print(f"vae: {trainer.step} steps, PSNR {autoencoder.psnr(vae.float(), pictures[:64]):.1f} dB")
    means, _ = text_to_image.encode_pictures(vae, pictures[:2000])
    scaled = AutoencoderKL.from_config(vae.config, scaling_factor=text_to_image.latent_scale(means))
    scaled.load_state_dict(vae.state_dict())
    scaled.half().save_pretrained(job.scenes / "vae")


def train_text(job: Job):
    """Tokenizer and CLIPTextModel -> scenes/tokenizer, scenes/text_encoder."""
    vocabulary = text.write_tokenizer(job.scenes / "tokenizer")
    model = nn.ModuleDict({"encoder": text.new_text_encoder(vocabulary), "heads": text.FactHeads(text.WIDTH)})
    trainer = Trainer(
        "text", model, job.folder / "text", job.recipe("text", 1e-3, average=0.99, dtype=torch.float32)
    )
    encoder = trainer.run(text.naming_loss(vocabulary)).encoder
    encoder.half().save_pretrained(job.scenes / "text_encoder")


def train_unet(job: Job):
    """UNet2DConditionModel and scheduler -> scenes/unet, scenes/scheduler, and model_index.json."""
    pictures = make_pictures(job)
    vae = AutoencoderKL.from_pretrained(job.scenes / "vae")
    encoder = CLIPTextModel.from_pretrained(job.scenes / "text_encoder")
    vocabulary = _read_vocabulary(job.scenes / "tokenizer")
    latents = _stored_latents(job, vae, pictures)
    fresh = text_to_image.new_unet().to(memory_format=torch.channels_last)
    trainer = Trainer("unet", fresh, job.folder / "unet", job.recipe("unet", 1e-3, average=0.998))
    loss_of = text_to_image.noise_loss(
        latents, encoder.to(trainer.device, trainer.dtype), vocabulary, vae.config.scaling_factor
    )

    def look(unet, step):
        _write_scenes(job, unet)

    unet = trainer.run(loss_of, LOOK_EVERY, look)
    print(f"unet: {trainer.step} steps, weighted loss {trainer.loss:.4f}")
    _write_scenes(job, unet)


def train_ddpm(job: Job):
    """UNet2DModel and scheduler -> scenes-ddpm."""
    pictures = pixels.small_pictures(make_pictures(job))
    fresh = pixels.new_pixel_unet().to(memory_format=torch.channels_last)
    trainer = Trainer("ddpm", fresh, job.folder / "ddpm", job.recipe("ddpm", 1.5e-3, average=0.998))
    unet = trainer.run(pixels.pixel_loss(pictures))
    print(f"ddpm: {trainer.step} steps, loss {trainer.loss:.4f}")
    target = job.folder / "scenes-ddpm"
    _half(unet).save_pretrained(target / "unet")
    DDPMScheduler(**pixels.SCHEDULER).save_pretrained(target / "scheduler")
    _write_index(
        target, "DDPMPipeline", unet=("diffusers", "UNet2DModel"), scheduler=("diffusers", "DDPMScheduler")
    )


def train_scorer(job: Job):
    """Scorer -> scenes-scorer."""
    pictures = make_pictures(job)
    fresh = scorer.Scorer().to(memory_format=torch.channels_last)
    trainer = Trainer("scorer", fresh, job.folder / "scorer", job.recipe("scorer", 1e-3, average=0.998))
    model = trainer.run(scorer.scoring_loss(pictures))
    print(f"scorer: {trainer.step} steps, loss {trainer.loss:.4f}")
    _half(model).save_pretrained(job.folder / "scenes-scorer")


STAGES = {
    "pictures": make_pictures,
    "vae": train_vae,
    "text": train_text,
    "unet": train_unet,
    "ddpm": train_ddpm,
    "scorer": train_scorer,
}


def _read_vocabulary(folder):
    return json.loads((Path(folder) / "vocab.json").read_text(encoding="utf-8"))


def _half(model):
    return copy.deepcopy(model).half()


def _write_scenes(job, unet):
    _half(unet).save_pretrained(job.scenes / "unet")
    # clip_sample is for DDPM, DDIM and others that take this config over, and by default clip at [-1, 1]
    scheduler = PNDMScheduler.from_config(text_to_image.SCHEDULER, clip_sample=False)
    scheduler.save_pretrained(job.scenes / "scheduler")
    _write_index(
        job.scenes,
        "StableDiffusionPipeline",
        vae=("diffusers", "AutoencoderKL"),
        text_encoder=("transformers", "CLIPTextModel"),
        tokenizer=("transformers", "CLIPTokenizer"),
        unet=("diffusers", "UNet2DConditionModel"),
        scheduler=("diffusers", "PNDMScheduler"),
        safety_checker=(None, None),
        feature_extractor=(None, None),
    )


def _write_index(folder, pipeline, **parts):
    """model_index.json as diffusers writes it."""
    head = {"_class_name": pipeline, "_diffusers_version": "0.42.0"}
    if "safety_checker" in parts:
        head["requires_safety_checker"] = False
    write_json(folder / "model_index.json", head | {name: list(where) for name, where in parts.items()})


def _stored_latents(job, vae, pictures):
    """The latents of all pictures, encoded once and kept in a file."""
    file = job.folder / "latents.pt"
    if file.exists():
        stored = torch.load(file, weights_only=True)
        if len(stored["means"]) == len(pictures):
            return stored["means"], stored["stds"]
    means, stds = text_to_image.encode_pictures(vae, pictures)
    with replacing(file) as temporary:
        torch.save({"means": means, "stds": stds}, temporary)
    return means, stds


def _reconstructions(job, pictures):
    """Writes rows of pictures above their reconstructions."""

    def look(vae, step):
        with torch.inference_mode():
            x = torch.from_numpy(pictures[:8]).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        rows = ((torch.stack([x, y]) + 1) * 127.5).round().to(torch.uint8)  # (2, 8, 3, S, S)
        sheet = rows.permute(0, 3, 1, 4, 2).reshape(2 * PICTURE_SIZE, -1, 3)
        Image.fromarray(sheet.cpu().numpy()).save(job.folder / "vae" / f"reconstructions-{step:06d}.png")

    return look
