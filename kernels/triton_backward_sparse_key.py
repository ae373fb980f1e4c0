"""Backward of the sparse branch for keys and values; formulas in `triton_backward_sparse.py`.

    dK = dS^T Q / sqrt(D)      dV = alpha P^T dO

over the query blocks that selected a key block, listed by `triton_inverse.py`. P and dS are formed
transposed, keys by queries, so that they are left operands as they stand in registers.

Layouts: query, key, value, grad_out `[B, L, H, D]` with any strides but 1 in the last dimension;
gradients `[B, L, H, D]` contiguous; row_lse, row_delta `[B, H, M * block_q]`; alpha `[B, H, M]`.
Compute capability 8.0 and above.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.triton_backward_tiles import (
    LOG2E,
    Launch,
    batch_and_head,
    choose_launch,
    head_offset,
    listed_tile,
    packed_offset,
    rows_left,
)
from sla_video.kernels.triton_inverse import InverseLists
from sla_video.kernels.triton_tiles import load_rows, padded_dim, store_rows, strides


@triton.jit(do_not_specialize=["length", "num_q", "num_k"])
def _sparse_key_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    row_lse_ptr,
    row_delta_ptr,
    alpha_ptr,
    query_blocks_ptr,
    offsets_ptr,
    order_ptr,
    key_shift_ptr,
    grad_key_ptr,
    grad_value_ptr,
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
    ADD: tl.constexpr,
):
    """dK and dV of one tile of keys; key_shift `[B, H, D_PAD]` is subtracted from every dK."""
    tiles_q: tl.constexpr = BLOCK_Q // TILE_Q
    tiles_k: tl.constexpr = BLOCK_K // TILE_K
    block = tl.load(order_ptr + tl.program_id(0) // tiles_k)
    b, h, bh = batch_and_head(block // num_k, heads)
    n = (block % num_k).to(tl.int64)
    start_k = n * BLOCK_K + (tl.program_id(0) % tiles_k) * TILE_K
    rows_k = rows_left(start_k, length)
    offs_q = tl.arange(0, TILE_Q)

    key_ptr += head_offset(key_strides, b, start_k, h)
    value_ptr += head_offset(value_strides, b, start_k, h)
    query_ptr += head_offset(query_strides, b, 0, h)
    grad_out_ptr += head_offset(grad_strides, b, 0, h)
    row_lse_ptr += bh * num_q * BLOCK_Q
    row_delta_ptr += bh * num_q * BLOCK_Q
    offsets_ptr += bh * (num_k + 1) + n
    first, last = tl.load(offsets_ptr), tl.load(offsets_ptr + 1)

    # [TILE_K, D_PAD]
    key = load_rows(key_ptr, key_strides[1], rows_k, TILE_K, D, D_PAD)
    value = load_rows(value_ptr, value_strides[1], rows_k, TILE_K, D, D_PAD)
    grad_key = tl.zeros([TILE_K, D_PAD], tl.float32)
    grad_value = tl.zeros([TILE_K, D_PAD], tl.float32)
    for step in range(first * tiles_q, last * tiles_q):
        m, start, rows = listed_tile(query_blocks_ptr, step, length, BLOCK_Q, TILE_Q)
        query_tile_ptr = query_ptr + start * query_strides[1]
        query = load_rows(query_tile_ptr, query_strides[1], rows, TILE_Q, D, D_PAD)
        grad_tile_ptr = grad_out_ptr + start * grad_strides[1]
        grad_out = load_rows(grad_tile_ptr, grad_strides[1], rows, TILE_Q, D, D_PAD)
        alpha = 1.0
        if alpha_ptr is not None:
            alpha = tl.load(alpha_ptr + bh * num_q + m)
        lse = tl.load(row_lse_ptr + start + offs_q)
        delta = tl.load(row_delta_ptr + start + offs_q)
        # [TILE_K, TILE_Q]
        logits = tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * LOG2E)
        weights = tl.exp2(logits - lse[None, :])
        mixed = (alpha * weights).to(grad_out.dtype)
        grad_value = tl.dot(mixed, grad_out, grad_value, input_precision="ieee")
        along = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
        grad_logits = weights * (alpha * along - delta[None, :])
        grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision="ieee")

    grad_key *= scale
    if key_shift_ptr is not None:
        grad_key -= tl.load(key_shift_ptr + bh * D_PAD + tl.arange(0, D_PAD))[None, :]
    offset = packed_offset(b, start_k, h, length, heads, D)
    grad_key_ptr += offset
    grad_value_ptr += offset
    if ADD:
        linear = load_rows(grad_key_ptr, heads * D, rows_k, TILE_K, D, D_PAD)
        grad_key += linear.to(tl.float32)
        linear = load_rows(grad_value_ptr, heads * D, rows_k, TILE_K, D, D_PAD)
        grad_value += linear.to(tl.float32)
    store_rows(grad_key_ptr, heads * D, grad_key, rows_k, TILE_K, D, D_PAD)
    store_rows(grad_value_ptr, heads * D, grad_value, rows_k, TILE_K, D, D_PAD)


# (bytes per element > 2, large shared memory) -> launch.
_LAUNCHES = {
    (False, True): Launch(64, 64, 4, 3),
    (False, False): Launch(32, 64, 4, 2),
    (True, True): Launch(32, 32, 4, 1),
    (True, False): Launch(16, 32, 4, 1),
}


def sparse_key_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    row_lse: Tensor,
    row_delta: Tensor,
    inverse: InverseLists,
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    block_q: int,
    block_k: int,
    add: bool,
    key_shift: Tensor | None,
) -> None:
    """Write the gradients of key and value; see `sla2_backward` for the other arguments.

    Args:
        row_lse, row_delta: as `sparse_query_backward` returns them.
        grad_key, grad_value: `[B, L, H, D]` contiguous, written in place; with `add`, added to.
        key_shift: `[B, H, D_PAD]` float32, subtracted from the gradient of every key.
    """
    batch, length, heads, head_dim = query.shape
    num_k = inverse.offsets.shape[-1] - 1
    launch = choose_launch(_LAUNCHES, query)
    tile_k = min(block_k, launch.tile_k)
    _sparse_key_kernel[(batch * heads * num_k * (block_k // tile_k),)](
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        grad_out_ptr=grad_out,
        row_lse_ptr=row_lse,
        row_delta_ptr=row_delta,
        alpha_ptr=alpha,
        query_blocks_ptr=inverse.query_blocks,
        offsets_ptr=inverse.offsets,
        order_ptr=inverse.order,
        key_shift_ptr=key_shift,
        grad_key_ptr=grad_key,
        grad_value_ptr=grad_value,
        query_strides=strides(query),
        key_strides=strides(key),
        value_strides=strides(value),
        grad_strides=strides(grad_out),
        scale=head_dim**-0.5,
        length=length,
        heads=heads,
        num_q=row_lse.shape[-1] // block_q,
        num_k=num_k,
        D=head_dim,
        D_PAD=padded_dim(head_dim),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_Q=min(block_q, launch.tile_q),
        TILE_K=tile_k,
        ADD=add,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
