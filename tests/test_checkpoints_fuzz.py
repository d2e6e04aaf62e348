"""Checkpoints from strangers: thousands of damaged and forged files, each refused at once, or read rightly.

Every case is a small checkpoint with one file changed. Loading it ends in a CheckpointError that names the
file, or the change was harmless: then what is loaded is what another reader finds in the files. Either way
within a second of processor time and 200 MB of memory, and no code from the files is run. The cases come from
seeds; the few in the quick suite are the first of those in the slow one.
"""

import json
import math
import os
import pickle
import shutil
import struct
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file
from test_checkpoints_load import WEIGHTS, Net, write
from tiny_pipelines import write_ddpm, write_stable_diffusion

import minidiff
from minidiff import CheckpointError

SECONDS, MEGABYTES = 1.0, 200
PICKLE = "diffusion_pytorch_model.bin"
# of torch about old pickles, and of NumPy about betas of 1e308
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def few_and_many(few, many):
    """Seeds for the quick suite, and the others, marked slow."""
    return pytest.mark.parametrize(
        "seeds", [range(few), pytest.param(range(few, many), marks=pytest.mark.slow)], ids=["few", "many"]
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{kind: folder} of small whole checkpoints; tests change copies."""
    root = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    net = Net()
    for kind in ("safetensors", "bin", "old bin", "shards"):
        (root / kind).mkdir()
        write(net, root / kind, kind)
    write_stable_diffusion(root / "sd")
    write_ddpm(root / "ddpm")
    tokenizer = json.loads((root / "sd" / "tokenizer" / "vocab.json").read_text())
    merges = (root / "sd" / "tokenizer" / "merges.txt").read_text().split("\n")[1:-1]
    (root / "new tokenizer").mkdir()
    whole = {"model": {"vocab": tokenizer, "merges": [merge.split(" ") for merge in merges]}}
    (root / "new tokenizer" / "tokenizer.json").write_text(json.dumps(whole))
    (root / "new tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def copy(checkpoints, tmp_path):
    def copied(kind):
        return Path(shutil.copytree(checkpoints[kind], tmp_path / "checkpoint", symlinks=True))

    return copied


@pytest.fixture(autouse=True)
def little_memory():
    """Fails a test in which the process grows by more than MEGABYTES."""
    peak = Path("/proc/self/clear_refs")
    if sys.platform != "linux":
        yield
        return
    peak.write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < MEGABYTES


def memory(key):
    """A line of the process's status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1000


def attempt(load, file):
    """What load() returns, or None for a proper CheckpointError: one line that names the file."""
    start = time.process_time()
    try:
        loaded = load()
    except CheckpointError as error:
        message, loaded = str(error), None
        assert str(file) in message, f"{file} is not named in {message!r}"
        assert len(message) > len(str(file)) + 8 and len(message) < 2500, message
        message.encode()
    assert time.process_time() - start < SECONDS
    return loaded


def same(tensors, expected):
    return tensors.keys() == expected.keys() and all(
        torch.equal(torch.nan_to_num(tensors[k]), torch.nan_to_num(v)) for k, v in expected.items()
    )


# --- safetensors ---


def safetensors_bytes(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parted(content):
    """(header as a dict, data) of a whole safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


NUMBERS = [0, 1, -1, 4, 2**31, 2**32 + 4, 2**62, 2**63, 2**64 - 1, 10**30, 1.5, True, None, "4", [], math.nan]


def forge_header(rng, header, data):
    """One lie in one entry of a header; perhaps other data."""
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    other = rng.choice([n for n in header if n not in ("__metadata__", name)])
    number = NUMBERS[rng.integers(len(NUMBERS))]
    kind = rng.integers(13)
    if kind == 0:
        entry["data_offsets"][rng.integers(2)] = number
    elif kind == 1:
        entry["data_offsets"] = [o + int(rng.integers(-8, 9)) for o in entry["data_offsets"]]
    elif kind == 2:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == 3:
        entry["shape"] = [*entry["shape"], number]
    elif kind == 4:
        entry["shape"] = [number] * int(rng.integers(0, 70))
    elif kind == 5:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 6:
        entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "I8", "BOOL", "F4", "C64", "X", "f32", ""])
    elif kind == 7:
        del entry[rng.choice(list(entry))]
    elif kind == 8:
        header[f"{name}{rng.choice(['.x', '/../../x', chr(0), chr(27) + '[2J', ''])}"] = header.pop(name)
    elif kind == 9:
        entry[rng.choice(["dtype", "shape", "data_offsets"])] = [number, {}, "x", [[[]]]][rng.integers(4)]
    elif kind == 10:
        header["__metadata__"] = [number, {"a": number}, [], {"__proto__": "x"}][rng.integers(4)]
    elif kind == 11:
        header["empty"] = {"dtype": "F32", "shape": [0, 2**60], "data_offsets": [0, 0]}
    else:
        data = data[: int(rng.integers(len(data)))] if rng.integers(2) else data + bytes(rng.integers(1, 99))
    return header, data


def damage_bytes(rng, content):
    """One accident: cut off, bytes changed, lost, doubled, or a wrong length of the header."""
    content, at = bytearray(content), int(rng.integers(len(content)))
    kind = rng.integers(6)
    if kind == 0:
        del content[at:]
    elif kind == 1:
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(min(len(content), 1200))] = rng.integers(256)
    elif kind == 2:
        del content[at : at + int(rng.integers(1, 64))]
    elif kind == 3:
        content[at:at] = content[at : at + int(rng.integers(1, 64))]
    elif kind == 4:
        content[:8] = struct.pack("<Q", int(rng.choice(np.array([0, 1, 99, 2**24, 2**40, 2**63], np.uint64))))
    else:
        content[at] ^= 1 << int(rng.integers(8))
    return bytes(content)


@few_and_many(60, 900)
def test_forged_and_damaged_safetensors(copy, seeds):
    folder = copy("safetensors")
    path, refused = folder / WEIGHTS, 0
    whole = path.read_bytes()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        header, data = parted(whole)
        damaged = (
            damage_bytes(rng, whole) if seed % 3 == 0 else safetensors_bytes(*forge_header(rng, header, data))
        )
        path.write_bytes(damaged)
        net = attempt(lambda: Net.from_pretrained(folder, torch_dtype="auto"), folder)
        refused += net is None
        if net is not None:  # then the reference reads the same
            assert same(net.state_dict(), load_file(path)), seed
    assert refused > 0.6 * len(seeds)


def entry(shape=(4,), place=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


DATA = bytes(range(16))
TWICE = b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"
FORGED = {
    "overlap": (safetensors_bytes({"a": entry([2], [0, 8]), "b": entry([3], [4, 16])}, DATA), "'b' overlaps"),
    "the same place": (safetensors_bytes({"a": entry(), "b": entry()}, DATA), "'b' overlaps another tensor"),
    "a hole": (safetensors_bytes({"a": entry([1], [0, 4]), "b": entry([2], [8, 16])}, DATA), "'b' leaves a"),
    "not from 0": (safetensors_bytes({"a": entry([2], [8, 16])}, DATA), "'a' leaves a hole"),
    "a remainder": (safetensors_bytes({"a": entry([2], [0, 8])}, DATA), "its tensors end at byte"),
    "cut": (safetensors_bytes({"a": entry()}, DATA[:12]), "its tensors end at byte .*was it cut off"),
    "too few values": (safetensors_bytes({"a": entry([3])}, DATA), "which are not the bytes 0 to 16"),
    "backwards": (safetensors_bytes({"a": entry([4], [16, 0])}, DATA), "which are not the bytes 16 to 0"),
    "huge shape": (safetensors_bytes({"a": entry([2**62, 2**62])}, DATA), "which are not the bytes"),
    "huge offsets": (safetensors_bytes({"a": entry([2**40], [0, 2**42])}, DATA), "tensors end at byte 4,398"),
    "negative": (safetensors_bytes({"a": entry([-4])}, DATA), r"has the shape \[-4\]"),
    "fraction": (safetensors_bytes({"a": entry([4.0])}, DATA), r"has the shape \[4.0\]"),
    "a truth": (safetensors_bytes({"a": entry([True], [0, 4])}, DATA[:4]), r"has the shape \[True\]"),
    "many axes": (safetensors_bytes({"a": entry([1] * 70, [0, 4])}, DATA[:4]), "has the shape"),
    "4 bits": (safetensors_bytes({"a": entry([32], dtype="F4")}, DATA), "has the type 'F4'; minidiff reads"),
    "no type": (safetensors_bytes({"a": entry(dtype=["F32"])}, DATA), "has the type .*minidiff reads F64"),
    "a name twice": (safetensors_bytes(TWICE, DATA), "its header is no valid JSON: the key 'a' stands twice"),
    "no header": (safetensors_bytes(b"", b""), "its header is no valid JSON"),
    "no JSON": (safetensors_bytes(b"\x80\x04\x95", DATA), "its header is not UTF-8 text"),
    "a list": (safetensors_bytes(b"[]", b""), "its header must hold a JSON object, not a list"),
    "not a number": (safetensors_bytes(b'{"a": NaN}', b""), "NaN is no value"),
    "deep": (safetensors_bytes(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}", b""), "nested too deeply"),
    "deep objects": (safetensors_bytes(b'{"a":' * 10**5 + b"1" + b"}" * 10**5, b""), "nested too deeply"),
    "a million tensors": (
        safetensors_bytes(json.dumps({str(i): entry([0], [0, 0]) for i in range(10**5)}).encode(), b""),
        "more than 500,000 values",
    ),
    "header beyond the end": (safetensors_bytes({"a": entry()}, DATA, length=2**40), "says that it has 1,0"),
    "header of 2**63": (safetensors_bytes({"a": entry()}, DATA, length=2**63), "says that it has 9,223,372"),
    "header too short": (safetensors_bytes({"a": entry()}, DATA, length=20), "its header is no valid JSON"),
    "of 3 bytes": (b"abc", "it has 3 bytes"),
    "whole numbers for weights": (None, "layers.0.weight has the type torch.int32, which can't"),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}, b""), "__metadata__ that is no"),
    "a zip": (b"PK\x03\x04" + bytes(40), "says that it has"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_each_lie_of_a_header_is_named(copy, case):
    folder = copy("safetensors")
    content, reason = FORGED[case]
    header, data = parted((folder / WEIGHTS).read_bytes())
    header["layers.0.weight"]["dtype"] = "I32"
    (folder / WEIGHTS).write_bytes(content or safetensors_bytes(header, data))
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}.* {reason}"):
        Net.from_pretrained(folder)


def test_a_header_of_gigabytes_is_not_read(copy):
    folder = copy("safetensors")
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 4 << 30))
        file.truncate(8 << 30)
    assert attempt(lambda: Net.from_pretrained(folder), folder / WEIGHTS) is None


def test_what_safetensors_writes_in_any_type_is_read_as_it_reads_it(tmp_path):
    tensors = {}
    for name, dtype in minidiff.checkpoints.files.DTYPES.items():
        tensors[name] = torch.arange(24).reshape(2, 3, 4).to(dtype)
    tensors |= {"empty": torch.empty(3, 0), "scalar": torch.tensor(2.5)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    read = minidiff.checkpoints.files.read_tensors([tmp_path / "x.safetensors"])
    assert {k: (t.dtype, t.shape, t.double().tolist()) for k, t in read.items()} == {
        k: (t.dtype, t.shape, t.double().tolist()) for k, t in tensors.items()
    }


# --- pickles ---


def canaries(path):
    """Objects that leave a file at path when they are unpickled by a reader that runs what it finds."""
    made = f"open({str(path)!r}, 'w').close()"

    class Call:
        def __init__(self, function, *args):
            self.call = function, args

        def __reduce__(self):
            return self.call

    return [
        Call(exec, made), Call(eval, made), Call(os.mkdir, str(path)), Call(os.system, f"touch {path}"),
        Call(open, str(path), "w"), Call(__import__("subprocess").check_output, ["touch", str(path)]),
        Call(map, exec, [made]), Call(torch.save, {}, str(path)),
        Call(torch.hub.download_url_to_file, "file:///etc/hostname", str(path)),
        Call(np.save, str(path), np.zeros(1)), Call(pickle.loads, pickle.dumps(Call(exec, made))),
        Call(bytearray, 10**12), Call(__import__("functools").partial, exec, made),
    ]  # fmt: skip


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["alone", "as a value", "beside the weights", "as a name", "in an archive"])
def test_no_program_in_a_pickle_is_run(copy, tmp_path, place, protocol):
    folder, canary = copy("bin"), tmp_path / "canary"
    weights = torch.load(folder / PICKLE, weights_only=True)
    for evil in canaries(canary):
        made = {
            "as a value": {"layers.0.weight": evil}, "beside the weights": weights | {"extra": evil},
            "as a name": {(evil,): torch.zeros(1)},
        }.get(place, evil)  # fmt: skip
        if place in ("beside the weights", "in an archive"):
            torch.save(made, folder / PICKLE, pickle_protocol=protocol)
        else:
            (folder / PICKLE).write_bytes(pickle.dumps(made, protocol))
        assert attempt(lambda: Net.from_pretrained(folder), folder / PICKLE) is None
        assert not canary.exists(), evil.call


@few_and_many(40, 500)
@pytest.mark.parametrize("kind", ["bin", "old bin"])
def test_damaged_pickles(copy, kind, seeds):
    folder = copy(kind)
    path, refused = folder / PICKLE, 0
    whole = path.read_bytes()
    for seed in seeds:
        path.write_bytes(damage_bytes(np.random.default_rng(seed), whole))
        net = attempt(lambda: Net.from_pretrained(folder, torch_dtype="auto"), folder)
        refused += net is None
        if net is not None:
            assert same(net.state_dict(), torch.load(path, weights_only=True, mmap=kind == "bin")), seed
    assert refused > 0.3 * len(seeds)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(copy):
    folder = copy("bin")
    with zipfile.ZipFile(folder / PICKLE) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for bomb in ("data.pkl", "data/0"):
        with zipfile.ZipFile(folder / PICKLE, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                if name.endswith(bomb):
                    with archive.open(name, "w", force_zip64=True) as entry:
                        for _ in range(20):
                            entry.write(bytes(1 << 20))
                else:
                    archive.writestr(name, content)
        with pytest.raises(CheckpointError, match=rf"{PICKLE} holds compressed entries, .* any size"):
            Net.from_pretrained(folder)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            lambda: torch.zeros(1).expand(10**6, 10**6),
            r"bytes of tensors|no table of tensors: 'weight' is none",
        ),
        (lambda: torch.eye(2).to_sparse(), "no table of tensors: 'weight' is none"),
        (lambda: torch.empty(10**9, device="meta"), "no table of tensors: 'weight' is none"),
        (lambda: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8), "is none|damaged"),
    ],
    ids=["expanded", "sparse", "without values", "quantized"],
)
def test_tensors_that_are_larger_than_their_file_are_refused(copy, tensor, message):
    folder = copy("bin")
    torch.save({"weight": tensor()}, folder / PICKLE)
    with pytest.raises(CheckpointError, match=rf"{PICKLE} .*{message}"):
        Net.from_pretrained(folder)


def test_many_names_for_one_tensor_are_not_copied_one_by_one(copy):
    folder, big = copy("bin"), torch.zeros(1 << 18)
    torch.save({f"t{i}": big for i in range(10**4)}, folder / PICKLE)  # 1 MB, but 10 GB of tensors
    with pytest.raises(
        CheckpointError, match="declares 10,485,760,000 bytes of tensors, far more than it has"
    ):
        Net.from_pretrained(folder, torch_dtype=torch.float16)


# --- JSON ---

DEEP = [[[[[[[[[[[[1]]]]]]]]]]]]
VALUES = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 10**4000, 0.5, -2.5, 1e308,
    math.nan, math.inf, -math.inf, "", "x", "../../etc/passwd", "/etc/passwd",
    "x" * 5000, "\x1b[31m\r\n", "\ud800", "\0", "NaN",
    [], [[]], {}, {"a": 1}, DEEP, [0], [-1, 2], [None, None], ["x", "y"], [1] * 3000,
    [2**40, 2**40], [1.5, 2],
]  # fmt: skip


def places(values, path=()):
    """The paths to all values in a JSON document."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list) and value:
            yield from places(value, (*path, key))


def forge_json(rng, text):
    """A JSON text with one value, key or character changed."""
    values = json.loads(text)
    every = list(places(values))
    *inner, last = every[rng.integers(len(every))]
    holder = values
    for key in inner:
        holder = holder[key]
    kind = rng.integers(10)
    if kind < 5:
        holder[last] = VALUES[rng.integers(len(VALUES))]
    elif kind == 5:
        del holder[last]
    elif kind == 6 and isinstance(holder, dict):
        holder[str(rng.choice(["x", "__class__", "_x", "", last + " ", "\x1b]0;x\7"]))] = holder[last]
    elif kind == 7:
        text = json.dumps(values)
        return (text[:1] + json.dumps(str(every[0][0])) + ": 1, " + text[1:]).encode()
    elif kind == 8:
        return damage_bytes(rng, text.encode())
    else:
        nest = int(rng.choice([100, 900, 10**5]))
        holder[last] = "NEST"
        return json.dumps(values).replace('"NEST"', "[" * nest + "]" * nest).encode()
    return json.dumps(values).encode()


def takes_its_config_from(loaded, path):
    """Whether every value in the file stands in the config, as another reader of JSON reads it."""
    written = json.loads(path.read_bytes())
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in loaded.config.items()}
    return all(repr(config.get(k)) == repr(v) for k, v in written.items() if not k.startswith("_"))


MODELS = {
    ("sd", "unet"): "UNet2DConditionModel", ("sd", "vae"): "AutoencoderKL",
    ("sd", "text_encoder"): "CLIPTextModel", ("ddpm", "unet"): "UNet2DModel",
}  # fmt: skip


@few_and_many(20, 140)
@pytest.mark.parametrize(("kind", "part"), MODELS, ids=MODELS.values())
def test_forged_model_configs(copy, kind, part, seeds):
    folder, model_class = copy(kind), getattr(minidiff, MODELS[kind, part])
    path, refused = folder / part / "config.json", 0
    whole, weights = path.read_text(), model_class.from_pretrained(folder, part).state_dict()
    for seed in seeds:
        path.write_bytes(forge_json(np.random.default_rng(seed), whole))
        model = attempt(lambda: model_class.from_pretrained(folder, part), path)
        refused += model is None
        if model is not None:
            assert same(model.state_dict(), weights), seed
            known = (
                model_class.config_name if part == "text_encoder" else path
            )  # CLIP's keys without influence
            assert known != path or takes_its_config_from(model, path), seed
    assert refused > 0.3 * len(seeds)


@few_and_many(40, 200)
def test_forged_scheduler_configs(copy, seeds):
    folder = copy("ddpm")
    path = folder / "scheduler" / "scheduler_config.json"
    whole, accepted = path.read_text(), 0
    for seed in seeds:
        path.write_bytes(forge_json(np.random.default_rng(seed), whole))
        scheduler = attempt(lambda: minidiff.DDPMScheduler.from_pretrained(folder, "scheduler"), path)
        if scheduler is not None:
            accepted += 1
            assert takes_its_config_from(scheduler, path), seed
    assert 0 < accepted < 0.8 * len(seeds)


@few_and_many(40, 200)
def test_forged_pipeline_indexes(copy, seeds):
    folder = copy("ddpm")
    path, refused = folder / "model_index.json", 0
    whole = path.read_text()
    for seed in seeds:
        path.write_bytes(forge_json(np.random.default_rng(seed), whole))
        pipe = attempt(lambda: minidiff.DiffusionPipeline.from_pretrained(folder), folder)
        refused += pipe is None
        if pipe is not None:
            index = json.loads(path.read_bytes())
            assert type(pipe).__name__ == index["_class_name"], seed
            assert all(type(part).__name__ == index[name][1] for name, part in pipe.components.items()), seed
    assert refused > 0.2 * len(seeds)


@few_and_many(40, 250)
def test_forged_shard_indexes(copy, seeds):
    folder = copy("shards")
    path, refused = folder / f"{WEIGHTS}.index.json", 0
    whole, weights = path.read_text(), Net.from_pretrained(folder).state_dict()
    shards = sorted(p.name for p in folder.glob("*-of-*"))
    for seed in seeds:
        rng = np.random.default_rng(seed)
        forged = forge_json(rng, whole)
        if seed % 4 == 0:
            values = json.loads(whole)
            name = rng.choice(list(values["weight_map"]))
            values["weight_map"][name] = str(
                rng.choice([*shards, f"../{shards[0]}", f"/{shards[0]}", "config.json"])
            )
            forged = json.dumps(values).encode()
        path.write_bytes(forged)
        net = attempt(lambda: Net.from_pretrained(folder), folder)
        refused += net is None
        assert net is None or same(net.state_dict(), weights), seed
    assert refused > 0.3 * len(seeds)


def read_tokenizer(folder):
    """(vocabulary, merges) by another reader."""
    if (folder / "vocab.json").exists():
        lines = (folder / "merges.txt").read_text("utf-8").replace("\r\n", "\n").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        return json.loads((folder / "vocab.json").read_bytes()), merges
    model = json.loads((folder / "tokenizer.json").read_bytes())["model"]
    return model["vocab"], [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


@few_and_many(12, 120)
@pytest.mark.parametrize(
    ("kind", "file"),
    [("sd", "vocab.json"), ("sd", "merges.txt"), ("sd", "tokenizer_config.json"),
     ("sd", "special_tokens_map.json"), ("new tokenizer", "tokenizer.json")],
)  # fmt: skip
def test_forged_tokenizers(copy, kind, file, seeds):
    folder = copy(kind)
    folder = folder / "tokenizer" if kind == "sd" else folder
    path = folder / file
    whole = path.read_text("utf-8")
    for seed in seeds:
        rng = np.random.default_rng(seed)
        forged = damage_bytes(rng, whole.encode()) if file == "merges.txt" else forge_json(rng, whole)
        path.write_bytes(forged)
        tokenizer = attempt(lambda: minidiff.CLIPTokenizer.from_pretrained(folder), folder)
        if tokenizer is not None:
            assert (tokenizer._vocab, tokenizer._merges) == read_tokenizer(folder), seed
            ids = tokenizer("a red ball", padding="max_length", max_length=9, truncation=True).input_ids
            assert len(ids) == 9 and all(0 <= i < len(tokenizer) for i in ids)


@pytest.mark.slow
def test_json_of_many_values_costs_little(copy):
    folder = copy("safetensors")
    bombs = [
        b'{"a": [' + value * (15_000_000 // len(value)) + b"1]}" for value in (b"[],", b'{"a":1},', b'"ab",')
    ]
    bombs.append(('{"a": "' + "\U0001f600" * (3 << 20) + '"}').encode())  # four times as large in memory
    bombs.append(
        json.dumps(dict.fromkeys(map(str, range(1 << 18)))).encode()[:-1] + b',"7":1}'
    )  # a key twice
    for bomb in bombs:
        (folder / "config.json").write_bytes(bomb)
        assert attempt(lambda: Net.from_pretrained(folder), folder / "config.json") is None


# --- the folder ---


def test_links_out_of_the_folder_are_not_followed_whatever_the_file(copy, checkpoints, tmp_path):
    for kind in ("safetensors", "bin", "shards", "sd", "ddpm"):
        folder = copy(kind)
        outside = Path(shutil.copytree(folder, tmp_path / "outside"))
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            if path.suffix == ".txt" or path.name == "special_tokens_map.json":
                loader = minidiff.CLIPTokenizer.from_pretrained
                where = path.parent
            elif kind in ("sd", "ddpm"):
                loader, where = minidiff.DiffusionPipeline.from_pretrained, folder
            else:
                loader, where = Net.from_pretrained, folder
            path.rename(path.with_suffix(".kept"))
            path.symlink_to(outside / path.relative_to(folder))
            with pytest.raises(CheckpointError, match=rf"{path.name} is a link that leads out"):
                loader(where)
            path.unlink()
            path.with_suffix(".kept").rename(path)
        shutil.rmtree(folder)
        shutil.rmtree(outside)


def test_what_is_no_file_is_not_opened(copy):
    folder = copy("safetensors")
    for name in (WEIGHTS, "config.json"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)  # to open it would wait for a writer for ever
        assert attempt(lambda: Net.from_pretrained(folder), folder / name) is None
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)  # to itself
        assert attempt(lambda: Net.from_pretrained(folder), folder) is None
        (folder / name).unlink()
        (folder / name).write_bytes(kept)
    assert Net.from_pretrained(folder)
