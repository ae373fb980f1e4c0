"""States of blocks, and their sums over what is dropped, for the backward of the linear branch.

    S_n = sum over the tokens j of block n of x_j^T y_j      A_m = sum of S_n over n that m drops

with x the features phi(K) and y = V for key blocks, and x the weighted query features psi and
y = dO for query blocks (`triton_backward_linear.py`). All A_m of one head are one matrix product
of a table of zeros and ones, `[M, N]`, with the states, `[N, D * D]`: at 97% sparsity that moves a
fifth of the bytes that reading the selected states for each m would, and the time does not depend
on the sparsity. Only what is dropped is summed, so nothing cancels.

Layouts: key, value `[B, L, H, D]` with any strides but 1 in the last dimension; states
`[B, H, N', D_PAD, D_PAD]` in the dtype of the inputs, of float16 with a factor for each; sums of x
`[B, H, N', D_PAD]`, float32. N' is N, or for what is to be summed a multiple of 16, filled up with
zeros: matrix units are not fed at full speed with less. Compute capability 8.0 and above.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.triton_backward_tiles import (
    batch_and_head,
    head_offset,
    power_of_two,
    rows_left,
)
from sla_video.kernels.triton_tiles import load_rows, padded_dim, padded_row, row_softmax, strides


class BlockStates(NamedTuple):
    """States of all blocks of one kind, N per head, or their sums over what these drop.

    Attributes:
        states: `[B, H, N', D_PAD, D_PAD]`.
        factors: float32, what the states are to be multiplied by; None for 1. `[B, H, N']`, powers
            of two, or `[B, H]` for sums.
        sums: `[B, H, N', D_PAD]` float32, of x over the tokens.
    """

    states: Tensor
    factors: Tensor | None
    sums: Tensor


@triton.jit
def store_state(states_ptr, factors_ptr, block, state, D_PAD: tl.constexpr):
    """Store the state of one block, of float16 with a largest entry of about 1."""
    cols = tl.arange(0, D_PAD)
    if factors_ptr is not None:
        factor = power_of_two(tl.max(tl.abs(state)))
        state *= 1.0 / factor
        tl.store(factors_ptr + block, factor)
    square = cols[:, None] * D_PAD + cols[None, :]
    states_ptr += block * D_PAD * D_PAD
    tl.store(states_ptr + square, state.to(states_ptr.dtype.element_ty))


@triton.jit
def load_state(states_ptr, factors_ptr, sums_ptr, block, bh, D_PAD: tl.constexpr):
    """What one block drops, as a matmul operand, its factor and its sum."""
    cols = tl.arange(0, D_PAD)
    square = cols[:, None] * D_PAD + cols[None, :]
    factor = tl.full([], 1.0, tl.float32)
    if factors_ptr is not None:
        factor = tl.load(factors_ptr + bh)
    state = tl.load(states_ptr + block * D_PAD * D_PAD + square)
    return state, factor, tl.load(sums_ptr + block * D_PAD + cols)


@triton.jit(do_not_specialize=["length", "state_blocks"])
def _key_states_kernel(
    key_ptr,
    value_ptr,
    key_mean_ptr,
    states_ptr,
    factors_ptr,
    sums_ptr,
    key_strides,
    value_strides,
    length,
    heads,
    state_blocks,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """State and sum of one key block."""
    n = tl.program_id(0).to(tl.int64)
    b, h, bh = batch_and_head(tl.program_id(1), heads)
    key_ptr += head_offset(key_strides, b, n * BLOCK, h)
    value_ptr += head_offset(value_strides, b, n * BLOCK, h)
    cols = tl.arange(0, D_PAD)
    offs = tl.arange(0, TILE)
    mean = tl.zeros([D_PAD], tl.float32)
    if key_mean_ptr is not None:
        mean = tl.load(key_mean_ptr + bh * D + cols, mask=cols < D, other=0.0)

    state = tl.zeros([D_PAD, D_PAD], tl.float32)
    block_sum = tl.zeros([D_PAD], tl.float32)
    for offset in tl.static_range(0, BLOCK, TILE):
        rows = rows_left(n * BLOCK + offset, length)
        tile_ptr = key_ptr + offset * key_strides[1]
        key = load_rows(tile_ptr, key_strides[1], rows, TILE, D, D_PAD)
        tile_ptr = value_ptr + offset * value_strides[1]
        value = load_rows(tile_ptr, value_strides[1], rows, TILE, D, D_PAD)
        features = row_softmax(key.to(tl.float32) - mean[None, :], D, D_PAD)
        features = tl.where((offs < rows)[:, None], features, 0.0).to(key.dtype)
        state = tl.dot(tl.trans(features), value, state, input_precision="ieee")
        # Of the rounded features, as the products.
        block_sum += tl.sum(features.to(tl.float32), 0)
    block = bh * state_blocks + n
    store_state(states_ptr, factors_ptr, block, state, D_PAD)
    tl.store(sums_ptr + block * D_PAD + cols, block_sum)


def empty_states(x: Tensor, num_blocks: int) -> BlockStates:
    """Memory for the states of blocks of x `[B, L, H, D]`, zero beyond the last block."""
    batch, _, heads, head_dim = x.shape
    d_pad, rows = padded_dim(head_dim), padded_row(num_blocks)
    sums = torch.empty(batch, heads, rows, d_pad, dtype=torch.float32, device=x.device)
    factors = sums.new_empty(batch, heads, rows) if x.dtype == torch.float16 else None
    found = BlockStates(x.new_empty(batch, heads, rows, d_pad, d_pad), factors, sums)
    for part in found:
        if part is not None:
            part[:, :, num_blocks:].zero_()
    return found


def key_states(key: Tensor, key_mean: Tensor | None, value: Tensor, block_k: int) -> BlockStates:
    """States of phi(K) and V, from key, value `[B, L, H, D]`.

    Args:
        key_mean: `[B, H, D]` float32, subtracted from the keys; None for raw ones.
    """
    batch, length, heads, head_dim = key.shape
    num_k, d_pad = triton.cdiv(length, block_k), padded_dim(head_dim)
    found = empty_states(key, num_k)
    wide = key.element_size() > 2
    _key_states_kernel[(num_k, batch * heads)](
        key_ptr=key,
        value_ptr=value,
        key_mean_ptr=key_mean,
        states_ptr=found.states,
        factors_ptr=found.factors,
        sums_ptr=found.sums,
        key_strides=strides(key),
        value_strides=strides(value),
        length=length,
        heads=heads,
        state_blocks=padded_row(num_k),
        D=head_dim,
        D_PAD=d_pad,
        BLOCK=block_k,
        TILE=min(block_k, 16 if wide else 64),
        num_warps=8 if wide or d_pad > 64 else 4,
        num_stages=1,
    )
    return found


def sum_dropped(blocks: BlockStates, dropped: Tensor) -> BlockStates:
    """Sums of the states of N blocks of one kind over what each of M of the other drops.

    Args:
        dropped: `[B * H, M, N']` in the dtype of the states, 1 where dropped and 0 elsewhere, or
            a weight; beyond the last block any finite number.
    """
    states, factors, sums = blocks
    batch, heads, _, d_pad = sums.shape
    shape = (batch, heads, dropped.shape[1], d_pad)
    # Also where the backward pass runs under autocast.
    with torch.autocast(states.device.type, enabled=False):
        dropped_sums = torch.bmm(dropped.float(), sums.flatten(0, 1))
        if factors is not None:
            # Powers of two up to 1, which float16 holds, in the place of ones.
            largest = factors.amax(-1)
            share = (factors / largest[..., None]).flatten(0, 1)[:, None]
            dropped, factors = (dropped * share).to(dropped.dtype), largest
        dropped_states = torch.bmm(dropped, states.flatten(0, 1).flatten(2))
    return BlockStates(dropped_states.view(*shape, d_pad), factors, dropped_sums.view(shape))
