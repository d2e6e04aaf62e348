"""The shapes that kernels meet in Stable Diffusion: {shape: where}, for 1, 2 and 8 rows of a batch.

ATTENTION (B, heads, T, S, D), GROUP_NORM (B, C, H, W, silu), GEGLU (tokens, C, width), UPSAMPLE_CONV (B, C,
H, W), all at 512² and 768², SDXL also at its own 1024². Guidance doubles the rows: one picture is B = 2.
Tests hold these tables against what the models' layers really see.
"""

from itertools import product

BATCHES = (1, 2, 8)
TEXT = 77  # tokens
SIDES = {"SD 1.5": (512, 768), "SD 2.1": (512, 768), "SDXL": (512, 768, 1024), "VAE": (512, 768)}

# A U-Net's levels from the top: its attentions' heads, None where a level has no transformer. Channels are
# 320, 640, 1280 and again 1280; a level has half the side of the one above, the top one a latent's: 1/8 of
# the picture's.
HEADS = {"SD 1.5": (8, 8, 8, 8), "SD 2.1": (5, 10, 20, 20), "SDXL": (None, 10, 20)}
CHANNELS = (320, 640, 1280, 1280)
# Channels that a level's norms see: those of the levels beside it at its first resnets, and on the way up
# the sums with the skips.
UNET_NORMS = ((320, 640, 960), (320, 640, 960, 1280, 1920), (640, 1280, 1920, 2560), (1280, 2560))
VAE_NORMS = ((128, 256), (128, 256, 512), (256, 512), (512,))  # from the picture's size down
VAE_UPSAMPLED = ((512, 8), (512, 4), (256, 2))  # channels, and pixels per latent pixel before it


def _unet_levels():
    """(model, level, B, side, what to call it) of every level at every size."""
    for model, heads in HEADS.items():
        for picture, level, batch in product(SIDES[model], range(len(heads)), BATCHES):
            where = f"{model} U-Net at {picture}², 1/{8 << level}"
            yield model, level, batch, picture // 8 >> level, where


def _vae_levels():
    for picture, level, batch in product(SIDES["VAE"], range(4), BATCHES):
        yield level, batch, picture >> level, f"VAE at {picture}², 1/{1 << level}"


def _named(pairs):
    """{shape: where}, the places of one shape joined."""
    table = {}
    for shape, where in pairs:
        table.setdefault(shape, {})[where] = None
    return {shape: "; ".join(places) for shape, places in table.items()}


def _attention():
    for model, level, batch, side, where in _unet_levels():
        heads = HEADS[model][level]
        if heads is not None:
            size, tokens = CHANNELS[level] // heads, side * side
            yield (batch, heads, tokens, tokens, size), f"{where}, self"
            yield (batch, heads, tokens, TEXT, size), f"{where}, text"
    for level, batch, side, where in _vae_levels():
        if level == 3:
            yield (batch, 1, side * side, side * side, 512), where


def _group_norm():
    for model, level, batch, side, where in _unet_levels():
        for channels in UNET_NORMS[level]:
            yield (batch, channels, side, side, True), where
        if HEADS[model][level] is not None:
            yield (batch, CHANNELS[level], side, side, False), f"{where}, transformer"
    for level, batch, side, where in _vae_levels():
        for channels in VAE_NORMS[level]:
            yield (batch, channels, side, side, True), where
        if level == 3:
            yield (batch, 512, side, side, False), f"{where}, attention"


def _geglu():
    for model, level, batch, side, where in _unet_levels():
        if HEADS[model][level] is not None:
            channels = CHANNELS[level]
            yield (batch * side * side, channels, 4 * channels), where


def _upsample_conv():
    for _, level, batch, side, where in _unet_levels():
        if level > 0:
            yield (batch, CHANNELS[level], side, side), where
    for picture, (channels, factor), batch in product(SIDES["VAE"], VAE_UPSAMPLED, BATCHES):
        side = picture // factor
        yield (batch, channels, side, side), f"VAE at {picture}², 1/{factor}"


ATTENTION = _named(_attention())
GROUP_NORM = _named(_group_norm())
GEGLU = _named(_geglu())
UPSAMPLE_CONV = _named(_upsample_conv())
