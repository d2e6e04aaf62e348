"""Says a scene in words, each time a little differently, so that prompts may be loose."""

import numpy as np

from minidiff.scenes.world import INVERSE, Scene

SYNONYMS = {"sphere": ("sphere", "sphere", "ball"), "cube": ("cube", "cube", "box"), "large": ("large", "large", "big"),
            "small": ("small", "small", "little")}  # fmt: skip
PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "in front of": ("in front of", "before"),
    "behind": ("behind", "in back of"),
}
OPENINGS = ("", "", "", "", "a photo of ", "a picture of ", "a render of ")


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """One sentence for the scene. Without rng the plain one, with every attribute; with it, a loose one of many:
    synonyms, the inverse relation, sizes, relation or floor now and then left out."""
    if rng is None:
        first = " ".join(["a", scene.solids[0].size, scene.solids[0].colour, scene.solids[0].shape])
        rest = [f"{scene.relation} a {s.size} {s.colour} {s.shape}" for s in scene.solids[1:]]
        return " ".join([first, *rest, f"on a {scene.floor} floor"])
    solids, relation = scene.solids, scene.relation
    if relation and rng.random() < 0.5:
        solids, relation = solids[::-1], INVERSE[relation]
    name_sizes = rng.random() < 0.85
    words = [_noun_phrase(solid, rng, name_sizes) for solid in solids]
    if relation:
        words.insert(1, str(rng.choice(PHRASES[relation])) if rng.random() < 0.95 else "and")
    floor = f" on a {scene.floor} floor" if rng.random() < 0.6 else ""
    return str(rng.choice(OPENINGS)) + " ".join(words) + floor


def vocabulary_corpus(seed: int = 0, count: int = 20_000) -> list[str]:
    """Captions from which the tokenizer's merges are learned."""
    from minidiff.scenes.world import random_scene

    rng = np.random.default_rng([seed, 7])
    return [caption(random_scene(rng), rng) for _ in range(count)]


def _noun_phrase(solid, rng, name_size):
    size = [_synonym(solid.size, rng)] if name_size else []
    words = [*size, solid.colour, _synonym(solid.shape, rng)]
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _synonym(word, rng):
    return str(rng.choice(SYNONYMS[word])) if word in SYNONYMS else word
