"""A U-Net without the waiting: its step as one CUDA graph.

The CPU starts hundreds of kernels in every step of a loop, always the same ones with the same shapes, and a
GPU that is done with one waits for the next. A CUDA graph is a recording of all the starts: one call replays
them, on the same addresses; so what goes in is copied to fixed buffers, the timestep too.
"""

from collections import OrderedDict
from types import SimpleNamespace

import torch

from minidiff.backends import BackendUnavailable
from minidiff.models.layers import Output, as_timesteps
from minidiff.optimization.rewrite import autocast_to, rewrite_of
from minidiff.optimization.steps import Step, tensors_in

MOST_GRAPHS = 4  # shapes of which a recording is kept; each holds the memory of one step
WARM_UP = 3  # steps before a recording, in which kernels are compiled and libraries choose theirs


def record(function, device):
    """function() as a CUDA graph: a function that replays it and returns the same tensor, with new values."""
    if device.type != "cuda":
        raise BackendUnavailable(f"a compiled U-Net needs a GPU, and this one is on {device}; move it back, "
                                 "or undo it with minidiff.optimization.restore(unet)")  # fmt: skip
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()

    def replay():
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay


class GraphedStep(Step):
    """The forward of a UNet2DConditionModel by recordings, one for each combination of shapes."""

    def __init__(self, unet, record=record):
        super().__init__(unet)
        self.record = record
        self.recorded, self.addresses = OrderedDict(), None
        self.tree, self.weights, self.rewrites = None, [], []  # of the U-Net, so that no step walks it

    def with_gradients(self, given):
        """A recording can't be differentiated: RuntimeError."""
        raise RuntimeError("a compiled U-Net makes no gradients: call it under torch.no_grad(), or undo it "
                           "with minidiff.optimization.restore(unet)")  # fmt: skip

    def run(self, given):
        """The result for these arguments; a new combination of shapes is recorded first."""
        return_dict = given.pop("return_dict", True)
        given["timestep"] = as_timesteps(given["timestep"], given["sample"])  # (B,), on the device
        self._look()
        for rewrite in self.rewrites:
            rewrite.prepare()
        sample = self._replay(given)  # a buffer, which is overwritten by the next step
        sample = sample.clone(memory_format=torch.contiguous_format)
        return Output(sample=sample) if return_dict else (sample,)

    def _look(self):
        """Brings the lists of weights and rewrites up to date if a module was exchanged."""
        if self.tree is None or any(parts[name] is not part for parts, name, part in self.tree):
            layers = list(self.layer.modules())
            self.tree = [(one._modules, name, part) for one in layers for name, part in one._modules.items()]
            self.weights = [(one._parameters, name) for one in layers for name in one._parameters]
            self.rewrites = [found for one in layers if (found := rewrite_of(one)) is not None]

    def _replay(self, given):
        """The result in a buffer."""
        found = [parameters[name] for parameters, name in self.weights]
        addresses = [None if weight is None else weight.data_ptr() for weight in found]
        if addresses != self.addresses:  # the model was moved: recordings point to where it was
            self.recorded.clear()
            self.addresses = addresses
        everything = {
            "given": given,
            "keys": self.keys.current,
            "autocast": autocast_to(given["sample"].device),
        }
        shapes = repr(_map(lambda x: (tuple(x.shape), x.dtype, x.device), everything))
        if shapes not in self.recorded:
            while len(self.recorded) >= MOST_GRAPHS:
                self.recorded.popitem(last=False)
            self.recorded[shapes] = self._record(given)
        self.recorded.move_to_end(shapes)
        recording = self.recorded[shapes]
        _fill(recording.given, given)
        if recording.source is not self.keys.current:  # another text
            _fill(recording.keys, self.keys.current)
            recording.source = self.keys.current
        return recording.replay()

    @torch.inference_mode(False)  # whose tensors could not be filled outside it
    @torch.no_grad()
    def _record(self, given):
        device = given["sample"].device
        buffers, keys = _map(_buffer, given), _map(torch.clone, self.keys.current)
        step, dtype = super().run, autocast_to(device)
        # autocast's own copies of weights would be gone when the recording reads them
        with torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False):
            replay = self.record(lambda: step(buffers | {"return_dict": False}, keys)[0], device)
        return SimpleNamespace(given=buffers, keys=keys, source=self.keys.current, replay=replay)

    def __getstate__(self):
        unset = {"recorded": OrderedDict(), "addresses": None, "tree": None, "weights": [], "rewrites": []}
        return self.__dict__ | unset  # for copies


def _fill(buffers, values):
    for buffer, value in zip(tensors_in(buffers), tensors_in(values), strict=True):
        buffer.copy_(value)


def _buffer(x):
    """A tensor of its own with the values of x; pictures are channels_last."""
    order = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return torch.empty_like(x, memory_format=order).copy_(x)


def _map(function, value):
    """value with function(tensor) for each tensor in its dicts and lists."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(function, entry) for key, entry in value.items()}
    return [_map(function, entry) for entry in value] if isinstance(value, list | tuple) else value
