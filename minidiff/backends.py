"""Which version of attention, group norm and the like runs, and where: the choice, without any of the work.

A layer keeps the name of its version in `.backend` and what it does in `.op`. `use_backend` sets a version by
name; it is then kept, and refused where it can't run. Layers for which nobody chose get the default where
their model is moved to: the kernels on a GPU, PyTorch's functions elsewhere. Nothing is replaced in silence.
"""

import os

import torch
from torch import nn

BACKENDS = ("reference", "torch", "triton")
OPERATIONS = ("attention", "group_norm", "geglu", "upsample_conv")
FOLLOWING = (
    "attention",
    "group_norm",
)  # operations whose default on a GPU is "triton"; elsewhere all "torch"


class BackendUnavailable(RuntimeError):
    """The backend that was asked for can't run here."""


class Portable(nn.Module):
    """A model that takes the default backend where it is moved: `.to`, `.cuda`, `.cpu`.

    Raises BackendUnavailable, and moves nothing, if a backend that was chosen by name can't run there.
    """

    def _apply(self, fn, recurse=True):
        some = next(self.parameters(), None)
        if some is not None:
            check_move(self, fn(some.new_empty(0)).device)
        super()._apply(fn, recurse)
        for layer in self.modules() if some is not None else ():
            if getattr(layer, "op", None) in FOLLOWING and not getattr(layer, "backend_chosen", False):
                layer.backend = default_backend(next(self.parameters()).device)
        return self


def use_backend(module, **versions: str | None):
    """Sets the backend of all layers in module that do an operation; returns module.

    versions: attention, group_norm, geglu or upsample_conv="reference", "torch" or "triton"; None leaves
    these layers as they are. Raises ValueError for another name, TypeError for another operation or no
    model, BackendUnavailable if it can't run where module is; nothing is changed then.
    """
    unknown = ", ".join(sorted(set(versions) - set(OPERATIONS)))
    if unknown:
        raise TypeError(f"use_backend knows no operation {unknown}; there are {', '.join(OPERATIONS)}")
    if not isinstance(module, nn.Module):
        raise TypeError(f"use_backend takes a model, such as pipe.unet, not a {type(module).__name__}")
    chosen = {op: name for op, name in versions.items() if name is not None}
    devices = {tensor.device for tensor in module.parameters()}
    for op, name in chosen.items():
        check_backend(name)
        for device in devices if name == "triton" else ():
            kernel(op, device)
    for layer in module.modules():
        if getattr(layer, "op", None) in chosen:
            layer.backend, layer.backend_chosen = chosen[layer.op], True
    return module


def check_move(module, device):
    """Raises BackendUnavailable if a layer of module was given a backend that can't run on device."""
    for layer in module.modules():
        if getattr(layer, "backend_chosen", False) and layer.backend == "triton":
            kernel(layer.op, device)


def available_backends(device="cpu") -> tuple[str, ...]:
    """The backends that run here on tensors of this device."""
    try:
        kernel("attention", torch.device(device))
    except BackendUnavailable:
        return BACKENDS[:2]
    return BACKENDS


def default_backend(device) -> str:
    """The rule for a model that moves: "triton" on a GPU where the kernels are there, else "torch"."""
    on_gpu = torch.device(device).type == "cuda"
    return "triton" if on_gpu and "triton" in available_backends(device) else "torch"


def check_backend(name):
    """Raises ValueError unless name is a backend's."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")


def kernel(op, device):
    """The Triton kernel for op, or BackendUnavailable with the reason why it can't run on device."""
    try:  # imported here: Triton is absent on some systems, and slow to import
        import minidiff_kernels

        found = getattr(minidiff_kernels, op)
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(f'{op}: backend "triton" needs minidiff_kernels, which is not usable here '
                                 f'({error}). Use backend="torch".') from error  # fmt: skip
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if interpreted else "cuda"):
        change = "unset TRITON_INTERPRET" if interpreted else "set TRITON_INTERPRET=1"
        raise BackendUnavailable(f'{op}: backend "triton" got a tensor on {device}. Use backend="torch", or '
                                 f"{change} before importing minidiff.")  # fmt: skip
    if not interpreted:
        check_gpu(op, device, minidiff_kernels)
    return found


def check_gpu(op, device, kernels):
    """Raises BackendUnavailable where there is no GPU, or one that the kernels can't use."""
    if not torch.cuda.is_available():
        raise BackendUnavailable(f'{op}: there is no GPU for backend "triton". Use backend="torch".')
    try:
        kernels.target(device)
    except RuntimeError as error:  # an old GPU; the error names it
        raise BackendUnavailable(f"{op}: {error}") from error
