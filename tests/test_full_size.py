"""Every published weight file loads at its full size: strictly, with all of its tensors used.

The files are written here from what the published headers say (data/manifests.json.gz): names, shapes, types,
and, where it is known, the order and the place of every byte. Nearly all values are zeros that take no room
on the disk; the first and the last value of each tensor are not, and are looked for.
"""

import json
import re
import struct

import pytest
import torch
from test_manifests import DATA

import minidiff
from minidiff.checkpoints import keys

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def removed(tmp_path):
    """Leaves none of these files behind."""
    yield
    for path in tmp_path.iterdir():
        path.unlink()


SAFETENSORS = {"CLIPTextModel": "model", "CLIPTextModelWithProjection": "model"}
PICKLES = {"CLIPTextModel": "pytorch_model"}
ONLY_PICKLED = re.compile(
    r"ddpm-.*|stable-diffusion-(v1-[123]|2-base)\..*|stable-diffusion-inpainting\.[^.]*"
)
# {file: published size}; files of 2022 are not padded, so that their tensors begin anywhere
UNPADDED = {
    "stable-diffusion-v1-4.unet": 3_438_167_534,
    "stable-diffusion-v1-4.text_encoder": 492_265_879,
    "stable-diffusion-2-1-base.unet": 3_463_726_498,
    "stable-diffusion-2-1-base.text_encoder": 1_361_597_018,
    "stable-diffusion-2-1.unet": 3_463_726_498,
    "stable-diffusion-2-1.text_encoder": 1_361_597_018,
}
PADDED = {
    "stable-diffusion-v1-4.unet.fp16": 1_719_125_304,
    "stable-diffusion-v1-4.vae": 334_643_276,
    "stable-diffusion-v1-4.vae.fp16": 167_335_342,
    "stable-diffusion-v1-4.text_encoder.fp16": 246_144_864,
    "stable-diffusion-inpainting.unet.fp16": 1_719_154_104,
    "stable-diffusion-xl-base-1.0.unet": 10_270_077_736,
    "stable-diffusion-xl-base-1.0.unet.fp16": 5_135_149_760,
    "stable-diffusion-xl-base-1.0.vae": 334_643_268,
    "stable-diffusion-xl-base-1.0.text_encoder": 492_265_168,
    "stable-diffusion-xl-base-1.0.text_encoder_2": 2_778_702_264,
    "stable-diffusion-xl-base-1.0.text_encoder_2.fp16": 1_389_382_176,
}


def manifest(file):
    """{name: (type, shape)} of a published file; all numbers are floating but CLIP's positions."""
    floating = torch.float16 if file.endswith(".fp16") else torch.float32
    shapes = DATA["tensors"][DATA["files"][file]["tensors"]]
    return {n: (torch.int64 if n.endswith("position_ids") else floating, s) for n, s in shapes.items()}


def write_safetensors(tensors, path, padded=True):
    """Writes a sparse file and returns its size. Unpadded text encoders are sorted by name alone."""
    by_name = not padded and path.name.startswith("model")
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    head, at = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors, key=lambda n: n if by_name else (-tensors[n][0].itemsize, n)):
        dtype, shape = tensors[name]
        end = at + torch.Size(shape).numel() * dtype.itemsize
        head[name] = {"dtype": kinds[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8 if padded else 0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
        for i, (name, (dtype, _)) in enumerate(tensors.items()):
            start, end = head[name]["data_offsets"]
            for place, value in ((start, first(i)), (end - dtype.itemsize, last(i))):
                file.seek(8 + len(text) + place)
                file.write(torch.tensor([value]).to(dtype).numpy().tobytes())
    return 8 + len(text) + at


def first(i):
    return i % 100 + 1


def last(i):
    return -(i % 100) - 2


def load(file, folder, **options):
    """(the model, the file's names by ours); the model's class is the one that the config names."""
    config = DATA["files"][file]["config"]
    (folder / "config.json").write_text(json.dumps(config))
    name = config.get("_class_name") or config["architectures"][0]
    variant = "fp16" if file.endswith(".fp16") else None
    model = getattr(minidiff, name).from_pretrained(folder, variant=variant, **options)
    return model, keys.translate(manifest(file), model.state_dict())


def class_of(file):
    config = DATA["files"][file]["config"]
    return config.get("_class_name") or config["architectures"][0]


def assert_whole(model, names, tensors, dtype):
    """All tensors of the file are in the model, in that type, at a place fit for it, with their values."""
    state, numbers = model.state_dict(), {name: i for i, name in enumerate(tensors)}
    assert names.keys() == state.keys()
    unused = tensors.keys() - set(names.values())
    assert all(name.endswith("position_ids") for name in unused)
    for ours, theirs in names.items():
        values = state[ours].view(-1)
        assert values.dtype == dtype and list(state[ours].shape) == tensors[theirs][1]
        assert values.data_ptr() % dtype.itemsize == 0
        i = numbers[theirs]
        assert (values[-1], values[0]) == (last(i), first(i) if len(values) > 1 else last(i)), ours


@pytest.mark.parametrize("file", DATA["files"])
def test_every_published_file_loads_at_full_size(file, tmp_path):
    tensors, variant = manifest(file), ".fp16" if file.endswith(".fp16") else ""
    stem = SAFETENSORS.get(class_of(file), "diffusion_pytorch_model")
    size = write_safetensors(tensors, tmp_path / f"{stem}{variant}.safetensors", file not in UNPADDED)
    assert size == (UNPADDED | PADDED).get(file, size)
    model, names = load(file, tmp_path, torch_dtype="auto")
    assert_whole(model, names, tensors, torch.float16 if variant else torch.float32)


@pytest.mark.parametrize("file", [f for f in DATA["files"] if ONLY_PICKLED.fullmatch(f)])
def test_what_is_published_as_a_pickle_alone_loads_at_full_size(file, tmp_path):
    tensors = manifest(file)
    stem = PICKLES.get(class_of(file), "diffusion_pytorch_model")
    empty = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}
    with torch.serialization.skip_data():  # zeros, without room on the disk
        torch.save(empty, tmp_path / f"{stem}.bin")
    model, names = load(file, tmp_path)
    assert names.keys() == model.state_dict().keys()
    assert all(not t.view(-1)[:: max(1, t.numel() // 9)].any() for t in model.state_dict().values())
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("file", "dtype"),
    [
        ("stable-diffusion-v1-5.unet", torch.float16),
        ("stable-diffusion-v1-4.unet", torch.float16),  # from places that are not fit for float32
        ("stable-diffusion-v1-5.vae", torch.bfloat16),
        ("stable-diffusion-v1-4.text_encoder", torch.float16),
        ("stable-diffusion-v1-5.text_encoder.fp16", torch.float32),
        ("stable-diffusion-v1-5.vae.fp16", None),
    ],
)
def test_full_size_weights_change_their_type(file, dtype, tmp_path):
    tensors, variant = manifest(file), ".fp16" if file.endswith(".fp16") else ""
    stem = SAFETENSORS.get(class_of(file), "diffusion_pytorch_model")
    write_safetensors(tensors, tmp_path / f"{stem}{variant}.safetensors", file not in UNPADDED)
    model, names = load(file, tmp_path, torch_dtype=dtype)
    assert_whole(model, names, tensors, dtype or torch.float32)


def test_a_full_size_pickle_is_converted_in_little_memory(tmp_path):
    file = "ddpm-celebahq-256.unet"
    empty = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in manifest(file).items()}
    with torch.serialization.skip_data():
        torch.save(empty, tmp_path / "diffusion_pytorch_model.bin")
    model, _ = load(file, tmp_path, torch_dtype=torch.float16)
    assert model.dtype == torch.float16 and not any(t.any() for t in model.state_dict().values())
