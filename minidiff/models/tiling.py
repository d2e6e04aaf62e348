"""Pictures too large for the memory, in pieces: rows of a batch one by one, and tiles that fade into another.

`AutoencoderKL.enable_slicing` is exact. `enable_tiling` is not: a tile's group norms and attention see the
tile alone, so tones differ from tile to tile, and fading hides where. Sizes, overlaps and ramps are those of
diffusers.
"""

from collections.abc import Callable

import torch


class Pieces:
    """What an autoencoder has for large pictures: off until it is enabled, by diffusers' names.

    tile_sample_min_size and tile_latent_min_size: the sides of a tile in pixels and in latents, those of
    config.sample_size; pictures that are no larger are made at once. tile_overlap_factor in [0, 1): which
    part of a tile the next one has, too. All three may be set.
    """

    use_tiling = False
    use_slicing = False
    tile_overlap_factor = 0.25

    def enable_tiling(self, use_tiling: bool = True):
        """From now on, encodes and decodes pictures larger than a tile in tiles, one after the other."""
        self.use_tiling = use_tiling

    def disable_tiling(self):
        """From now on, encodes and decodes pictures whole."""
        self.use_tiling = False

    def enable_slicing(self):
        """From now on, encodes and decodes the pictures of a batch one after the other."""
        self.use_slicing = True

    def disable_slicing(self):
        """From now on, encodes and decodes all pictures of a batch at once."""
        self.use_slicing = False

    def _set_tile_sizes(self, sample_size, factor):
        """Tiles as large as the pictures of training, whose config may give one side, two or none."""
        side = sample_size[0] if isinstance(sample_size, list | tuple) else sample_size
        self.tile_sample_min_size, self.tile_latent_min_size = side, side and side // factor

    def _in_pieces(self, convert: Callable, x: torch.Tensor) -> torch.Tensor:
        """convert(x), by rows and tiles as enabled; convert is `_encode` or `_decode` of this autoencoder.

        x: pictures (B, C, H, W) or latents (B, C, h, w). ValueError where tiles have no size, or are so small
        or overlap so far that the next one would lie where the last one lay.
        """
        sides = self.tile_sample_min_size, self.tile_latent_min_size
        if self.use_tiling and not all(sides):
            raise ValueError(f"tile_sample_min_size and tile_latent_min_size are {sides[0]} and {sides[1]}; "
                             "set them to a tile's sides in pixels and in latents")  # fmt: skip
        given, made = sides if convert == self._encode else sides[::-1]
        if self.use_tiling and max(x.shape[2:]) > given:
            convert = _Tiles(convert, given, made, self.tile_overlap_factor)
        rows = x.split(1) if self.use_slicing else [x]
        return torch.cat([convert(row) for row in rows])


class _Tiles:
    """convert, tile by tile: tiles of side `given` become tiles of side `made`, which fade into another."""

    def __init__(self, convert, given, made, overlap):
        self.convert, self.given, self.step = convert, given, int(given * (1 - overlap))
        self.fade = int(made * overlap)  # the places over which a tile takes the place of the one before
        self.kept = made - self.fade
        if self.step < 1 or self.kept < 1:
            raise ValueError(f"tiles of {given} that overlap by {overlap} lead nowhere; make "
                             "tile_sample_min_size and tile_latent_min_size larger, or tile_overlap_factor "
                             "smaller")  # fmt: skip

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        above, bands = [], []
        for top in range(0, x.shape[2], self.step):
            row = []
            for i, left in enumerate(range(0, x.shape[3], self.step)):
                tile = self.convert(x[:, :, top : top + self.given, left : left + self.given])
                tile = _fade(above[i], tile, self.fade, 2) if above else tile
                row.append(_fade(row[-1], tile, self.fade, 3) if row else tile)
            bands.append(torch.cat([tile[:, :, : self.kept, : self.kept] for tile in row], dim=3))
            above = row
        return torch.cat(bands, dim=2)


def _fade(before, tile, length, dim):
    """tile, whose first places along dim are mixed with the last ones of the tile before: 0 to almost all."""
    length = min(length, before.shape[dim], tile.shape[dim])  # at the edge of the picture, tiles are smaller
    share = torch.arange(length, device=tile.device).to(tile.dtype) / length
    share = share.view(-1, *[1] * (3 - dim))  # (length, 1) down, (length,) across
    last = before.narrow(dim, before.shape[dim] - length, length)
    mixed = last * (1 - share) + tile.narrow(dim, 0, length) * share
    return torch.cat([mixed, tile.narrow(dim, length, tile.shape[dim] - length)], dim)
