"""Backward of the linear branch, over the blocks that are not selected.

With A_m = sum of phi(k_j)^T v_j and z_m = sum of phi(k_j) over the tokens j that query block m
drops, O_l = phi(q) A_m / (phi(q) . z_m) and the output O = alpha O_s + (1 - alpha) O_l:

    w_i = (1 - alpha_m) / (phi(q_i) . z_m)      e_i = dO_i . O_l_i
    dphi(q_i) = w_i (dO_i A_m^T - e_i z_m)
    D_n = sum_i w_i phi(q_i)^T dO_i      d_n = -sum_i w_i e_i phi(q_i)      i: drops key block n
    dphi(k_j) = v_j D_n^T + d_n          dv_j = phi(k_j) D_n
    dalpha_m = sum_i dO_i . (O_s_i - O_l_i)

A_m, z_m, D_n, d_n are "everything minus what is selected" and live in registers only. The gradient
then passes the softmax of phi: dx = phi * (dphi - phi . dphi).

Kept in memory are phi(K) and psi_i = w_i phi(q_i) L / D, in the dtype of the inputs: the factor
L / D makes typical entries 1 / D, for float16.

The kernel here walks the key blocks of each query block; that of `triton_backward_linear_key.py`
the query blocks of each key block, for D_n, d_n and what follows from them.

Layouts: query, value, grad_out, out_sparse `[B, L, H, D]` with any strides but 1 in the last
dimension; gradients `[B, L, H, D]` contiguous; phi(K), psi `[B, H, L, D]` contiguous; alpha
`[B, H, M]`; indices `[B, H, M, K]`; counts `[B, H, M]`. Compute capability 8.0 and above.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.triton_backward_tiles import (
    Launch,
    as_operand,
    batch_and_head,
    choose_launch,
    head_offset,
    listed_tile,
    packed_offset,
    rows_left,
)
from sla_video.kernels.triton_tiles import load_rows, row_softmax, store_rows, strides

# Dropped weight below this share of the total is rounding error of the subtraction.
_SMALLEST_SHARE = tl.constexpr(1e-6)


@triton.jit(do_not_specialize=["length", "num_q", "num_k", "num_selected"])
def _linear_query_kernel(
    query_ptr,
    value_ptr,
    grad_out_ptr,
    out_sparse_ptr,
    features_ptr,
    block_sums_ptr,
    totals_ptr,
    total_sums_ptr,
    alpha_ptr,
    indices_ptr,
    counts_ptr,
    psi_ptr,
    psi_sums_ptr,
    grad_query_ptr,
    grad_alpha_ptr,
    query_strides,
    value_strides,
    grad_strides,
    out_strides,
    length,
    heads,
    num_q,
    num_k,
    num_selected,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """dQ, dalpha, psi and the sum of e_i psi_i of one query block."""
    m = tl.program_id(0)
    b, h, bh = batch_and_head(tl.program_id(1), heads)
    block = bh * num_q + m
    start_q = m.to(tl.int64) * BLOCK_Q
    cols = tl.arange(0, D_PAD)

    value_ptr += head_offset(value_strides, b, 0, h)
    features_ptr += bh * length * D
    block_sums_ptr += bh * num_k * D_PAD
    indices_ptr += block * num_selected
    count = num_selected
    if counts_ptr is not None:
        count = tl.load(counts_ptr + block)

    tiles_k: tl.constexpr = BLOCK_K // TILE_K
    selected = tl.zeros([D_PAD, D_PAD], tl.float32)
    selected_sum = tl.zeros([D_PAD], tl.float32)
    for step in range(0, count * tiles_k):
        n, start, rows = listed_tile(indices_ptr, step, length, BLOCK_K, TILE_K)
        tile_ptr = features_ptr + start * D
        features = load_rows(tile_ptr, D, rows, TILE_K, D, D_PAD)
        tile_ptr = value_ptr + start * value_strides[1]
        value = load_rows(tile_ptr, value_strides[1], rows, TILE_K, D, D_PAD)
        selected = tl.dot(tl.trans(features), value, selected, input_precision="ieee")
        block_sum = tl.load(block_sums_ptr + n * D_PAD + cols)
        selected_sum += block_sum / tiles_k

    totals_ptr += bh * D_PAD * D_PAD
    # [D_PAD, D_PAD], [D_PAD]
    dropped = tl.load(totals_ptr + cols[:, None] * D_PAD + cols[None, :]) - selected
    state, factor = as_operand(dropped, features_ptr.dtype.element_ty)
    total_sum = tl.load(total_sums_ptr + bh * D_PAD + cols)
    dropped_sum = tl.maximum(total_sum - selected_sum, 0.0)
    alpha = tl.load(alpha_ptr + block)
    # A row that drops nothing has no linear part.
    linear_weight = tl.where(count < num_k, 1.0 - alpha, 0.0)
    present = tl.where(count < num_k, 1.0, 0.0)

    query_ptr += head_offset(query_strides, b, start_q, h)
    grad_out_ptr += head_offset(grad_strides, b, start_q, h)
    out_sparse_ptr += head_offset(out_strides, b, start_q, h)
    psi_ptr += (bh * length + start_q) * D
    grad_query_ptr += packed_offset(b, start_q, h, length, heads, D)
    rows_q = rows_left(start_q, length)
    grad_alpha = tl.zeros([TILE_Q], tl.float32)
    psi_sum = tl.zeros([D_PAD], tl.float32)
    for offset in range(0, BLOCK_Q, TILE_Q):
        rows = rows_q - offset
        tile_ptr = query_ptr + offset * query_strides[1]
        # [TILE_Q, D_PAD]
        query = load_rows(tile_ptr, query_strides[1], rows, TILE_Q, D, D_PAD)
        phi = row_softmax(query.to(tl.float32), D, D_PAD)
        floor = _SMALLEST_SHARE * tl.sum(phi * total_sum[None, :], 1)
        weight = tl.maximum(tl.sum(phi * dropped_sum[None, :], 1), floor)
        along = tl.dot(phi.to(query.dtype), state, input_precision="ieee")
        out_linear = along * (factor * present / weight)[:, None]
        tile_ptr = grad_out_ptr + offset * grad_strides[1]
        grad_out = load_rows(tile_ptr, grad_strides[1], rows, TILE_Q, D, D_PAD)
        tile_ptr = out_sparse_ptr + offset * out_strides[1]
        out_sparse = load_rows(tile_ptr, out_strides[1], rows, TILE_Q, D, D_PAD)
        wide_grad = grad_out.to(tl.float32)
        along_linear = tl.sum(wide_grad * out_linear, 1)
        grad_alpha += tl.sum(wide_grad * out_sparse.to(tl.float32), 1) - along_linear

        w = linear_weight / weight
        grad_phi = tl.dot(grad_out, tl.trans(state), input_precision="ieee") * factor
        grad_phi -= along_linear[:, None] * dropped_sum[None, :]
        # O_l does not change when phi(q) is scaled, so phi . dphi = 0 and dq = phi * dphi.
        grad_query = phi * grad_phi * w[:, None]
        tile_ptr = grad_query_ptr + offset * heads * D
        store_rows(tile_ptr, heads * D, grad_query, rows, TILE_Q, D, D_PAD)
        psi = (phi * (w * (length / D))[:, None]).to(query.dtype)
        store_rows(psi_ptr + offset * D, D, psi, rows, TILE_Q, D, D_PAD)
        psi_sum += tl.sum(along_linear[:, None] * psi.to(tl.float32), 0)
    # Left to be summed by the caller: Triton 3.6 cannot compile a sum of sums for Blackwell.
    tl.store(grad_alpha_ptr + block * TILE_Q + tl.arange(0, TILE_Q), grad_alpha)
    tl.store(psi_sums_ptr + block * D_PAD + cols, psi_sum)


# (bytes per element > 2, large shared memory) -> launch.
_LAUNCHES = {
    (False, True): Launch(64, 64, 8, 3),
    (False, False): Launch(32, 64, 8, 2),
    (True, True): Launch(16, 16, 8, 1),
    (True, False): Launch(16, 16, 8, 1),
}


def linear_query_backward(
    grad_out: Tensor,
    query: Tensor,
    value: Tensor,
    features: Tensor,
    state: Tensor,
    block_sums: Tensor,
    indices: Tensor,
    counts: Tensor | None,
    alpha: Tensor,
    out_sparse: Tensor,
    grad_query: Tensor,
    *,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the gradient of the query; see `sla2_backward` for the other arguments.

    Args:
        features, state, block_sums: as `key_totals` returns them.
        grad_query: `[B, L, H, D]` contiguous, written in place.

    Returns:
        gradient of alpha `[B, H, M]`, psi `[B, H, L, D]`, and sums of `e_i psi_i` over each query
        block `[B, H, M, D_PAD]`.
    """
    batch, length, heads, head_dim = query.shape
    num_q, num_selected = indices.shape[-2:]
    num_k, d_pad = block_sums.shape[-2:]
    launch = choose_launch(_LAUNCHES, query)
    tile_q = min(block_q, launch.tile_q)
    psi = torch.empty_like(features)
    psi_sums = block_sums.new_empty(batch, heads, num_q, d_pad)
    grad_alpha = block_sums.new_empty(batch, heads, num_q, tile_q)
    _linear_query_kernel[(num_q, batch * heads)](
        query_ptr=query,
        value_ptr=value,
        grad_out_ptr=grad_out,
        out_sparse_ptr=out_sparse,
        features_ptr=features,
        block_sums_ptr=block_sums,
        totals_ptr=state,
        total_sums_ptr=block_sums.sum(2),
        alpha_ptr=alpha,
        indices_ptr=indices,
        counts_ptr=counts,
        psi_ptr=psi,
        psi_sums_ptr=psi_sums,
        grad_query_ptr=grad_query,
        grad_alpha_ptr=grad_alpha,
        query_strides=strides(query),
        value_strides=strides(value),
        grad_strides=strides(grad_out),
        out_strides=strides(out_sparse),
        length=length,
        heads=heads,
        num_q=num_q,
        num_k=num_k,
        num_selected=num_selected,
        D=head_dim,
        D_PAD=d_pad,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_Q=tile_q,
        TILE_K=min(block_k, launch.tile_k),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return grad_alpha.sum(-1), psi, psi_sums
