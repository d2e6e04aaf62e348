"""Scripts written for diffusers: short ones that run in both libraries, and what is said where they can't.

Each function of SCRIPTS knows its library only as a name, so that the same lines run on both.
"""

import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from parity import assert_close
from PIL import Image
from tiny_pipelines import generator, load_both, write_ddpm, write_stable_diffusion

import minidiff
from minidiff.boundary import Output
from minidiff.pipelines.porting import ABSENT

PROMPT = "a red ball"
STEPS = {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("tiny") / "stable-diffusion")


@pytest.fixture(scope="module")
def ddpm_folder(tmp_path_factory):
    return write_ddpm(tmp_path_factory.mktemp("tiny") / "ddpm", sample_size=8)


@pytest.fixture
def pipe(folder):
    return quiet(minidiff.StableDiffusionPipeline.from_pretrained(folder))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **options):
    return pipeline(PROMPT, generator=generator(), output_type="np", **STEPS | options).images


def latents_made_larger(lib, folder):
    """Latents out, twice as large, decoded and made pictures by hand."""
    pipe = quiet(lib.DiffusionPipeline.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False))
    latents = pipe(PROMPT, generator=generator(), output_type="latent", **STEPS).images
    latents = torch.nn.functional.interpolate(latents, scale_factor=2)
    with torch.no_grad():
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    images = pipe.image_processor.postprocess(image, output_type="pil", do_denormalize=[True] * len(image))
    assert pipe.safety_checker is None
    floats = (image / 2 + 0.5).clamp(0, 1)  # what is compared: levels may fall to either side of a half
    assert_close(np.asarray(images[0]) / 255, floats[0].permute(1, 2, 0), atol=0.501 / 255)
    return floats


def picture_through_the_autoencoder(lib, folder):
    """A picture in by the image processor, and out by it."""
    pipe = lib.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (21, 30, 3), np.uint8))
    x = pipe.image_processor.preprocess(picture)
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
    unit = (decoded / 2 + 0.5).clamp(0, 1)
    processed = pipe.image_processor.postprocess(unit, output_type="pt", do_denormalize=[False])
    assert pipe.image_processor.postprocess(x, output_type="latent") is x
    return torch.cat([x, processed], dim=0)


def blurred_mask(lib, folder):
    """Inpainting with a mask whose edges are soft."""
    pipe = quiet(lib.AutoPipelineForInpainting.from_pretrained(folder))
    picture, mask = Image.new("RGB", (16, 16), (200, 30, 30)), Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 9, 12))
    mask = pipe.mask_processor.blur(mask, blur_factor=2)
    image = pipe(PROMPT, image=picture, mask_image=mask, generator=generator(), output_type="np", **STEPS)
    return image.images + pipe.mask_processor.preprocess(mask)[0, 0, ..., None].numpy()


def guidance_that_ends(lib, folder):
    """A callback that ends guidance after half of the steps, and a text that was encoded before."""
    pipe = quiet(lib.StableDiffusionPipeline.from_pretrained(folder))
    embeds, negative = pipe.encode_prompt(PROMPT, pipe._execution_device, 1, True, negative_prompt="blue")

    def end_guidance(pipe, step, timestep, tensors):
        if step == pipe.num_timesteps // 2:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    return pipe(
        prompt_embeds=embeds, negative_prompt_embeds=negative, generator=generator(), num_inference_steps=4,
        callback_on_step_end=end_guidance, output_type="np",
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    ).images  # fmt: skip


def large_picture(lib, folder):
    """All that is said to need less memory, and a picture larger than a tile."""
    pipe = quiet(lib.StableDiffusionPipeline.from_pretrained(folder))
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8
    return draw(pipe, height=32, width=40, num_images_per_prompt=2)


def own_pipeline(lib, folder):
    """A class of one's own, that is drawn with, saved and loaded."""

    class Mine(lib.DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, steps, generator):
            size = self.unet.config.sample_size
            x = torch.randn(1, self.unet.config.in_channels, size, size, generator=generator)
            self.scheduler.set_timesteps(steps)
            with self.progress_bar(total=steps) as bar:
                for t in self.scheduler.timesteps:
                    x = self.scheduler.step(self.unet(x, t).sample, t, x, generator=generator).prev_sample
                    bar.update()
            x = (x / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
            return self.numpy_to_pil(x)[0]

    unet = lib.UNet2DModel.from_pretrained(folder / "ddpm", subfolder="unet")
    mine = quiet(Mine(unet, scheduler=lib.DDPMScheduler()).to("cpu"))
    assert set(mine.components) == {"unet", "scheduler"}
    mine.save_pretrained(folder / lib.__name__)
    again = quiet(Mine.from_pretrained(folder / lib.__name__))
    assert again(3, generator()) == mine(3, generator())
    return np.asarray(mine(3, generator())) / 255


SCRIPTS = [picture_through_the_autoencoder, guidance_that_ends]
SCRIPTS += [
    pytest.param(one, marks=pytest.mark.slow) for one in (latents_made_larger, blurred_mask, large_picture)
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_makes_the_same_picture_in_both_libraries(script, folder):
    ours, theirs = (script(lib, folder) for lib in (minidiff, diffusers))
    assert np.std(np.asarray(ours)) > 0.03
    assert_close(ours, theirs, atol=1e-5)


def test_a_pipeline_of_ones_own_makes_the_same_picture_in_both_libraries(tmp_path):
    write_ddpm(tmp_path / "ddpm", sample_size=8)
    ours, theirs = (own_pipeline(lib, tmp_path) for lib in (minidiff, diffusers))
    assert_close(ours, theirs, atol=1.001 / 255)  # whole levels, which may fall to either side of a half


def test_tiles_and_slices_are_turned_on_and_off_by_the_pipeline(pipe):
    z = torch.randn(2, 4, 24, 20, generator=generator())
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8
    whole = pipe.vae.decode(z).sample
    pipe.enable_vae_slicing()
    assert pipe.vae.use_slicing and not pipe.vae.use_tiling
    pipe.enable_vae_tiling()
    assert not torch.allclose(pipe.vae.decode(z).sample, whole)
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    assert torch.equal(pipe.vae.decode(z).sample, whole)


@pytest.mark.parametrize("name", ["attention_slicing", "xformers_memory_efficient_attention"])
def test_hints_about_attention_are_answered_with_one_line(pipe, caplog, name):
    expected = draw(pipe)
    with caplog.at_level(logging.WARNING):
        getattr(pipe, f"enable_{name}")()
        getattr(pipe, f"disable_{name}")()
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"enable_{name} changes nothing: attention never holds its whole matrix here")
    assert line.endswith('backend "reference" (this pipeline runs torch)')
    assert np.array_equal(draw(pipe), expected)


@pytest.fixture(scope="module")
def shared(folder):
    """A pipeline that tests leave as it is."""
    return minidiff.StableDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ABSENT)
def test_what_diffusers_pipelines_have_and_ours_lack_is_explained(shared, name):
    theirs = diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline
    assert any(hasattr(pipeline, name) for pipeline in theirs)
    assert not hasattr(shared, name) and getattr(shared, name, None) is None
    with pytest.raises(AttributeError, match=rf"^StableDiffusionPipeline has no {name}: \w.* "):
        getattr(shared, name)


def test_other_missing_attributes_are_pythons_errors(pipe):
    with pytest.raises(AttributeError, match="'StableDiffusionPipeline' object has no attribute 'untet'"):
        pipe.untet  # noqa: B018
    del pipe.unet.conv_in
    with pytest.raises(AttributeError, match="has no attribute 'conv_in'"):
        draw(pipe)

    class Faulty(minidiff.StableDiffusionPipeline):
        @property
        def device(self):
            return self.vae.devise

    with pytest.raises(AttributeError, match="'AutoencoderKL' object has no attribute 'devise'"):
        Faulty(**pipe.components)._execution_device  # noqa: B018


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_of_diffusers_is_refused_at_once(pipe, folder, name):
    theirs = getattr(diffusers, name).from_config(pipe.scheduler.config)
    before = pipe.scheduler
    message = rf"is a {name} of diffusers, .* write minidiff\.{name}\.from_config\(scheduler\.config\)"
    with pytest.raises(TypeError, match=message):
        pipe.scheduler = theirs
    with pytest.raises(TypeError, match=message):
        minidiff.StableDiffusionImg2ImgPipeline(**pipe.components | {"scheduler": theirs})
    with pytest.raises(TypeError, match=message):
        minidiff.DiffusionPipeline.from_pretrained(folder, scheduler=theirs)
    assert pipe.scheduler is before
    pipe.scheduler = getattr(minidiff, name).from_config(theirs.config)  # what the message says
    assert np.isfinite(draw(pipe)).all()


def test_other_things_that_are_no_scheduler_of_ours_are_refused(pipe):
    with pytest.raises(
        TypeError, match="a RePaintScheduler of diffusers, which minidiff does not have; write"
    ):
        pipe.scheduler = diffusers.RePaintScheduler()
    mine = type("Mine", (diffusers.DDIMScheduler,), {})()
    with pytest.raises(
        TypeError, match=r"a Mine of diffusers, .* write minidiff\.DDIMScheduler\.from_config"
    ):
        pipe.scheduler = mine
    with pytest.raises(TypeError, match=r"is 'ddim'; pass an object, such as minidiff\.DDIMScheduler\.from"):
        pipe.scheduler = "ddim"
    with pytest.raises(TypeError, match=r"is the class LMSDiscreteScheduler; .*from_config\(pipe\.scheduler"):
        pipe.scheduler = minidiff.LMSDiscreteScheduler


def test_ddim_is_made_of_a_scheduler_of_diffusers(ddpm_folder):
    theirs = diffusers.DDIMPipeline.from_pretrained(ddpm_folder)
    ours = minidiff.DDIMPipeline.from_pretrained(ddpm_folder, scheduler=theirs.scheduler)
    images = [quiet(p)(generator=generator(), output_type="np", **STEPS).images for p in (ours, theirs)]
    assert_close(*images, atol=1e-5)


@pytest.mark.parametrize("bases", [(), (SchedulerMixin,)], ids=["no base", "a base of diffusers"])
def test_a_scheduler_of_ones_own_is_accepted(pipe, bases):
    def step(self, model_output, timestep, sample, return_dict=True):
        return Output(prev_sample=sample - 0.1 * model_output)

    def set_timesteps(self, num_inference_steps):
        self.timesteps = np.linspace(999, 0, num_inference_steps)

    methods = {"step": step, "set_timesteps": set_timesteps, "scale_model_input": lambda self, x, t: x}
    own = type("Own", bases, methods | {"init_noise_sigma": 1.0, "order": 1, "config": {}})
    pipe.scheduler = own()
    assert np.isfinite(draw(pipe)).all()
    assert np.isfinite(draw(minidiff.StableDiffusionPipeline(**pipe.components))).all()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_models_of_diffusers_and_transformers_are_accepted(pipe, folder, part):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = minidiff.EulerDiscreteScheduler.from_config(pipe.scheduler.config)  # t with fractions
    expected = draw(pipe)
    setattr(pipe, part, getattr(theirs, part))
    assert_close(draw(pipe), expected, atol=1e-5)
    assert_close(draw(minidiff.StableDiffusionPipeline(**pipe.components)), expected, atol=1e-5)


def test_numpy_to_pil_takes_one_picture_or_several(pipe):
    x = np.linspace(0, 1, 2 * 5 * 4 * 3, dtype=np.float32).reshape(2, 5, 4, 3)
    both = pipe.numpy_to_pil(x), diffusers.StableDiffusionPipeline.numpy_to_pil(x)
    assert [image.tobytes() for image in both[0]] == [image.tobytes() for image in both[1]]
    assert pipe.numpy_to_pil(x[1])[0] == both[0][1]


def test_a_bar_counts_as_in_diffusers(folder):
    for pipeline in load_both("StableDiffusionPipeline", folder):
        bar = pipeline.progress_bar(range(3))
        assert (list(bar), bar.disable, pipeline.progress_bar(total=5).total) == ([0, 1, 2], True, 5)
