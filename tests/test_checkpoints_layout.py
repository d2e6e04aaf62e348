"""What is believed of a checkpoint's folder: names, links, JSON, and which files hold the weights."""

import json
import subprocess
import sys

import pytest

from minidiff import CheckpointError
from minidiff.checkpoints import hub, layout
from minidiff.config import replacing


@pytest.mark.parametrize("name", ["../x.json", "/etc/passwd", "a/../../x", "a\\..\\x", "x\0.json", ".."])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="is not a name inside the checkpoint's folder"):
        layout.inside(tmp_path, name)
    with pytest.raises(CheckpointError, match="is not a name inside the checkpoint's folder"):
        hub.read_json(tmp_path, "config.json", name)


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").symlink_to(tmp_path / "secret.json")
    (folder / "unet").symlink_to(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"config\.json is a link that leads out of the checkpoint's folder"
    ):
        hub.read_json(folder, "config.json")
    with pytest.raises(CheckpointError, match="unet is a link that leads out"):
        hub.read_json(folder, "secret.json", "unet")


def test_links_within_the_folder_and_to_the_folder_are_followed(tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "unet").mkdir(parents=True)
    (folder / "real.json").write_text('{"a": 1}')
    (folder / "unet" / "config.json").symlink_to("../real.json")
    (tmp_path / "alias").symlink_to(folder)
    assert hub.read_json(tmp_path / "alias", "config.json", "unet") == {"a": 1}


def test_links_from_a_snapshot_to_the_blobs_of_its_repository_are_followed(tmp_path):
    repository = tmp_path / "models--me--tiny"
    snapshot = repository / "snapshots" / "abc"
    (snapshot / "unet").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "123").write_text('{"a": 1}')
    (tmp_path / "other").write_text("{}")
    (snapshot / "unet" / "config.json").symlink_to("../../../blobs/123")
    (snapshot / "unet" / "other.json").symlink_to(tmp_path / "other")
    for folder, subfolder in ((snapshot, "unet"), (snapshot / "unet", None)):
        assert hub.read_json(folder, "config.json", subfolder) == {"a": 1}
        with pytest.raises(CheckpointError, match="leads out"):
            hub.read_json(folder, "other.json", subfolder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no valid JSON"),
        (b'{"a": 1', "no valid JSON"),
        (b"[1, 2]", "must hold a JSON object, not a list"),
        (b'"text"', "must hold a JSON object, not a str"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice"),
        (b'{"x": {"a": 1, "a": 3}}', "the key 'a' stands twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b'{"a": "\xff"}', "is not UTF-8 text: invalid start byte at byte 7"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "Git-LFS pointer"),
    ],
    ids=["empty", "cut", "list", "text", "twice", "twice inside", "deep", "huge number", "latin", "pointer"],
)
def test_what_is_no_config_is_refused_with_the_file_and_the_reason(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
        layout.read_json(tmp_path / "config.json")


def test_a_file_far_too_large_for_a_config_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "MAX_TEXT_BYTES", 1 << 20)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="larger than 1 MiB: no config"):
        layout.read_json(tmp_path / "config.json")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        layout.read_json(tmp_path / "config.json")


UNET = "diffusion_pytorch_model"
# SD 1.5's unet folder, in-painting's (float32 as .bin only), shards, shards of a variant, a text encoder
FOLDERS = {
    "both": [f"{UNET}{v}.{e}" for v in ("", ".fp16", ".non_ema") for e in ("safetensors", "bin")],
    "mixed": [f"{UNET}.bin", f"{UNET}.fp16.bin", f"{UNET}.fp16.safetensors"],
    "shards": [f"{UNET}.safetensors.index.json", *(f"{UNET}-0000{i}-of-00002.safetensors" for i in (1, 2))],
    "shards of fp16": [f"{UNET}.safetensors.index.fp16.json"]
    + [f"{UNET}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)],
    "shards of bin": [f"{UNET}.bin.index.json", f"{UNET}-00001-of-00001.bin"],
}


@pytest.mark.parametrize(
    ("folder", "variant", "use_safetensors", "picked"),
    [
        ("both", None, None, [f"{UNET}.safetensors"]),
        ("both", None, False, [f"{UNET}.bin"]),
        ("both", "fp16", None, [f"{UNET}.fp16.safetensors"]),
        ("both", "non_ema", False, [f"{UNET}.non_ema.bin"]),
        ("mixed", None, None, [f"{UNET}.bin"]),
        ("mixed", "fp16", None, [f"{UNET}.fp16.safetensors"]),
        ("mixed", "fp16", False, [f"{UNET}.fp16.bin"]),
        ("shards", None, None, FOLDERS["shards"]),
        ("shards of fp16", "fp16", True, FOLDERS["shards of fp16"]),
        ("shards of bin", None, None, FOLDERS["shards of bin"]),
    ],
)
def test_the_weight_file_is_picked_by_variant_and_format(folder, variant, use_safetensors, picked):
    names = {*FOLDERS[folder], "config.json"}
    assert layout.pick_weights(names, "unet", f"{UNET}.safetensors", variant, use_safetensors) == picked


def test_transformers_has_its_own_name_for_pickles():
    names = {"pytorch_model.bin", "pytorch_model.fp16.bin"}
    assert layout.pick_weights(names, "here", "model.safetensors", "fp16") == ["pytorch_model.fp16.bin"]


@pytest.mark.parametrize(
    ("folder", "variant", "use_safetensors", "message"),
    [
        (
            "mixed",
            None,
            True,
            rf"unet has no {UNET}\.safetensors; it has {UNET}\.bin, .*choose with variant=",
        ),
        ("mixed", "bf16", None, rf"unet has no {UNET}\.bf16\.safetensors or {UNET}\.bf16\.bin; it has"),
        (
            "shards of fp16",
            None,
            None,
            rf"unet has no {UNET}\.safetensors or {UNET}\.bin; it has {UNET}\.fp16-00001",
        ),
    ],
)
def test_a_missing_weight_file_is_named_with_what_is_there(folder, variant, use_safetensors, message):
    with pytest.raises(CheckpointError, match=message):
        layout.pick_weights(set(FOLDERS[folder]), "unet", f"{UNET}.safetensors", variant, use_safetensors)


def test_a_folder_without_weights_says_so():
    with pytest.raises(CheckpointError, match=r"unet has no .*; it has no weights$"):
        layout.pick_weights({"config.json"}, "unet", f"{UNET}.safetensors")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    layout.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), layout.replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_an_error_names_the_file_and_not_its_temporary_one(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a.txt") as temporary:
        temporary.read_text()
    assert caught.value.filename == str(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a.txt"):
        (tmp_path / "b.txt").read_text()
    assert str(caught.value.filename) == str(tmp_path / "b.txt")


def test_a_place_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/a\.txt can't be written: "):
        layout.write_text(tmp_path / "file" / "a.txt", "text")


def test_configs_are_read_where_torch_is_not_installed(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"beta_end": 0.02}))
    code = f"""
import sys
sys.modules["torch"] = sys.modules["huggingface_hub"] = None
from minidiff.checkpoints import CheckpointError, hub
assert hub.read_json({str(tmp_path)!r}, "scheduler_config.json", "scheduler") == {{"beta_end": 0.02}}
"""
    subprocess.run([sys.executable, "-c", code], check=True)
