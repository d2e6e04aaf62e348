"""Weights in several files behind an index: written as diffusers writes them, read whatever was written."""

import json

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints_load import WEIGHTS, Net, assert_same

from minidiff import AutoencoderKL, CheckpointError, CLIPTextModel, UNet2DModel
from minidiff.checkpoints import layout

STEM = WEIGHTS.removesuffix(".safetensors")
INDEX = f"{WEIGHTS}.index.json"
SMALL = {"block_out_channels": [32], "layers_per_block": 1, "norm_num_groups": 8}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def unet():
    torch.manual_seed(0)
    return UNet2DModel(down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], **SMALL).eval()


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["100KB", "60 kb", 40_000, "0.05MB", "10GB"])
def test_shards_are_named_and_filled_as_diffusers_does_it(tmp_path, size, variant):
    model = unet()
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    infix = f".{variant}" if variant else ""
    theirs = huggingface_hub.split_torch_state_dict_into_shards(  # the library that diffusers asks
        model.state_dict(), max_shard_size=size, filename_pattern=f"{STEM}{infix}{{suffix}}.safetensors"
    )
    index = [f"{WEIGHTS}.index{infix}.json"] if theirs.is_sharded else []
    assert names(tmp_path) == sorted(["config.json", *index, *theirs.filename_to_tensors])
    for name, tensors in theirs.filename_to_tensors.items():
        assert load_file(tmp_path / name).keys() == set(tensors)
    for name in index:
        expected = {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}
        assert json.loads((tmp_path / name).read_text()) == expected
    for read in (diffusers.UNet2DModel, UNet2DModel):
        again = read.from_pretrained(tmp_path, variant=variant).state_dict()
        assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())


def test_what_diffusers_writes_is_read(tmp_path):
    ours = unet()
    theirs = diffusers.UNet2DModel.from_config(dict(ours.config))
    theirs.load_state_dict(ours.state_dict())
    for variant in (None, "fp16"):
        theirs.save_pretrained(tmp_path, variant=variant, max_shard_size="50KB")
        again = UNet2DModel.from_pretrained(tmp_path, variant=variant).state_dict()
        assert all(torch.equal(again[k], v) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("made", [
    lambda: AutoencoderKL(block_out_channels=[16], norm_num_groups=8),
    lambda: CLIPTextModel(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2),
])  # fmt: skip
def test_other_models_are_sharded_too(tmp_path, made):
    import transformers

    model = made()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(names(tmp_path)) > 3
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())
    if isinstance(model, CLIPTextModel):
        theirs = transformers.CLIPTextModel.from_pretrained(tmp_path).state_dict()
    else:
        theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path).state_dict()
    ours = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    assert all(torch.equal(v, ours[k.removeprefix("text_model.")]) for k, v in theirs.items())


def test_a_tensor_larger_than_a_shard_stands_alone(net, tmp_path):
    net.save_pretrained(tmp_path, max_shard_size=1)
    assert len(names(tmp_path)) == 2 + len(net.state_dict())
    assert_same(Net.from_pretrained(tmp_path), net)


def test_what_an_earlier_call_wrote_does_not_stay_and_other_variants_do(net, tmp_path):
    net.save_pretrained(tmp_path, variant="ema")
    net.save_pretrained(tmp_path)
    kept = [f"{STEM}.ema.safetensors"]
    for size in (100, 50, "1GB", 100):
        net = Net(channels=net.config.channels)  # other weights every time
        net.save_pretrained(tmp_path, max_shard_size=size)
        shards = [name for name in names(tmp_path) if "-of-" in name]
        assert len({name[-17:] for name in shards}) <= 1  # all of one count
        assert (INDEX in names(tmp_path)) == bool(shards) == (WEIGHTS not in names(tmp_path))
        assert set(kept) <= set(names(tmp_path))
        assert_same(Net.from_pretrained(tmp_path), net)
    net.save_pretrained(tmp_path, variant="ema", max_shard_size=100)
    assert f"{STEM}.ema.safetensors" not in names(tmp_path)
    assert_same(Net.from_pretrained(tmp_path, variant="ema"), net)


def test_an_interrupted_save_leaves_the_old_shards(net, tmp_path, monkeypatch):
    net.save_pretrained(tmp_path, max_shard_size=100)
    before, calls = {p.name: p.read_bytes() for p in tmp_path.iterdir()}, []

    def interrupted(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save_file(tensors, path, metadata)

    monkeypatch.setattr("minidiff.checkpoints.files.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Net().save_pretrained(tmp_path, max_shard_size=100)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("size", ["", "ten", "10 pounds", 0, -5, "0GB", None, True, "1e400GB"])
def test_a_size_that_is_none_is_refused(net, tmp_path, size):
    with pytest.raises(
        ValueError, match=r"max_shard_size is a number of bytes or a text such as '10GB', not"
    ):
        net.save_pretrained(tmp_path, max_shard_size=size)
    assert names(tmp_path) == []


def test_sizes_are_read_as_diffusers_reads_them():
    sizes = {"10GB": 10**10, "5MB": 5 * 10**6, "3kb": 3000, "2 TB": 2 * 10**12, 12: 12}
    assert {size: layout.bytes_in(size) for size in sizes} == sizes


# --- an index whose shards disagree ---


def change_shard(folder, number, change):
    path = sorted(folder.glob("*-of-*"))[number]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path.name


def test_a_tensor_that_the_index_does_not_know_is_an_error(net, tmp_path):
    net.save_pretrained(tmp_path, max_shard_size=100)
    shard = change_shard(tmp_path, 0, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(
        CheckpointError, match=rf"{shard} has tensors that .*{INDEX} does not expect there: extra"
    ):
        Net.from_pretrained(tmp_path)


def test_a_tensor_in_two_shards_is_an_error(net, tmp_path):
    net.save_pretrained(tmp_path, max_shard_size=100)
    first = load_file(sorted(tmp_path.glob("*-of-*"))[0])
    name = next(iter(first))
    shard = change_shard(tmp_path, 1, lambda tensors: tensors.update({name: first[name] + 1}))
    with pytest.raises(CheckpointError, match=rf"{shard} has tensors that .* does not expect there: {name}"):
        Net.from_pretrained(tmp_path)


def test_a_tensor_that_no_shard_has_is_an_error(net, tmp_path):
    net.save_pretrained(tmp_path, max_shard_size=100)
    change_shard(tmp_path, 1, lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(CheckpointError, match=rf"{INDEX} names tensors that are not in their shards: "):
        Net.from_pretrained(tmp_path)


def test_a_damaged_shard_is_named(net, tmp_path):
    net.save_pretrained(tmp_path, max_shard_size=100)
    path = sorted(tmp_path.glob("*-of-*"))[-1]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged .*was it cut off"):
        Net.from_pretrained(tmp_path)


def test_shards_of_another_save_that_the_index_does_not_name_are_not_opened(net, tmp_path):
    net.save_pretrained(tmp_path, max_shard_size=100)
    (tmp_path / f"{STEM}-00001-of-00009.safetensors").write_text("from an older save")
    assert_same(Net.from_pretrained(tmp_path), net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_change_their_type(net, tmp_path, dtype):
    net.save_pretrained(tmp_path, max_shard_size=100)
    assert_same(Net.from_pretrained(tmp_path, torch_dtype=dtype), net, dtype)
