"""A scene, or what a caption says of one, as class numbers: what the text encoder and the scorer learn to
name.
"""

import numpy as np

from minidiff.scenes import COLOURS, FLOORS, SHAPES, SIZES, Scene, Solid, Telling
from minidiff.scenes.world import INVERSE

RELATION_CLASSES = (None, "left of", "in front of", "and")
# Name of a fact -> its classes; None: absent or not said. "first" is the left one, the one in front, or,
# where no relation is named, the one named first.
FACTS = {
    "relation": RELATION_CLASSES,
    **{f"{which} {what}": (None, *options)
       for which in ("first", "second")
       for what, options in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES))},
    "floor": (None, *FLOORS),
}  # fmt: skip


def facts_of(told: Scene | Telling) -> np.ndarray:
    """int64 class numbers in the order of FACTS."""
    solids, relation = told.solids, told.relation
    if relation in ("right of", "behind"):
        solids, relation = solids[::-1], INVERSE[relation]
    named = [relation]
    for solid in (*solids, None)[:2]:
        shape, colour, size = solid.kind if solid else (None, None, None)
        named += [shape, colour, size if getattr(told, "sizes", True) else None]
    named.append(told.floor)
    return np.array([tuple(classes).index(name) for classes, name in zip(FACTS.values(), named, strict=True)])


def scene_of(numbers) -> Scene:
    """The scene that these class numbers name; the place of its solids is not known. Inverse of facts_of."""
    named = [tuple(classes)[n] for classes, n in zip(FACTS.values(), numbers, strict=True)]
    solids = tuple(Solid(*kind) for kind in (named[1:4], named[4:7]) if kind[0] is not None)
    return Scene(solids, named[-1], named[0])
