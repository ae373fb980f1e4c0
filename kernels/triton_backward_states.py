"""States of blocks, from which the linear branch takes what a block drops: all minus selected.

    S_n = sum over the tokens j of block n of x_j^T y_j      T = sum_n S_n

with x the features phi(K) and y = V for key blocks, and x the weighted query features psi and
y = dO for query blocks (`triton_backward_linear.py`). A state takes the room of two tiles x, y of
D tokens, and adding one takes no product. T is summed from the rounded states, so what is
subtracted later cancels; partial sums are added in a fixed order, the same on every run.

Layouts: key, value `[B, L, H, D]` with any strides but 1 in the last dimension; states
`[B, H, N, D_PAD, D_PAD]` in the dtype of the inputs, of float16 with a factor for each; sums of x
`[B, H, N, D_PAD]`, totals `[B, H, D_PAD + 1, D_PAD]`, float32. Compute capability 8.0 and above.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.triton_backward_tiles import (
    as_operand,
    batch_and_head,
    head_offset,
    rows_left,
)
from sla_video.kernels.triton_tiles import load_rows, padded_dim, row_softmax, strides


class BlockStates(NamedTuple):
    """States of all blocks of one kind; N of them per head.

    Attributes:
        states: `[B, H, N, D_PAD, D_PAD]`.
        factors: `[B, H, N]` float32, what the states are to be multiplied by; None for 1.
        sums: `[B, H, N, D_PAD]` float32, of x over the tokens of a block.
        total: `[B, H, D_PAD + 1, D_PAD]` float32, over all blocks: T, and the sum of sums below it.
    """

    states: Tensor
    factors: Tensor | None
    sums: Tensor
    total: Tensor


@triton.jit
def dropped_state(
    total_ptr,
    states_ptr,
    factors_ptr,
    sums_ptr,
    list_ptr,
    count,
    bh,
    num_blocks,
    D_PAD: tl.constexpr,
):
    """T and the total sum of one head less those of `count` listed blocks, float32."""
    cols = tl.arange(0, D_PAD)
    square = cols[:, None] * D_PAD + cols[None, :]
    total_ptr += bh * (D_PAD + 1) * D_PAD
    # [D_PAD, D_PAD], [D_PAD]
    state = tl.load(total_ptr + square)
    state_sum = tl.load(total_ptr + D_PAD * D_PAD + cols)
    for step in range(0, count):
        block = bh * num_blocks + tl.load(list_ptr + step)
        selected = tl.load(states_ptr + block * D_PAD * D_PAD + square).to(tl.float32)
        if factors_ptr is not None:
            selected *= tl.load(factors_ptr + block)
        state -= selected
        state_sum -= tl.load(sums_ptr + block * D_PAD + cols)
    return state, state_sum


@triton.jit
def store_state(states_ptr, factors_ptr, block, state, D_PAD: tl.constexpr):
    """Store the state of one block, and return it as it will be read."""
    cols = tl.arange(0, D_PAD)
    rounded, factor = as_operand(state, states_ptr.dtype.element_ty)
    states_ptr += block * D_PAD * D_PAD
    tl.store(states_ptr + cols[:, None] * D_PAD + cols[None, :], rounded)
    if factors_ptr is not None:
        tl.store(factors_ptr + block, factor)
    return rounded.to(tl.float32) * factor


@triton.jit(do_not_specialize=["length", "num_k", "run"])
def _key_states_kernel(
    key_ptr,
    value_ptr,
    key_mean_ptr,
    states_ptr,
    factors_ptr,
    sums_ptr,
    totals_ptr,
    key_strides,
    value_strides,
    length,
    heads,
    num_k,
    run,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """States and sums of `run` key blocks, and their total: D_PAD rows, then that of the sums."""
    b, h, bh = batch_and_head(tl.program_id(1), heads)
    key_ptr += head_offset(key_strides, b, 0, h)
    value_ptr += head_offset(value_strides, b, 0, h)
    cols = tl.arange(0, D_PAD)
    offs = tl.arange(0, TILE)
    mean = tl.zeros([D_PAD], tl.float32)
    if key_mean_ptr is not None:
        mean = tl.load(key_mean_ptr + bh * D + cols, mask=cols < D, other=0.0)

    total = tl.zeros([D_PAD, D_PAD], tl.float32)
    total_sum = tl.zeros([D_PAD], tl.float32)
    first = tl.program_id(0).to(tl.int64) * run
    for step in range(0, tl.minimum(run, num_k - first)):
        state = tl.zeros([D_PAD, D_PAD], tl.float32)
        block_sum = tl.zeros([D_PAD], tl.float32)
        for offset in tl.static_range(0, BLOCK, TILE):
            start = (first + step) * BLOCK + offset
            rows = rows_left(start, length)
            tile_ptr = key_ptr + start * key_strides[1]
            key = load_rows(tile_ptr, key_strides[1], rows, TILE, D, D_PAD)
            features = row_softmax(key.to(tl.float32) - mean[None, :], D, D_PAD)
            features = tl.where((offs < rows)[:, None], features, 0.0).to(key.dtype)
            tile_ptr = value_ptr + start * value_strides[1]
            value = load_rows(tile_ptr, value_strides[1], rows, TILE, D, D_PAD)
            state = tl.dot(tl.trans(features), value, state, input_precision="ieee")
            # Of the rounded features, as the products.
            block_sum += tl.sum(features.to(tl.float32), 0)
        block = bh * num_k + first + step
        total += store_state(states_ptr, factors_ptr, block, state, D_PAD)
        total_sum += block_sum
        tl.store(sums_ptr + block * D_PAD + cols, block_sum)

    totals_ptr += (bh * tl.num_programs(0) + tl.program_id(0)) * (D_PAD + 1) * D_PAD
    tl.store(totals_ptr + cols[:, None] * D_PAD + cols[None, :], total)
    tl.store(totals_ptr + D_PAD * D_PAD + cols, total_sum)


@triton.jit
def _sum_columns(x_ptr, factors_ptr, out_ptr, rows, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum over `rows` rows of SIZE entries, times their factors, of COLUMNS of them."""
    offs = tl.arange(0, 32)
    cols = tl.arange(0, COLUMNS)
    total = tl.zeros([32, COLUMNS], tl.float32)
    for start in range(0, rows, 32):
        row = (start + offs).to(tl.int64)
        exists = row < rows
        x_row_ptr = x_ptr + row[:, None] * SIZE + cols[None, :]
        x = tl.load(x_row_ptr, mask=exists[:, None], other=0.0).to(tl.float32)
        if factors_ptr is not None:
            x *= tl.load(factors_ptr + row, mask=exists, other=0.0)[:, None]
        total += x
    tl.store(out_ptr + cols, tl.sum(total, 0))


@triton.jit(do_not_specialize=["num_blocks"])
def _sum_states_kernel(
    states_ptr, factors_ptr, sums_ptr, totals_ptr, num_blocks, D_PAD: tl.constexpr
):
    """Sum over the blocks of one head of 256 entries of their states, or of their sums."""
    size: tl.constexpr = D_PAD * D_PAD
    bh = tl.program_id(1).to(tl.int64)
    totals_ptr += bh * (size + D_PAD)
    if factors_ptr is not None:
        factors_ptr += bh * num_blocks
    first = tl.program_id(0) * 256
    if first < size:
        states_ptr += bh * num_blocks * size + first
        _sum_columns(states_ptr, factors_ptr, totals_ptr + first, num_blocks, size, 256)
    else:
        sums_ptr += bh * num_blocks * D_PAD
        _sum_columns(sums_ptr, None, totals_ptr + size, num_blocks, D_PAD, D_PAD)


# Programs to aim for, some multiples of the multiprocessors of a large GPU.
_PROGRAMS = 512


def empty_states(x: Tensor, num_blocks: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Memory for states, factors and sums of blocks of x `[B, L, H, D]`."""
    batch, _, heads, head_dim = x.shape
    d_pad = padded_dim(head_dim)
    sums = torch.empty(batch, heads, num_blocks, d_pad, dtype=torch.float32, device=x.device)
    factors = sums.new_empty(batch, heads, num_blocks) if x.dtype == torch.float16 else None
    return x.new_empty(batch, heads, num_blocks, d_pad, d_pad), factors, sums


def key_states(key: Tensor, key_mean: Tensor | None, value: Tensor, block_k: int) -> BlockStates:
    """States of phi(K) and V, from key, value `[B, L, H, D]`.

    Args:
        key_mean: `[B, H, D]` float32, subtracted from the keys; None for raw ones.
    """
    batch, length, heads, head_dim = key.shape
    num_k, d_pad = triton.cdiv(length, block_k), padded_dim(head_dim)
    states, factors, sums = empty_states(key, num_k)
    # Few runs of many blocks: each leaves a total behind.
    run = triton.cdiv(num_k, max(1, _PROGRAMS // (batch * heads)))
    runs = triton.cdiv(num_k, run)
    run_totals = sums.new_empty(batch, heads, runs, d_pad + 1, d_pad)
    wide = key.element_size() > 2
    _key_states_kernel[(runs, batch * heads)](
        key_ptr=key,
        value_ptr=value,
        key_mean_ptr=key_mean,
        states_ptr=states,
        factors_ptr=factors,
        sums_ptr=sums,
        totals_ptr=run_totals,
        key_strides=strides(key),
        value_strides=strides(value),
        length=length,
        heads=heads,
        num_k=num_k,
        run=run,
        D=head_dim,
        D_PAD=d_pad,
        BLOCK=block_k,
        TILE=min(block_k, 16 if wide else 64),
        num_warps=8 if wide or d_pad > 64 else 4,
        # The tiles of a larger block are all in flight at once.
        num_stages=1 if wide or block_k > 64 else 3,
    )
    return BlockStates(states, factors, sums, run_totals.sum(2))


def with_totals(states: Tensor, factors: Tensor | None, sums: Tensor) -> BlockStates:
    """States of blocks together with their totals."""
    batch, heads, num_blocks, d_pad = sums.shape
    total = sums.new_empty(batch, heads, d_pad + 1, d_pad)
    _sum_states_kernel[(d_pad * d_pad // 256 + 1, batch * heads)](
        states_ptr=states,
        factors_ptr=factors,
        sums_ptr=sums,
        totals_ptr=total,
        num_blocks=num_blocks,
        D_PAD=d_pad,
        num_warps=4,
    )
    return BlockStates(states, factors, sums, total)
