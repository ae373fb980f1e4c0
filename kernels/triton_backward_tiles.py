"""What the backward kernels share beyond `triton_tiles.py`: offsets, lists of blocks.

Blocks of BLOCK tokens are visited in tiles of TILE tokens, powers of two with TILE <= BLOCK.
Offsets into tensors are int64.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def batch_and_head(bh, heads):
    """Batch and head of a flat head index, and that index, as int64.

    Divided in int32, which takes a few instructions where int64 takes a function.
    """
    return (bh // heads).to(tl.int64), (bh % heads).to(tl.int64), bh.to(tl.int64)


@triton.jit
def head_offset(strides, b, start, h):
    """Offset of token `start` of one head in a `[B, L, H, D]` tensor; b, start, h are int64."""
    return b * strides[0] + start * strides[1] + h * strides[2]


@triton.jit
def packed_offset(b, start, h, length, heads, D: tl.constexpr):
    """`head_offset` in a contiguous `[B, L, H, D]` tensor."""
    return ((b * length + start) * heads + h) * D


@triton.jit
def rows_left(start, length):
    """Tokens from `start` on, as int32: compared with every row of a tile."""
    return (length - start).to(tl.int32)


@triton.jit
def listed_tile(list_ptr, step, length, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Tile `step` of the blocks in a list: its first token, tokens from there on."""
    tiles: tl.constexpr = BLOCK // TILE
    block = tl.load(list_ptr + step // tiles)
    start = block.to(tl.int64) * BLOCK + (step % tiles) * TILE
    return start, rows_left(start, length)


@triton.jit
def power_of_two(x):
    """The smallest power of two that is not below x, for x >= 0; tiny for 0."""
    return tl.exp2(tl.ceil(tl.log2(tl.maximum(x, 1e-30))))
