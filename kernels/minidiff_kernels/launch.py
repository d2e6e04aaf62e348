"""What every launcher asks before it starts a kernel: can it run on these tensors, and on which kind of GPU?

Block sizes are chosen per kind of GPU, `target`: "sm_80" (Ampere, and the consumer GPUs from then on), "sm_90"
(Hopper), "sm_100" (data-centre Blackwell), "gfx942" (MI300, and AMD's others), or "interpreter".
"""

import contextlib
import functools

import torch
import triton


@triton.jit
def _probe():
    pass


# Triton decides when a kernel is defined, by TRITON_INTERPRET, whether it is compiled or interpreted
INTERPRETED = not isinstance(_probe, triton.JITFunction)


def check_tensors(op: str, /, **tensors) -> None:
    """Raises if a kernel can't read these tensors, named as the caller knows them; None stands for an absent one.

    RuntimeError: a tensor is not on a GPU, unless Triton interprets. ValueError: they are on several devices.
    """
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    (name, device), *others = given.items()
    if device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f'{op}: {name} is on {device}, but Triton needs a GPU. Use backend="torch", or set '
                           "TRITON_INTERPRET=1 before importing minidiff.")  # fmt: skip
    for other, its_device in others:
        if its_device != device:
            raise ValueError(f"{op}: {name} is on {device}, {other} on {its_device}; move them to one device")


@functools.cache
def target(device: torch.device) -> str:
    """The kind of GPU that device is, as in the tables of block sizes; RuntimeError before compute capability 8."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(f"{name} has compute capability {major}.{minor}, but the kernels need 8.0 or newer. "
                           'Use backend="torch".')  # fmt: skip
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks run side by side at least: a GPU's multiprocessors, or 1 in the interpreter."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def on(device: torch.device):
    """A context in which launches go to device: Triton takes the current GPU, not that of its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
