"""Backward of the linear branch, over the blocks that are not selected.

With A_m = sum of phi(k_j)^T v_j and z_m = sum of phi(k_j) over the tokens j that query block m
drops, O_l = phi(q) A_m / (phi(q) . z_m) and the output O = alpha O_s + (1 - alpha) O_l:

    w_i = (1 - alpha_m) / (phi(q_i) . z_m)      g_i = dO_i A_m^T
    e_i = dO_i . O_l_i = phi(q_i) . g_i / (phi(q_i) . z_m)
    dphi(q_i) = w_i (g_i - e_i z_m)
    D_n = sum_i w_i phi(q_i)^T dO_i      d_n = -sum_i w_i e_i phi(q_i)      i: drops key block n
    dphi(k_j) = v_j D_n^T + d_n          dv_j = phi(k_j) D_n
    dalpha_m = sum_i (dO_i . O_s_i - e_i)

A_m, z_m, D_n, d_n are "everything minus what is selected": of states of key blocks, and of states
of query blocks (`triton_backward_states.py`). The gradient then passes the softmax of phi:
dx = phi * (dphi - phi . dphi).

The kernel here does query blocks: dQ, dalpha, and their states, in which psi_i = w_i phi(q_i) L / D
stands for the features: the factor L / D makes typical entries 1 / D, for float16. Key blocks are
done in `triton_backward_key.py`, together with the sparse branch.

Layouts: query, grad_out, out_sparse `[B, L, H, D]` with any strides but 1 in the last dimension;
grad_query `[B, L, H, D]` contiguous; alpha `[B, H, M]`; indices `[B, H, M, K]`; counts `[B, H, M]`.
Compute capability 8.0 and above.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.triton_backward_states import (
    BlockStates,
    dropped_state,
    empty_states,
    store_state,
    with_totals,
)
from sla_video.kernels.triton_backward_tiles import (
    Launch,
    Launches,
    as_operand,
    batch_and_head,
    choose_launch,
    head_offset,
    packed_offset,
    rows_left,
)
from sla_video.kernels.triton_tiles import load_rows, row_softmax, store_rows, strides

# Dropped weight below this share of the total is rounding error of the subtraction.
_SMALLEST_SHARE = tl.constexpr(1e-6)


@triton.jit(do_not_specialize=["length", "num_q", "num_k", "num_selected"])
def _linear_query_kernel(
    query_ptr,
    grad_out_ptr,
    out_sparse_ptr,
    states_ptr,
    factors_ptr,
    sums_ptr,
    total_ptr,
    alpha_ptr,
    indices_ptr,
    counts_ptr,
    query_states_ptr,
    query_factors_ptr,
    query_sums_ptr,
    grad_query_ptr,
    grad_alpha_ptr,
    query_strides,
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
    TILE_Q: tl.constexpr,
):
    """dQ, dalpha, the state of psi and dO and the sum of e_i psi_i of one query block."""
    m = tl.program_id(0)
    b, h, bh = batch_and_head(tl.program_id(1), heads)
    block = bh * num_q + m
    start_q = m.to(tl.int64) * BLOCK_Q
    cols = tl.arange(0, D_PAD)

    count = num_selected
    if counts_ptr is not None:
        count = tl.load(counts_ptr + block)
    dropped, dropped_sum = dropped_state(
        total_ptr,
        states_ptr,
        factors_ptr,
        sums_ptr,
        indices_ptr + block * num_selected,
        count,
        bh,
        num_k,
        D_PAD,
    )
    state, factor = as_operand(dropped, states_ptr.dtype.element_ty)
    dropped_sum = tl.maximum(dropped_sum, 0.0)
    total_sum = tl.load(total_ptr + (bh + 1) * (D_PAD + 1) * D_PAD - D_PAD + cols)
    alpha = tl.load(alpha_ptr + block)
    # A row that drops nothing has no linear part.
    linear_weight = tl.where(count < num_k, 1.0 - alpha, 0.0)
    present = tl.where(count < num_k, 1.0, 0.0)

    query_ptr += head_offset(query_strides, b, start_q, h)
    grad_out_ptr += head_offset(grad_strides, b, start_q, h)
    out_sparse_ptr += head_offset(out_strides, b, start_q, h)
    grad_query_ptr += packed_offset(b, start_q, h, length, heads, D)
    rows_q = rows_left(start_q, length)
    grad_alpha = tl.zeros([TILE_Q], tl.float32)
    psi_state = tl.zeros([D_PAD, D_PAD], tl.float32)
    psi_sum = tl.zeros([D_PAD], tl.float32)
    for offset in range(0, BLOCK_Q, TILE_Q):
        rows = rows_q - offset
        tile_ptr = query_ptr + offset * query_strides[1]
        # [TILE_Q, D_PAD]
        query = load_rows(tile_ptr, query_strides[1], rows, TILE_Q, D, D_PAD)
        tile_ptr = grad_out_ptr + offset * grad_strides[1]
        grad_out = load_rows(tile_ptr, grad_strides[1], rows, TILE_Q, D, D_PAD)
        tile_ptr = out_sparse_ptr + offset * out_strides[1]
        out_sparse = load_rows(tile_ptr, out_strides[1], rows, TILE_Q, D, D_PAD)
        along_sparse = tl.sum(grad_out.to(tl.float32) * out_sparse.to(tl.float32), 1)
        grad_phi = tl.dot(grad_out, tl.trans(state), input_precision="ieee") * factor
        phi = row_softmax(query.to(tl.float32), D, D_PAD)
        floor = _SMALLEST_SHARE * tl.sum(phi * total_sum[None, :], 1)
        weight = tl.maximum(tl.sum(phi * dropped_sum[None, :], 1), floor)
        along_linear = tl.sum(phi * grad_phi, 1) * (present / weight)
        grad_alpha += along_sparse - along_linear

        w = linear_weight / weight
        # O_l does not change when phi(q) is scaled, so phi . dphi = 0 and dq = phi * dphi.
        grad_phi -= along_linear[:, None] * dropped_sum[None, :]
        tile_ptr = grad_query_ptr + offset * heads * D
        store_rows(tile_ptr, heads * D, phi * grad_phi * w[:, None], rows, TILE_Q, D, D_PAD)
        psi = (phi * (w * (length / D))[:, None]).to(query.dtype)
        psi_state = tl.dot(tl.trans(psi), grad_out, psi_state, input_precision="ieee")
        psi_sum += tl.sum(along_linear[:, None] * psi.to(tl.float32), 0)
    store_state(query_states_ptr, query_factors_ptr, block, psi_state, D_PAD)
    tl.store(query_sums_ptr + block * D_PAD + cols, psi_sum)
    # Left to be summed by the caller: Triton 3.6 cannot compile a sum of sums for Blackwell.
    tl.store(grad_alpha_ptr + block * TILE_Q + tl.arange(0, TILE_Q), grad_alpha)


_LAUNCHES = Launches(
    narrow=Launch(64, 64, 8, 1, max_registers=128),
    broad=Launch(64, 64, 8, 1),
    small=Launch(32, 64, 8, 1),
    float32=Launch(16, 16, 8, 1),
    float32_small=Launch(16, 16, 8, 1),
)


def linear_query_backward(
    grad_out: Tensor,
    query: Tensor,
    key_states: BlockStates,
    indices: Tensor,
    counts: Tensor | None,
    alpha: Tensor,
    out_sparse: Tensor,
    grad_query: Tensor,
    *,
    block_q: int,
) -> tuple[Tensor, BlockStates]:
    """Write the gradient of the query; see `sla2_backward` for the other arguments.

    Args:
        key_states: of phi(K) and V.
        grad_query: `[B, L, H, D]` contiguous, written in place.

    Returns:
        gradient of alpha `[B, H, M]`, and the states of psi and dO, with sums of `e_i psi_i`.
    """
    batch, length, heads, head_dim = query.shape
    num_q, num_selected = indices.shape[-2:]
    num_k, d_pad = key_states.sums.shape[-2:]
    launch = choose_launch(_LAUNCHES, query)
    tile_q = min(block_q, launch.tile_q)
    states, factors, sums = empty_states(query, num_q)
    grad_alpha = sums.new_empty(batch, heads, num_q, tile_q)
    _linear_query_kernel[(num_q, batch * heads)](
        query_ptr=query,
        grad_out_ptr=grad_out,
        out_sparse_ptr=out_sparse,
        states_ptr=key_states.states,
        factors_ptr=key_states.factors,
        sums_ptr=key_states.sums,
        total_ptr=key_states.total,
        alpha_ptr=alpha,
        indices_ptr=indices,
        counts_ptr=counts,
        query_states_ptr=states,
        query_factors_ptr=factors,
        query_sums_ptr=sums,
        grad_query_ptr=grad_query,
        grad_alpha_ptr=grad_alpha,
        query_strides=strides(query),
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
        TILE_Q=tile_q,
        **launch.keywords(),
    )
    return grad_alpha.sum(-1), with_totals(states, factors, sums)
