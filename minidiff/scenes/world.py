"""What can be in a picture: one or two solids of a colour and a size, in a relation, on a coloured floor.

x points to the right, y up, z towards the camera; lengths are in units of about a solid's radius. A tenth of
all combinations is held out of training, so that prompts can be scored on things never seen together.
"""

import zlib
from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLOURS = {  # linear RGB reflectance
    "red": (0.72, 0.03, 0.03),
    "orange": (0.90, 0.28, 0.01),
    "yellow": (0.88, 0.70, 0.03),
    "green": (0.04, 0.42, 0.06),
    "blue": (0.03, 0.09, 0.62),
    "purple": (0.30, 0.04, 0.50),
    "white": (0.85, 0.85, 0.85),
}
SIZES = {"small": 0.55, "large": 0.88}  # radius of a sphere; the other shapes are made to look as large
FLOORS = {"gray": (0.28, 0.28, 0.29), "brown": (0.30, 0.17, 0.09), "pink": (0.62, 0.30, 0.33)}
RELATIONS = ("left of", "right of", "in front of", "behind")
INVERSE = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}
CUBE_YAWS = (0.45, 1.12)  # radians: two views of a cube, each with two faces in sight
SINGLE_SHARE = 0.25  # pictures with one solid
HELD_OUT_SHARE = 10  # one combination in so many is never trained on


@dataclass(frozen=True)
class Solid:
    """One thing on the floor. x, z: its centre's place on the floor; yaw in radians turns a cube."""

    shape: str
    colour: str
    size: str
    x: float = 0.0
    z: float = 0.0
    yaw: float = 0.0

    @property
    def kind(self):
        """(shape, colour, size): what a caption can say of it."""
        return self.shape, self.colour, self.size


@dataclass(frozen=True)
class Scene:
    """One or two solids on a floor; relation says where the first stands as seen from the second."""

    solids: tuple[Solid, ...]
    floor: str
    relation: str | None = None

    def canonical(self):
        """The same scene told with "left of" or "in front of": inverse relations are one scene."""
        if self.relation in ("right of", "behind"):
            return replace(self, solids=self.solids[::-1], relation=INVERSE[self.relation])
        return self


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with every choice drawn from rng, told canonically."""
    count = 1 if rng.random() < SINGLE_SHARE else 2
    kinds = [
        tuple(str(rng.choice(list(options))) for options in (SHAPES, COLOURS, SIZES)) for _ in range(count)
    ]
    relation = str(rng.choice(("left of", "in front of"))) if count == 2 else None
    return _placed(kinds, relation, str(rng.choice(list(FLOORS))), rng)


def held_out(scene: Scene) -> bool:
    """Whether training leaves out this combination of solids and relation, on whatever floor."""
    scene = scene.canonical()
    name = f"{scene.relation}|" + "|".join(",".join(solid.kind) for solid in scene.solids)
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """count scenes that training never saw: the same list for the same seed."""
    rng, found = np.random.default_rng([seed, 20_240_817]), []
    while len(found) < count:
        scene = random_scene(rng)
        if held_out(scene):
            found.append(scene)
    return found


def _placed(kinds, relation, floor, rng):
    """The scene with its solids put where the relation wants them, with some play."""

    def around(x, z, play_x, play_z):
        return x + rng.uniform(-play_x, play_x), z + rng.uniform(-play_z, play_z)

    if relation is None:
        places = [around(0.0, 0.1, 0.5, 0.4)]
    elif relation == "left of":
        places = [around(-1.15, 0.1, 0.2, 0.3), around(1.15, 0.1, 0.2, 0.3)]
    else:  # the nearer one is put a little aside, so that it does not hide the other
        aside = rng.choice((-0.5, 0.5))
        places = [around(-aside, 1.05, 0.15, 0.15), around(aside, -1.25, 0.15, 0.2)]
    solids = tuple(
        Solid(*kind, x=float(x), z=float(z), yaw=float(rng.choice(CUBE_YAWS)) if kind[0] == "cube" else 0.0)
        for kind, (x, z) in zip(kinds, places, strict=True)
    )
    return Scene(solids, floor, relation)
