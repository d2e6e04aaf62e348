"""AutoencoderKL in pieces, by tiles and by rows, against diffusers; and what is refused."""

import pytest
import torch
from parity import assert_close, twins

import minidiff

LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
TINY = {"block_out_channels": (4, 8), **LEVELS, "norm_num_groups": 2, "sample_size": 16}  # 8 latents
SIZES = {  # height, width
    "smaller than a tile": (8, 12),
    "one tile": (16, 16),
    "two tiles across": (10, 20),
    "two tiles down": (26, 16),
    "many tiles, the last of them small": (26, 34),
    "larger by a whole step": (28, 40),
}
TILINGS = {
    "as made": {},
    "other sides": {"tile_sample_min_size": 8, "tile_latent_min_size": 4},
    "half over": {"tile_overlap_factor": 0.5},
    "side by side": {"tile_overlap_factor": 0.0},
}


def normal(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair():
    return twins("AutoencoderKL", **TINY)


@pytest.fixture
def both(pair):
    """Both autoencoders, which a test may set up; afterwards they are as they were made."""
    before = [dict(vars(vae)) for vae in pair]
    yield pair
    for vae, values in zip(pair, before, strict=True):
        vars(vae).clear()
        vars(vae).update(values)


def assert_both_ways_equal(both, size):
    ours, theirs = both
    x = normal(2, 3, *size)
    with torch.no_grad():
        z = theirs.encode(x).latent_dist.mean
        assert_close(ours.encode(x).latent_dist.mean, z, atol=1e-9)
        assert_close(ours.decode(z).sample, theirs.decode(z).sample, atol=1e-9)
        assert_close(ours(x).sample, theirs(x).sample, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("size", SIZES)
def test_tiles_equal_diffusers(both, size, tiling):
    for vae in both:
        vae.enable_tiling()
        for name, value in TILINGS[tiling].items():
            setattr(vae, name, value)
    assert_both_ways_equal(both, SIZES[size])


@pytest.mark.parametrize("tiles", [False, True])
def test_slices_equal_diffusers_and_the_batch_at_once(both, tiles):
    for vae in both:
        vae.enable_slicing()
        if tiles:
            vae.enable_tiling()
    assert_both_ways_equal(both, (22, 20))
    ours, z = both[0], normal(3, 4, 8, 8)
    sliced = ours.decode(z).sample
    ours.disable_slicing()
    assert_close(sliced, ours.decode(z).sample, atol=1e-12)


def test_no_piece_is_larger_than_a_tile_or_more_than_one_row(both):
    ours, seen = both[0], []
    ours.enable_tiling()
    ours.enable_slicing()
    hook = ours.decoder.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    ours.decode(normal(2, 4, 13, 19))
    hook.remove()
    assert len(seen) == 2 * 3 * 4  # rows, tiles down, tiles across: one each 6 latents
    assert {shape[0] for shape in seen} == {1} and max(max(shape[2:]) for shape in seen) == 8


def test_tiles_are_off_until_enabled_and_after_being_disabled(both):
    ours, theirs = both
    names = (
        "use_tiling",
        "use_slicing",
        "tile_sample_min_size",
        "tile_latent_min_size",
        "tile_overlap_factor",
    )
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    z = normal(1, 4, 12, 12)
    whole = ours.decode(z).sample
    ours.enable_tiling()
    tiled = ours.decode(z).sample
    assert tiled.shape == whole.shape and not torch.allclose(tiled, whole)
    for disable in (ours.disable_tiling, lambda: ours.enable_tiling(use_tiling=False)):
        ours.enable_tiling()
        disable()
        assert torch.equal(ours.decode(z).sample, whole)


def test_tiles_pass_gradients_on(both):
    gradients = []
    for vae in both:
        vae.enable_tiling()
        z = normal(1, 4, 8, 14).requires_grad_()
        vae.decode(z).sample.square().sum().backward()
        gradients.append(z.grad)
    assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_values_that_are_not_finite_are_found_in_tiles_too(both):
    both[0].enable_tiling()
    z = normal(1, 4, 12, 12)
    z[0, 0, -1, -1] = torch.nan
    with pytest.raises(ValueError, match="the latents hold NaN"):
        both[0].decode(z)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tile_overlap_factor": 1.0}, r"tiles of 8 that overlap by 1\.0 lead nowhere"),
        ({"tile_latent_min_size": 1}, r"tiles of 1 that overlap by 0\.25 lead nowhere; make tile_sample_min"),
        ({"tile_sample_min_size": None}, "are None and 8; set them to a tile's sides"),
    ],
)
def test_tiles_that_can_not_cover_a_picture_are_refused(both, changes, message):
    both[0].enable_tiling()
    for name, value in changes.items():
        setattr(both[0], name, value)
    with pytest.raises(ValueError, match=message):
        both[0].decode(normal(1, 4, 12, 12))


@pytest.mark.parametrize("size, sides", [((16, 24), (16, 8)), (None, (None, None))])
def test_sample_sizes_of_two_sides_or_none_are_read(size, sides):
    vae = minidiff.AutoencoderKL(**TINY | {"sample_size": size})
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == sides
