"""Linear branch over the blocks that are not selected, and the mix with the sparse branch.

    A_m = total - sum_n features[n]^T V[n],  z_m = total_features - sum_n feature_sums[n],
          n over the key blocks selected by query block m
    O_l[i] = phi(q_i) A_m / (phi(q_i) . z_m)
    O[i]   = alpha_m O_s[i] + (1 - alpha_m) O_l[i]

One program owns one query block of one head. The states A_m stay in registers and are never
written: summing the few selected blocks and subtracting them from the total costs one matrix
product per selected block, and no softmax. Total and products use the same rounded features and
values and float32 sums, so what cancels is exact up to float32 rounding. Not so with features in
FP8: the few selected blocks have its error, the total has not. A row whose dropped blocks hold less
than 2^-20 of its features' weight (2^-10 in FP8), where rounding would show, has its denominator
held there: its linear part fades to zero instead of to noise.

What a program reads per block, features and values, bounds its time, not what it computes: that is
why features in FP8 pay. They come from `triton_prepare` (FEATURES="value", or "fp8" in the
transposed layout that FP8 matrix units want) or are recomputed from K here ("recomputed"): less
memory, more exponentials. Layouts as in `triton_prepare`. Hardware: compute capability 8.0; FP8
features 8.9.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.options import PhiK
from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_prepare import KeyOperands
from sla_video.kernels.triton_tiles import (
    LaunchConfig,
    capability,
    launch_on,
    load_rows,
    padded_dim,
    row_softmax,
    store_rows,
    strides,
)


@triton.jit(do_not_specialize=["length", "num_q", "num_k", "num_selected"])
def _linear_mix_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    sparse_ptr,
    key_mean_ptr,
    features_ptr,
    feature_sums_ptr,
    totals_ptr,
    value_scale_ptr,
    indices_ptr,
    counts_ptr,
    alpha_ptr,
    out_ptr,
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
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    FEATURES: tl.constexpr,
    SMOOTH_FEATURES: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):
    """Queries are mixed TILE_Q at a time, which bounds registers."""
    # Backwards: the end of what the sparse kernel has just written is still in the cache.
    m = num_q - 1 - tl.program_id(0)
    bh = tl.num_programs(1) - 1 - tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    offs_d = tl.arange(0, D_PAD)
    offs_k = tl.arange(0, BLOCK_K)
    tile = offs_k[:, None] * D_PAD + offs_d[None, :]
    tile_t = offs_d[:, None] * BLOCK_K + offs_k[None, :]
    first_block = bh.to(tl.int64) * num_k
    if FEATURES == "recomputed":
        features_base_ptr = key_ptr + b * stride_kb + h * stride_kh
        mean = tl.zeros([D_PAD], tl.float32)
        if SMOOTH_FEATURES:
            mean = tl.load(key_mean_ptr + bh * D + offs_d, mask=offs_d < D, other=0.0)
    else:
        features_base_ptr = features_ptr + first_block * (BLOCK_K * D_PAD)
    if FEATURES == "fp8":
        value_base_ptr = value_ptr + first_block * (BLOCK_K * D_PAD)
    else:
        value_base_ptr = value_ptr + b * stride_vb + h * stride_vh

    row = bh.to(tl.int64) * num_q + m
    indices_row_ptr = indices_ptr + row * num_selected
    count = num_selected
    if HAS_COUNTS:
        count = tl.load(counts_ptr + row)
    # Without a way around the loop, its matrix products need not wait for each other.
    tl.assume(count > 0)
    state = tl.zeros([D_PAD, D_PAD], tl.float32)
    weight = tl.zeros([D_PAD], tl.float32)
    for i in range(0, count):
        n = tl.load(indices_row_ptr + i).to(tl.int64)
        rows_k = length - n * BLOCK_K
        weight += tl.load(feature_sums_ptr + (first_block + n) * D_PAD + offs_d)
        if FEATURES == "fp8":
            phi_t = tl.load(features_base_ptr + n * (BLOCK_K * D_PAD) + tile_t)
            value_t = tl.load(value_base_ptr + n * (BLOCK_K * D_PAD) + tile_t)
            state = tl.dot(phi_t, tl.trans(value_t), state)
        else:
            start_ptr = value_base_ptr + n * BLOCK_K * stride_vl
            value = load_rows(start_ptr, stride_vl, rows_k, BLOCK_K, D, D_PAD)
            if FEATURES == "recomputed":
                start_ptr = features_base_ptr + n * BLOCK_K * stride_kl
                key = load_rows(start_ptr, stride_kl, rows_k, BLOCK_K, D, D_PAD)
                # Absent tokens get features too, and zeros for values.
                phi = row_softmax(key.to(tl.float32) - mean[None, :], D, D_PAD).to(value.dtype)
            else:
                phi = tl.load(features_base_ptr + n * (BLOCK_K * D_PAD) + tile)
            state = tl.dot(tl.trans(phi), value, state, input_precision="tf32x3")

    totals_base_ptr = totals_ptr + bh.to(tl.int64) * ((D_PAD + 1) * D_PAD)
    if FEATURES == "fp8":
        value_scale = tl.load(value_scale_ptr + bh * D_PAD + offs_d)
        state = state * (value_scale * (1.0 / 448.0))[None, :]
    state = tl.load(totals_base_ptr + offs_d[:, None] * D_PAD + offs_d[None, :]) - state
    total_weight = tl.load(totals_base_ptr + D_PAD * D_PAD + offs_d)
    weight = total_weight - weight
    # Entries of the state are below the largest weight times |v|: no overflow in float16.
    unit = 1.0 / tl.maximum(tl.max(weight, 0), 1e-20)
    # A row that drops nothing has no linear part: what is left of its state is noise.
    state = (state * tl.where(count < num_k, unit, 0.0)).to(query_ptr.dtype.element_ty)
    LEAST: tl.constexpr = 0.0009765625 if FEATURES == "fp8" else 9.5367431640625e-07
    alpha = tl.where(count < num_k, tl.load(alpha_ptr + row), 1.0)

    for offset in tl.static_range(0, BLOCK_Q, TILE_Q):
        rows_q = length - m * BLOCK_Q - offset
        start_q = m.to(tl.int64) * BLOCK_Q + offset
        query_base_ptr = query_ptr + b * stride_qb + h * stride_qh + start_q * stride_ql
        query = load_rows(query_base_ptr, stride_ql, rows_q, TILE_Q, D, D_PAD)
        # phi(q) but for its denominator, which cancels.
        x = query.to(tl.float32)
        if D < D_PAD:
            x = tl.where((offs_d < D)[None, :], x, float("-inf"))
        top = tl.max(x, 1) * 1.4426950408889634
        phi_q = tl.exp2(x * 1.4426950408889634 - top[:, None])
        floor = tl.sum(phi_q * total_weight[None, :], 1) * LEAST
        divisor = tl.maximum(tl.sum(phi_q * weight[None, :], 1), floor)
        # For float32, split operands would not fit into shared memory here.
        linear = tl.dot(phi_q.to(query.dtype), state, input_precision="ieee")
        share = (1.0 - alpha) / (divisor * unit)

        sparse_base_ptr = sparse_ptr + b * stride_sb + h * stride_sh + start_q * stride_sl
        sparse = load_rows(sparse_base_ptr, stride_sl, rows_q, TILE_Q, D, D_PAD).to(tl.float32)
        out = linear * share[:, None] + sparse * alpha
        out_base_ptr = out_ptr + b * stride_ob + h * stride_oh + start_q * stride_ol
        store_rows(out_base_ptr, stride_ol, out, rows_q, TILE_Q, D, D_PAD)


def _config(query: Tensor, pad: int) -> LaunchConfig:
    if query.dtype == torch.float32:
        return LaunchConfig(8, 1)
    if pad < 128:
        return LaunchConfig(4, 3)
    if capability(query.device)[0] == 9:
        # Two programs share a multiprocessor, nothing is spilled in the loop, and blocks are
        # fetched two steps ahead: of the stages, half go to the indices.
        return LaunchConfig(8, 5, max_registers=128)
    return LaunchConfig(8, 2)


def linear_forward_mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    indices: Tensor,
    counts: Tensor | None,
    alpha: Tensor,
    out_sparse: Tensor,
    *,
    operands: KeyOperands,
    block_q: int,
    block_k: int,
    phi_k: PhiK = "smoothed",
    out: Tensor | None = None,
) -> Tensor:
    """`alpha O_s + (1 - alpha) O_l`, the linear branch over what `indices` leaves out.

    Args:
        query, key, value: `[B, L, H, D]`, each contiguous along D.
        key_mean: `[B, H, D]` float32, mean key over tokens.
        indices, counts: the selected blocks, as for `sparse_forward`.
        alpha: `[B, H, M]` float32, weight of the sparse branch. Rows that list every key block get
            their sparse output unchanged.
        out_sparse: `[B, L, H, D]` of `sparse_forward`.
        operands: what `prepare_keys` made with `need_features`.
        phi_k: features of `"smoothed"` or `"raw"` keys.
        out: where to write, `out_sparse` itself if it is not needed any more. A new tensor if None.

    Returns:
        the output `[B, L, H, D]`.
    """
    batch, length, heads, head_dim = query.shape
    pad = padded_dim(head_dim)
    assert operands.totals is not None, "operands were prepared without features"
    stored = operands.features
    fp8 = stored is not None and stored.dtype == torch.float8_e4m3fn
    features = "recomputed" if stored is None else "fp8" if fp8 else "value"
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    with launch_on(query):
        _linear_mix_kernel[(num_blocks(length, block_q), batch * heads)](
            query,
            key,
            operands.low_values if fp8 else value,
            out_sparse,
            key_mean.contiguous(),
            stored,
            operands.feature_sums,
            operands.totals,
            operands.value_scale,
            indices.contiguous(),
            None if counts is None else counts.contiguous(),
            alpha.contiguous(),
            out,
            *strides(query),
            *strides(key),
            *strides(value),
            *strides(out_sparse),
            *strides(out),
            heads,
            length,
            num_blocks(length, block_q),
            num_blocks(length, block_k),
            indices.shape[-1],
            D=head_dim,
            D_PAD=pad,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            TILE_Q=min(block_q, 64),
            FEATURES=features,
            SMOOTH_FEATURES=phi_k == "smoothed",
            HAS_COUNTS=counts is not None,
            **_config(query, pad).keywords(),
        )
    return out
