"""One set of parts for several tasks: from_pipe, and the AutoPipelines, which pick the class."""

import inspect
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import edit_json, generator, write_ddpm, write_stable_diffusion, write_stable_diffusion_xl

import minidiff

TEXT, IMAGE, INPAINT, XL = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
)
PICTURE = Image.fromarray((np.random.default_rng(0).random((16, 16, 3)) * 255).astype(np.uint8))
AUTO = {
    "AutoPipelineForText2Image": TEXT,
    "AutoPipelineForImage2Image": IMAGE,
    "AutoPipelineForInpainting": INPAINT,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("tiny") / "stable-diffusion")


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    return write_stable_diffusion_xl(tmp_path_factory.mktemp("tiny") / "xl")


@pytest.fixture
def pipe(folder):
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def xl(xl_folder):
    return minidiff.StableDiffusionXLPipeline.from_pretrained(xl_folder)


@pytest.fixture
def ddpm(tmp_path):
    return minidiff.DDPMPipeline.from_pretrained(write_ddpm(tmp_path))


@pytest.mark.parametrize("target", [TEXT, IMAGE, INPAINT])
@pytest.mark.parametrize("source", [TEXT, IMAGE, INPAINT])
def test_every_part_is_shared(pipe, source, target):
    before = getattr(minidiff, source).from_pipe(pipe)
    after = getattr(minidiff, target).from_pipe(before)
    assert type(after).__name__ == target and after is not before
    for name, part in pipe.components.items():
        assert getattr(after, name) is part
    ours, theirs = (list(p.unet.parameters()) for p in (pipe, after))
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", AUTO)
@pytest.mark.parametrize("source", [TEXT, IMAGE, INPAINT])
def test_the_class_for_a_task_is_picked_as_in_diffusers(pipe, name, source):
    before = getattr(minidiff, source).from_pipe(pipe)
    after = getattr(minidiff, name).from_pipe(before)
    assert type(after).__name__ == AUTO[name] and after.unet is pipe.unet
    theirs = getattr(diffusers, source)(
        **dict.fromkeys(pipe.components),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    assert type(getattr(diffusers, name).from_pipe(theirs)).__name__ == AUTO[name]


@pytest.mark.parametrize("saved_by", [TEXT, IMAGE, INPAINT])
@pytest.mark.parametrize("name", AUTO)
def test_any_checkpoint_of_the_family_is_loaded_for_any_task(pipe, tmp_path, name, saved_by):
    getattr(minidiff, saved_by).from_pipe(pipe).save_pretrained(tmp_path)
    loaded = getattr(minidiff, name).from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert type(loaded).__name__ == AUTO[name] and loaded.dtype == torch.float16
    assert type(minidiff.DiffusionPipeline.from_pretrained(tmp_path)).__name__ == saved_by
    assert type(getattr(diffusers, name).from_pretrained(tmp_path)).__name__ == AUTO[name]


def test_parts_can_be_given_to_both(pipe, folder):
    vae = minidiff.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    for made in (
        minidiff.AutoPipelineForImage2Image.from_pipe(pipe, vae=vae),
        minidiff.AutoPipelineForImage2Image.from_pretrained(folder, vae=vae),
        minidiff.StableDiffusionImg2ImgPipeline.from_pipe(pipe, vae=vae),
    ):
        assert made.vae is vae and made.vae is not pipe.vae
    scheduler = minidiff.DDIMScheduler.from_config(pipe.scheduler.config)
    assert minidiff.StableDiffusionPipeline.from_pipe(pipe, scheduler=scheduler).scheduler is scheduler


def test_xl_is_picked_for_text_to_image(xl, xl_folder):
    assert type(minidiff.AutoPipelineForText2Image.from_pretrained(xl_folder)).__name__ == XL
    again = minidiff.AutoPipelineForText2Image.from_pipe(xl)
    assert type(again).__name__ == XL and again.text_encoder_2 is xl.text_encoder_2
    assert again.force_zeros_for_empty_prompt is xl.force_zeros_for_empty_prompt


@pytest.mark.parametrize(
    "name, missing",
    [
        ("AutoPipelineForImage2Image", "StableDiffusionXLImg2ImgPipeline"),
        ("AutoPipelineForInpainting", "StableDiffusionXLInpaintPipeline"),
    ],
)
def test_what_minidiff_does_not_have_for_xl_is_refused_by_name(xl, xl_folder, name, missing):
    with pytest.raises(minidiff.CheckpointError, match=f"minidiff has no {missing}, which"):
        getattr(minidiff, name).from_pretrained(xl_folder)
    with pytest.raises(ValueError, match=f"minidiff has no {missing}, which"):
        getattr(minidiff, name).from_pipe(xl)


def test_an_xl_checkpoint_for_another_task_serves_text_to_image(xl_folder, tmp_path):
    copy = shutil.copytree(xl_folder, tmp_path / "copy")
    edit_json(copy / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
    assert type(minidiff.AutoPipelineForText2Image.from_pretrained(copy)).__name__ == XL


@pytest.mark.parametrize("name", AUTO)
def test_pipelines_of_other_families_are_refused(ddpm, tmp_path, name):
    with pytest.raises(ValueError, match="knows no DDPMPipeline; it knows StableDiffusionPipeline, "):
        getattr(minidiff, name).from_pipe(ddpm)
    with pytest.raises(minidiff.CheckpointError, match="knows no DDPMPipeline"):
        getattr(minidiff, name).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", AUTO)
def test_an_auto_pipeline_has_no_objects_as_in_diffusers(name):
    for library in (minidiff, diffusers):
        with pytest.raises(OSError, match="from_pretrained"):
            getattr(library, name)()


def test_a_pipeline_of_ones_own_is_known_by_what_it_is_made_of(pipe):
    class Mine(minidiff.StableDiffusionPipeline):
        pass

    assert type(minidiff.AutoPipelineForInpainting.from_pipe(Mine.from_pipe(pipe))).__name__ == INPAINT


def test_parts_that_do_not_fit_are_refused(pipe, xl, ddpm):
    with pytest.raises(ValueError, match="XLPipeline: StableDiffusionPipeline has no use for text_encoder_2"):
        minidiff.StableDiffusionPipeline.from_pipe(xl)
    with pytest.raises(
        ValueError, match="StableDiffusionXLPipeline needs another text_encoder_2, tokenizer_2"
    ):
        minidiff.StableDiffusionXLPipeline.from_pipe(pipe)
    with pytest.raises(
        ValueError, match="StableDiffusionPipeline needs another vae, text_encoder, tokenizer, unet"
    ):
        minidiff.StableDiffusionPipeline.from_pipe(ddpm)
    with pytest.raises(TypeError, match="has no argument controlnet"):
        minidiff.StableDiffusionPipeline.from_pipe(pipe, controlnet=None)
    with pytest.raises(TypeError, match="takes a pipeline, not a UNet2DConditionModel"):
        minidiff.StableDiffusionPipeline.from_pipe(pipe.unet)


def test_other_classes_and_the_base_class_have_it_too(pipe, ddpm):
    assert type(minidiff.DiffusionPipeline.from_pipe(pipe)) is minidiff.StableDiffusionPipeline
    ddim = minidiff.DDIMPipeline.from_pipe(ddpm)
    assert ddim.unet is ddpm.unet and type(ddim.scheduler) is minidiff.DDIMScheduler


def test_the_parts_keep_their_type_unless_another_is_asked_for(pipe):
    pipe.to(torch.float16)
    assert minidiff.StableDiffusionImg2ImgPipeline.from_pipe(pipe).dtype == torch.float16
    assert minidiff.StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.float32) is not pipe
    assert pipe.dtype == torch.float32  # shared


def test_the_pipelines_draw_what_those_from_the_folder_draw(pipe, folder):
    options = {"num_inference_steps": 4, "output_type": "np"}
    mask = Image.new("L", PICTURE.size, 255)
    for name, pictures in ((IMAGE, [PICTURE]), (INPAINT, [PICTURE, mask])):
        shared, loaded = (
            getattr(minidiff, name).from_pipe(pipe),
            getattr(minidiff, name).from_pretrained(folder),
        )
        drawn = [
            p("a red ball", *pictures, generator=generator(), **options).images for p in (shared, loaded)
        ]
        assert np.array_equal(*drawn)


@pytest.mark.parametrize("name", [IMAGE, INPAINT])
def test_arguments_have_the_order_and_the_defaults_of_diffusers(name):
    ours, theirs = (
        list(inspect.signature(getattr(library, name).__call__).parameters.values())
        for library in (minidiff, diffusers)
    )
    positional = [argument.name for argument in ours if argument.kind is argument.POSITIONAL_OR_KEYWORD]
    assert positional == [argument.name for argument in theirs][: len(positional)]
    for argument in ours:
        expected = next(each.default for each in theirs if each.name == argument.name)
        assert argument.default == (tuple(expected) if isinstance(expected, list) else expected)
