"""What the backward kernels share beyond `triton_tiles.py`: offsets, lists of blocks, operands.

Blocks of BLOCK tokens are visited in tiles of TILE tokens, powers of two with TILE <= BLOCK.
Offsets into tensors are int64.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sla_video.kernels.triton_tiles import capability, padded_dim

# Compute capabilities with 160 KiB and more of shared memory per program; others have about 99 KiB.
_LARGE_SHARED_MEMORY = ((8, 0), (9, 0), (10, 0), (10, 3))


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


class Launch(NamedTuple):
    """How to run one kernel: most tokens per tile, warps per program, depth of the pipeline.

    `max_registers` per thread, where more programs at once pay.
    """

    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def keywords(self) -> dict[str, int | None]:
        """What Triton wants to know at a launch."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


class Launches(NamedTuple):
    """How to run one kernel on tensors of two bytes per element, and of more.

    Attributes:
        narrow: head dimensions up to 64, with 160 KiB of shared memory and more.
        broad: larger ones, with as much.
        small: less shared memory.
        float32, float32_small: more than two bytes per element; with less shared memory.
        hopper: in place of `broad` on compute capability 9.0.
    """

    narrow: Launch
    broad: Launch
    small: Launch
    float32: Launch
    float32_small: Launch
    hopper: Launch | None = None


def choose_launch(launches: Launches, x: torch.Tensor) -> Launch:
    """The launch for a tensor like x `[B, L, H, D]`."""
    large = _has_large_shared_memory(x.device)
    if x.element_size() > 2:
        return launches.float32 if large else launches.float32_small
    if not large:
        return launches.small
    if padded_dim(x.shape[-1]) <= 64:
        return launches.narrow
    hopper = capability(x.device) == (9, 0) and launches.hopper
    return hopper or launches.broad


def _has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may use 160 KiB of shared memory; True on CPUs, where Triton interprets."""
    return device.type != "cuda" or capability(device) in _LARGE_SHARED_MEMORY
