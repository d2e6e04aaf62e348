"""Single files in the original layout: published names and shapes, and diffusers' own conversion, live."""

import importlib
import json
import logging
import pickle
import sys
import types

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from ldm_files import (
    DATA,
    MAPPING,
    PIPELINES,
    original_tensors,
    write_folder,
    write_single_file,
    write_sparse,
)
from parity import assert_close
from test_hub import files, server  # noqa: F401, fixtures
from test_tokenizer import clip, pair  # noqa: F401, fixtures
from tiny_pipelines import generator, write_ddpm, write_stable_diffusion

import minidiff
from minidiff.checkpoints import CheckpointError, kinds, ldm, single_file, vocabulary

REPOSITORIES = {  # the published folders of the same weights
    "stable-diffusion-v1-5": kinds.SD1,
    "stable-diffusion-inpainting": kinds.SD1_INPAINTING,
    "stable-diffusion-2-1": kinds.SD2_V,
    "stable-diffusion-2-1-base": kinds.SD2_BASE,
    "stable-diffusion-xl-base-1.0": kinds.SDXL,
}
TITLES = {
    "v1-5-pruned-emaonly": "Stable Diffusion 1",
    "v1-5-pruned": "Stable Diffusion 1",
    "sd-v1-5-inpainting": "Stable Diffusion 1 for inpainting",
    "v2-1_512-ema-pruned": "Stable Diffusion 2",
    "v2-1_512-nonema-pruned": "Stable Diffusion 2",
    "sd_xl_base_1.0": "Stable Diffusion XL",
}
KINDS = [pytest.param(kind, marks=pytest.mark.slow) if kind == "sdxl" else kind for kind in MAPPING]
MODELS = ("vae", "unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """original(kind) -> (folder in diffusers' layout, tensors in the original layout) of one tiny model."""
    place, made = tmp_path_factory.mktemp("original"), {}

    def make(kind):
        if kind not in made:
            folder = write_folder(place / kind, kind)
            made[kind] = folder, original_tensors(folder, kind)
        return made[kind]

    return make


@pytest.fixture
def write(original, tmp_path):
    """write(kind, ending) -> (path of a single file, folder that describes it); changed edits its tensors."""

    def write(kind="sd1", ending="safetensors", changed=None):
        folder, tensors = original(kind)
        tensors = dict(tensors)
        if changed is not None:
            changed(tensors)
        return write_single_file(tmp_path / f"{kind}.{ending}", tensors), folder

    return write


def published(name):
    """(manifest, mapping without the ignored names and constants) of a published file."""
    entry = DATA["files"][name]
    rows = [row for row in DATA["mapping"][entry["mapping"]] if row[0] in entry["tensors"]]
    kept = {(row[0], row[1], row[2]) for row in rows if row[1] and "position_ids" not in row[0]}
    return entry["tensors"], kept


def pipeline_class(kind):
    name = PIPELINES[kind].__name__
    return getattr(minidiff, name, minidiff.StableDiffusionPipeline)


def weights(model):
    """The weights of a model of either library under the published names."""
    prefix = "text_model." if type(model).__name__ == "CLIPTextModel" else ""
    named = {prefix + name.removeprefix(prefix): t for name, t in model.state_dict().items()}
    return {name: tensor for name, tensor in named.items() if "position_ids" not in name}


def assert_equal_weights(ours, theirs):
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {t.dtype for t in ours.values()} == {t.dtype for t in theirs.values()}


@pytest.mark.parametrize("name", DATA["files"])
def test_every_name_of_a_published_file_goes_where_it_belongs(name):
    manifest, expected = published(name)
    found, by_part = set(), {}
    for there in (n for n in manifest if not ldm.is_ignored(n)):
        row = next(row for row in ldm.PREFIXES if there.startswith(row[0]))
        by_part.setdefault(row, []).append(there)
    for (prefix, part, table), names in by_part.items():
        sources = ldm.convert(names, prefix, table, "the file")
        found |= {(source.name, part, ours) for ours, source in sources.items()}
    assert found == expected


@pytest.mark.parametrize("name", DATA["files"])
def test_a_published_file_is_recognised_and_loads_in_full_size(name, tmp_path):
    file = single_file.open_file(
        write_sparse(tmp_path / f"{name}.safetensors", DATA["files"][name]["tensors"])
    )
    assert file.title == TITLES[name]
    loaded = {part: file.build(part, getattr(minidiff, file.index[part][1]), "auto") for part in file.parts}
    _, expected = published(name)
    assert {(part, n) for part, m in loaded.items() for n in m.state_dict()} == {r[1:] for r in expected}


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_the_configs_of_a_kind_are_the_published_ones(repository):
    configs, kind = DATA["configs"][repository], REPOSITORIES[repository]
    index = {
        n: e for n, e in configs["model_index.json"].items() if isinstance(e, list) and n in kind.configs
    }
    assert kind.pipeline == configs["model_index.json"]["_class_name"]
    assert {part: kind.index()[part] for part in kind.configs} == index
    for part in kind.configs.keys() & set(MODELS):
        with torch.device("meta"):
            model_class = getattr(minidiff, kind.configs[part]["_class_name"])
            ours = model_class.from_config(kind.configs[part]).config
            theirs = model_class.from_config(configs[f"{part}/config.json"]).config
        # names that begin with _ say where it is from; what text encoders need not know is carried along
        names = [n for n in theirs if not n.startswith("_") and n in ours]
        assert {n: plain(ours[n]) for n in names} == {n: plain(theirs[n]) for n in names}
    scheduler = {k: v for k, v in configs["scheduler/scheduler_config.json"].items() if v is not None}
    scheduler.pop("_diffusers_version")
    assert kind.configs["scheduler"] == scheduler


def plain(value):
    """A value as JSON has it; None means False in upcast_attention, and nothing where it is the default."""
    return list(value) if isinstance(value, tuple) else value or False


@pytest.mark.parametrize(("name", "pad_token"), [("sd1", "<|endoftext|>"), ("sd2", "!")])
def test_the_vocabulary_that_ships_gives_the_golden_ids(clip, pair, name, pad_token):  # noqa: F811
    tokenizer = minidiff.CLIPTokenizer(**vocabulary.clip(pad_token))
    assert dict(zip(clip[name], tokenizer(list(clip[name])).input_ids, strict=True)) == clip[name]
    _, theirs = pair(name)
    assert tokenizer.get_vocab() == theirs.get_vocab() and tokenizer.pad_token_id == theirs.pad_token_id
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    assert tokenizer("wow! a cat", **options).input_ids == theirs("wow! a cat", **options).input_ids


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_a_kind_s_tokenizers_pad_as_the_published_ones(repository):
    kind = REPOSITORIES[repository]
    for part in (part for part in kind.configs if part.startswith("tokenizer")):
        special = DATA["configs"][repository][f"{part}/special_tokens_map.json"]
        arguments = vocabulary.clip(kind.configs[part]["pad_token"])
        assert {role: arguments[role] for role in special} == special


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_those_of_diffusers_conversion_bit_by_bit(write, kind, ending):
    path, folder = write(kind, ending)
    ours = pipeline_class(kind).from_single_file(path, config=folder)
    theirs = PIPELINES[kind].from_single_file(str(path), config=str(folder))
    for part in MODELS:
        if hasattr(theirs, part):
            assert_equal_weights(getattr(ours, part), getattr(theirs, part))
            assert not getattr(ours, part).training
    assert type(ours.scheduler).__name__ == type(theirs.scheduler).__name__


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sd1-inpainting"])
def test_a_single_file_draws_what_diffusers_draws_from_it(write, kind):
    path, folder = write(kind)
    pipelines = (
        pipeline_class(kind).from_single_file(str(path), config=str(folder)),
        PIPELINES[kind].from_single_file(str(path), config=str(folder)),
    )
    images = []
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 3, "output_type": "np", "generator": generator()}
        images.append(pipeline("a red ball!", **options).images)
    assert_close(*images, atol=1 / 255)
    assert images[0].shape == (1, 64, 64, 3)


@pytest.mark.slow
def test_the_class_is_picked_from_the_file(write):
    sd1, sd1_folder = write("sd1")
    xl, xl_folder = write("sdxl")
    ours = minidiff.DiffusionPipeline.from_single_file(sd1, config=sd1_folder)
    assert type(ours) is minidiff.StableDiffusionPipeline
    ours = minidiff.DiffusionPipeline.from_single_file(xl, config=xl_folder)
    assert type(ours) is minidiff.StableDiffusionXLPipeline


@pytest.mark.slow
def test_an_xl_file_in_full_size_is_a_pipeline_of_its_class(tmp_path):
    path = write_sparse(tmp_path / "xl.safetensors", DATA["files"]["sd_xl_base_1.0"]["tensors"])
    pipe = minidiff.DiffusionPipeline.from_single_file(path, torch_dtype="auto")
    assert type(pipe) is minidiff.StableDiffusionXLPipeline
    assert type(pipe.scheduler) is minidiff.EulerDiscreteScheduler
    assert (pipe.tokenizer.pad_token_id, pipe.tokenizer_2.pad_token_id) == (49407, 0)
    assert pipe.vae.config.scaling_factor == 0.13025 and pipe.dtype == torch.float16


def test_a_file_in_full_size_needs_no_config(tmp_path):
    path = write_sparse(tmp_path / "v1-5.safetensors", DATA["files"]["v1-5-pruned-emaonly"]["tensors"])
    pipe = minidiff.StableDiffusionPipeline.from_single_file(path)
    assert type(pipe.scheduler) is minidiff.PNDMScheduler and pipe.scheduler.config.steps_offset == 1
    assert pipe.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert pipe.unet.config.sample_size == 64 and pipe.dtype == torch.float32


@pytest.mark.slow
def test_torch_dtype_is_that_of_all_models(write):
    path, folder = write(changed=lambda tensors: tensors.update({n: half(t) for n, t in tensors.items()}))
    for dtype, expected in ((None, torch.float32), ("auto", torch.float16), (torch.bfloat16, torch.bfloat16)):
        pipe = minidiff.StableDiffusionPipeline.from_single_file(path, config=folder, torch_dtype=dtype)
        assert {t.dtype for model in pipe.models for t in model.state_dict().values()} == {expected}
    pipe = minidiff.StableDiffusionPipeline.from_single_file(path, config=folder, dtype=torch.float16)
    theirs = PIPELINES["sd1"].from_single_file(str(path), config=str(folder), torch_dtype=torch.float16)
    for part in ("vae", "unet", "text_encoder"):
        assert_equal_weights(getattr(pipe, part), getattr(theirs, part))


def half(tensor):
    return tensor.half() if tensor.is_floating_point() else tensor


def test_thirds_of_one_tensor_are_converted_together(write):
    path, folder = write("sd2")
    pipe = minidiff.StableDiffusionPipeline.from_single_file(path, config=folder, torch_dtype=torch.float16)
    attention = pipe.text_encoder.text_model.encoder.layers[0].self_attn
    storages = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj)}
    assert len(storages) == 1


def test_averages_are_taken_or_left_on_purpose(original, tmp_path, caplog):
    folder, _ = original("sd1")
    path = write_single_file(tmp_path / "both.safetensors", original_tensors(folder, "sd1", ema=True))
    plain, averages = (
        minidiff.StableDiffusionPipeline.from_single_file(path, config=folder, extract_ema=ema).unet
        for ema in (False, True)
    )
    assert "extract_ema=True takes those" in caplog.text and len(caplog.records) == 1
    for ours, ema in ((plain, False), (averages, True)):
        theirs = PIPELINES["sd1"].from_single_file(str(path), config=str(folder), extract_ema=ema)
        assert_equal_weights(ours, theirs.unet)
    assert not torch.equal(plain.conv_in.weight, averages.conv_in.weight)


def test_a_file_without_averages_says_so(write, caplog):
    path, folder = write()
    minidiff.StableDiffusionPipeline.from_single_file(path, config=folder, extract_ema=True)
    assert "has no averages (EMA) beside" in caplog.text


def test_averages_of_some_weights_only_are_refused(original, tmp_path):
    folder, _ = original("sd1")
    tensors = original_tensors(folder, "sd1", ema=True)
    del tensors["model_ema.diffusion_modelout2bias"]
    path = write_single_file(tmp_path / "some.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"some\.safetensors.*lacks model_ema\.diffusion_modelout2bias"):
        minidiff.UNet2DConditionModel.from_single_file(path, extract_ema=True)


@pytest.mark.parametrize("alone", [False, True])
def test_a_vae_comes_from_a_whole_file_or_alone_as_in_diffusers(original, tmp_path, alone):
    folder, tensors = original("sd1")
    if alone:
        prefix = "first_stage_model."
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        tensors["loss.discriminator.main.0.weight"] = torch.ones(3)
    path, options = write_single_file(tmp_path / "vae.safetensors", tensors), {"scaling_factor": 0.5}
    ours = minidiff.AutoencoderKL.from_single_file(path, config=folder, subfolder="vae", **options)
    theirs = diffusers.AutoencoderKL.from_single_file(
        str(path), config=str(folder), subfolder="vae", **options
    )
    assert_equal_weights(ours, theirs)
    assert ours.config.scaling_factor == theirs.config.scaling_factor == 0.5


def test_a_vae_alone_in_full_size_gets_stable_diffusion_1_s_config(tmp_path):
    manifest, prefix = DATA["files"]["v1-5-pruned"]["tensors"], "first_stage_model."
    manifest = {n.removeprefix(prefix): e for n, e in manifest.items() if n.startswith(prefix)}
    path = write_sparse(tmp_path / "vae-ft-mse-840000-ema-pruned.safetensors", manifest)
    assert minidiff.AutoencoderKL.from_single_file(path).config.scaling_factor == 0.18215
    vae = minidiff.AutoencoderKL.from_single_file(path, scaling_factor=0.13025, torch_dtype=torch.float16)
    assert vae.config.scaling_factor == 0.13025 and vae.dtype == torch.float16
    with pytest.raises(CheckpointError, match="holds no U-Net, only vae; a VAE is loaded with AutoencoderKL"):
        minidiff.StableDiffusionPipeline.from_single_file(path)
    with pytest.raises(CheckpointError, match="holds no unet, only vae"):
        minidiff.UNet2DConditionModel.from_single_file(path)


def test_a_unet_comes_from_a_whole_file_as_in_diffusers(write):
    path, folder = write("sd2")
    ours = minidiff.UNet2DConditionModel.from_single_file(path, config=folder, subfolder="unet")
    theirs = diffusers.UNet2DConditionModel.from_single_file(str(path), config=str(folder), subfolder="unet")
    assert_equal_weights(ours, theirs)


def manifest_file(path, name, changed=None):
    manifest = dict(DATA["files"][name]["tensors"])
    if changed is not None:
        manifest |= changed
    return write_sparse(path, manifest)


def test_stable_diffusion_2_predicts_v_unless_the_caller_knows_better(tmp_path, caplog):
    path = manifest_file(tmp_path / "v2.safetensors", "v2-1_512-ema-pruned")
    with caplog.at_level(logging.WARNING):
        pipe = minidiff.StableDiffusionPipeline.from_single_file(path)
    assert "pass prediction_type='epsilon'" in caplog.text
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.unet.config.sample_size == 96
    caplog.clear()
    pipe = minidiff.StableDiffusionPipeline.from_single_file(path, prediction_type="epsilon")
    assert not caplog.records
    assert pipe.scheduler.config.prediction_type == "epsilon" and pipe.unet.config.sample_size == 64
    pipe = minidiff.StableDiffusionPipeline.from_single_file(path, prediction_type="v_prediction")
    assert not caplog.records and pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.tokenizer("!").input_ids == [49406, 0, 49407]


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ((), ("epsilon", None)),
        (("v_pred",), ("v_prediction", False)),
        (("v_pred", "ztsnr"), ("v_prediction", True)),
    ],
)
def test_marks_of_xl_finetunes_decide_what_they_predict(marks, expected):
    shapes = {n: s for n, (_, s) in DATA["files"]["sd_xl_base_1.0"]["tensors"].items()} | dict.fromkeys(
        marks, ()
    )
    scheduler = kinds.recognise(shapes, "the file").configs["scheduler"]
    assert (scheduler["prediction_type"], scheduler.get("rescale_betas_zero_snr")) == expected
    assert all(ldm.is_ignored(mark) for mark in marks)


FIRST = kinds.FIRST
TO_K = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("text", "latents", "expected"),
    [
        (768, 4, kinds.SD1),
        (1024, 9, kinds.SD2_INPAINTING),
        (2048, 9, kinds.SDXL_INPAINTING),
        (768, 8, "InstructPix2Pix, which minidiff does not have"),
        (1024, 5, "depth maps, which minidiff does not have"),
        (1024, 7, "upscaler, which minidiff does not have"),
        (1280, 4, "the refiner of Stable Diffusion XL, which minidiff does not have"),
        (512, 4, "texts of 512 channels and latents of 4; no such model is known"),
    ],
)
def test_kinds_are_told_apart_by_two_shapes(text, latents, expected):
    shapes = {FIRST: (320, latents, 3, 3), TO_K: (640, text)}
    if isinstance(expected, kinds.Kind):
        assert kinds.recognise(shapes, "the file") is expected
    else:
        with pytest.raises(CheckpointError, match=f"the file .*{expected}"):
            kinds.recognise(shapes, "the file")


def refuse(match, *args, pipeline=minidiff.StableDiffusionPipeline, error=CheckpointError, **kwargs):
    with pytest.raises(error, match=match):
        pipeline.from_single_file(*args, **kwargs)


def test_what_is_no_file_is_refused(tmp_path, write):
    refuse("is a folder, not a single file; load it with from_pretrained", tmp_path)
    refuse("there is no file .*nothing.ckpt", tmp_path / "nothing.ckpt")
    refuse("there is no file nothing.ckpt", "nothing.ckpt")
    refuse("there is no file https://example.com/", "https://example.com/owner/name/file.safetensors")
    refuse("named by a str or a path, not NoneType", None, error=TypeError)
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 4265146304\n")
    refuse("pointer.safetensors is a Git-LFS pointer", pointer)
    path, _ = write()
    path.write_bytes(path.read_bytes()[:-1000])
    refuse("sd1.safetensors is damaged", path)


def test_a_pickle_with_a_program_is_refused_and_not_run(tmp_path):
    class Program:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("yes",))

    for number, content in enumerate(
        ({"state_dict": {"a": Program()}}, {"callbacks": Program(), "state_dict": {}})
    ):
        path = tmp_path / f"{number}.ckpt"
        torch.save(content, path)
        refuse(f"{number}.ckpt .*holds more than tensors", path)
    assert not (tmp_path / "ran").exists()


def test_the_state_of_training_beside_the_weights_does_no_harm(original, tmp_path, monkeypatch):
    folder, tensors = original("sd1")
    name = "pytorch_lightning.callbacks.model_checkpoint"
    checkpoint_class = type("ModelCheckpoint", (), {"__module__": name})
    for module in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    sys.modules[name].ModelCheckpoint = checkpoint_class
    state = {"best_model_score": np.float64(0.5), "monitor": "val/loss"}
    training = {"callbacks": {checkpoint_class: state}, "lr_schedulers": [], "global_step": 470_000}
    torch.save(training | {"state_dict": tensors}, tmp_path / "sd-v1-4-full-ema.ckpt")
    monkeypatch.delitem(sys.modules, name)
    path = tmp_path / "sd-v1-4-full-ema.ckpt"
    pipe = minidiff.StableDiffusionPipeline.from_single_file(path, config=folder)
    assert torch.equal(pipe.unet.conv_in.weight, tensors[FIRST])
    with pytest.raises(pickle.UnpicklingError):  # torch alone refuses it, and does again afterwards
        torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["lora_unet_down_blocks_0.lora_up.weight"], "it is a LoRA"),
        (["unet.down_blocks.0.lora_A.weight"], "it is a LoRA"),
        (["control_model.time_embed.0.weight"], "it is a ControlNet"),
        (["emb_params"], "it is a textual inversion"),
        (["model.diffusion_model.joint_blocks.0.x.weight"], "Stable Diffusion 3"),
        (["something", "else"], "its tensors are else, something"),
        ([], "its tensors are none"),
    ],
)
def test_files_of_other_kinds_are_called_by_their_names(tmp_path, names, match):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({name: torch.zeros(2, 2) for name in names}, path)
    refuse(f"other.safetensors .*{match}", path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_of_a_folder_is_no_single_file(tmp_path, part):
    folder = write_stable_diffusion(tmp_path / "folder")
    [path] = (folder / part).glob("*.safetensors")
    match = "one part in diffusers' layout: put it into a folder with its config.json"
    refuse(match, path)
    refuse(match, path, pipeline=minidiff.AutoencoderKL)


def test_a_missing_part_is_named_and_can_be_given(write):
    def without_vae(tensors):
        for name in [name for name in tensors if name.startswith("first_stage_model.")]:
            del tensors[name]

    path, folder = write(changed=without_vae)
    refuse(
        r"sd1.safetensors holds no vae, only .*pass vae=AutoencoderKL\.from_pretrained", path, config=folder
    )
    vae = minidiff.AutoencoderKL.from_pretrained(folder, "vae")
    scheduler = minidiff.DDIMScheduler()
    pipe = minidiff.StableDiffusionPipeline.from_single_file(
        path, config=folder, vae=vae, scheduler=scheduler, safety_checker=None
    )
    assert pipe.vae is vae and pipe.scheduler is scheduler


def test_tensors_that_fit_nothing_are_named(write):
    def more(name):
        return lambda tensors: tensors.update({name: torch.ones(2)})

    for name in ("embedding_manager.embedder", "model.diffusion_model.input_blocks.1.0.in_layers.1.weight"):
        path, folder = write(changed=more(name))
        refuse(f"sd1.safetensors has 1 tensors that no model here has: {name}", path, config=folder)
    path, folder = write(changed=more("model.diffusion_model.input_blocks.1.1.proj_in.lora.weight"))
    refuse(r"1 unexpected: down_blocks\.0\.attentions\.0\.proj_in\.lora\.weight", path, config=folder)
    path, folder = write(changed=more("model.diffusion_model.output_blocks.2.2.conv.weight"))
    refuse("are the same tensor, up_blocks.0.upsamplers.0.conv.weight", path, config=folder)
    path, folder = write(changed=more("cond_stage_model.model.ln_final.weight"))
    refuse("has two of the part text_encoder", path, config=folder)


def test_missing_and_misshapen_tensors_are_named(write):
    path, folder = write(changed=lambda tensors: tensors.pop(FIRST))
    refuse(r"1 missing: conv_in\.weight", path, config=folder)
    refuse("sd1.safetensors holds no U-Net of Stable Diffusion", path)
    path, folder = write(changed=lambda tensors: tensors.update({FIRST: torch.ones(4, 5, 3, 3)}))
    refuse(r"conv_in\.weight \(4, 5, 3, 3\) instead of \(4, 4, 3, 3\)", path, config=folder)


def test_an_empty_tensor_of_any_shape_is_only_misshapen(tmp_path):
    manifest = dict(DATA["files"]["sd_xl_base_1.0"]["tensors"])
    manifest["first_stage_model.decoder.mid.attn_1.q.weight"] = ["F16", [0, 2**62, 2**62]]
    path = write_sparse(tmp_path / "empty.safetensors", manifest)
    refuse(r"to_q\.weight \(0, \d+, \d+\) instead of \(512, 512\)", path, pipeline=minidiff.AutoencoderKL)


def test_a_tiny_model_needs_the_config_that_describes_it(write):
    path, _ = write()
    refuse("texts of 16 channels and latents of 4; no such model is known. With config=", path)


def test_another_pipeline_s_file_is_refused(write, tmp_path):
    path, folder = write("sdxl")
    refuse("is described by .*load it with StableDiffusionXLPipeline, not with StableDiffusionPipeline", path,
           config=folder)  # fmt: skip
    path, folder = write("sd1")
    refuse("names no text_encoder_2, which a StableDiffusionXLPipeline needs", path, config=folder,
           pipeline=minidiff.StableDiffusionXLPipeline)  # fmt: skip
    refuse("load it with StableDiffusionPipeline, not with DDPMPipeline", path, config=folder,
           pipeline=minidiff.DDPMPipeline)  # fmt: skip
    refuse("described by .*names no vae, which a StableDiffusionPipeline needs", path,
           config=write_ddpm(tmp_path / "ddpm"))  # fmt: skip


def test_arguments_that_fit_nothing_are_refused(write):
    path, folder = write()
    refuse("original_config='v1-inference.yaml' is not read", path, original_config="v1-inference.yaml",
           error=ValueError)  # fmt: skip
    refuse("original_config='x' is not read", path, original_config="x", error=ValueError,
           pipeline=minidiff.AutoencoderKL)  # fmt: skip
    refuse("prediction_type is 'noise'; it must be", path, prediction_type="noise", error=ValueError)
    refuse("got a scheduler and a prediction_type", path, prediction_type="epsilon", error=ValueError,
           scheduler=minidiff.DDIMScheduler())  # fmt: skip
    refuse("torch_dtype is a torch.dtype, 'auto' or None", path, torch_dtype="float16", error=TypeError)
    refuse("two names of one thing", path, torch_dtype=torch.half, dtype=torch.half, error=ValueError)
    refuse("has no argument image_size", path, config=folder, image_size=512, error=TypeError)
    refuse("AutoencoderKL.from_single_file has no argument image_size", path, image_size=512, error=TypeError,
           pipeline=minidiff.AutoencoderKL)  # fmt: skip


def test_files_of_the_hub_are_named_by_path_or_address(server, write, monkeypatch, tmp_path):  # noqa: F811
    path, folder = write()
    monkeypatch.chdir(tmp_path)
    server.files = {"old/v1.safetensors": path.read_bytes(), "README.md": b"text"}
    address = f"http://127.0.0.1:{server.server_port}/me/tiny"
    for name in ("me/tiny/old/v1.safetensors", f"{address}/blob/main/old/v1.safetensors?download=true"):
        pipe = minidiff.StableDiffusionPipeline.from_single_file(name, config=str(folder))
        assert torch.equal(pipe.unet.conv_in.weight, safetensors.torch.load_file(path)[FIRST])
    refuse("me/tiny on the hub has no v2.safetensors", "me/tiny/v2.safetensors", config=str(folder))
    refuse("the repository has no revision 'other'", f"{address}/resolve/other/old/v1.safetensors")
    refuse("the hub has no such repository", "me/nothing/v2.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "conditioner.embedders.0.logit_scale",
        "conditioner.embedders.0.transformer.text_projection.weight",
        "cond_stage_model.logit_scale",
        "cond_stage_model.transformer.text_projection.weight",
        "denoiser.sigmas",
        "first_stage_model.loss.logvar",
        "model_ema.diffusion_modelout2bias",
        "scale_factor",
    ],
)
def test_what_other_programs_add_is_ignored(name):
    assert ldm.is_ignored(name)


@pytest.mark.parametrize(
    "name",
    [
        "conditioner.embedders.1.model.text_projection",
        "cond_stage_model.model.transformer.resblocks.22.ln_1.bias",
        "conditioner.embedders.1.model.transformer.resblocks.23.ln_1.bias",
        "first_stage_model.quant_conv.weight",
        "model.diffusion_model.betas",
    ],
)
def test_what_a_model_needs_is_not_ignored(name):
    assert not ldm.is_ignored(name)


def test_a_text_encoder_without_its_prefix_loads(write):
    def shorten(tensors):
        prefix = "cond_stage_model.transformer.text_model."
        for name in [name for name in tensors if name.startswith(prefix)]:
            tensors[name.replace("text_model.", "")] = tensors.pop(name)

    path, folder = write(changed=shorten)
    ours = minidiff.StableDiffusionPipeline.from_single_file(path, config=folder).text_encoder
    assert_equal_weights(ours, minidiff.CLIPTextModel.from_pretrained(folder, "text_encoder"))


def test_an_inpainting_file_asks_for_the_inpainting_pipeline(tmp_path):
    path = manifest_file(tmp_path / "inpainting.safetensors", "sd-v1-5-inpainting")
    if hasattr(minidiff, "StableDiffusionInpaintPipeline"):
        pipe = minidiff.DiffusionPipeline.from_single_file(path)
        assert type(pipe) is minidiff.StableDiffusionInpaintPipeline
    else:
        refuse("for inpainting.* asks for a StableDiffusionInpaintPipeline; minidiff has", path,
               pipeline=minidiff.DiffusionPipeline)  # fmt: skip
    unet = minidiff.UNet2DConditionModel.from_single_file(path)
    assert unet.config.in_channels == 9


def test_the_index_of_a_kind_names_classes_of_diffusers():
    for kind in (*kinds.KINDS.values(), kinds.SD2_BASE):
        index = json.loads(json.dumps(kind.index()))
        entries = [entry for entry in index.values() if isinstance(entry, list) and entry[0] is not None]
        assert hasattr(diffusers, index["_class_name"]) and len(entries) == len(kind.configs)
        assert all(hasattr(importlib.import_module(library), name) for library, name in entries)
