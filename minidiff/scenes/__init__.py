"""The little world behind the checkpoints that ship: ray-traced still lifes whose every attribute is known.

`world` says what can be in a picture, `render` draws it, `captions` says it in words. NumPy only.
"""

from minidiff.scenes.captions import Telling, caption, tell, vocabulary_corpus, words
from minidiff.scenes.render import render
from minidiff.scenes.world import (
    COLOURS,
    FLOORS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Solid,
    held_out,
    held_out_scenes,
    random_scene,
)

__all__ = [
    "COLOURS",
    "FLOORS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Scene",
    "Solid",
    "Telling",
    "caption",
    "held_out",
    "held_out_scenes",
    "random_scene",
    "render",
    "tell",
    "vocabulary_corpus",
    "words",
]
