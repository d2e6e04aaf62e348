"""Which attention kernel does a shape, with which tiles, and in which blocks on which GPU."""

import bisect
import math

from minidiff_kernels import launch

SLICE, LARGEST = 256, 512  # columns that one block accumulates, and that a head has at most
SHORT_KEYS, ON_CHIP = 128, 128 * 128  # keys that stay on chip, and numbers of k and of v: 32 KiB of each
PADDED = "padded"
# Blocks for heads of up to so many columns: the largest that fit and don't spill, found by compiling. On
# sm_90 two share a multiprocessor up to 64 columns and at 160, three at 80: exponentials of one overlap with
# products of another. sm_80's fit the 99 KiB of consumer GPUs. Masks are loaded number by number, which takes
# registers.
COLUMNS = (64, 80, 128, 160, 256, 512)
TILED = {  # (BLOCK_M, BLOCK_N, num_warps, num_stages) for each of COLUMNS
    "sm_80": ((128, 64, 8, 3),) * 2 + ((128, 32, 8, 2), (64, 32, 4, 2), (64, 16, 8, 2), (64, 16, 8, 2)),
    "sm_90": (
        (128, 64, 8, 3),
        (64, 64, 4, 3),
        (128, 64, 8, 2),
        (64, 64, 4, 2),
        (128, 32, 8, 2),
        (64, 32, 8, 2),
    ),
    "sm_100": ((128, 64, 8, 3),) * 2 + ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    "gfx942": ((128, 64, 8, 2),) * 3 + ((64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 8, 2)),
    "masked": ((64, 32, 8, 2),) * 4 + ((64, 16, 8, 2),) * 2,
    "float32": ((32, 32, 8, 2),) * 3 + ((32, 16, 8, 2),) * 2 + ((16, 16, 8, 2),),
    "float32 masked": ((32, 16, 8, 2),) * 5 + ((16, 16, 8, 2),),
}
SHORT = {  # (BLOCK_M, num_warps, num_stages)
    "all": ((64, 4, 2),) * 2 + ((64, 4, 1),) * 2,
    "masked": ((32, 8, 2),) * 3,
    "gfx942 masked": ((32, 4, 2),) * 3,
}


def is_short(keys: int, size: int, itemsize: int, kind: str | None) -> bool:
    """Whether _attention_short does it: k and v must fit on chip, and float32 needs too many registers."""
    columns, widest = sum(split(size)), COLUMNS[len(SHORT["masked" if kind else "all"]) - 1]
    fits = columns <= widest and sum(split(keys)) * columns <= ON_CHIP
    return keys <= SHORT_KEYS and fits and (itemsize == 2 or launch.INTERPRETED)


def split(size: int) -> tuple[int, int]:
    """The tiles, powers of two from 16 on, that size numbers are cut into; the second may be 0."""
    first = max(16, 1 << (size.bit_length() - 1))
    return first, 0 if size <= first else max(16, 1 << (size - first - 1).bit_length())


def constants_of(short: bool, keys: int, size: int, kind: str | None, unit: int) -> dict:
    """The constants that no block size decides; kind is the mask's: "bool", "float" or None."""
    constants = {"SCALE": 1 / math.sqrt(size), "MASK": kind, "UNIT": unit, "D": size}
    if not short:
        return constants
    first, rest = split(keys)
    return constants | {"N0": first, "N1": rest, "FULL": keys >= first}


def blocks_of(short: bool, size: int, itemsize: int, kind: str | None, target: str) -> tuple:
    """What SHORT or TILED has for heads of this size on target."""
    if target == "interpreter":
        itemsize, kind, target = 2, None, "sm_90"  # registers don't matter
    table, row = SHORT if short else TILED, target if itemsize == 2 else "float32"
    blocks = table.get(f"{row} masked", table["masked"]) if kind else table.get(row, table.get("all"))
    return blocks[bisect.bisect_left(COLUMNS, sum(split(size)))]


def config_of(short: bool, keys: int, size: int, blocks: tuple) -> dict:
    """blocks, as SHORT and TILED have them, as a kernel's arguments; PADDED at the end: heads in one tile."""
    padded = blocks[-1] == PADDED
    *sizes, num_warps, num_stages = blocks[:-1] if padded else blocks
    first, rest = (1 << (size - 1).bit_length(), 0) if padded else split(size)
    heads = {"D0": first, "D1": rest}
    options = {"BLOCK_M": sizes[0], "num_warps": num_warps, "num_stages": num_stages}
    if short:
        return heads | options
    columns = (first, rest) if size <= SLICE else (SLICE, 0)
    return (
        heads
        | options
        | {"V0": columns[0], "V1": columns[1], "BLOCK_N": sizes[1], "EVEN": keys % sizes[1] == 0}
    )
