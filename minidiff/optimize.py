"""A U-Net without the waiting: its step as one CUDA graph, the text's keys and values once per prompt.

The CPU starts hundreds of kernels in every step of a loop, always the same ones with the same shapes, and a
GPU that is done with one waits for the next. A CUDA graph is a recording of all the starts: one call replays
them, on the same addresses; so what goes in is copied to fixed buffers, the timestep too. And in every step
the cross-attentions of a U-Net compute keys and values of the same text: here once, when a new text comes.

Both compute the same function as before, and `state_dict()` stays as it is. `pipe.compile()` does it.
"""

import inspect
from collections import OrderedDict
from functools import partial

import torch
from torch import nn

from minidiff import ops
from minidiff.backends import BackendUnavailable
from minidiff.models.layers import Output, as_timesteps
from minidiff.models.unet import BasicTransformerBlock, UNet2DConditionModel

MOST_GRAPHS = 4  # shapes of which a recording is kept; each holds the memory of one step
WARM_UP = 3  # steps before a recording, in which kernels are compiled and libraries choose theirs


def compile_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Makes calls of unet replay a CUDA graph, recorded at the first call with new shapes; returns unet.

    It must be on a GPU and be called without gradients. Its weights become channels_last. They may be changed
    in place later, and all be moved or replaced; after replacing some of them, compile it again. Raises
    BackendUnavailable without a GPU, TypeError for another model.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"compile takes a UNet2DConditionModel, not a {type(unet).__name__}")
    if unet.device.type != "cuda":
        raise BackendUnavailable(f"compile: a CUDA graph needs a GPU, and the U-Net is on {unet.device}; "
                                 'move it first: pipe.to("cuda")')  # fmt: skip
    restore_unet(unet)
    unet.to(memory_format=torch.channels_last)
    unet.forward = _GraphedStep(unet, keep_text_keys(unet), record)
    return unet


def restore_unet(unet: nn.Module) -> nn.Module:
    """Undoes compile_unet and keep_text_keys, whose memory is freed; returns unet."""
    for module in unet.modules():
        module.__dict__.pop("forward", None)
    return unet


def keep_text_keys(unet: nn.Module) -> "TextKeys":
    """Makes the cross-attentions of unet keep the keys and values of the last text; returns where they are.

    The caller tells of a text before each step: `keys.update(text)`. Exact: nothing else is computed.
    """
    layers = []
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            layers += [block.attn1, block.attn2] if block.only_cross_attention else [block.attn2]
    return TextKeys(layers)


class TextKeys:
    """Keys and values of a text in each of some Attention layers, whose forward takes them from here.

    Buffers stay at their addresses as long as texts have one shape, so that a graph may read them.
    """

    def __init__(self, layers):
        self.layers, self.buffers, self.current = layers, {}, []
        self.addresses, self.text, self.state = [], None, None  # of the weights; which text came last
        for number, layer in enumerate(layers):
            layer.forward = partial(self._attend, layer, number)

    @torch.no_grad()
    def update(self, text: torch.Tensor):
        """Computes keys and values of text (B, S, E), unless it is the tensor that came last, unchanged.

        Changes in place are noticed, of the text as of the weights; only tensors of torch.inference_mode
        do not count their changes, and are computed anew each time.
        """
        weights = [linear.weight for layer in self.layers for linear in (layer.to_k, layer.to_v)]
        self.addresses = [weight.data_ptr() for weight in weights]
        state = None
        if not text.is_inference():
            state = self.addresses, [weight._version for weight in weights], text._version
        if text is self.text and state is not None and state == self.state:
            return
        fresh = [tuple(layer._heads(project(text)).contiguous() for project in (layer.to_k, layer.to_v))
                 for layer in self.layers]  # fmt: skip
        shape = tuple((key.shape, key.dtype, key.device) for key, _ in fresh)
        self.current = self.buffers.setdefault(shape, fresh)  # (B, heads, S, D) each
        for old, new in zip(self.current, fresh, strict=True):
            for kept, value in zip(old, new, strict=True):
                kept.copy_(value)
        self.text, self.state = text, state

    def _attend(self, layer, number, hidden_states, encoder_hidden_states=None, mask=None):
        """Attention.forward with keys and values that are known; encoder_hidden_states is not looked at."""
        q = layer._heads(layer.to_q(hidden_states))  # (B, heads, T, D)
        out = ops.attention(q, *self.current[number], mask, backend=layer.backend)  # (B, heads, T, D)
        return layer.to_out[0](out.transpose(1, 2).flatten(2))  # (B, T, C)


def record(function, device):
    """function() as a CUDA graph: a function that replays it and returns the same tensor, with new values."""
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


class _GraphedStep:
    """The forward of a U-Net by recordings, one for each combination of shapes; arguments are forward's."""

    def __init__(self, unet, keys, record):
        self.unet, self.keys, self.record = unet, keys, record
        self.plain = type(unet).forward
        self.signature = inspect.signature(self.plain)
        self.recorded, self.addresses = OrderedDict(), None

    def __call__(self, *args, **kwargs):
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.unet.parameters()):
            raise RuntimeError("a compiled U-Net makes no gradients: call it under torch.no_grad(), or undo "
                               "it with minidiff.optimize.restore_unet(unet)")  # fmt: skip
        given = dict(self.signature.bind(self.unet, *args, **kwargs).arguments)
        del given["self"]
        return_dict = given.pop("return_dict", True)
        given["timestep"] = as_timesteps(given["timestep"], given["sample"])  # (B,), on the device
        self.keys.update(given["encoder_hidden_states"])
        sample = self._run(given).clone()  # the buffer is overwritten by the next step
        return Output(sample=sample) if return_dict else (sample,)

    def _run(self, given):
        """The result for these arguments, in a buffer; a new combination of shapes is recorded first."""
        ends = self.unet.conv_in.weight.data_ptr(), self.unet.conv_out.weight.data_ptr()
        addresses = [*ends, *self.keys.addresses]
        if addresses != self.addresses:  # the model was moved: recordings point to where it was
            self.recorded.clear()
            self.addresses = addresses
        shapes = repr(_map(lambda x: (tuple(x.shape), x.dtype, x.device), given))
        if shapes not in self.recorded:
            while len(self.recorded) >= MOST_GRAPHS:
                self.recorded.popitem(last=False)
            buffers = _map(_buffer, given)
            with torch.no_grad():
                run = partial(self.plain, self.unet, **buffers, return_dict=False)
                replay = self.record(lambda: run()[0], given["sample"].device)
            self.recorded[shapes] = buffers, replay
        self.recorded.move_to_end(shapes)
        buffers, replay = self.recorded[shapes]
        for buffer, value in zip(_tensors(buffers), _tensors(given), strict=True):
            buffer.copy_(value)
        return replay()


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


def _tensors(value):
    found = []
    _map(found.append, value)
    return found
