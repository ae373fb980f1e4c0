"""Sums over all tokens of one head, from which the linear branch subtracts the selected part.

    T = sum_j x_j^T y_j

with x the features phi(K) and y = V in the forward direction, and x the weighted query features
psi and y = dO in the backward direction. Each program sums a run of blocks; the partial sums are
added in a fixed order, so the result is the same on every run.

Layouts: key, y `[B, L, H, D]` with any strides but 1 in the last dimension; features
`[B, H, L, D]` contiguous; states `[B, H, D_PAD, D_PAD]` and block sums `[B, H, N, D_PAD]`
in float32. Compute capability 8.0 and above.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.triton_backward_tiles import batch_and_head, head_offset, rows_left
from sla_video.kernels.triton_tiles import load_rows, padded_dim, row_softmax, store_rows, strides


@triton.jit(do_not_specialize=["length", "num_blocks", "run"])
def _totals_kernel(
    key_ptr,
    key_mean_ptr,
    y_ptr,
    features_ptr,
    block_sums_ptr,
    totals_ptr,
    key_strides,
    y_strides,
    length,
    heads,
    num_blocks,
    run,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Partial T of `run` blocks.

    Where `key_ptr` is given, the features are made here: phi(key - key_mean), written to
    `features_ptr`, and their sum over each block to `block_sums_ptr`. Otherwise they are read.
    """
    b, h, bh = batch_and_head(tl.program_id(1), heads)
    y_ptr += head_offset(y_strides, b, 0, h)
    features_ptr += bh * length * D
    cols = tl.arange(0, D_PAD)
    offs = tl.arange(0, TILE)
    if key_ptr is not None:
        key_ptr += head_offset(key_strides, b, 0, h)
    mean = tl.zeros([D_PAD], tl.float32)
    if key_mean_ptr is not None:
        mean = tl.load(key_mean_ptr + bh * D + cols, mask=cols < D, other=0.0)

    total = tl.zeros([D_PAD, D_PAD], tl.float32)
    first = tl.program_id(0).to(tl.int64) * run
    for step in range(0, tl.minimum(run, num_blocks - first)):
        block = first + step
        block_sum = tl.zeros([D_PAD], tl.float32)
        for offset in tl.static_range(0, BLOCK, TILE):
            start = block * BLOCK + offset
            rows = rows_left(start, length)
            features_tile_ptr = features_ptr + start * D
            if key_ptr is not None:
                tile_ptr = key_ptr + start * key_strides[1]
                key = load_rows(tile_ptr, key_strides[1], rows, TILE, D, D_PAD)
                features = row_softmax(key.to(tl.float32) - mean[None, :], D, D_PAD)
                features = tl.where((offs < rows)[:, None], features, 0.0).to(key.dtype)
                store_rows(features_tile_ptr, D, features, rows, TILE, D, D_PAD)
                # Of the rounded features: what is selected later cancels exactly.
                block_sum += tl.sum(features.to(tl.float32), 0)
            else:
                features = load_rows(features_tile_ptr, D, rows, TILE, D, D_PAD)
            tile_ptr = y_ptr + start * y_strides[1]
            y = load_rows(tile_ptr, y_strides[1], rows, TILE, D, D_PAD)
            total = tl.dot(tl.trans(features), y, total, input_precision="ieee")
        if key_ptr is not None:
            tl.store(block_sums_ptr + (bh * num_blocks + block) * D_PAD + cols, block_sum)

    totals_ptr += (bh * tl.num_programs(0) + tl.program_id(0)) * D_PAD * D_PAD
    tl.store(totals_ptr + cols[:, None] * D_PAD + cols[None, :], total)


# Programs to aim for, some multiples of the multiprocessors of a large GPU.
_PROGRAMS = 512
# Tokens at a time where blocks do not matter.
_BLOCK = 64


def key_totals(
    key: Tensor, key_mean: Tensor | None, value: Tensor, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of keys and their sums, from key, value `[B, L, H, D]`.

    Args:
        key_mean: `[B, H, D]` float32, subtracted from the keys; None for raw ones.

    Returns:
        phi(K) `[B, H, L, D]` in the dtype of key, T of phi(K) and V `[B, H, D_PAD, D_PAD]`, and
        the sums of phi(K) over each block of `block_k` tokens `[B, H, N, D_PAD]`.
    """
    batch, length, heads, head_dim = key.shape
    features = key.new_empty(batch, heads, length, head_dim)
    num_k, d_pad = triton.cdiv(length, block_k), padded_dim(head_dim)
    block_sums = torch.empty(batch, heads, num_k, d_pad, dtype=torch.float32, device=key.device)
    state = _totals(value, features, block_k, key, key_mean, block_sums)
    return features, state, block_sums


def query_totals(psi: Tensor, grad_out: Tensor) -> Tensor:
    """T `[B, H, D_PAD, D_PAD]` of psi `[B, H, L, D]` and dO `[B, L, H, D]`."""
    return _totals(grad_out, psi, _BLOCK, None, None, None)


def _totals(
    y: Tensor,
    features: Tensor,
    block: int,
    key: Tensor | None,
    key_mean: Tensor | None,
    block_sums: Tensor | None,
) -> Tensor:
    batch, length, heads, head_dim = y.shape
    d_pad = padded_dim(head_dim)
    num_blocks = triton.cdiv(length, block)
    # Few runs of many blocks: each leaves a D x D state behind.
    run = triton.cdiv(num_blocks, max(1, _PROGRAMS // (batch * heads)))
    runs = triton.cdiv(num_blocks, run)
    run_totals = torch.empty(batch, heads, runs, d_pad, d_pad, dtype=torch.float32, device=y.device)
    wide = y.element_size() > 2
    _totals_kernel[(runs, batch * heads)](
        key_ptr=key,
        key_mean_ptr=key_mean,
        y_ptr=y,
        features_ptr=features,
        block_sums_ptr=block_sums,
        totals_ptr=run_totals,
        key_strides=strides(y if key is None else key),
        y_strides=strides(y),
        length=length,
        heads=heads,
        num_blocks=num_blocks,
        run=run,
        D=head_dim,
        D_PAD=d_pad,
        BLOCK=block,
        TILE=min(block, 16 if wide else 64),
        num_warps=8,
        num_stages=1 if wide else 3,
    )
    return run_totals.sum(2)
