"""Backward of the linear branch, over the blocks that are not selected.

With A_m = sum of phi(k_j)^T v_j and z_m = sum of phi(k_j) over the tokens j that query block m
drops, O_l = phi(q) A_m / (phi(q) . z_m) and the output O = alpha O_s + (1 - alpha) O_l:

    w_i = (1 - alpha_m) / (phi(q_i) . z_m)      g_i = dO_i A_m^T
    e_i = dO_i . O_l_i = phi(q_i) . g_i / (phi(q_i) . z_m)
    dphi(q_i) = w_i (g_i - e_i z_m)
    D_n = sum_i w_i phi(q_i)^T dO_i      d_n = -sum_i w_i e_i phi(q_i)      i: drops key block n
    dphi(k_j) = v_j D_n^T + d_n          dv_j = phi(k_j) D_n
    dalpha_m = sum_i (dO_i . O_s_i - e_i)

A_m, z_m, D_n, d_n are sums of states of key blocks, and of query blocks, over what is dropped
(`triton_backward_states.py`). The gradient then passes the softmax of phi:
dx = phi * (dphi - phi . dphi).

The kernel here does query blocks: dQ, dalpha, and their states, in which psi_i = w_i phi(q_i) L / D
stands for the features: the factor L / D makes typical entries 1 / D, for float16. Key blocks are
done in `triton_backward_key.py`, together with the sparse branch.

Layouts: query, grad_out, out_sparse `[B, L, H, D]` with any strides but 1 in the last dimension;
grad_query `[B, L, H, D]` contiguous; alpha `[B, H, M]`. Compute capability 8.0 and above.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.launch_choice import launch_config
from sla_video.kernels.triton_backward_states import (
    BlockStates,
    empty_states,
    load_state,
    store_state,
)
from sla_video.kernels.triton_backward_tiles import (
    batch_and_head,
    head_offset,
    packed_offset,
    rows_left,
)
from sla_video.kernels.triton_tiles import (
    load_rows,
    padded_dim,
    padded_row,
    store_rows,
    strides,
    unscaled_softmax,
)


@triton.jit(do_not_specialize=["length", "num_q", "state_blocks"])
def _linear_query_kernel(
    query_ptr,
    grad_out_ptr,
    out_sparse_ptr,
    states_ptr,
    factors_ptr,
    sums_ptr,
    alpha_ptr,
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
    state_blocks,
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

    # [D_PAD, D_PAD], [D_PAD]
    state, factor, dropped_sum = load_state(states_ptr, factors_ptr, sums_ptr, block, bh, D_PAD)
    alpha = tl.load(alpha_ptr + block)
    # A row that drops nothing has no linear part.
    linear_weight = tl.where(tl.sum(dropped_sum, 0) > 0, 1.0 - alpha, 0.0)

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
        # O_l, e and w phi do not change when phi is scaled: it need not add up to 1.
        phi = unscaled_softmax(query.to(tl.float32), D, D_PAD)
        weight = tl.maximum(tl.sum(phi * dropped_sum[None, :], 1), 1e-30)
        along_linear = tl.sum(phi * grad_phi, 1) / weight
        grad_alpha += along_sparse - along_linear

        # So w phi . dphi = 0, and the softmax passes on no more than w phi * dphi.
        phi *= (linear_weight / weight)[:, None]
        grad_phi = phi * (grad_phi - along_linear[:, None] * dropped_sum[None, :])
        tile_ptr = grad_query_ptr + offset * heads * D
        store_rows(tile_ptr, heads * D, grad_phi, rows, TILE_Q, D, D_PAD)
        psi = (phi * (length / D)).to(query.dtype)
        psi_state = tl.dot(tl.trans(psi), grad_out, psi_state, input_precision="ieee")
        psi_sum += tl.sum(along_linear[:, None] * psi.to(tl.float32), 0)
    state_block = bh * state_blocks + m
    store_state(query_states_ptr, query_factors_ptr, state_block, psi_state, D_PAD)
    tl.store(query_sums_ptr + state_block * D_PAD + cols, psi_sum)
    # Left to be summed by the caller: Triton 3.6 cannot compile a sum of sums for Blackwell.
    tl.store(grad_alpha_ptr + block * TILE_Q + tl.arange(0, TILE_Q), grad_alpha)


def linear_query_backward(
    grad_out: Tensor,
    query: Tensor,
    dropped: BlockStates,
    alpha: Tensor,
    out_sparse: Tensor,
    grad_query: Tensor,
    *,
    block_q: int,
) -> tuple[Tensor, BlockStates]:
    """Write the gradient of the query; see `sla2_backward` for the other arguments.

    Args:
        dropped: states of phi(K) and V, summed over the key blocks that each query block drops.
        grad_query: `[B, L, H, D]` contiguous, written in place.

    Returns:
        gradient of alpha `[B, H, M]`, and the states of psi and dO, with sums of `e_i psi_i` over
        the tokens of each query block.
    """
    batch, length, heads, head_dim = query.shape
    num_q = alpha.shape[-1]
    launch = launch_config("linear_query_backward", query, block_q=block_q)
    tile_q = min(block_q, launch.tile_q)
    found = empty_states(query, num_q)
    grad_alpha = found.sums.new_empty(batch, heads, num_q, tile_q)
    _linear_query_kernel[(num_q, batch * heads)](
        query_ptr=query,
        grad_out_ptr=grad_out,
        out_sparse_ptr=out_sparse,
        states_ptr=dropped.states,
        factors_ptr=dropped.factors,
        sums_ptr=dropped.sums,
        alpha_ptr=alpha,
        query_states_ptr=found.states,
        query_factors_ptr=found.factors,
        query_sums_ptr=found.sums,
        grad_query_ptr=grad_query,
        grad_alpha_ptr=grad_alpha,
        query_strides=strides(query),
        grad_strides=strides(grad_out),
        out_strides=strides(out_sparse),
        length=length,
        heads=heads,
        num_q=num_q,
        state_blocks=padded_row(num_q),
        D=head_dim,
        D_PAD=padded_dim(head_dim),
        BLOCK_Q=block_q,
        TILE_Q=tile_q,
        **launch.keywords(),
    )
    return grad_alpha.sum(-1), found
