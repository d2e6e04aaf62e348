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


def floats(x, name="array") -> np.ndarray:
    """x, an array or a tensor, to compute with: float64 stays, all other floats become float32.

    TypeError, with x's name, for anything else.
    """
    array = to_numpy(x) if is_tensor(x) else x
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        kind = f"array of {array.dtype}" if isinstance(array, np.ndarray) else type(x).__name__
        raise TypeError(f"{name} is a {kind}; it must be a floating point array or tensor")
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)


def number_list(values, name: str, least: int = 1, whole: bool = False) -> np.ndarray:
    """A caller's list, array or tensor of at least `least` numbers: float64 or, whole ones, int64 (n,).

    ValueError, with its name, for another shape, and for what is no number, not finite or not whole.
    """
    given = np.asarray(to_numpy(values))
    wanted = np.int64 if whole else np.float64
    right = given.ndim == 1 and len(given) >= least and given.dtype.kind in "iuf" and np.isfinite(given).all()
    if not right or (given.astype(wanted) != given).any():
        kind = "whole" if whole else "finite"
        raise ValueError(f"{name} is {values!r}; it must be a list of {kind} numbers, {least} or more")
    return given.astype(wanted)


def whole_number(value, name: str, most: int | None = None) -> int:
    """value as an int from 1 to most. TypeError if it is no whole number, ValueError if out of range."""
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or value < 1 or (most is not None and value > most):
        bounds = "of at least 1" if most is None else f"from 1 to {most}"
        error = ValueError if integer else TypeError
        raise error(f"{name} is {value!r}; it must be a whole number {bounds}")
    return int(value)


def table_index(timestep, length: int) -> int:
    """timestep, in any form that people pass, as an index into tables; -1 means their last entry.

    ValueError if it is not whole, or outside.
    """
    t = timestep.item() if hasattr(timestep, "item") else timestep
    if not isinstance(t, int | float) or t != t // 1:
        raise ValueError(f"timestep is {timestep!r}; it must be one whole number")
    if not -1 <= t < length:
        raise ValueError(
            f"timestep {t} is none of the {length} that the tables have; take it from .timesteps"
        )
    return int(t)


def like(array: np.ndarray, reference, keep_dtype=False):
    """array with the kind (NumPy or torch), device and dtype of reference; values are rounded once.

    keep_dtype: it keeps its own dtype.
    """
    dtype = None if keep_dtype else reference.dtype
    if not is_tensor(reference):
        return array if keep_dtype else array.astype(dtype, copy=False)
    return sys.modules["torch"].from_numpy(array).to(device=reference.device, dtype=dtype)


class Output(dict):
    """What a call returns: its parts as attributes, keys or a tuple."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this result has no {name!r}; it has {', '.join(self)}") from None

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self):
        """The parts without their names, as with return_dict=False."""
        return tuple(self.values())


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


def draw_like(reference, shape, generator=None, dtype=None) -> np.ndarray:
    """`draw_normal` in reference's dtype, if no other is given, and, without a generator, on its device."""
    device = reference.device if is_tensor(reference) else None
    return draw_normal(shape, generator, reference.dtype if dtype is None else dtype, device)


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
    return scaled if output_type == "np" else to_pil(scaled)


def to_pil(pictures):
    """Pictures, float32 (B, H, W, C) in [0, 1], as a list of PIL images; ValueError unless C is 1, 3 or 4."""
    from PIL import Image  # inside, so that schedulers and sampling don't need it

    if pictures.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"a picture with {pictures.shape[-1]} channels has no PIL format; use output_type='np' or 'pt'"
        )
    pixels = (pictures * 255).round().astype(np.uint8)
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
