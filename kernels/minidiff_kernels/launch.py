"""What every launcher needs: can a kernel reach these tensors, on which GPU, how does it sum, and a gradient.

Kernels run on a GPU, or, to be read and tested without one, on CPU tensors in Triton's interpreter:
TRITON_INTERPRET=1 in the environment before Triton is imported.
"""

import contextlib
import functools
import os

import torch
import triton.language as tl
from torch.autograd.function import once_differentiable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton looks once too, where a kernel is defined
# Options of every launch. a · b + c is one instruction: Triton's default until 3.10, and a fifth less to do.
OPTIONS = {"enable_fp_fusion": True}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(op, **tensors):
    """Raises TypeError, ValueError or RuntimeError unless a kernel can work on all of these; None is skipped.

    The first tensor says which device it is; it and the others may differ in their floating dtype.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given.values()))
    for name, tensor in given.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; expected float16, bfloat16, float32 or float64")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the first tensor on {first.device}; "
                             "move them to one device")  # fmt: skip
    if first.device.type != ("cpu" if INTERPRETED else "cuda"):
        raise RuntimeError(f'{op}: Triton got a tensor on {first.device}. Use backend="torch", or set '
                           "TRITON_INTERPRET=1 before importing triton, to interpret on a CPU")  # fmt: skip


def check_shapes(op, **expected):
    """Raises ValueError unless each tensor of {name: (tensor, shape)} has its shape; None is skipped."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")


def on_device(tensor):
    """A context in which kernels start on tensor's GPU, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def target(device: torch.device) -> str:
    """The kind of GPU, as tables of block sizes name it, that device is or comes closest to.

    "sm_90" is Hopper, "sm_100" data-centre Blackwell, "gfx942" AMD, "sm_80" any other by NVIDIA: Ampere, and
    the consumer GPUs since, which multiply matrices with its instructions. "interpreter" on a CPU.
    RuntimeError for GPUs before compute capability 8.0, which lack bfloat16 and asynchronous copies.
    """
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; "
                           'the kernels need 8.0 or newer. Use backend="torch".')  # fmt: skip
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many processors with their own shared memory device has; 1 in the interpreter."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def sum_dtype(tensor):
    """The precision of sums: float32, or float64 for float64."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def differentiable(launch, recompute, *tensors):
    """launch(*tensors), whose gradient is that of recompute(*tensors), the same in PyTorch's operations."""
    return _Recomputed.apply(launch, recompute, *tensors)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, launch, recompute, *tensors):
        ctx.recompute = recompute
        ctx.save_for_backward(*tensors)
        return launch(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        needed = ctx.needs_input_grad[2:]
        inputs = [t if t is None else t.detach().requires_grad_(n)
                  for t, n in zip(ctx.saved_tensors, needed, strict=True)]  # fmt: skip
        with torch.enable_grad():
            out = ctx.recompute(*inputs)
        wanted = [t for t, n in zip(inputs, needed, strict=True) if n]
        gradients = iter(torch.autograd.grad(out, wanted, gradient))
        return None, None, *(next(gradients) if n else None for n in needed)
