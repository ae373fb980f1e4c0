"""Backward for keys and values, of both branches.

Sparse branch, over the query blocks that selected a key block (formulas in
`triton_backward_sparse.py`); linear branch, from the summed states of those that did not
(`triton_backward_linear.py`):

    dK = dS^T Q / sqrt(D)          dV = alpha P^T dO
    dphi(k_j) = v_j D_n^T + d_n    dv_j = phi(k_j) D_n

Where a key block's logits had a number of their own added for each query block, its gradient is the
sum of dS over the pair of blocks.

The query blocks that selected a key block are listed by `triton_inverse.py`. Sums over them start
from the gradients of the linear branch. P and dS are formed transposed, keys by queries, so that
they are left operands as they stand in registers.

Layouts: query, key, value, grad_out `[B, L, H, D]` with any strides but 1 in the last dimension;
gradients `[B, L, H, D]` contiguous; row_lse, row_delta `[B, H, M * block_q]`; states as in
`triton_backward_states.py`. Compute capability 8.0 and above.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.launch_choice import launch_config
from sla_video.kernels.triton_backward_states import BlockStates, load_state
from sla_video.kernels.triton_backward_tiles import (
    batch_and_head,
    head_offset,
    listed_tile,
    packed_offset,
    rows_left,
)
from sla_video.kernels.triton_inverse import InverseLists
from sla_video.kernels.triton_tiles import (
    LOG2E,
    load_rows,
    padded_dim,
    row_softmax,
    store_rows,
    strides,
)


@triton.jit
def _linear_gradients(
    key,
    value,
    key_mean_ptr,
    state,
    state_sum,
    factor,
    weight,
    rows_k,
    bh,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Gradients of what phi(K) was taken of and of values `[TILE_K, D_PAD]`, times `weight`."""
    cols = tl.arange(0, D_PAD)
    x = key.to(tl.float32)
    if key_mean_ptr is not None:
        x -= tl.load(key_mean_ptr + bh * D + cols, mask=cols < D, other=0.0)[None, :]
    phi = row_softmax(x, D, D_PAD)
    phi = tl.where((tl.arange(0, TILE_K) < rows_k)[:, None], phi, 0.0)
    grad_value = tl.dot(phi.to(key.dtype), state, input_precision="ieee") * (factor * weight)
    grad_phi = tl.dot(value, tl.trans(state), input_precision="ieee") * factor
    grad_phi -= state_sum[None, :]
    grad_key = phi * (grad_phi - tl.sum(phi * grad_phi, 1)[:, None]) * weight
    return grad_key, grad_value


@triton.jit(do_not_specialize=["length", "num_q", "num_k"])
def _key_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    row_lse_ptr,
    row_delta_ptr,
    key_mean_ptr,
    states_ptr,
    factors_ptr,
    sums_ptr,
    query_blocks_ptr,
    counts_ptr,
    order_ptr,
    bias_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_sums_ptr,
    grad_bias_ptr,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    scale,
    length,
    heads,
    num_q,
    num_k,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """dK and dV of one tile of keys, and minus the sum of the linear branch's dK over it."""
    tiles_q: tl.constexpr = BLOCK_Q // TILE_Q
    tiles_k: tl.constexpr = BLOCK_K // TILE_K
    block = tl.load(order_ptr + tl.program_id(0) // tiles_k)
    tile = tl.program_id(0) % tiles_k
    b, h, bh = batch_and_head(block // num_k, heads)
    start_k = (block % num_k).to(tl.int64) * BLOCK_K + tile * TILE_K
    rows_k = rows_left(start_k, length)
    offs_q = tl.arange(0, TILE_Q)

    query_blocks_ptr += block.to(tl.int64) * num_q
    if bias_ptr is not None:
        bias_ptr += bh * num_q * num_k + block % num_k
        # [TILE_K, 1]
        exists = (tl.arange(0, TILE_K) < rows_k)[:, None]
        pair = (bh * num_k * tiles_k + (block % num_k) * tiles_k + tile) * (num_q * tiles_q)
        grad_bias_ptr += pair
    count = tl.load(counts_ptr + block)
    key_ptr += head_offset(key_strides, b, start_k, h)
    value_ptr += head_offset(value_strides, b, start_k, h)
    # [TILE_K, D_PAD]
    key = load_rows(key_ptr, key_strides[1], rows_k, TILE_K, D, D_PAD)
    value = load_rows(value_ptr, value_strides[1], rows_k, TILE_K, D, D_PAD)
    grad_key = tl.zeros([TILE_K, D_PAD], tl.float32)
    grad_value = tl.zeros([TILE_K, D_PAD], tl.float32)
    if states_ptr is not None:
        state, factor, state_sum = load_state(states_ptr, factors_ptr, sums_ptr, block, bh, D_PAD)
        # States hold features times L / D.
        linear_key, grad_value = _linear_gradients(
            key,
            value,
            key_mean_ptr,
            state,
            state_sum,
            factor,
            D / length,
            rows_k,
            bh,
            D,
            D_PAD,
            TILE_K,
        )
        grad_sums_ptr += (block.to(tl.int64) * tiles_k + tile) * D_PAD
        tl.store(grad_sums_ptr + tl.arange(0, D_PAD), -tl.sum(linear_key, 0))
        grad_key = linear_key * (1.0 / scale)

    query_ptr += head_offset(query_strides, b, 0, h)
    grad_out_ptr += head_offset(grad_strides, b, 0, h)
    row_lse_ptr += bh * num_q * BLOCK_Q
    row_delta_ptr += bh * num_q * BLOCK_Q
    for step in range(0, count * tiles_q):
        start, rows = listed_tile(query_blocks_ptr, step, length, BLOCK_Q, TILE_Q)
        query_tile_ptr = query_ptr + start * query_strides[1]
        query = load_rows(query_tile_ptr, query_strides[1], rows, TILE_Q, D, D_PAD)
        grad_tile_ptr = grad_out_ptr + start * grad_strides[1]
        grad_out = load_rows(grad_tile_ptr, grad_strides[1], rows, TILE_Q, D, D_PAD)
        lse = tl.load(row_lse_ptr + start + offs_q)
        delta = tl.load(row_delta_ptr + start + offs_q)
        # [TILE_K, TILE_Q]
        logits = tl.dot(key, tl.trans(query), input_precision="ieee")
        along = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
        powers = logits * (scale * LOG2E) - lse[None, :]
        if bias_ptr is not None:
            powers += tl.load(bias_ptr + start // BLOCK_Q * num_k)
        weights = tl.exp2(powers)
        grad_value = tl.dot(
            weights.to(grad_out.dtype), grad_out, grad_value, input_precision="ieee"
        )
        grad_logits = weights * (along - delta[None, :])
        if bias_ptr is not None:
            total = tl.sum(tl.sum(tl.where(exists, grad_logits, 0.0), 1), 0)
            tl.store(grad_bias_ptr + start // TILE_Q, total)
        grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision="ieee")

    offset = packed_offset(b, start_k, h, length, heads, D)
    grad_key *= scale
    store_rows(grad_key_ptr + offset, heads * D, grad_key, rows_k, TILE_K, D, D_PAD)
    store_rows(grad_value_ptr + offset, heads * D, grad_value, rows_k, TILE_K, D, D_PAD)


def key_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_lse: Tensor,
    row_delta: Tensor,
    inverse: InverseLists,
    dropped: BlockStates | None,
    key_mean: Tensor | None,
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    block_q: int,
    block_k: int,
    bias: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradients of key and value; see `sla2_backward` for the other arguments.

    Args:
        row_lse, row_delta: as `sparse_query_backward` returns them.
        dropped: states of psi and dO, summed over the query blocks that drop each key block; None
            where nothing is dropped anywhere.
        key_mean: `[B, H, D]` float32, subtracted from the keys in phi; None for raw ones.
        grad_key, grad_value: `[B, L, H, D]` contiguous, written in place.
        bias: `[B, H, M, N]` float32 contiguous, what was added to the logits of a key block, in
            powers of two. All pairs of blocks are then listed.

    Returns:
        gradient of `key_mean`, `[B, H, D_PAD]` float32, None without states; to be used where it is
        given. And that of the logits' share of each pair of blocks, `[B, H, M, N]` float32 (not in
        powers of two); None without bias.
    """
    batch, length, heads, head_dim = query.shape
    num_q, num_k = row_lse.shape[-1] // block_q, inverse.counts.shape[-1]
    d_pad = padded_dim(head_dim)
    launch = launch_config("key_backward", query, block_q=block_q, block_k=block_k)
    tile_k = min(block_k, launch.tile_k)
    tiles = num_k * (block_k // tile_k)
    states, factors, sums = dropped or (None,) * 3
    grad_sums = None
    if states is not None:
        grad_sums = torch.empty(
            batch, heads, tiles, d_pad, dtype=torch.float32, device=query.device
        )
    tile_q = min(block_q, launch.tile_q)
    grad_bias = None
    if bias is not None:
        tiles_of_pairs = (batch, heads, num_k, block_k // tile_k, num_q, block_q // tile_q)
        grad_bias = torch.empty(tiles_of_pairs, dtype=torch.float32, device=query.device)
    _key_kernel[(batch * heads * tiles,)](
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        grad_out_ptr=grad_out,
        row_lse_ptr=row_lse,
        row_delta_ptr=row_delta,
        key_mean_ptr=key_mean,
        states_ptr=states,
        factors_ptr=factors,
        sums_ptr=sums,
        query_blocks_ptr=inverse.query_blocks,
        counts_ptr=inverse.counts,
        order_ptr=inverse.order,
        bias_ptr=bias,
        grad_key_ptr=grad_key,
        grad_value_ptr=grad_value,
        grad_sums_ptr=grad_sums,
        grad_bias_ptr=grad_bias,
        query_strides=strides(query),
        key_strides=strides(key),
        value_strides=strides(value),
        grad_strides=strides(grad_out),
        scale=head_dim**-0.5,
        length=length,
        heads=heads,
        num_q=num_q,
        num_k=num_k,
        D=head_dim,
        D_PAD=d_pad,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_Q=tile_q,
        TILE_K=tile_k,
        **launch.keywords(),
    )
    if grad_bias is not None:
        grad_bias = grad_bias.sum((3, 5)).mT
    return None if grad_sums is None else grad_sums.sum(2), grad_bias
