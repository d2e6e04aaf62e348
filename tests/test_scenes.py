"""The little world: pictures are functions of their scenes, captions say what is there, held-out scenes stay
out.
"""

import numpy as np
import pytest

from minidiff.scenes import (
    COLOURS,
    FLOORS,
    SHAPES,
    SIZES,
    Scene,
    Solid,
    caption,
    held_out,
    held_out_scenes,
    random_scene,
    render,
    tell,
    words,
)
from minidiff.train.data import training_scene
from minidiff.train.facts import facts_of, scene_of
from minidiff.train.scorer import compare, tally

RED_LEFT = Scene(
    (Solid("sphere", "red", "large", -1.1), Solid("cube", "blue", "small", 1.1)), "gray", "left of"
)


def test_a_plain_caption_says_everything():
    assert caption(RED_LEFT) == "a large red sphere left of a small blue cube on a gray floor"


def test_the_left_solid_is_drawn_on_the_left():
    picture = render(RED_LEFT, 64).astype(int)
    red = (picture[..., 0] - picture[..., 2]) > 60
    blue = (picture[..., 2] - picture[..., 0]) > 60
    assert red.any() and blue.any()
    assert red.nonzero()[1].mean() < 32 < blue.nonzero()[1].mean()


def test_what_is_in_front_is_drawn_lower():
    solids = (Solid("sphere", "red", "small", 0.3, 1.1), Solid("sphere", "blue", "small", -0.3, -1.2))
    picture = render(Scene(solids, "gray", "in front of"), 64).astype(int)
    red = (picture[..., 0] - picture[..., 2]) > 60
    blue = (picture[..., 2] - picture[..., 0]) > 60
    assert red.nonzero()[0].mean() > blue.nonzero()[0].mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_solid_covers_more_pixels_than_a_small_one(shape):
    def covered(size):
        empty = render(Scene((), "gray"), 64).astype(int)
        picture = render(Scene((Solid(shape, "white", size),), "gray"), 64).astype(int)
        return (np.abs(picture - empty).max(-1) > 40).sum()

    assert covered("large") > 1.8 * covered("small") > 100


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_on_every_floor_differ_from_the_floor(colour):
    for floor in FLOORS:
        picture = render(Scene((Solid("sphere", colour, "large"),), floor), 32).astype(int)
        assert np.abs(picture[16, 16] - picture[30, 2]).max() > 30


def test_rendering_is_a_function_of_the_scene():
    assert np.array_equal(render(RED_LEFT, 32), render(RED_LEFT, 32))


def test_training_never_sees_a_held_out_combination():
    assert not any(held_out(training_scene(n)) for n in range(300))
    assert all(held_out(scene) for scene in held_out_scenes(50))


def test_about_a_tenth_is_held_out():
    rng = np.random.default_rng(0)
    share = np.mean([held_out(random_scene(rng)) for _ in range(3000)])
    assert 0.06 < share < 0.14


def test_inverse_relations_are_one_scene():
    mirrored = Scene(RED_LEFT.solids[::-1], "gray", "right of")
    assert mirrored.canonical() == RED_LEFT
    assert held_out(mirrored) == held_out(RED_LEFT)
    assert np.array_equal(facts_of(mirrored), facts_of(RED_LEFT))


def test_facts_name_the_scene_back():
    rng = np.random.default_rng(1)
    for _ in range(100):
        scene = random_scene(rng)
        named = scene_of(facts_of(scene))
        assert [s.kind for s in named.solids] == [s.kind for s in scene.solids]
        assert (named.floor, named.relation) == (scene.floor, scene.relation)


def test_loose_captions_name_only_what_they_say():
    rng = np.random.default_rng(2)
    for _ in range(200):
        telling = tell(random_scene(rng), rng)
        text = words(telling, rng)
        for solid in telling.solids:
            assert solid.colour in text
        assert telling.sizes == any(word in text.split() for word in ("small", "little", "large", "big"))
        assert (telling.floor is not None) == ("floor" in text)


def test_the_score_tells_exchanged_solids_from_right_ones():
    exchanged = Scene(RED_LEFT.solids[::-1], "gray", "left of")
    assert compare(RED_LEFT, RED_LEFT)["everything"] == (1, 1)
    assert compare(RED_LEFT, exchanged)["relation"] == (0, 1)
    assert compare(RED_LEFT, exchanged)["colour"] == (2, 2)
    one = Scene((Solid("sphere", "red", "small"),), "pink")
    assert compare(RED_LEFT, one) == {
        "count": (0, 1),
        "shape": (1, 2),
        "colour": (1, 2),
        "size": (0, 2),
        "relation": (0, 1),
        "floor": (0, 1),
        "everything": (0, 1),
    }
    assert tally([(RED_LEFT, RED_LEFT), (RED_LEFT, one)])["shape"] == 0.75


def test_sizes_are_ordered():
    assert SIZES["small"] < SIZES["large"]
