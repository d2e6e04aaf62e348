"""from_pretrained and save_pretrained of a small model: files of every kind, whole, damaged, not fitting."""

import json
import pickle
import resource
import struct
import subprocess
import sys
import time

import diffusers
import numpy as np
import pytest
import torch
from parity import assert_close
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from minidiff import CheckpointError, UNet2DModel
from minidiff.checkpoints import files, keys
from minidiff.checkpoints.load import PretrainedModel


class Net(PretrainedModel):
    """Two linear layers, a running count and an attention, with the tensor names of a VAE's middle."""

    def __init__(self, channels: int = 4, layers: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(channels, channels) for _ in range(layers))
        self.attn = nn.Module()
        self.attn.to_q = nn.Linear(channels, channels)
        self.attn.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.register_buffer("count", torch.tensor(7))


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def assert_same(loaded, net, dtype=torch.float32):
    expected = {k: v.to(dtype) if v.is_floating_point() else v for k, v in net.state_dict().items()}
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in expected.items())
    assert loaded.dtype == dtype
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())


def in_the_old_way(tensors, path):
    """Writes safetensors as 2022: names in order, no padding, so that tensors begin at any byte."""
    head, offset = {"__metadata__": {"format": "pt"}}, 0
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    for name, tensor in sorted(tensors.items()):
        end = offset + tensor.numel() * tensor.element_size()
        head[name] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(head).encode()
    header += b" " * ((1 - len(header)) % 8)
    data = b"".join(t.contiguous().numpy().tobytes() for _, t in sorted(tensors.items()))
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def write(net, folder, kind):
    """net's config and weights in folder, the weights as a file of that kind."""
    net.save_config(folder)
    tensors = net.state_dict()
    half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    names = sorted(tensors)
    if kind == "safetensors":
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    elif kind == "unaligned":
        in_the_old_way(tensors, folder / WEIGHTS)
    elif kind == "half":
        save_file(half, folder / WEIGHTS)
    elif kind == "bin":
        torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    elif kind == "old bin":
        torch.save(tensors, folder / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif kind == "training bin":
        torch.save({"state_dict": tensors, "step": 3}, folder / "diffusion_pytorch_model.bin")
    elif kind == "shards":
        where = {}
        for i, part in enumerate((names[:3], names[3:])):
            shard = f"diffusion_pytorch_model-{i + 1:05}-of-00002.safetensors"
            save_file({n: tensors[n] for n in part}, folder / shard)
            where |= dict.fromkeys(part, shard)
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


KINDS = ["safetensors", "unaligned", "bin", "old bin", "training bin", "shards"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_every_kind_load_as_they_were_saved(net, tmp_path, kind):
    write(net, tmp_path, kind)
    assert_same(Net.from_pretrained(tmp_path), net)
    assert_same(Net.from_pretrained(tmp_path, torch_dtype=torch.float16), net, torch.float16)
    assert_same(Net.from_pretrained(str(tmp_path), torch_dtype="auto"), net)


def test_half_files_become_float32_unless_asked_otherwise_as_in_diffusers(net, tmp_path):
    write(net, tmp_path, "half")
    assert_same(Net.from_pretrained(tmp_path), net.half())
    assert_same(Net.from_pretrained(tmp_path, torch_dtype="auto"), net.half(), torch.float16)
    assert_same(Net.from_pretrained(tmp_path, torch_dtype=torch.bfloat16), net.half(), torch.bfloat16)
    with pytest.raises(TypeError, match=r"torch_dtype is a torch\.dtype, 'auto' or None, not 'half'"):
        Net.from_pretrained(tmp_path, torch_dtype="half")


@pytest.mark.parametrize("kind", ["safetensors", "unaligned", "bin"])
def test_tensors_lie_where_their_type_wants_and_training_leaves_the_file_alone(net, tmp_path, kind):
    write(net, tmp_path, kind)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    loaded = Net.from_pretrained(tmp_path)
    assert all(t.data_ptr() % t.element_size() == 0 for t in loaded.state_dict().values())
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_weights_are_mapped_not_read(tmp_path):
    size = 1 << 30  # would take seconds and a gibibyte of memory
    head = json.dumps({"weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(head) + -len(head) % 8) + head + b" " * (-len(head) % 8))
        file.truncate(file.tell() + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    class One(PretrainedModel):
        def __init__(self, size: int):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(size))

    (tmp_path / "config.json").write_text(json.dumps({"size": size // 4}))
    assert One.from_pretrained(tmp_path).weight[-1] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_a_subfolder_and_a_variant_are_found(net, tmp_path):
    net.save_pretrained(tmp_path / "net", variant="ema")
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.ema.safetensors",
    ]
    assert_same(Net.from_pretrained(tmp_path, "net", "ema"), net)
    assert_same(Net.from_pretrained(tmp_path, subfolder="net", variant="ema", use_safetensors=True), net)
    with pytest.raises(
        CheckpointError, match=r"it has diffusion_pytorch_model\.ema\.safetensors: choose with variant="
    ):
        Net.from_pretrained(tmp_path, "net")


def test_what_is_saved_is_complete_and_readable_by_others(net, tmp_path):
    net.to(memory_format=torch.channels_last)
    net.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["_class_name"], config["channels"]) == ("Net", 4)
    assert_same(Net.from_pretrained(tmp_path), net)


def test_diffusers_reads_what_we_save_and_we_read_what_it_saves(tmp_path):
    torch.manual_seed(0)
    levels = {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"]}
    ours = UNet2DModel(sample_size=8, block_out_channels=[32], layers_per_block=1, **levels).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in theirs.state_dict().items())
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB", variant="fp16")
    assert len(list((tmp_path / "theirs").glob("*-of-*"))) > 2
    again = UNet2DModel.from_pretrained(tmp_path / "theirs", variant="fp16")
    sample, timestep = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    assert_close(again(sample, timestep).sample, ours(sample, timestep).sample)


# --- faults of weight files ---


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
@pytest.mark.parametrize("left", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_an_error_with_its_name(net, tmp_path, kind, left):
    write(net, tmp_path, kind)
    path = next(p for p in tmp_path.iterdir() if p.suffix != ".json")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * left) if isinstance(left, float) else left])
    with pytest.raises(CheckpointError, match=rf"{path.name} (is damaged|holds no table)"):
        Net.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
def test_a_file_with_changed_bytes_loads_or_is_a_checkpoint_error(net, tmp_path, kind):
    write(net, tmp_path, kind)
    path = next(p for p in tmp_path.iterdir() if p.suffix != ".json")
    data, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(200):
        changed = bytearray(data)
        changed[rng.integers(min(len(data), 900))] = rng.integers(256)
        path.write_bytes(changed)
        try:
            Net.from_pretrained(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > 50


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('run')",))


def test_a_pickle_that_holds_a_program_is_refused_and_not_run(net, tmp_path):
    net.save_config(tmp_path)
    torch.save({"weight": Evil()}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"model\.bin is damaged, .*, or holds more than tensors.*safetensors"
    ):
        Net.from_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"weight": Evil()}))
    with pytest.raises(CheckpointError, match=r"model\.bin is damaged"):
        Net.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, torch.zeros(3)])
def test_a_pickle_of_something_else_is_refused(net, tmp_path, content):
    net.save_config(tmp_path)
    torch.save(content, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no table of tensors"):
        Net.from_pretrained(tmp_path)


def test_a_git_lfs_pointer_is_recognized(net, tmp_path):
    net.save_config(tmp_path)
    (tmp_path / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3438167534\n"
    )
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is a Git-LFS pointer, .* run git lfs pull"):
        Net.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "has no weight_map"),
        (
            lambda index: index["weight_map"].update(count="../../x.safetensors"),
            r"names \.\./\.\./x\.safetensors",
        ),
        (lambda index: index["weight_map"].update(count="/etc/passwd"), "names /etc/passwd"),
        (
            lambda index: index["weight_map"].update(more=f"{WEIGHTS[:-12]}-00001-of-00002.safetensors"),
            "not in their",
        ),
        (lambda index: index["weight_map"].update(count=["x"]), "names"),
    ],
)
def test_an_index_that_does_not_match_its_shards_is_refused(net, tmp_path, change, message):
    write(net, tmp_path, "shards")
    path = tmp_path / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        Net.from_pretrained(tmp_path)


def test_a_missing_shard_is_named(net, tmp_path):
    write(net, tmp_path, "shards")
    next(tmp_path.glob("*-00002-of-00002.safetensors")).unlink()
    with pytest.raises(
        CheckpointError, match=r"index\.json names .*-00002-of-00002\.safetensors, which its folder"
    ):
        Net.from_pretrained(tmp_path)


# --- weights and configs that do not belong together ---


def change_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def test_missing_unexpected_and_misshaped_tensors_are_listed(net, tmp_path):
    net.save_pretrained(tmp_path)

    def change(weights):
        del weights["attn.to_q.bias"], weights["count"]
        weights["lora.A"] = torch.zeros(1)
        weights["layers.0.weight"] = torch.zeros(4, 5)

    change_weights(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        Net.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / WEIGHTS} does not fit {tmp_path / 'config.json'}; tensors: 2 missing: "
        "attn.to_q.bias, count; 1 unexpected: lora.A; 1 of another shape: "
        "layers.0.weight (4, 5) instead of (4, 4)"
    )


def test_long_lists_are_cut_with_their_count(net, tmp_path):
    Net(layers=30).save_pretrained(tmp_path)
    net.save_config(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"56 unexpected: layers\.10\.bias, .*, layers\.11\.weight and 52 more$"
    ):
        Net.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 10**9}, "more than 1018 tensors, far more than its file has"),
        ({"channels": 10**9}, "8 of another shape: "),
        ({"channels": 2**62}, "config.json: "),
        ({"channels": "four"}, "config.json: "),
        ({"channels": -1}, "config.json: "),
        ({"layers": None}, "config.json: "),
        ({"depth": 3}, "config.json: Net has no option depth"),
        ({"_class_name": "UNet2DModel"}, "config.json describes a UNet2DModel, not a Net"),
        ({"_class_name": ["Net"]}, r"config.json describes a \['Net'\], not a Net"),
    ],
)
def test_a_config_that_asks_for_nonsense_is_answered_at_once(net, tmp_path, options, message):
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | options))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        Net.from_pretrained(tmp_path)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "key", ["layers_per_block", "block_out_channels", "attention_head_dim", "num_class_embeds"]
)
def test_a_unet_of_a_thousand_million_is_refused_at_once(tmp_path, key):
    levels = {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"]}
    UNet2DModel(sample_size=8, block_out_channels=[32], layers_per_block=1, **levels).save_pretrained(
        tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config[key] = [10**9] if isinstance(config[key], list) else 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        UNet2DModel.from_pretrained(tmp_path)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
def test_a_missing_file_is_named(net, tmp_path, file):
    net.save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=f"{tmp_path} has no {file}"):
        Net.from_pretrained(tmp_path)


def test_keys_that_begin_with_an_underscore_pass(net, tmp_path):
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "_name_or_path": "x",
        "_diffusers_version": "0.2.2",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(Net.from_pretrained(tmp_path), net)


# --- names of older files ---

OLD = {"attn.query": "attn.to_q", "attn.proj_attn": "attn.to_out.0"}


@pytest.mark.parametrize("renamed", [["attn.query"], ["attn.proj_attn"], list(OLD)])
def test_early_attention_names_load_key_by_key(net, tmp_path, renamed):
    net.save_pretrained(tmp_path)

    def change(weights):
        for old in renamed:
            for end in ("weight", "bias"):
                weights[f"{old}.{end}"] = weights.pop(f"{OLD[old]}.{end}")

    change_weights(tmp_path, change)
    assert_same(Net.from_pretrained(tmp_path), net)


def test_both_spellings_of_one_tensor_are_an_error(net, tmp_path):
    net.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda w: w.update({"attn.query.bias": torch.zeros(4)}))
    with pytest.raises(CheckpointError, match=r"1 unexpected: attn\.query\.bias"):
        Net.from_pretrained(tmp_path)


def test_names_are_translated_only_into_names_that_the_model_has():
    wanted = {"a.to_q.weight", "b.key.weight", "text_model.encoder.x", "encoder.y"}
    names = {
        "a.query.weight",
        "b.key.weight",
        "c.value.bias",
        "encoder.x",
        "encoder.y",
        "embeddings.position_ids",
    }
    assert keys.translate(names, wanted) == {
        "a.to_q.weight": "a.query.weight",
        "b.key.weight": "b.key.weight",
        "c.value.bias": "c.value.bias",
        "text_model.encoder.x": "encoder.x",
        "encoder.y": "encoder.y",
    }


# --- writing ---

FULL_DISK = """
import resource, signal, sys
import torch
from minidiff import CheckpointError, UNet2DModel
levels = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
model = UNet2DModel(sample_size=8, block_out_channels=[32], layers_per_block=1, **levels)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    model.save_pretrained(sys.argv[1])
except CheckpointError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint_whole(net, tmp_path):
    net.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", FULL_DISK, tmp_path, "100000"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.startswith(f"{tmp_path / WEIGHTS} can't be written: ")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_save_leaves_the_old_checkpoint_whole(net, tmp_path, monkeypatch):
    net.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("minidiff.checkpoints.files.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Net(channels=8).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_written_weights_are_as_readable_as_any_new_file(tmp_path):
    (tmp_path / "any").touch()
    files.write_tensors(tmp_path / "model.safetensors", {"x": torch.zeros(2)})
    modes = {(tmp_path / name).stat().st_mode for name in ("any", "model.safetensors")}
    assert len(modes) == 1
