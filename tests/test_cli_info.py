"""`minidiff info` says what a checkpoint is and what is unusual about it, from configs and headers alone."""

import json
import re
import time

import numpy as np
import pytest
import torch
from ldm_files import DATA as LDM
from test_checkpoints_fuzz import forge_json
from test_full_size import manifest, write_safetensors
from test_manifests import DATA
from tiny_pipelines import write_stable_diffusion

import minidiff
from minidiff.cli import main

LIBRARIES = {"unet": "diffusers", "vae": "diffusers", "scheduler": "diffusers"}
PNDM = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1}
EULER = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}


@pytest.fixture
def run(capsys):
    def run(*words):
        capsys.readouterr()  # what was said while the checkpoint was made
        status = main(["info", *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def lay_down(
    folder, repository, variant="", scheduler=PNDM, pickled=(), pipeline="StableDiffusionPipeline", **unet
):
    """A published repository with sparse weights of full size; unet: changes of its config."""
    index = {"_class_name": pipeline}
    for file in DATA["files"]:
        repo, part, *infix = file.replace("xl-base-1.0", "xl-base-1_0").split(".")
        if repo.replace("1_0", "1.0") != repository or "".join(infix) != variant:
            continue
        config = DATA["files"][file]["config"] | (unet if part == "unet" else {})
        name = config.get("_class_name") or config["architectures"][0]
        index[part] = [LIBRARIES.get(part, "transformers"), name]
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        stem = "diffusion_pytorch_model" if part in LIBRARIES else "model"
        path = folder / part / f"{stem}{'.' * bool(variant)}{variant}.safetensors"
        write_safetensors(manifest(file), path, padded=not file.startswith("stable-diffusion-v1-4.t"))
        if part in pickled:
            stem = stem.replace("model", "pytorch_model") if stem == "model" else stem
            path.rename(folder / part / f"{stem}.bin")
    if scheduler:
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


KINDS = [
    ("stable-diffusion-v1-5", PNDM, {}, "Stable Diffusion 1"),
    ("stable-diffusion-inpainting", PNDM, {}, "Stable Diffusion 1 for inpainting"),
    ("stable-diffusion-2-1-base", PNDM, {}, "Stable Diffusion 2 base"),
    ("stable-diffusion-2-1", PNDM | {"prediction_type": "v_prediction"}, {}, "Stable Diffusion 2, v-pred"),
    ("stable-diffusion-2-1", PNDM, {"in_channels": 9}, "Stable Diffusion 2 for inpainting"),
    ("sd-turbo", EULER | {"timestep_spacing": "trailing"}, {}, "Stable Diffusion 2 turbo: 1 to 4 steps"),
    ("stable-diffusion-xl-base-1.0", EULER, {}, "Stable Diffusion XL"),
    ("sdxl-turbo", EULER | {"timestep_spacing": "trailing"}, {}, "Stable Diffusion XL turbo: 1 to 4 steps"),
    ("stable-diffusion-v1-5", PNDM, {"time_cond_proj_dim": 256}, "Stable Diffusion 1, a latent consistency"),
    ("stable-diffusion-v1-5", PNDM | {"prediction_type": "v_prediction"}, {}, "Stable Diffusion 1, v-pred"),
    ("stable-diffusion-v1-5", PNDM, {"in_channels": 8}, "InstructPix2Pix"),
    ("stable-diffusion-v1-5", PNDM, {"cross_attention_dim": 640}, "a U-Net for texts of 640 channels"),
    ("ddpm-cifar10-32", EULER, {}, "DDPM, pictures without a text"),
]  # fmt: skip


@pytest.mark.parametrize(("repository", "scheduler", "unet", "kind"), KINDS, ids=[row[3] for row in KINDS])
def test_the_kind_of_a_checkpoint_is_named(run, tmp_path, repository, scheduler, unet, kind):
    folder = lay_down(tmp_path / "x", repository, scheduler=scheduler, **unet)
    status, out, err = run(folder)
    assert (status, err) == (0, "")
    said = out.splitlines()[0].removeprefix(f"{folder}: ")
    assert re.match(rf"{re.escape(kind)}(iction)?( model \(LCM\))?( \(|:|,)", said), said


def test_small_models_are_not_taken_for_the_published_ones(run, tmp_path):
    write_stable_diffusion(tmp_path / "tiny", cross_attention_dim=32)
    assert "a U-Net for texts of 32 channels" in run(tmp_path / "tiny")[1]
    folder = lay_down(tmp_path / "x", "stable-diffusion-v1-5", block_out_channels=[32, 64, 64, 64])
    assert "of its own sizes, in the manner of Stable Diffusion 1" in run(folder)[1]
    status, out, _ = run("scenes")
    assert status == 0 and "scenes: a U-Net for texts of" in out


def unusual(out):
    lines = out.splitlines()
    assert "  unusual:" in lines, out
    return [line.strip() for line in lines[lines.index("  unusual:") + 1 :]]


def test_older_names_and_places_are_unusual(run, tmp_path):
    said = unusual(run(lay_down(tmp_path / "x", "stable-diffusion-v1-4"))[1])
    assert said == [
        "text_encoder: 197 of 197 tensors lie where their type can't be mapped: "
        "they are copied when they are loaded",
        "text_encoder: text_model.embeddings.position_ids is stored, a constant: ignored",
        "vae: 16 attention tensors have the names of 2022 (query, key, value, proj_attn): renamed",
    ]  # fmt: skip
    said = unusual(run(lay_down(tmp_path / "y", "stable-diffusion-v1-5"))[1])
    assert said[-1] == "vae: its config has no scaling_factor: 0.18215, as in 2022"


def test_newer_checkpoints_have_nothing_unusual(run, tmp_path):
    out = run(lay_down(tmp_path / "x", "sd-turbo", scheduler=EULER))[1]
    assert "unusual" not in out or unusual(out) == []


def test_types_that_differ_from_the_config_are_unusual(run, tmp_path):
    said = unusual(run(lay_down(tmp_path / "x", "stable-diffusion-xl-base-1.0", scheduler=EULER))[1])
    assert "text_encoder: its config says float16, its weights are float32, which counts" in said
    assert "vae: it overflows in float16: decode in float32 (force_upcast)" in said


def test_pickles_shards_and_old_schedulers_are_unusual(run, tmp_path):
    scheduler = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"}
    folder = lay_down(
        tmp_path / "x", "stable-diffusion-v1-5", scheduler=scheduler, pickled=["unet", "text_encoder"]
    )
    write_safetensors(
        {"a": (torch.float16, [1])}, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    )
    minidiff.AutoencoderKL().save_pretrained(folder / "vae", max_shard_size="500KB")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    status, out, _ = run(folder)
    said = unusual(out)
    assert status == 0 and out.count("pickled: not opened") == 2
    assert any(
        line.startswith("unet: diffusion_pytorch_model.bin is a pickle: minidiff reads") for line in said
    )
    assert (
        "unet: as safetensors there are only diffusion_pytorch_model.fp16.safetensors: see --variant" in said
    )
    assert any(line.startswith("vae: in ") and line.endswith(" files behind an index") for line in said)
    assert "scheduler: its config has no steps_offset; Stable Diffusion's pipelines take 1" in said
    assert "safety_checker: left out; minidiff has no StableDiffusionSafetyChecker" in said


def test_parts_in_the_checkpoint_s_own_folder_are_unusual(run, tmp_path):
    folder = lay_down(tmp_path / "x", "ddpm-cifar10-32", scheduler=EULER)
    for path in (*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()):
        path.rename(folder / path.name)
    (folder / "unet").rmdir()
    (folder / "scheduler").rmdir()
    said = unusual(run(folder)[1])
    assert "unet: in the checkpoint's own folder, as in 2022" in said
    assert any("attention tensors have the names of 2022" in line for line in said)


def test_a_variant_is_shown(run, tmp_path):
    folder = lay_down(tmp_path / "x", "stable-diffusion-v1-5", variant="fp16")
    status, out, _ = run(folder, "--variant", "fp16")
    assert status == 0 and "859,520,964  1,719,125,304  float16" in out
    status, out, err = run(folder)
    assert status == 2 and "choose with variant=" in err


def test_the_answer_for_ten_gigabytes_comes_within_a_second(run, tmp_path):
    folder = lay_down(tmp_path / "x", "stable-diffusion-xl-base-1.0", scheduler=EULER)
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) > 13e9
    start = time.process_time()
    status, out, _ = run(folder)
    assert status == 0 and "3,468,837,867" in out
    assert time.process_time() - start < 1


SINGLE = {
    "v1-5-pruned-emaonly": "Stable Diffusion 1", "v1-5-pruned": "Stable Diffusion 1",
    "sd-v1-5-inpainting": "Stable Diffusion 1 for inpainting", "v2-1_512-ema-pruned": "Stable Diffusion 2",
    "sd_xl_base_1.0": "Stable Diffusion XL",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in SINGLE if name in LDM["files"]])
def test_single_files_are_told_apart(run, tmp_path, name):
    kinds = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64, "I32": torch.int64}
    tensors = {n: (kinds[dtype], shape) for n, (dtype, shape) in LDM["files"][name]["tensors"].items()}
    path = tmp_path / f"{name}.safetensors"
    size = write_safetensors(tensors, path)
    start = time.process_time()
    status, out, err = run(path)
    assert (status, err) == (0, "") and time.process_time() - start < 1
    assert out.startswith(f"{path}: {SINGLE[name]}, as a single file\n")
    assert {"unet", "vae", "text_encoder", "together"} <= {line.split()[0] for line in out.splitlines()[2:]}
    assert f"{size:,}" in out
    assert ("stored twice, as trained and averaged" in out) == (name == "v1-5-pruned")
    assert ("no tensor says whether it predicts v" in out) == name.startswith("v2")


def test_a_pickled_single_file_is_not_opened(run, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x02cos\nsystem\nX")
    status, out, _ = run(tmp_path / "x.ckpt")
    assert status == 0 and "pickled: not opened; minidiff convert reads it" in out


def test_a_picture_is_no_checkpoint(run, tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    status, _, err = run(tmp_path / "x.png")
    assert status == 2 and "x.png is neither a .safetensors file nor one of torch.save" in err


def test_other_files_are_refused_by_name(run, tmp_path):
    write_safetensors({"a.lora_up.weight": (torch.float32, [4, 4])}, tmp_path / "lora.safetensors")
    status, _, err = run(tmp_path / "lora.safetensors")
    assert status == 2 and "it is a LoRA" in err
    (tmp_path / "text.safetensors").write_text("no such thing")
    status, _, err = run(tmp_path / "text.safetensors")
    assert status == 2 and str(tmp_path / "text.safetensors") in err


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_forged_configs_are_answered_in_one_line_or_shown(run, tmp_path, file):
    folder = write_stable_diffusion(tmp_path / "x")
    path = folder / file
    whole = path.read_text()
    for seed in range(60):
        path.write_bytes(forge_json(np.random.default_rng(seed), whole))
        status, out, err = run(folder)
        assert (status == 0 and out and not err) or (
            status == 2 and err.count("\n") == 1 and str(folder) in err
        ), seed
