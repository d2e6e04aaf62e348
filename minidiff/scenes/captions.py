"""Says a scene in words, each time a little differently, so that prompts may be loose."""

from dataclasses import dataclass

import numpy as np

from minidiff.scenes.world import INVERSE, Scene, Solid, random_scene

SYNONYMS = {  # a word that stands twice is drawn twice as often
    "sphere": ("sphere", "sphere", "ball"),
    "cube": ("cube", "cube", "box"),
    "large": ("large", "large", "big"),
    "small": ("small", "small", "little"),
}
PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "in front of": ("in front of", "before"),
    "behind": ("behind", "in back of"),
}
OPENINGS = ("", "", "", "", "a photo of ", "a picture of ", "a render of ")


@dataclass(frozen=True)
class Telling:
    """What a caption says of a scene: the solids in its order, their relation ("and": none is named) and the
    floor.
    """

    solids: tuple[Solid, ...]
    relation: str | None
    sizes: bool
    floor: str | None


def tell(scene: Scene, rng: np.random.Generator | None = None) -> Telling:
    """Chooses what to say: everything without rng; with it either order, and now and then less."""
    if rng is None:
        return Telling(scene.solids, scene.relation, True, scene.floor)
    solids, relation = scene.solids, scene.relation
    if relation and rng.random() < 0.5:
        solids, relation = solids[::-1], INVERSE[relation]
    if relation and rng.random() < 0.05:
        relation = "and"
    return Telling(solids, relation, rng.random() < 0.85, scene.floor if rng.random() < 0.6 else None)


def words(telling: Telling, rng: np.random.Generator | None = None) -> str:
    """The sentence: with the plainest words, or with synonyms and openings drawn from rng."""

    def choose(options):
        return options[0] if rng is None else options[rng.integers(len(options))]

    def noun_phrase(solid):
        adjectives = [choose(SYNONYMS[solid.size])] if telling.sizes else []
        parts = [*adjectives, solid.colour, choose(SYNONYMS.get(solid.shape, (solid.shape,)))]
        return ("an " if parts[0][0] in "aeiou" else "a ") + " ".join(parts)

    relation = choose(PHRASES.get(telling.relation, (telling.relation,)))
    phrases = f" {relation} ".join(noun_phrase(solid) for solid in telling.solids)
    return choose(OPENINGS) + phrases + (f" on a {telling.floor} floor" if telling.floor else "")


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """One sentence for the scene: the plain one with every attribute, or, with rng, a loose one of many."""
    return words(tell(scene, rng), rng)


def vocabulary_corpus(seed: int = 0, count: int = 20_000) -> list[str]:
    """Captions from which the tokenizer's merges are learned."""
    rng = np.random.default_rng([seed, 7])
    return [caption(random_scene(rng), rng) for _ in range(count)]
