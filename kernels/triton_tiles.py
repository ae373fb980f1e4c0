"""Pieces that the Triton kernels share: tiles of `[B, L, H, D]` tensors and their quantization.

Hardware: NVIDIA GPUs of compute capability 8.0 and newer; FP8 from 8.9.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
# The smallest tile that an 8-bit matrix unit sums over.
_SMALLEST_DIM = 32


@triton.jit
def load_rows(base_ptr, stride_l, rows, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Tile `[ROWS, D_PAD]` from `base_ptr` on, zero from row `rows` and column D on."""
    offs_l = tl.arange(0, ROWS)
    offs_d = tl.arange(0, D_PAD)
    mask = (offs_l < rows)[:, None]
    if D < D_PAD:
        mask = mask & (offs_d < D)[None, :]
    return tl.load(base_ptr + offs_l[:, None] * stride_l + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def load_places(places_ptr, bh, length, start, rows, ROWS: tl.constexpr):
    """Where the tokens from `start` on are in a head whose keys have another order, int64.

    Of places `[B, H, L]`. From row `rows` on there are none: a valid one is given.
    """
    offs = tl.minimum(tl.arange(0, ROWS), rows - 1)
    return tl.load(places_ptr + bh.to(tl.int64) * length + start + offs).to(tl.int64)


@triton.jit
def load_rows_at(
    head_ptr, places, stride_l, rows, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):
    """Tile `[ROWS, D_PAD]` of the rows at `places`, zero from row `rows` and column D on."""
    offs_d = tl.arange(0, D_PAD)
    mask = (tl.arange(0, ROWS) < rows)[:, None]
    if D < D_PAD:
        mask = mask & (offs_d < D)[None, :]
    return tl.load(head_ptr + places[:, None] * stride_l + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    base_ptr, stride_l, x, rows, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):
    """Store the first `rows` rows and D columns of tile x `[ROWS, D_PAD]`."""
    offs_l = tl.arange(0, ROWS)
    offs_d = tl.arange(0, D_PAD)
    mask = (offs_l < rows)[:, None]
    if D < D_PAD:
        mask = mask & (offs_d < D)[None, :]
    x = x.to(base_ptr.dtype.element_ty)
    tl.store(base_ptr + offs_l[:, None] * stride_l + offs_d[None, :], x, mask=mask)


@triton.jit
def unscaled_softmax(x, D: tl.constexpr, D_PAD: tl.constexpr):
    """Softmax over the first D columns of x `[ROWS, D_PAD]` times its denominator, zero beyond."""
    if D < D_PAD:
        x = tl.where((tl.arange(0, D_PAD) < D)[None, :], x, float("-inf"))
    return tl.exp2(x * LOG2E - (tl.max(x, 1) * LOG2E)[:, None])


@triton.jit
def row_softmax(x, D: tl.constexpr, D_PAD: tl.constexpr):
    """Softmax over the first D columns of x `[ROWS, D_PAD]`, zero beyond: the feature map."""
    x = unscaled_softmax(x, D, D_PAD)
    return x * (1.0 / tl.sum(x, 1))[:, None]


@triton.jit
def quantization_scale(largest, TOP: tl.constexpr):
    """Scale that takes `largest` to TOP; 1 for nothing but zeros."""
    return tl.where(largest > 0, largest / TOP, 1.0)


@triton.jit
def round_to_int8(x):
    """Nearest integer to x in [-127, 127], ties to even.

    Adding 1.5 * 2^23 leaves the integer in the low bits of the float: two cheap instructions,
    where a conversion runs at a quarter of their rate or less.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def matrix_order(offs):
    """The key that stands at each of these positions of a transposed low-bit tile.

    Of every 16 columns, a thread holds 2c, 2c + 1, 2c + 8 and 2c + 9 in what a matrix unit puts
    out, and 4c to 4c + 3 in an 8-bit operand that one takes in. With keys stored in this order, P
    goes from one to the other without leaving its thread: see `in_matrix_order`.
    """
    return (offs & -16) | ((offs & 2) << 2) | ((offs & 12) >> 1) | (offs & 1)


@triton.jit
def in_matrix_order(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile x `[ROWS, COLUMNS]` with columns in the order of `matrix_order`."""
    x = tl.permute(tl.reshape(x, (ROWS, COLUMNS // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(x, (ROWS, COLUMNS))


def padded_dim(head_dim: int) -> int:
    """Columns of a tile that holds `head_dim` of them."""
    return max(_SMALLEST_DIM, 1 << (head_dim - 1).bit_length())


def padded_row(num_k: int) -> int:
    """Columns of a row that holds one number for each key block: a multiple of 16.

    It is known as such to compiled kernels, and aligned as matrix units want it.
    """
    return num_k + -num_k % 16


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of x `[B, L, H, D]` along B, L and H.

    That of a single batch entry or head is never used; 0 keeps it from specialising a kernel.
    """
    stride_b, stride_l, stride_h, _ = x.stride()
    return stride_b if x.shape[0] > 1 else 0, stride_l, stride_h if x.shape[2] > 1 else 0


def launch_on(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of x the one that kernels are launched on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; (0, 0) for a CPU, where Triton interprets."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for a CPU, where Triton interprets."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def blocks_per_program(num_k: int, heads: int, programs: int) -> int:
    """The run of key blocks that keeps `programs` busy at a time, and most of them to the end.

    Args:
        heads: B x H. A run stays within one of them.
    """
    busy, runs = 0.0, 1
    for waves in range(1, 5):
        some = max(1, min(num_k, waves * programs // heads))
        rounds = -(-some * heads // programs)
        # Fewer runs are better, if it is by little that more would be busy.
        if some * heads / (rounds * programs) > busy + 0.03:
            busy, runs = some * heads / (rounds * programs), some
    return -(-num_k // runs)
