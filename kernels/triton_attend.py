"""Both branches and their mix in one kernel: O = alpha O_s + (1 - alpha) O_l.

One program owns one query block of one head. It walks the list of selected key blocks for the
sparse branch (`triton_sparse`) and adds the linear branch from the states summed over what is
dropped (`triton_linear`), before O_s leaves registers: what the second part loads hides behind
what other programs compute.

Layouts: query, key, value, O_s and the output are `[B, L, H, D]` with any strides but 1 along D,
low-bit operands are those of `triton_statistics` and `triton_prepare`. Hardware: compute
capability 8.0; FP8 8.9.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.launch_choice import launch_config
from sla_video.kernels.options import SparseDtype
from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_bounded import beyond_bound, bounded_rows
from sla_video.kernels.triton_linear import linear_rows
from sla_video.kernels.triton_prepare import KeyOperands
from sla_video.kernels.triton_sparse import sparse_rows
from sla_video.kernels.triton_tiles import (
    launch_on,
    load_rows,
    padded_dim,
    store_rows,
    strides,
)


@triton.jit(do_not_specialize=["heads", "length", "num_q", "num_k", "num_selected"])
def _attend_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    low_query_ptr,
    query_scale_ptr,
    low_keys_ptr,
    key_scale_ptr,
    low_values_ptr,
    value_scale_ptr,
    key_mean_ptr,
    indices_ptr,
    counts_ptr,
    bias_ptr,
    alpha_ptr,
    sums_ptr,
    state_unit_ptr,
    sparse_ptr,
    out_ptr,
    lse_ptr,
    places_ptr,
    beyond_ptr,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_sb,
    stride_sl,
    stride_sh,
    stride_ob,
    stride_ol,
    stride_oh,
    heads,
    length,
    num_q,
    num_k,
    num_selected,
    scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPARSE_DTYPE: tl.constexpr,
    HALVES: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """O_s goes to `sparse_ptr` too, if given. Without sums of states there is nothing to mix.

    With `beyond_ptr` there are two launches: BOUNDED for query blocks whose logits are bounded, and
    one for the others.

    `out_ptr` may be `query_ptr`: no other program reads this block of queries. But warps may hold
    other rows as they load than as they store, so stores wait for the loads of all.
    """
    m = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    row = bh.to(tl.int64) * num_q + m
    if beyond_ptr is not None:
        if BOUNDED:
            if tl.load(beyond_ptr + row) != 0:
                return
        else:
            if tl.load(beyond_ptr + row) == 0:
                return
    first_block = bh.to(tl.int64) * num_k
    start_q = m.to(tl.int64) * BLOCK_Q
    rows_q = length - m * BLOCK_Q
    query_block_ptr = query_ptr + b * stride_qb + h * stride_qh + start_q * stride_ql
    key_head_ptr = key_ptr + b * stride_kb + h * stride_kh
    value_head_ptr = value_ptr + b * stride_vb + h * stride_vh
    indices_row_ptr = indices_ptr + row * num_selected
    count = num_selected
    if counts_ptr is not None:
        count = tl.load(counts_ptr + row)
    bias_row_ptr = None
    if bias_ptr is not None:
        bias_row_ptr = bias_ptr + row * num_k
    # Without a way around the loop, its matrix products need not wait for each other.
    tl.assume(count > 0)
    if BOUNDED:
        out, lse = bounded_rows(
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
            D,
            D_PAD,
            BLOCK_Q,
            BLOCK_K,
            lse_ptr is not None,
        )
    else:
        out, lse = sparse_rows(
            query_block_ptr,
            key_head_ptr,
            value_head_ptr,
            low_query_ptr,
            query_scale_ptr,
            low_keys_ptr,
            key_scale_ptr,
            low_values_ptr,
            value_scale_ptr,
            key_mean_ptr,
            indices_row_ptr,
            bias_row_ptr,
            places_ptr,
            stride_ql,
            stride_kl,
            stride_vl,
            bh,
            row,
            first_block,
            rows_q,
            length,
            count,
            scale,
            D,
            D_PAD,
            BLOCK_Q,
            BLOCK_K,
            SPARSE_DTYPE,
            lse_ptr is not None,
        )
    if sums_ptr is not None:
        # Asked for before anything is waited for.
        offs_d = tl.arange(0, D_PAD)
        sums_row_ptr = sums_ptr + row * ((D_PAD + 1) * D_PAD)
        state = tl.load(sums_row_ptr + offs_d[:, None] * D_PAD + offs_d[None, :])
        weight = tl.load(sums_row_ptr + D_PAD * D_PAD + offs_d).to(tl.float32)
        alpha = tl.load(alpha_ptr + row)
    if lse_ptr is not None:
        offs_q = tl.arange(0, BLOCK_Q)
        lse_block_ptr = lse_ptr + bh.to(tl.int64) * length + start_q
        tl.store(lse_block_ptr + offs_q, lse, mask=offs_q < rows_q)
    if sparse_ptr is not None:
        sparse_block_ptr = sparse_ptr + b * stride_sb + h * stride_sh + start_q * stride_sl
        store_rows(sparse_block_ptr, stride_sl, out, rows_q, BLOCK_Q, D, D_PAD)
    out_block_ptr = out_ptr + b * stride_ob + h * stride_oh + start_q * stride_ol
    if sums_ptr is None:
        tl.debug_barrier()
        store_rows(out_block_ptr, stride_ol, out, rows_q, BLOCK_Q, D, D_PAD)
    else:
        # A query block that drops nothing has no linear part.
        alpha = tl.where(tl.max(weight, 0) > 0, alpha, 1.0)
        if state_unit_ptr is not None:
            state_unit_ptr += bh * D_PAD
        if HALVES:
            # Half of the queries at a time, which bounds registers.
            HALF: tl.constexpr = BLOCK_Q // 2
            out = tl.permute(tl.reshape(out, (2, HALF, D_PAD)), (1, 2, 0))
            upper, lower = tl.split(out)
            query = load_rows(query_block_ptr, stride_ql, rows_q, HALF, D, D_PAD)
            linear = linear_rows(query, state, weight, state_unit_ptr, alpha, D, D_PAD)
            upper = upper * alpha + linear
            tl.debug_barrier()
            store_rows(out_block_ptr, stride_ol, upper, rows_q, HALF, D, D_PAD)
            query_block_ptr += HALF * stride_ql
            out_block_ptr += HALF * stride_ol
            query = load_rows(query_block_ptr, stride_ql, rows_q - HALF, HALF, D, D_PAD)
            linear = linear_rows(query, state, weight, state_unit_ptr, alpha, D, D_PAD)
            lower = lower * alpha + linear
            tl.debug_barrier()
            store_rows(out_block_ptr, stride_ol, lower, rows_q - HALF, HALF, D, D_PAD)
        else:
            query = load_rows(query_block_ptr, stride_ql, rows_q, BLOCK_Q, D, D_PAD)
            linear = linear_rows(query, state, weight, state_unit_ptr, alpha, D, D_PAD)
            out = out * alpha + linear
            tl.debug_barrier()
            store_rows(out_block_ptr, stride_ol, out, rows_q, BLOCK_Q, D, D_PAD)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor | None,
    key_mean: Tensor,
    *,
    operands: KeyOperands,
    block_q: int,
    block_k: int,
    out: Tensor,
    lse: Tensor | None = None,
    out_sparse: Tensor | None = None,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    sums: Tensor | None = None,
    sparse_dtype: SparseDtype = "bf16",
    low_query: Tensor | None = None,
    query_scale: Tensor | None = None,
    query_norm: Tensor | None = None,
    places: Tensor | None = None,
) -> None:
    """Attention of each query block to the key blocks listed for it, mixed with that to the rest.

    Args:
        query, key, value: `[B, L, H, D]`, each contiguous along D.
        indices: `[B, H, M, K]` int32, distinct key blocks of each query block.
        counts: `[B, H, M]` int32, from 1 to K: only the first `counts` entries of a row are
            visited. None visits all.
        key_mean: `[B, H, D]` float32, mean key over tokens.
        operands: what `prepare_keys` made of key and value for this `sparse_dtype`.
        out: `[B, L, H, D]`, written; may be `query`, and shares no memory with it otherwise.
        lse: `[B, H, L]` float32, contiguous; the log-sum-exp of the selected part, in terms of the
            keys as given, is written to it.
        out_sparse: like `out`; O_s is written to it.
        bias: `[B, H, M, N]` float32, what is added to the logits of a key block, in powers of two.
        alpha: `[B, H, M]` float32, weight of the sparse branch.
        sums: of `sum_dropped_states`. A query block that drops nothing gets its O_s, whatever alpha
            is. None leaves the linear branch out.
        low_query, query_scale: of `block_statistics`, for low-bit keys.
        query_norm: of `block_statistics`, where the launch for bounded logits may be taken, which
            needs the norms of keys among `operands`, too.
        places: `[B, H, L]` int32 of a `KeyOrder`, the one that `operands` were made with.
    """
    batch, length, heads, head_dim = query.shape
    pad = padded_dim(head_dim)
    assert (low_query is None) == (operands.low_keys is None), "Q and K are multiplied as one type"
    assert (alpha is None) == (sums is None), "the mix takes a weight and what to mix"
    config = launch_config("attend", query, block_q=block_q, block_k=block_k, variant=sparse_dtype)
    beyond = None
    if config.bounded and query_norm is not None and operands.key_norm is not None:
        assert sparse_dtype == "int8" and bias is None and value.dtype != torch.float16
        beyond = beyond_bound(query_norm, operands.key_norm, indices, counts, head_dim)
    with launch_on(query):
        for bounded in (False,) if beyond is None else (True, False):
            _attend_kernel[(num_blocks(length, block_q), batch * heads)](
                query,
                key,
                value,
                low_query,
                query_scale,
                operands.low_keys,
                operands.key_scale,
                operands.low_values,
                operands.value_scale,
                key_mean.contiguous(),
                indices.contiguous(),
                None if counts is None else counts.contiguous(),
                None if bias is None else bias.contiguous(),
                None if alpha is None else alpha.contiguous(),
                sums,
                None if sums is None else operands.state_unit,
                out_sparse,
                out,
                lse,
                None if places is None else places.contiguous(),
                beyond,
                *strides(query),
                *strides(key),
                *strides(value),
                *strides(out if out_sparse is None else out_sparse),
                *strides(out),
                heads,
                length,
                num_blocks(length, block_q),
                num_blocks(length, block_k),
                indices.shape[-1],
                head_dim**-0.5,
                D=head_dim,
                D_PAD=pad,
                BLOCK_Q=block_q,
                BLOCK_K=block_k,
                SPARSE_DTYPE=sparse_dtype,
                HALVES=block_q == 128
                and (config.num_warps == 4 or config.max_registers is not None),
                BOUNDED=bounded,
                **config.keywords(),
            )
