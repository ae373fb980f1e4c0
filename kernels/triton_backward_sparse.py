"""Backward of the sparse branch, block by block: nothing of size L x L is stored.

With S = Q K^T / sqrt(D) over the selected tokens, P = exp(S - lse), O_s = P V and the output
O = alpha O_s + (1 - alpha) O_l, gradients dO of O and dlse of the log-sum-exp give

    R = dO V^T      delta = rowsum(dO * O_s) - dlse / alpha      dS = alpha P * (R - delta)
    dQ = dS K / sqrt(D)      dK = dS^T Q / sqrt(D)      dV = alpha P^T dO

(after FlashAttention-2, arXiv 2307.08691). alpha P = exp(S - lse + log alpha) costs nothing more
than P. The kernel here walks the key blocks of each query block for dQ and adds to what the linear
branch left there; that of `triton_backward_key.py` the query blocks of each key block, for dK and
dV.

Layouts: query, key, value, grad_out, out_sparse `[B, L, H, D]` with any strides but 1 in the last
dimension; gradients `[B, L, H, D]` contiguous; lse, grad_lse `[B, H, L]`; alpha `[B, H, M]`;
indices `[B, H, M, K]`; counts `[B, H, M]`. Compute capability 8.0 and above.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.launch_choice import launch_config
from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_backward_tiles import (
    batch_and_head,
    head_offset,
    listed_tile,
    packed_offset,
    rows_left,
)
from sla_video.kernels.triton_tiles import LOG2E, load_rows, padded_dim, store_rows, strides


@triton.jit(do_not_specialize=["length", "num_q", "num_k", "num_selected"])
def _sparse_query_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    out_sparse_ptr,
    lse_ptr,
    grad_lse_ptr,
    alpha_ptr,
    indices_ptr,
    counts_ptr,
    bias_ptr,
    row_lse_ptr,
    row_delta_ptr,
    grad_query_ptr,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    out_strides,
    scale,
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
    EXACT: tl.constexpr,
    ADD: tl.constexpr,
):
    """dQ of one tile of queries, and what the other kernel needs to know of each row.

    Where the forward was quantized (not EXACT), its log-sum-exp and O_s are near those of the
    unquantized branch, which come out of the same pass: with P' = exp(S - near lse),

        exp(lse - near lse) = sum P'    delta - near delta = sum P' (R - near delta) / sum P'
    """
    tiles_q: tl.constexpr = BLOCK_Q // TILE_Q
    tiles_k: tl.constexpr = BLOCK_K // TILE_K
    tile = tl.program_id(0).to(tl.int64)
    b, h, bh = batch_and_head(tl.program_id(1), heads)
    block = bh * num_q + tile // tiles_q
    start_q = tile * TILE_Q
    rows_q = rows_left(start_q, length)
    offs_q = tl.arange(0, TILE_Q)
    mask_q = offs_q < rows_q
    offs_k = tl.arange(0, TILE_K)

    query_ptr += head_offset(query_strides, b, start_q, h)
    grad_out_ptr += head_offset(grad_strides, b, start_q, h)
    key_ptr += head_offset(key_strides, b, 0, h)
    value_ptr += head_offset(value_strides, b, 0, h)
    indices_ptr += block * num_selected
    if bias_ptr is not None:
        bias_ptr += block * num_k
    # Of the rows in [B, H, L].
    position = bh * length + start_q + offs_q
    count = num_selected
    if counts_ptr is not None:
        count = tl.load(counts_ptr + block)
    alpha = tl.full([], 1.0, tl.float32)
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr + block)
        if grad_lse_ptr is not None:
            # dlse / alpha stays finite; its product with alpha P is dlse P all the same.
            alpha = tl.maximum(alpha, 1e-30)

    # [TILE_Q, D_PAD]
    query = load_rows(query_ptr, query_strides[1], rows_q, TILE_Q, D, D_PAD)
    grad_out = load_rows(grad_out_ptr, grad_strides[1], rows_q, TILE_Q, D, D_PAD)
    out_sparse_ptr += head_offset(out_strides, b, start_q, h)
    out_sparse = load_rows(out_sparse_ptr, out_strides[1], rows_q, TILE_Q, D, D_PAD)
    delta = tl.sum(grad_out.to(tl.float32) * out_sparse.to(tl.float32), 1)
    # In powers of two, as the logits below.
    lse = tl.load(lse_ptr + position, mask=mask_q, other=0.0) * LOG2E
    further = tl.zeros([TILE_Q], tl.float32)
    if grad_lse_ptr is not None:
        further -= tl.load(grad_lse_ptr + position, mask=mask_q, other=0.0) / alpha
    if EXACT:
        delta += further
        if alpha_ptr is not None:
            lse -= tl.log2(alpha)

    # Powers that P' in the dtype of the inputs holds; beyond them the forward was not near.
    largest: tl.constexpr = 15.0 if query_ptr.dtype.element_ty == tl.float16 else 100.0
    total = tl.zeros([TILE_Q], tl.float32)
    shift = tl.zeros([TILE_Q], tl.float32)
    grad_query = tl.zeros([TILE_Q, D_PAD], tl.float32)
    weighted_key = tl.zeros([TILE_Q, D_PAD], tl.float32)
    for step in range(0, count * tiles_k):
        start, rows = listed_tile(indices_ptr, step, length, BLOCK_K, TILE_K)
        key_tile_ptr = key_ptr + start * key_strides[1]
        key = load_rows(key_tile_ptr, key_strides[1], rows, TILE_K, D, D_PAD)
        value_tile_ptr = value_ptr + start * value_strides[1]
        value = load_rows(value_tile_ptr, value_strides[1], rows, TILE_K, D, D_PAD)
        # [TILE_Q, TILE_K]
        logits = tl.dot(query, tl.trans(key), input_precision="ieee")
        along = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
        powers = logits * (scale * LOG2E) - lse[:, None]
        if bias_ptr is not None:
            powers += tl.load(bias_ptr + start // BLOCK_K)
        if not EXACT:
            powers = tl.minimum(powers, largest)
        # A key that does not exist has logit 0, which may exceed lse by more than exp2 can hold.
        weights = tl.where((offs_k < rows)[None, :], tl.exp2(powers), 0.0)
        grad_logits = weights * (along - delta[:, None])
        grad_query = tl.dot(grad_logits.to(key.dtype), key, grad_query, input_precision="ieee")
        if not EXACT:
            total += tl.sum(weights, 1)
            shift += tl.sum(grad_logits, 1)
            weights = weights.to(key.dtype)
            weighted_key = tl.dot(weights, key, weighted_key, input_precision="ieee")

    if not EXACT:
        total = tl.maximum(total, 1e-30)
        shift = shift / total + further
        grad_query = (grad_query - shift[:, None] * weighted_key) * (alpha / total)[:, None]
        lse += tl.log2(total) - tl.log2(alpha)
        delta += shift
    # In whole blocks, which the other kernel reads without a mask. A query that does not exist adds
    # nothing there since q = dO = 0.
    row = bh * num_q * BLOCK_Q + start_q + offs_q
    tl.store(row_lse_ptr + row, lse)
    tl.store(row_delta_ptr + row, delta)

    grad_query *= scale
    grad_query_ptr += packed_offset(b, start_q, h, length, heads, D)
    if ADD:
        linear = load_rows(grad_query_ptr, heads * D, rows_q, TILE_Q, D, D_PAD)
        grad_query += linear.to(tl.float32)
    store_rows(grad_query_ptr, heads * D, grad_query, rows_q, TILE_Q, D, D_PAD)


def sparse_query_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor | None,
    alpha: Tensor | None,
    out_sparse: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    *,
    block_q: int,
    block_k: int,
    grad_lse: Tensor | None,
    exact_lse: bool,
    add: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the query; see `sla2_backward` for the other arguments.

    Args:
        grad_query: `[B, L, H, D]` contiguous, written in place; with `add`, added to.
        bias: `[B, H, M, N]` float32 contiguous, what was added to the logits of a key block, in
            powers of two.

    Returns:
        for each query, in whole blocks `[B, H, M * block_q]`: the exact log-sum-exp less
        log alpha, in powers of two, and delta.
    """
    batch, length, heads, head_dim = query.shape
    num_q, num_selected = indices.shape[-2:]
    row_lse = torch.empty(batch, heads, num_q * block_q, dtype=torch.float32, device=query.device)
    row_delta = torch.empty_like(row_lse)
    # "near": with a second sum as large as dQ, where the forward was quantized.
    variant = "exact" if exact_lse else "near"
    launch = launch_config(
        "sparse_query_backward", query, block_q=block_q, block_k=block_k, variant=variant
    )
    tile_q = min(block_q, launch.tile_q)
    _sparse_query_kernel[(num_q * (block_q // tile_q), batch * heads)](
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        grad_out_ptr=grad_out,
        out_sparse_ptr=out_sparse,
        lse_ptr=lse,
        grad_lse_ptr=grad_lse,
        alpha_ptr=alpha,
        indices_ptr=indices,
        counts_ptr=counts,
        bias_ptr=bias,
        row_lse_ptr=row_lse,
        row_delta_ptr=row_delta,
        grad_query_ptr=grad_query,
        query_strides=strides(query),
        key_strides=strides(key),
        value_strides=strides(value),
        grad_strides=strides(grad_out),
        out_strides=strides(out_sparse),
        scale=head_dim**-0.5,
        length=length,
        heads=heads,
        num_q=num_q,
        num_k=num_blocks(length, block_k),
        num_selected=num_selected,
        D=head_dim,
        D_PAD=padded_dim(head_dim),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_Q=tile_q,
        TILE_K=min(block_k, launch.tile_k),
        EXACT=exact_lse,
        ADD=add,
        **launch.keywords(),
    )
    return row_lse, row_delta
