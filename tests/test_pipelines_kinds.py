"""One tiny repository of each kind of Stable Diffusion: both libraries draw one picture, also from ours.

Written by diffusers, with the options in which the published kinds differ; then loaded and saved by minidiff,
and loaded by diffusers.
"""

import diffusers
import pytest
from parity import assert_close
from tiny_pipelines import (
    BETAS,
    generator,
    load_both,
    tiny_vae,
    write_stable_diffusion,
    write_stable_diffusion_xl,
)

import minidiff

PIXEL = 1e-5
SD2 = {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True}
PNDM = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True)
V_PREDICTION = diffusers.DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False)
TRAILING = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}
KINDS = {  # name -> (how it is written, arguments of that, arguments of the call)
    "1": (write_stable_diffusion, {}, {}),
    "2 base": (write_stable_diffusion, {"scheduler": PNDM, **SD2}, {}),
    "2 with v-prediction": (write_stable_diffusion, {"scheduler": V_PREDICTION, **SD2}, {}),
    "turbo": (write_stable_diffusion, {"scheduler": TRAILING, **SD2}, ONE_STEP),
    "latent consistency": (
        write_stable_diffusion,
        {"scheduler": diffusers.LCMScheduler(), "time_cond_proj_dim": 16},
        {"guidance_scale": 8.5},
    ),
    "xl": (write_stable_diffusion_xl, {}, {}),
    "xl turbo": (write_stable_diffusion_xl, {}, ONE_STEP),
}


def draw(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "generator": generator(), "output_type": "np"} | options
    return pipeline("a red ball", **options).images


@pytest.mark.parametrize("kind", KINDS)
def test_a_repository_of_each_kind_draws_one_picture_in_both_libraries(kind, tmp_path):
    write, arguments, options = KINDS[kind]
    folder = write(tmp_path / "theirs", **arguments)
    name = "StableDiffusionXLPipeline" if kind.startswith("xl") else "StableDiffusionPipeline"
    ours, theirs = load_both(name, folder)
    expected = draw(theirs, **options)
    assert_close(draw(ours, **options), expected, atol=PIXEL)
    ours.save_pretrained(tmp_path / "ours")
    again = getattr(diffusers, name).from_pretrained(tmp_path / "ours")
    assert_close(draw(again, **options), expected, atol=PIXEL)
    assert type(minidiff.DiffusionPipeline.from_pretrained(tmp_path / "ours")) is type(ours)


def test_an_autoencoder_of_its_own_repository_takes_anothers_place(tmp_path):
    folder = write_stable_diffusion(tmp_path / "pipeline")
    tiny_vae(scaling_factor=0.25).save_pretrained(tmp_path / "vae")
    pictures = []
    for library in (minidiff, diffusers):
        vae = library.AutoencoderKL.from_pretrained(tmp_path / "vae")
        pictures.append(draw(library.StableDiffusionPipeline.from_pretrained(folder, vae=vae)))
    assert_close(*pictures, atol=PIXEL)
