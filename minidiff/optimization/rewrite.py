"""How a layer is rewritten: another forward stands in the layer itself, and its weights stay what they were.

A `Rewrite` computes what its layer computes in another way. Weights that it wants in another form (joined,
folded, packed) are `Derived` from the layer's own when they are first needed, and again when those change.
"""

import copy

import torch
from torch import nn


class Rewrite:
    """Another forward of a layer, which still has its own: `plain`. covers: layers whose work it does too."""

    covers: tuple[nn.Module, ...] = ()

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def plain(self, *args, **kwargs):
        """The layer's result as its class computes it."""
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def install(self):
        """Makes this the layer's forward."""
        self.layer.forward = self

    def prepare(self):
        """Brings derived weights up to date that a recorded graph reads; most have none."""


def rewrite_of(layer: nn.Module) -> Rewrite | None:
    """What a layer was rewritten as."""
    forward = layer.__dict__.get("forward")
    return forward if isinstance(forward, Rewrite) else None


def restore(model: nn.Module) -> nn.Module:
    """Undoes all rewrites of the layers of model, whose memory is freed; returns model."""
    for layer in model.modules():
        if rewrite_of(layer) is not None:
            del layer.forward
    return model


class Derived:
    """make(*tensors, *more) for the tensors of a layer; made again when one was changed, moved or replaced.

    A new tensor goes into the memory of the old one where it fits: a recorded graph finds it there.
    """

    def __init__(self, make):
        self.make, self.state, self.value = make, None, None
        self.sources = ()  # what value was made of, held so that nothing else gets its address

    def __call__(self, *tensors, more=()):
        state = [more, *map(_state, tensors)]
        if state != self.state:
            with torch.no_grad():
                self._keep(self.make(*tensors, *more))
            self.state, self.sources = state, [t if t is None else t.detach() for t in tensors]
        return self.value

    def _keep(self, new):
        if _alike(self.value, new):
            self.value.copy_(new)
        else:
            self.value = new

    def __deepcopy__(self, memo):
        return Derived(copy.deepcopy(self.make, memo))  # packed weights can't be copied


def _state(tensor):
    """What changes with a tensor's contents; tensors of torch.inference_mode count no changes."""
    if tensor is None:
        return None
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _alike(old, new):
    """Whether new can be copied into old."""
    dense = all(isinstance(x, torch.Tensor) and x.layout == torch.strided for x in (old, new))
    return dense and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)


def makes_gradients(*tensors) -> bool:
    """Whether autograd would record what is done with these tensors, of which some may be None."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
