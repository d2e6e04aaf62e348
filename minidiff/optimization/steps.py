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
from minidiff.optimization.rewrite import (
    Rewrite,
    autocast_to,
    makes_gradients,
    may_make_gradients,
    says_all,
    state_of,
)


class Step(Rewrite):
    """The forward of a UNet2DConditionModel or UNet2DModel; arguments are forward's.

    Where gradients are wanted everything is computed as the classes say.
    """

    def __init__(self, unet: nn.Module):
        super().__init__(unet)
        self.signature = inspect.signature(type(unet).forward)
        self.keys, self.times = TextKeys(unet), _joined_times(unet)

    def install(self):
        super().install()
        for rewrite in (*self.keys.parts, *self.times.parts):
            rewrite.install()

    def __call__(self, *args, **kwargs):
        given = dict(self.signature.bind(self.layer, *args, **kwargs).arguments)
        del given["self"]
        if may_make_gradients() and makes_gradients(*tensors_in(given), *self.layer.parameters()):
            return self.with_gradients(given)
        if self.keys.parts:  # its forward asks for a text
            self.keys.update(given["encoder_hidden_states"])
        return self.run(given)

    def with_gradients(self, given: dict):
        """The result of these arguments when autograd is to record it."""
        return self.plain(**given)

    def run(self, given: dict, keys: list | None = None):
        """The plain forward of these arguments, with times and keys (those of the text if None) known."""
        self.keys.used = self.keys.current if keys is None else keys
        self.times.begin()
        try:
            return self.plain(**given)
        finally:
            self.keys.used = None
            self.times.end()


def tensors_in(value) -> list[torch.Tensor]:
    """The tensors in value, which may be a tensor, or dicts and lists of such, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for entry in value for x in tensors_in(entry)] if isinstance(value, list | tuple) else []


def _joined_times(unet):
    passed = [part for part in unet.modules() if part is not unet and any(map(_has_time, part.modules()))]
    return JoinedTimes([block.time_emb_proj for block in passed if _has_time(block)], passed)


def _has_time(layer):
    return isinstance(layer, ResnetBlock2D) and hasattr(layer, "time_emb_proj")


class TextKeys:
    """Keys and values of a text in all cross-attentions of a U-Net, for the text that `update` got last.

    current: a pair (B, heads, S, D) for each of layers, or None where hooks or adapters want to be called in
    each step. It is another list after each update. used: the pairs of the running step, None outside one.
    """

    def __init__(self, unet):
        self.layers = []
        for block in unet.modules():
            if isinstance(block, BasicTransformerBlock):
                self.layers += [block.attn1, block.attn2] if block.only_cross_attention else [block.attn2]
        self.parts = [TextAttention(layer, self, number) for number, layer in enumerate(self.layers)]
        self.used = None
        self.current, self.text, self.state = [], None, None
        self.weights = ()  # of which current was made, held so that nothing else gets their addresses

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, text: torch.Tensor | None):
        """Computes keys and values of text (B, S, E), unless it is the tensor that came last, unchanged.

        Changes in place are noticed, of the text as of the weights; only tensors of torch.inference_mode
        do not count their changes, and are computed anew each time.
        """
        pairs = [(layer.to_k, layer.to_v) for layer in self.layers]
        pairs = [pair if text is not None and says_all(*pair) else None for pair in pairs]
        weights = [linear.weight for pair in pairs if pair for linear in pair]
        state = None
        if text is not None and not text.is_inference():
            state = [text._version, autocast_to(text.device), *map(state_of, weights), pairs]
        if text is self.text and state is not None and state == self.state:
            return
        current = [
            pair and tuple(layer.heads(project(text)).contiguous() for project in pair)
            for layer, pair in zip(self.layers, pairs, strict=True)
        ]
        self.current, self.text, self.state = current, text, state
        self.weights = [weight.detach() for weight in weights]

    def __getstate__(self):
        return self.__dict__ | {"current": [], "text": None, "state": None, "weights": ()}  # for copies


class TextAttention(Rewrite):
    """The forward of an Attention over the text: in a step its keys and values are known."""

    def __init__(self, layer, keys: TextKeys, number):
        super().__init__(layer)
        self.keys, self.number = keys, number
        self.covers = (layer.to_k, layer.to_v)

    def __call__(self, hidden_states, encoder_hidden_states=None, mask=None):
        known = self.keys.used and self.keys.used[self.number]
        if not known:
            return self.plain(hidden_states, encoder_hidden_states, mask)
        q = self.layer.heads(self.layer.to_q(hidden_states))  # (B, heads, T, D)
        return self.layer.attend(q, *known, mask)
