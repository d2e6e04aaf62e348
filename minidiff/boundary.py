"""Where torch, NumPy and PIL meet: conversions, random numbers, pictures. No mathematics of diffusion.

torch is never imported at the top: a tensor or generator can only come from a caller who imported it already,
so that schedulers and sampling work where torch isn't installed. bfloat16 has no NumPy dtype and crosses as
float32.
"""

import sys

import numpy as np

GENERATORS = "a torch.Generator, a numpy.random.Generator, or a list of them, one for each row"


def is_tensor(x) -> bool:
    """Whether x is a torch tensor; torch need not be installed."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def to_numpy(x) -> np.ndarray:
    """x, an array or a tensor on any device, as an ndarray, cut off from autograd.

    float16, float32 and float64 keep their dtype, bfloat16 becomes float32. A CPU tensor shares its memory.
    """
    if isinstance(x, np.ndarray):
        return x
    if not is_tensor(x):
        return np.asarray(x)
    x = x.detach()
    if x.dtype == sys.modules["torch"].bfloat16:
        x = x.float()
    return x.cpu().numpy()


def like(array: np.ndarray, reference, keep_dtype=False):
    """array with the kind (NumPy or torch), device and dtype of reference; values are rounded once.

    keep_dtype: it keeps its own dtype.
    """
    dtype = None if keep_dtype else reference.dtype
    if not is_tensor(reference):
        return array if keep_dtype else array.astype(dtype, copy=False)
    return sys.modules["torch"].from_numpy(array).to(device=reference.device, dtype=dtype)


def draw_normal(shape, generator=None, dtype=np.float32, device=None) -> np.ndarray:
    """An ndarray of standard normal numbers: the same ones, in the same order, as diffusers draws.

    generator is a torch.Generator, a numpy.random.Generator, or a list with one for each row of shape[0], so
    that image k of a batch equals the same seed alone; a list of one counts as that one. None is torch's
    global generator, on device. dtype, NumPy's or torch's, is the one that is drawn in: float64 draws differ
    from float32 ones.
    """
    shape = tuple(shape)
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    if not isinstance(generator, (list, tuple)):
        return _draw(shape, generator, dtype, device)
    if len(generator) != shape[0]:
        raise ValueError(
            f"got a list of {len(generator)} generators for {shape[0]} rows; pass one for each row, or one"
        )
    return np.concatenate([_draw((1, *shape[1:]), each, dtype, device) for each in generator])


def _draw(shape, generator, dtype, device):
    """One draw of the whole shape: torch draws fewer than 16 numbers in another way, so draws are never
    split.
    """
    if isinstance(generator, np.random.Generator):
        dtype = np.dtype("float32" if is_torch_dtype(dtype) else dtype)
        drawn = generator.standard_normal(shape, dtype=np.float64 if dtype == np.float64 else np.float32)
        return drawn.astype(dtype, copy=False)
    torch = _torch_for_drawing()
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; pass {GENERATORS}")
    dtype = dtype if is_torch_dtype(dtype) else getattr(torch, np.dtype(dtype).name)
    device = device if generator is None else generator.device
    return to_numpy(torch.randn(shape, generator=generator, dtype=dtype, device=device))


def is_torch_dtype(dtype) -> bool:
    """Whether dtype is torch's (torch.float32), not NumPy's."""
    return type(dtype).__module__ == "torch"


def _torch_for_drawing():
    """torch, imported here if nobody has: without a generator, numbers come from its global one."""
    try:
        import torch
    except ImportError:
        raise ValueError(
            "no generator was given and torch, whose global one would be used, isn't installed; "
            "pass generator=numpy.random.default_rng(seed)"
        ) from None
    return torch


def to_images(pictures, output_type: str = "pil"):
    """Pictures in [-1, 1], (B, C, H, W) array or tensor, as what a pipeline returns; values outside are
    clipped.

    output_type "pil": a list of B PIL images (C = 1 grey, 3 RGB, 4 RGBA); "np": float32 (B, H, W, C) in [0,
    1]; "pt": a tensor (B, C, H, W) in [0, 1]. The arithmetic is done in the pictures' dtype and rounded half
    to even, as in diffusers. Raises ValueError for another output_type and for values that are not finite.
    """
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type is {output_type!r}; it must be 'pil', 'np' or 'pt'")
    if len(pictures.shape) != 4:
        raise ValueError(f"pictures must have the shape (B, C, H, W), not {tuple(pictures.shape)}")
    if not np.isfinite(to_numpy(pictures)).all():
        raise ValueError(
            "the picture has values that are not finite. In float16 some decoders overflow: "
            "use torch_dtype=torch.float32 (or bfloat16) for the VAE"
        )
    scaled = (pictures * 0.5 + 0.5).clip(0, 1)
    if output_type == "pt":
        return scaled if is_tensor(scaled) else _torch_for_drawing().from_numpy(np.ascontiguousarray(scaled))
    scaled = to_numpy(scaled).transpose(0, 2, 3, 1).astype(np.float32, copy=False)  # (B, H, W, C)
    return scaled if output_type == "np" else _to_pil(scaled)


def _to_pil(pictures):
    """float32 (B, H, W, C) in [0, 1] -> a list of PIL images."""
    from PIL import Image  # inside, so that schedulers and sampling don't need it

    if pictures.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"a picture with {pictures.shape[-1]} channels has no PIL format; use output_type='np' or 'pt'"
        )
    pixels = (pictures * 255).round().astype(np.uint8)
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
