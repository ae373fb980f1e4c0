"""Sparse branch without a running maximum, for query blocks whose logits are known to be small.

    |S_ij| <= max_i |q_i| max_j |k_j - mean(K)| log2(e) / sqrt(D),  in powers of two

over the queries of a block and the keys of the blocks selected for it (Cauchy and Schwarz). Below
BOUND, P = 2^S is a number of bfloat16 and float32 as it is, and so are its sums: nothing is
subtracted from S, nothing rescaled, and row sums are one more matrix product, of P with a column of
ones. INT8 adds at most half a step to each number, sqrt(D) / 254 of the largest norm to each norm:
with D = 128 a bound of 72 is one of 79 for the rounded logits. Sums stay below 2^(79 + 20) for a
million keys, which leaves 2^28 for values.

For `sparse_dtype="int8"`, values in bfloat16 or float32. Query blocks beyond the bound take the
loop of `triton_sparse` in a launch of its own, as do logits with a bias: with both loops in one
kernel each matrix product waits for the one before.

Layouts and hardware are those of `triton_attend`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.launch_choice import attend_is_bounded
from sla_video.kernels.options import Options
from sla_video.kernels.triton_tiles import (
    LOG2E,
    launch_on,
    load_places,
    load_rows,
    load_rows_at,
)

BOUND = tl.constexpr(72.0)


@triton.jit
def bounded_rows(
    query_block_ptr,
    value_head_ptr,
    low_query_ptr,
    query_scale_ptr,
    low_keys_ptr,
    key_scale_ptr,
    key_mean_ptr,
    indices_row_ptr,
    places_ptr,
    stride_ql,
    stride_vl,
    bh,
    row,
    first_block,
    rows_q,
    length,
    count,
    scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NEED_LSE: tl.constexpr,
):
    """`sparse_rows` of a query block within the bound, for INT8 keys and values as they are."""
    offs_d = tl.arange(0, D_PAD)
    offs_k = tl.arange(0, BLOCK_K)
    tile = offs_k[:, None] * D_PAD + offs_d[None, :]
    tile_q = tl.arange(0, BLOCK_Q)[:, None] * D_PAD + offs_d[None, :]
    query = tl.load(low_query_ptr + row * (BLOCK_Q * D_PAD) + tile_q)
    scale_log2 = scale * LOG2E * tl.load(query_scale_ptr + row)
    low_keys_ptr += first_block * (BLOCK_K * D_PAD)
    # Integers become floats by their bits, and absent keys count as -4e37: see `sparse_rows`. As
    # functions that both loops share, these lines cost that one registers.
    BITS: tl.constexpr = 0x4B400000
    OFFSET: tl.constexpr = 12582912.0
    ABSENT_BITS: tl.constexpr = -0x2000000
    # So few columns that they stay in registers. All are alike.
    ones = tl.full([BLOCK_K, 8], 1.0, value_head_ptr.dtype.element_ty)
    row_sums = tl.zeros([BLOCK_Q, 8], tl.float32)
    acc = tl.zeros([BLOCK_Q, D_PAD], tl.float32)
    for i in range(0, count):
        index = tl.load(indices_row_ptr + i)
        n = index.to(tl.int64)
        rows_k = length - index * BLOCK_K
        # [BLOCK_Q, BLOCK_K]
        key = tl.load(low_keys_ptr + n * (BLOCK_K * D_PAD) + tile)
        step = scale_log2 * tl.load(key_scale_ptr + first_block + n)
        step = (step.to(tl.int32, bitcast=True) & -4).to(tl.float32, bitcast=True)
        bits = tl.where(offs_k < rows_k, BITS, ABSENT_BITS)[None, :]
        bits = tl.broadcast_to(bits, (BLOCK_Q, BLOCK_K))
        bits = tl.dot(query, tl.trans(key), bits, out_dtype=tl.int32)
        weights = tl.exp2(bits.to(tl.float32, bitcast=True) * step - OFFSET * step)
        if places_ptr is None:
            value_block_ptr = value_head_ptr + n * BLOCK_K * stride_vl
            value = load_rows(value_block_ptr, stride_vl, rows_k, BLOCK_K, D, D_PAD)
        else:
            places = load_places(places_ptr, bh, length, n * BLOCK_K, rows_k, BLOCK_K)
            value = load_rows_at(value_head_ptr, places, stride_vl, rows_k, BLOCK_K, D, D_PAD)
        weights = weights.to(value.dtype)
        row_sums = tl.dot(weights, ones, row_sums, input_precision="tf32x3")
        acc = tl.dot(weights, value, acc, input_precision="tf32x3")

    row_sum = tl.max(row_sums, 1)
    lse = tl.log2(row_sum) * (1.0 / LOG2E)
    if NEED_LSE:
        mean = tl.load(key_mean_ptr + bh * D + offs_d, mask=offs_d < D, other=0.0)
        exact = load_rows(query_block_ptr, stride_ql, rows_q, BLOCK_Q, D, D_PAD)
        lse += tl.sum(exact.to(tl.float32) * mean[None, :], 1) * scale
    return acc * (1.0 / row_sum)[:, None], lse


@triton.jit(do_not_specialize=["num_q", "num_k", "num_selected"])
def _beyond_bound_kernel(
    query_norm_ptr,
    key_norm_ptr,
    indices_ptr,
    counts_ptr,
    beyond_ptr,
    num_q,
    num_k,
    num_selected,
    scale,
    COLUMNS: tl.constexpr,
):
    """One program per query block."""
    bh = tl.program_id(1).to(tl.int64)
    row = bh * num_q + tl.program_id(0)
    count = num_selected
    if counts_ptr is not None:
        count = tl.load(counts_ptr + row)
    offs = tl.arange(0, COLUMNS)
    largest = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, count, COLUMNS):
        mask = start + offs < count
        index = tl.load(indices_ptr + row * num_selected + start + offs, mask=mask, other=0)
        norm = tl.load(key_norm_ptr + bh * num_k + index, mask=mask, other=0.0)
        largest = tl.maximum(largest, norm)
    bound = tl.load(query_norm_ptr + row) * tl.max(largest, 0) * (scale * LOG2E)
    # What is no number is beyond, too.
    tl.store(beyond_ptr + row, tl.where(bound < BOUND, 0, 1))


def beyond_bound(
    query_norm: Tensor,
    key_norm: Tensor,
    indices: Tensor,
    counts: Tensor | None,
    head_dim: int,
) -> Tensor:
    """1 for the query blocks whose logits may be large, else 0: `[B, H, M]` int32.

    Args:
        query_norm, key_norm: `[B, H, M]` and `[B, H, N]`, of `block_statistics` and `prepare_keys`.
        indices, counts: of `attend`.
    """
    batch, heads, num_q, num_selected = indices.shape
    beyond = torch.empty(batch, heads, num_q, dtype=torch.int32, device=indices.device)
    with launch_on(indices):
        _beyond_bound_kernel[(num_q, batch * heads)](
            query_norm.contiguous(),
            key_norm,
            indices.contiguous(),
            None if counts is None else counts.contiguous(),
            beyond,
            num_q,
            key_norm.shape[2],
            num_selected,
            head_dim**-0.5,
            COLUMNS=128,
            num_warps=1,
        )
    return beyond


def wants_norms(query: Tensor, options: Options) -> bool:
    """Whether attention is to be launched without a running maximum where logits are bounded.

    That takes norms of queries and keys, which earlier passes write.
    """
    if options.sparse_dtype != "int8" or options.selection == "soft_top_k":
        return False
    # Not of the head dimension itself, which is a symbol where a compiler takes sizes for dynamic.
    head_dim = query.shape[-1]
    columns = 32 if head_dim <= 32 else 64 if head_dim <= 64 else 128
    sizes = options.block_q, options.block_k
    return attend_is_bounded(query.device, query.dtype, columns, *sizes)
