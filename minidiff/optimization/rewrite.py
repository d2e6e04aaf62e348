"""How a layer is rewritten: another forward stands in the layer itself, and its weights stay what they were.

A `Rewrite` computes what its layer computes in another way. Weights that it wants in another form (joined,
folded, packed) are `Derived` from the layer's own when they are first needed, and again when those change.
"""

import torch
from torch import nn
from torch.autograd import forward_ad


class Rewrite:
    """Another forward of a layer, which still has its own: `plain`. covers: layers whose work it does too."""

    covers: tuple[nn.Module, ...] = ()

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def plain(self, *args, **kwargs):
        """The layer's result as its class computes it."""
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def install(self):
        """Makes this the layer's forward, unless somebody else has put one there."""
        self.layer.__dict__.setdefault("forward", self)

    def prepare(self):
        """Brings derived weights up to date that a recorded graph reads; most have none."""


def rewrite_of(layer: nn.Module) -> Rewrite | None:
    """What a layer was rewritten as."""
    forward = layer.__dict__.get("forward")
    return forward if isinstance(forward, Rewrite) else None


def models_of(model) -> list[nn.Module]:
    """The models of a pipeline, or the model itself; TypeError for anything else, or without weights."""
    models = [model] if isinstance(model, nn.Module) else getattr(model, "models", None)
    if not isinstance(models, list) or not any(next(one.parameters(), None) is not None for one in models):
        raise TypeError(f"expected a model with weights, or a pipeline, not a {type(model).__name__}")
    return models


def restore(model):
    """Undoes all rewrites of the layers of a model or a pipeline, whose memory is freed; returns it.

    On a GPU weights stay channels_last. Raises TypeError for anything else.
    """
    for layer in (layer for one in models_of(model) for layer in one.modules()):
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
        state = [more, *map(state_of, tensors)]
        if state != self.state:
            self.state = None
            with torch.inference_mode(False), torch.no_grad():  # inference tensors can't be changed later
                self._keep(self.make(*tensors, *more))
            self.state, self.sources = state, [t if t is None else t.detach() for t in tensors]
        return self.value

    def _keep(self, new):
        if _alike(self.value, new):
            self.value.copy_(new)
        else:
            self.value = new

    def __reduce__(self):
        return Derived, (self.make,)  # copies and pickles start anew: packed weights can be neither


def state_of(tensor):
    """What changes with a tensor's contents. Of torch.inference_mode's tensors nothing does: never equal."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.stride(), object() if tensor.is_inference() else tensor._version


def _alike(old, new):
    """Whether new can be copied into old."""
    dense = all(isinstance(x, torch.Tensor) and x.layout == torch.strided for x in (old, new))
    return dense and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)


def makes_gradients(*tensors) -> bool:
    """Whether autograd records what is done with these tensors, of which some may be None.

    Forward mode counts too, and goes on under torch.no_grad.
    """
    if not may_make_gradients():
        return False
    given = [t for t in tensors if t is not None]
    backward = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return backward or any(forward_ad.unpack_dual(t).tangent is not None for t in given)


def may_make_gradients() -> bool:
    """Whether autograd records anything now."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def says_all(*layers) -> bool:
    """Whether weight and bias are all that there is to these layers: no hooks, no adapters in their place."""
    return all(
        type(one) in (nn.Linear, nn.Conv2d)
        and getattr(one, "padding_mode", "zeros") == "zeros"
        and not has_hooks(one)
        and "forward" not in one.__dict__
        for one in layers
    )


def has_hooks(layer) -> bool:
    """Whether somebody looks at what goes into this layer, or comes out of it."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def autocast_to(device: torch.device):
    """The dtype in which autocast multiplies on device; None where it is off."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None
