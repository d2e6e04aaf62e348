"""Loading costs the memory of the weights in their new type, and never that of the file beside it.

Peaks of what is resident in a fresh process, files' pages included, beyond what was after the imports; with
generous margins, for a model of 151 MB. tests/benchmark_loading.py measures Stable Diffusion itself.
"""

import json
import subprocess
import sys

import pytest
import torch
from test_checkpoints_load import WEIGHTS, in_the_old_way
from torch import nn

from minidiff.checkpoints.load import PretrainedModel

linux = pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
MEGABYTES = 151


class Wide(PretrainedModel):
    """Layers of 4 MB, and one of 16 MB, in float32."""

    def __init__(self, layers: int = 32):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(layers))
        self.large = nn.Linear(2048, 2048, bias=False)


LOAD = """
import json, sys, torch
from test_checkpoints_memory import Wide
from minidiff.checkpoints import files
files.PICKLE_PIECE = 16 << 20  # of so small a model
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1000
before = status("VmRSS")
model = Wide.from_pretrained(sys.argv[1], torch_dtype=getattr(torch, sys.argv[2]))
loaded = status("VmHWM") - before
total = sum(w.double().sum().item() for w in model.parameters())
print(json.dumps([loaded, status("VmHWM") - before, total]))
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "loaded", "used"),
    [
        ("safetensors", "float32", 0.1, 1.2),  # mapped: nothing is read before it is used
        ("unaligned", "float32", 1.25, 1.4),
        ("bin", "float32", 0.1, 1.2),
        ("safetensors", "float16", 0.75, 0.9),
        ("unaligned", "float16", 1.1, 1.2),
        ("bin", "float16", 0.9, 1.0),
        ("old bin", "float16", 1.6, 1.7),  # can't be mapped: all of it is read
    ],
)
def test_loading_takes_no_more_memory_than_the_weights(tmp_path, monkeypatch, kind, dtype, loaded, used):
    torch.manual_seed(0)
    model = Wide()
    model.save_config(tmp_path)
    tensors = model.state_dict()
    if kind == "safetensors":
        model.save_pretrained(tmp_path)
    elif kind == "unaligned":
        in_the_old_way(tensors, tmp_path / WEIGHTS)
    else:
        path = tmp_path / "diffusion_pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "bin")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    command = [sys.executable, "-c", LOAD, tmp_path, dtype]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    at_load, at_use, total = json.loads(said)
    assert at_load < loaded * MEGABYTES
    assert at_use < used * MEGABYTES + 60  # the largest layer in float64, for the sum
    assert total == pytest.approx(sum(w.double().sum().item() for w in tensors.values()), abs=0.5)
