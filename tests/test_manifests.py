"""Every published weight file fits our models, names and shapes; on the meta device: nothing large is made.

data/manifests.json.gz holds what the headers of the published files say, and the configs beside them:
{"tensors": [{name: shape}], "files": {"repository.component[.fp16]": {"config": …, "tensors": index into the
list}}, "configs": {"repository.component": every config of a U-Net or VAE}}.
"""

import gzip
import json
from pathlib import Path

import diffusers
import pytest
import torch

import minidiff
from minidiff.checkpoints.keys import translate

DATA = json.loads(gzip.decompress((Path(__file__).parent / "data/manifests.json.gz").read_bytes()))
PARAMETERS = {  # counted in the published files
    "stable-diffusion-v1-5.unet": 859_520_964,
    "stable-diffusion-inpainting.unet": 859_535_364,
    "stable-diffusion-2-1.unet": 865_910_724,
    "stable-diffusion-xl-base-1.0.unet": 2_567_463_684,
    "stable-diffusion-v1-5.vae": 83_653_863,
    "ddpm-cifar10-32.unet": 35_746_307,
    "ddpm-celebahq-256.unet": 113_673_219,
    "stable-diffusion-v1-5.text_encoder": 123_060_480,
}


def on_meta(config):
    name = config.get("_class_name") or config["architectures"][0]
    with torch.device("meta"):
        return getattr(minidiff, name).from_config(config)


def shapes(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("file", DATA["files"])
def test_names_and_shapes_equal_the_published_file(file):
    entry = DATA["files"][file]
    ours, published = shapes(on_meta(entry["config"])), DATA["tensors"][entry["tensors"]]
    assert ours == {name: published[theirs] for name, theirs in translate(published, ours).items()}


@pytest.mark.parametrize("name", DATA["configs"])
def test_every_published_config_builds_the_model_that_diffusers_builds(name):
    config = DATA["configs"][name]
    with torch.device("meta"):
        theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    assert shapes(on_meta(config)) == shapes(theirs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_the_published_one(name):
    assert sum(p.numel() for p in on_meta(DATA["files"][name]["config"]).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel", "AutoencoderKL"])
def test_the_full_default_config_of_diffusers_builds_the_same_model(name):
    with torch.device("meta"):
        theirs = getattr(diffusers, name)()
    config = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    assert shapes(on_meta(config | {"_class_name": name})) == shapes(theirs)
