"""What kernels that multiply matrices share: one step of a product, and the order of its tiles."""

import triton
import triton.language as tl

from minidiff_kernels.launch import INTERPRETED

INTERPRET = tl.constexpr(INTERPRETED)


def choose(configs, rows, columns, tiles) -> dict:
    """The first of configs whose blocks divide the columns and make at least that many tiles, or the last.

    Large blocks, which come first, read less memory; but each multiprocessor should have one.
    """
    for config in configs:
        width = config["BLOCK_N"]
        if columns % width == 0 and triton.cdiv(rows, config["BLOCK_M"]) * (columns // width) >= tiles:
            return config
    return configs[-1]


def blocks(m, n, k, num_warps, num_stages, even=True) -> dict:
    """A config of a kernel that multiplies matrices; even: sums end where a block of k does."""
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "EVEN": even}
    return sizes | {"num_warps": num_warps, "num_stages": num_stages}


@triton.jit
def add_product(out, a, b):
    """out + a b, in out's precision; float32 is not rounded to TF32."""
    if INTERPRET:  # Triton's interpreter would multiply the bits of bfloat16 as if they were integers
        a, b = a.to(out.dtype), b.to(out.dtype)
    return tl.dot(a, b, out, input_precision="ieee", out_dtype=out.dtype)


@triton.jit
def tile_of(program, rows, columns, GROUP: tl.constexpr = 8):
    """(row, column) of a program's tile, in a matrix of rows × columns tiles.

    Programs that run at the same time cover about a square, GROUP rows high: together they read fewer rows of
    the one factor and columns of the other than a whole row of tiles would, and find them in the L2 cache.
    """
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = program % (GROUP * columns)
    return first + within % height, within // height
