"""A U-Net's step with what doesn't change left out: the text's keys and values once per prompt, time once.

In every step of a loop the cross-attentions of a U-Net compute keys and values of the same text, and each
residual block its part of the same time. `Step` is a forward of the whole U-Net that tells the rewritten
layers below it which text comes, and when a step begins and ends.
"""

import inspect

import torch
from torch import nn

from minidiff.models.layers import ResnetBlock2D
from minidiff.models.unet import BasicTransformerBlock
from minidiff.optimization.layers import JoinedTimes
from minidiff.optimization.rewrite import Rewrite, makes_gradients


class Step(Rewrite):
    """The forward of a UNet2DConditionModel or UNet2DModel; arguments are forward's.

    Where gradients are wanted everything is computed as the classes say.
    """

    def __init__(self, unet: nn.Module):
        super().__init__(unet)
        self.signature = inspect.signature(type(unet).forward)
        self.keys, self.times = TextKeys(unet), JoinedTimes(_time_projections(unet))

    def install(self):
        super().install()
        for rewrite in (*self.keys.parts, *self.times.parts):
            rewrite.install()

    def __call__(self, *args, **kwargs):
        given = dict(self.signature.bind(self.layer, *args, **kwargs).arguments)
        del given["self"]
        if makes_gradients(*tensors_in(given), *self.layer.parameters()):
            return self.with_gradients(given)
        if self.keys.parts:
            self.keys.update(given["encoder_hidden_states"])
        return self.run(given)

    def with_gradients(self, given: dict):
        """The result of these arguments when autograd is to record it."""
        return self.plain(**given)

    def run(self, given: dict):
        """The plain forward of these arguments, with keys and times that are known."""
        self.keys.running = True
        self.times.begin()
        try:
            return self.plain(**given)
        finally:
            self.keys.running = False
            self.times.end()


def tensors_in(value) -> list[torch.Tensor]:
    """The tensors in value, which may be a tensor, or dicts and lists of such, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for entry in value for x in tensors_in(entry)] if isinstance(value, list | tuple) else []


def _time_projections(unet):
    blocks = [block for block in unet.modules() if isinstance(block, ResnetBlock2D)]
    return [block.time_emb_proj for block in blocks if hasattr(block, "time_emb_proj")]


class TextKeys:
    """Keys and values of a text in all cross-attentions of a U-Net, for the text that `update` got last.

    They stay at their addresses as long as texts have one shape, so that a graph may read them.
    """

    def __init__(self, unet):
        self.layers = []
        for block in unet.modules():
            if isinstance(block, BasicTransformerBlock):
                self.layers += [block.attn1, block.attn2] if block.only_cross_attention else [block.attn2]
        self.parts = [TextAttention(layer, self, number) for number, layer in enumerate(self.layers)]
        self.running = False
        self.buffers, self.current = {}, []
        self.addresses, self.text, self.state = [], None, None  # of the weights; which text came last

    @torch.no_grad()
    def update(self, text: torch.Tensor):
        """Computes keys and values of text (B, S, E), unless it is the tensor that came last, unchanged.

        Changes in place are noticed, of the text as of the weights; only tensors of torch.inference_mode
        do not count their changes, and are computed anew each time.
        """
        weights = [linear.weight for layer in self.layers for linear in (layer.to_k, layer.to_v)]
        self.addresses = [weight.data_ptr() for weight in weights]
        state = None
        if not any(tensor.is_inference() for tensor in (text, *weights)):
            state = self.addresses, [weight._version for weight in weights], text._version
        if text is self.text and state is not None and state == self.state:
            return
        fresh = [tuple(layer.heads(project(text)).contiguous() for project in (layer.to_k, layer.to_v))
                 for layer in self.layers]  # fmt: skip
        shape = tuple((key.shape, key.dtype, key.device) for key, _ in fresh)
        self.current = self.buffers.setdefault(shape, fresh)  # (B, heads, S, D) each
        for old, new in zip(self.current, fresh, strict=True):
            for kept, value in zip(old, new, strict=True):
                kept.copy_(value)
        self.text, self.state = text, state


class TextAttention(Rewrite):
    """The forward of an Attention over the text: in a step its keys and values are known."""

    def __init__(self, layer, keys: TextKeys, number):
        super().__init__(layer)
        self.keys, self.number = keys, number
        self.covers = (layer.to_k, layer.to_v)

    def __call__(self, hidden_states, encoder_hidden_states=None, mask=None):
        if not self.keys.running:
            return self.plain(hidden_states, encoder_hidden_states, mask)
        q = self.layer.heads(self.layer.to_q(hidden_states))  # (B, heads, T, D)
        return self.layer.attend(q, *self.keys.current[self.number], mask)
