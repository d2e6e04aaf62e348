"""Models without needless work: `minidiff.optimize(model)` rewrites their layers, exactly.

Each rewrite computes the same function as the plain layer, in another order of rounding; weights and
`state_dict()` stay as they are. Read `rewrite.py` for how, then the rewrites: `onednn.py` (weights packed
once, on a CPU), `layers.py` (joined projections, folded upsampling), `norms.py`, `steps.py` (what is computed
once a prompt or once a step), `winograd.py`. `graphs.py` records a U-Net's step as a CUDA graph.
"""

import logging
from collections import Counter

import torch
from torch import nn

from minidiff import backends
from minidiff.models.layers import Attention, GroupNorm, ResnetBlock2D, Upsample2D
from minidiff.models.unet import GEGLU, UNet2DConditionModel
from minidiff.models.unet_ddpm import UNet2DModel
from minidiff.optimization import onednn, winograd
from minidiff.optimization.graphs import GraphedStep
from minidiff.optimization.layers import (
    FoldedUpsample,
    JoinedAttention,
    KernelGEGLU,
    KernelUpsample,
    LastConv,
    PointwiseConv,
    is_pointwise,
)
from minidiff.optimization.norms import ChannelsLastNorm
from minidiff.optimization.rewrite import Rewrite, models_of, restore, rewrite_of
from minidiff.optimization.steps import Step

__all__ = ["compile_unet", "optimize", "restore"]
logger = logging.getLogger(__name__)
LAST = ("conv_out", "quant_conv")  # layers whose result leaves a model


def optimize(model, winograd: bool = False):
    """Rewrites the layers of a model, or of all models of a pipeline, to do less work; returns it.

    For inference with models of Stable Diffusion's size; one as small as `scenes` gains nothing. Call it
    after `.to(device)` and after `use_backend`, and again after moving the model. What it computes is the
    same but for rounding, what it needs is memory: packed, joined and folded weights are kept beside the
    originals. The weights may be changed in place, moved or loaded anew; only changes through `weight.data`
    or NumPy, which PyTorch does not count, need another call. Where gradients are wanted, layers compute as
    before, as do those that hooks, adapters or autocast reach into. A U-Net works for one thread at a time.
    On a CPU weights are packed for oneDNN, in float32 and, where the processor multiplies it, bfloat16;
    pictures inside are channels_last. On a GPU the kernels of minidiff_kernels take over products with their
    gates, and upsampling.

    winograd: 3 × 3 convolutions with many channels, in float32 on a CPU, by Winograd's F(2×2, 3×3), which
    takes 16/9 of their weights' memory. Undo all with `minidiff.optimization.restore(model)`.
    Raises TypeError for anything but a model, or a pipeline of models.
    """
    models = models_of(model)
    weights = [weight for one in models if (weight := next(one.parameters(), None)) is not None]
    for dtype in {weight.dtype for weight in weights if weight.device.type == "cpu"}:
        if not onednn.usable(dtype):
            logger.warning("optimize: products in %s are not packed, which PyTorch does for float32 and, on "
                           "processors that multiply it, bfloat16", dtype)  # fmt: skip
    if any(weight.is_inference() for weight in weights):
        logger.warning("optimize: weights made under torch.inference_mode count no changes and are neither "
                       "packed nor joined; load the model outside of it")  # fmt: skip
    for one in models:
        _rewrite(one, Step, winograd)
    return model


def compile_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """optimize for a U-Net on a GPU, whose step then also replays a CUDA graph; returns unet.

    It is recorded at the first call with new shapes, and must be called without gradients. Its weights become
    channels_last. They may be changed, moved or replaced later, as for optimize; hooks are called while it is
    recorded only, and after `use_backend` it must be compiled again. Raises BackendUnavailable without a GPU,
    TypeError for another model, ValueError for a U-Net whose forward somebody has replaced.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"compile takes a UNet2DConditionModel, not a {type(unet).__name__}")
    if unet.device.type != "cuda":
        raise backends.BackendUnavailable(
            f"compile: a CUDA graph needs a GPU, and the U-Net is on {unet.device}; move it first: "
            'pipe.to("cuda"). On a CPU, minidiff.optimize(pipe) makes it faster.'
        )
    restore(unet)
    if "forward" in unet.__dict__:
        raise ValueError(
            f"compile: the U-Net's forward was replaced by {unet.forward!r:.100}; undo that first"
        )
    _rewrite(unet, GraphedStep)
    return unet


def _rewrite(model, step, with_winograd=False):
    weight = next(model.parameters(), None)
    if weight is None:
        return
    restore(model)
    device = weight.device
    if isinstance(model, UNet2DConditionModel | UNet2DModel):
        step(model).install()
    covered = set()
    for name, layer in model.named_modules():  # a layer comes before those below it
        if layer not in covered and rewrite_of(layer) is None:
            last = name.rpartition(".")[2] in LAST
            rewrite = _for_cpu(layer, last, with_winograd) if device.type == "cpu" else _for_gpu(layer, last)
            if rewrite is not None:
                rewrite.install()
        if rewrite_of(layer) is not None:
            covered.update(rewrite_of(layer).covers)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    kinds = Counter(type(found).__name__ for layer in model.modules() if (found := rewrite_of(layer)))
    done = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    logger.info("optimize: %s on %s: %s", type(model).__name__, device, done)


def _for_cpu(layer, last, with_winograd) -> Rewrite | None:
    """The rewrite of this layer; None if it stays plain."""
    if type(layer) is Attention and layer.to_k.in_features == layer.to_q.in_features:
        return JoinedAttention(layer)
    if isinstance(layer, GroupNorm | Upsample2D):
        rewrite = ChannelsLastNorm if isinstance(layer, GroupNorm) else FoldedUpsample
        return rewrite(layer) if layer.backend == "torch" else None
    if type(layer) is ResnetBlock2D:
        return onednn.PackedResnet(layer)
    if type(layer) is nn.Conv2d:
        kind = winograd.WinogradConv if with_winograd and winograd.fits(layer) else onednn.PackedConv
        return kind(layer, last)
    return onednn.PackedLinear(layer) if type(layer) is nn.Linear else None


def _for_gpu(layer, last) -> Rewrite | None:
    """The same where the kernels run; a backend that was chosen for a layer by name is kept."""
    if type(layer) is nn.Conv2d and last:
        return LastConv(layer)
    if is_pointwise(layer):
        return PointwiseConv(layer)
    if type(layer) is Attention and layer.to_k.in_features == layer.to_q.in_features:
        return JoinedAttention(layer)
    if not isinstance(layer, Upsample2D | GEGLU):
        return None
    device = next(layer.parameters()).device
    chosen = layer.backend if getattr(layer, "backend_chosen", False) else "triton"
    if chosen != "triton" or "triton" not in backends.available_backends(device):
        return None
    if isinstance(layer, Upsample2D):
        return KernelUpsample(
            layer, backends.kernel("upsample_conv", device), backends.kernel("fold", device)
        )
    return KernelGEGLU(layer, backends.kernel("geglu_linear", device))
