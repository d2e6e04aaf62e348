"""Pictures and captions to train on: rendered once into chunk files, each picture a function of its number
alone.

A chunk is complete or absent, so rendering resumes where it stopped, and a picture's scene needs no file: it
is drawn again from its number.
"""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from minidiff.config import replacing
from minidiff.scenes import Scene, held_out, random_scene, render

CHUNK = 500  # pictures a file
PICTURE_SIZE = 128


def training_scene(number: int, seed: int = 0) -> Scene:
    """The scene of training picture `number`; never a held-out combination."""
    rng = np.random.default_rng([seed, number])
    while held_out(scene := random_scene(rng)):
        pass
    return scene


def rendered_pictures(folder, count: int, seed: int = 0, workers: int = 1, progress=None) -> np.ndarray:
    """(count, 128, 128, 3) uint8 pictures, rendered into folder where they are not there yet.

    count is rounded up to whole chunks of 500. progress(done) is called with the number of chunks after each.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chunks = -(-count // CHUNK)
    missing = [c for c in range(chunks) if not _chunk_file(folder, seed, c).exists()]
    with ProcessPoolExecutor(workers) as pool:
        for done, _ in enumerate(pool.map(partial(_render_chunk, folder, seed), missing), start=1):
            if progress:
                progress(chunks - len(missing) + done)
    return np.concatenate([np.load(_chunk_file(folder, seed, c)) for c in range(chunks)])


def _chunk_file(folder, seed, chunk):
    return folder / f"pictures-{seed}-{chunk:04d}.npy"


def _render_chunk(folder, seed, chunk):
    pictures = [
        render(training_scene(n, seed), PICTURE_SIZE) for n in range(chunk * CHUNK, (chunk + 1) * CHUNK)
    ]
    with replacing(_chunk_file(folder, seed, chunk)) as temporary, temporary.open("wb") as file:
        np.save(file, np.stack(pictures))  # to a file, since np.save would add .npy to a name
