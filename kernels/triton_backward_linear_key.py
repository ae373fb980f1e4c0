"""Backward of the linear branch for keys and values; formulas in `triton_backward_linear.py`.

    D_n = sum_i w_i phi(q_i)^T dO_i      d_n = -sum_i w_i e_i phi(q_i)      i: drops key block n
    dphi(k_j) = v_j D_n^T + d_n          dv_j = phi(k_j) D_n

D_n and d_n are the sums over all queries minus those over the query blocks that selected key
block n, listed by `triton_inverse.py`.

Layouts: value, grad_out `[B, L, H, D]` with any strides but 1 in the last dimension; gradients
`[B, L, H, D]` contiguous; phi(K), psi `[B, H, L, D]` contiguous. Compute capability 8.0 and above.
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
from sla_video.kernels.triton_inverse import InverseLists
from sla_video.kernels.triton_tiles import load_rows, store_rows, strides


@triton.jit(do_not_specialize=["length", "num_q", "num_k"])
def _linear_key_kernel(
    value_ptr,
    grad_out_ptr,
    features_ptr,
    psi_ptr,
    psi_sums_ptr,
    totals_ptr,
    total_sums_ptr,
    query_blocks_ptr,
    offsets_ptr,
    order_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_sums_ptr,
    value_strides,
    grad_strides,
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
    """dV, the gradient of what phi(K) was taken of, and its sum over one key block."""
    block = tl.load(order_ptr + tl.program_id(0))
    b, h, bh = batch_and_head(block // num_k, heads)
    n = (block % num_k).to(tl.int64)
    start_k = n * BLOCK_K
    cols = tl.arange(0, D_PAD)

    grad_out_ptr += head_offset(grad_strides, b, 0, h)
    psi_ptr += bh * length * D
    psi_sums_ptr += bh * num_q * D_PAD
    offsets_ptr += bh * (num_k + 1) + n
    first, last = tl.load(offsets_ptr), tl.load(offsets_ptr + 1)

    tiles_q: tl.constexpr = BLOCK_Q // TILE_Q
    selected = tl.zeros([D_PAD, D_PAD], tl.float32)
    selected_sum = tl.zeros([D_PAD], tl.float32)
    for step in range(first * tiles_q, last * tiles_q):
        m, start, rows = listed_tile(query_blocks_ptr, step, length, BLOCK_Q, TILE_Q)
        tile_ptr = psi_ptr + start * D
        psi = load_rows(tile_ptr, D, rows, TILE_Q, D, D_PAD)
        tile_ptr = grad_out_ptr + start * grad_strides[1]
        grad_out = load_rows(tile_ptr, grad_strides[1], rows, TILE_Q, D, D_PAD)
        selected = tl.dot(tl.trans(psi), grad_out, selected, input_precision="ieee")
        psi_sum = tl.load(psi_sums_ptr + m * D_PAD + cols)
        selected_sum += psi_sum / tiles_q

    totals_ptr += bh * D_PAD * D_PAD
    # [D_PAD, D_PAD], [D_PAD]; zero where every query block selected this key block.
    scale = tl.where(last - first < num_q, D / length, 0.0)
    dropping = tl.load(totals_ptr + cols[:, None] * D_PAD + cols[None, :]) - selected
    state, factor = as_operand(dropping, features_ptr.dtype.element_ty)
    dropping_sum = tl.load(total_sums_ptr + bh * D_PAD + cols) - selected_sum

    value_ptr += head_offset(value_strides, b, start_k, h)
    features_ptr += (bh * length + start_k) * D
    offset_k = packed_offset(b, start_k, h, length, heads, D)
    grad_key_ptr += offset_k
    grad_value_ptr += offset_k
    rows_k = rows_left(start_k, length)
    grad_sum = tl.zeros([D_PAD], tl.float32)
    for offset in range(0, BLOCK_K, TILE_K):
        rows = rows_k - offset
        # [TILE_K, D_PAD]
        features = load_rows(features_ptr + offset * D, D, rows, TILE_K, D, D_PAD)
        tile_ptr = value_ptr + offset * value_strides[1]
        value = load_rows(tile_ptr, value_strides[1], rows, TILE_K, D, D_PAD)
        grad_value = tl.dot(features, state, input_precision="ieee") * (factor * scale)
        tile_ptr = grad_value_ptr + offset * heads * D
        store_rows(tile_ptr, heads * D, grad_value, rows, TILE_K, D, D_PAD)
        phi = features.to(tl.float32)
        grad_phi = tl.dot(value, tl.trans(state), input_precision="ieee") * factor
        grad_phi -= dropping_sum[None, :]
        grad_key = phi * (grad_phi - tl.sum(phi * grad_phi, 1)[:, None]) * scale
        tile_ptr = grad_key_ptr + offset * heads * D
        store_rows(tile_ptr, heads * D, grad_key, rows, TILE_K, D, D_PAD)
        # Rows that do not exist have phi = 0.
        grad_sum += tl.sum(grad_key, 0)
    tl.store(grad_sums_ptr + (bh * num_k + n) * D_PAD + cols, grad_sum)


# (bytes per element > 2, large shared memory) -> launch.
_LAUNCHES = {
    (False, True): Launch(64, 64, 8, 3),
    (False, False): Launch(64, 32, 8, 2),
    (True, True): Launch(16, 16, 8, 1),
    (True, False): Launch(16, 16, 8, 1),
}


def linear_key_backward(
    grad_out: Tensor,
    value: Tensor,
    features: Tensor,
    psi: Tensor,
    psi_sums: Tensor,
    state: Tensor,
    inverse: InverseLists,
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    block_q: int,
    block_k: int,
) -> Tensor:
    """Write the gradients of value and of what phi(K) was taken of.

    Args:
        grad_out, value: `[B, L, H, D]`.
        features: phi(K) `[B, H, L, D]`.
        psi, psi_sums: as `linear_query_backward` returns them; state: `query_totals` of psi and dO.
        grad_key, grad_value: `[B, L, H, D]` contiguous, written in place.

    Returns:
        mean of `grad_key` over tokens, `[B, H, D_PAD]` float32: what reached the mean of the keys.
    """
    batch, length, heads, head_dim = value.shape
    num_q, d_pad = psi_sums.shape[-2:]
    num_k = inverse.offsets.shape[-1] - 1
    launch = choose_launch(_LAUNCHES, value)
    grad_sums = torch.empty(batch, heads, num_k, d_pad, dtype=torch.float32, device=value.device)
    _linear_key_kernel[(batch * heads * num_k,)](
        value_ptr=value,
        grad_out_ptr=grad_out,
        features_ptr=features,
        psi_ptr=psi,
        psi_sums_ptr=psi_sums,
        totals_ptr=state,
        total_sums_ptr=psi_sums.sum(2),
        query_blocks_ptr=inverse.query_blocks,
        offsets_ptr=inverse.offsets,
        order_ptr=inverse.order,
        grad_key_ptr=grad_key,
        grad_value_ptr=grad_value,
        grad_sums_ptr=grad_sums,
        value_strides=strides(value),
        grad_strides=strides(grad_out),
        length=length,
        heads=heads,
        num_q=num_q,
        num_k=num_k,
        D=head_dim,
        D_PAD=d_pad,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_Q=min(block_q, launch.tile_q),
        TILE_K=min(block_k, launch.tile_k),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return grad_sums.sum(2) / length
