"""The two lessons that all begin with: DDPM and Stable Diffusion taken apart into models and schedulers.

Each is a function that knows its library only as a name to import from, so that the same lines run on
minidiff and on diffusers with transformers; they make every call of diffusers' page "Understanding pipelines,
models and schedulers" in the page's manner. The page itself runs too where MINIDIFF_TUTORIAL_PAGE names a
copy (docs/source/en/using-diffusers/ write_own_pipeline.md in diffusers' repository): with other import
lines, folders for the repositories' names and the tiny models' size, nothing else.
"""

import importlib
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity import assert_close
from PIL import Image
from tiny_pipelines import generator, write_ddpm, write_stable_diffusion

PAGE = os.environ.get("MINIDIFF_TUTORIAL_PAGE")
MODULES = {"minidiff": ["minidiff"], "diffusers": ["diffusers", "transformers"]}


@pytest.fixture(scope="module")
def ddpm_folder(tmp_path_factory):
    """A DDPM in one folder without sub-folders, as google/ddpm-cat-256 is."""
    return write_ddpm(tmp_path_factory.mktemp("tiny") / "ddpm", flat=True, sample_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("tiny") / "stable-diffusion")


def library(name):
    """The classes of one library, or of the two that share the work, as attributes."""
    modules = [importlib.import_module(module) for module in MODULES[name]]
    names = ["DDPMPipeline", "DDPMScheduler", "UNet2DModel", "AutoencoderKL", "UNet2DConditionModel"]
    names += ["PNDMScheduler", "UniPCMultistepScheduler", "DDIMScheduler", "CLIPTextModel", "CLIPTokenizer"]
    return SimpleNamespace(**{n: next(getattr(m, n) for m in modules if hasattr(m, n)) for n in names})


def ddpm_taken_apart(lib, folder):
    """Load a scheduler and a model, set the timesteps, draw noise, loop, make a picture."""
    scheduler = lib.DDPMScheduler.from_pretrained(folder)
    model = lib.UNet2DModel.from_pretrained(folder, use_safetensors=True).to("cpu")
    scheduler.set_timesteps(50)
    size = model.config.sample_size
    picture = torch.randn((1, 3, size, size), generator=generator(), device="cpu")
    torch.manual_seed(0)
    for t in scheduler.timesteps:
        with torch.no_grad():
            noise = model(picture, t).sample
        picture = scheduler.step(noise, t, picture).prev_sample
    picture = (picture / 2 + 0.5).clamp(0, 1).squeeze()
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy())


def stable_diffusion_taken_apart(lib, folder, scheduler="UniPCMultistepScheduler"):
    """Load the five parts, encode the text, draw noise, loop with guidance, decode, make a picture."""
    vae = lib.AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True)
    tokenizer = lib.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text_encoder = lib.CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", use_safetensors=True)
    unet = lib.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
    scheduler = getattr(lib, scheduler).from_pretrained(folder, subfolder="scheduler")
    for model in (vae, text_encoder, unet):
        model.to("cpu")

    prompts, guidance_scale = ["a red ball on a horse"], 7.5
    ids = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        cond = text_encoder(ids.input_ids.to("cpu"))[0]
    empty = tokenizer([""], padding="max_length", max_length=ids.input_ids.shape[-1], return_tensors="pt")
    uncond = text_encoder(empty.input_ids.to("cpu"))[0]  # not under no_grad, nor is it on the page
    text = torch.cat([uncond, cond])

    shape = (len(prompts), unet.config.in_channels, 16 // 2, 24 // 2)
    latents = torch.randn(shape, generator=torch.manual_seed(0), device="cpu") * scheduler.init_noise_sigma
    scheduler.set_timesteps(25)
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([latents] * 2), timestep=t)
        with torch.no_grad():
            noise = unet(both, t, encoder_hidden_states=text).sample
        noise_uncond, noise_cond = noise.chunk(2)
        noise = noise_uncond + guidance_scale * (noise_cond - noise_uncond)
        latents = scheduler.step(noise, t, latents).prev_sample
    with torch.no_grad():
        picture = vae.decode(1 / 0.18215 * latents).sample
    picture = (picture / 2 + 0.5).clamp(0, 1).squeeze()
    return Image.fromarray((picture.permute(1, 2, 0) * 255).to(torch.uint8).cpu().numpy())


def pixels(image):
    return np.asarray(image).astype(int)


def test_ddpm_taken_apart_makes_the_same_picture(ddpm_folder):
    ours, theirs = (ddpm_taken_apart(library(name), ddpm_folder) for name in MODULES)
    assert ours.size == (8, 8) and pixels(ours).std() > 10
    assert_close(pixels(ours), pixels(theirs), atol=1)  # of 255; measured: 0


@pytest.mark.parametrize("scheduler", ["UniPCMultistepScheduler", "PNDMScheduler", "DDIMScheduler"])
def test_stable_diffusion_taken_apart_makes_the_same_picture(folder, scheduler):
    ours, theirs = (stable_diffusion_taken_apart(library(name), folder, scheduler) for name in MODULES)
    assert ours.size == (24, 16) and pixels(ours).std() > 10
    assert_close(pixels(ours), pixels(theirs), atol=1)  # of 255, the page truncates; measured: 0


def test_ddpm_taken_apart_is_what_the_pipeline_does(ddpm_folder):
    pipe = library("minidiff").DDPMPipeline.from_pretrained(ddpm_folder, use_safetensors=True).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(num_inference_steps=25, generator=generator()).images[0]
    assert image.size == (8, 8) and pixels(image).std() > 10


@pytest.mark.skipif(not PAGE, reason="MINIDIFF_TUTORIAL_PAGE does not name a copy of diffusers' page")
def test_the_page_itself_runs_and_makes_the_same_pictures(ddpm_folder, folder):
    ours, theirs = (_run_page(Path(PAGE).read_text(), name, ddpm_folder, folder) for name in MODULES)
    for image, expected in zip(ours, theirs, strict=True):
        assert_close(pixels(image), pixels(expected), atol=1)


def _run_page(page, name, ddpm_folder, folder):
    """The pictures that the page's two lessons end with, run with one library's import lines."""
    blocks = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    source = "\n".join(_typed(block) for block in blocks)
    changes = {
        '"google/ddpm-cat-256"': repr(str(ddpm_folder)),
        '"CompVis/stable-diffusion-v1-4"': repr(str(folder)),
    }
    changes |= {'"cuda"': '"cpu"', "= 512": "= 16", "// 8": "// 2"}
    for old, new in changes.items():
        source = source.replace(old, new)
    if name == "minidiff":
        source = re.sub(r"from (diffusers|transformers) import", "from minidiff import", source)
    first, second = source.split("from PIL import Image\nimport torch\n")
    names = {}
    torch.manual_seed(0)
    exec(first, names)
    pictures = [names["image"]]
    exec("from PIL import Image\nimport torch\n" + second, names)
    return [*pictures, names["image"]]


def _typed(block):
    """What a person types of a block: all, or where it is a session the lines behind its prompts."""
    if ">>> " not in block:
        return block
    return "\n".join(line[4:] for line in block.split("\n") if line.startswith((">>> ", "... ")))
