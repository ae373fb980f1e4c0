"""Sparse branch in Triton: block-sparse softmax attention with an online softmax.

    O_s[i] = softmax_j(q_i . k_j / sqrt(D)) V,  j over the tokens of the selected key blocks
    lse[i] = log sum_j exp(q_i . k_j / sqrt(D))

One program owns one query block of one head and walks the list of its key blocks. With running row
maximum r and P = 2^(S - r) in [0, 1], in base 2 with log2(e) / sqrt(D) folded into one factor:

    "bf16"        S = Q K^T and P V in the dtype of the inputs, K and V read where they lie
    "int8"        S = (Q_8 K_8^T) s_m s_n, P V in the dtype of V
    "int8_fp8"    the same S; P in E4M3 with scale 1/448, V in E4M3 with one scale per channel
    "int8_int8"   the same S; P in INT8 with scale 1/127, V in INT8 with one scale per channel

P's scale costs nothing: it moves the exponent by log2(448) or log2(127) and cancels in O_s. Row
sums are of P before it is rounded. Low-bit keys are smoothed, which takes q . mean(K) / sqrt(D) off
each logit; the log-sum-exp gets it back. Q_8 is read, not made here: a tile that comes from memory
is multiplied from shared memory and leaves registers to other matrix products.

What is here runs inside the kernel of `triton_attend`, whose layouts and names it shares. Hardware:
compute capability 8.0; FP8 8.9.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from sla_video.kernels.triton_tiles import (
    LOG2E,
    in_matrix_order,
    load_places,
    load_rows,
    load_rows_at,
    round_to_int8,
)


@triton.jit
def sparse_rows(
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
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPARSE_DTYPE: tl.constexpr,
    NEED_LSE: tl.constexpr,
):
    """O_s `[BLOCK_Q, D_PAD]` and the log-sum-exp `[BLOCK_Q]` of one query block, float32.

    `bias_row_ptr`: for each key block, what is added to its logits, in powers of two; or None.
    `places_ptr`: of an order of keys, or None. Low-bit operands have that order already.
    Without NEED_LSE the second lacks what smoothing takes off.
    """
    LOW_KEYS: tl.constexpr = SPARSE_DTYPE != "bf16"
    LOW_VALUES: tl.constexpr = SPARSE_DTYPE == "int8_fp8" or SPARSE_DTYPE == "int8_int8"
    offs_d = tl.arange(0, D_PAD)
    offs_k = tl.arange(0, BLOCK_K)
    tile = offs_k[:, None] * D_PAD + offs_d[None, :]
    tile_t = offs_d[:, None] * BLOCK_K + offs_k[None, :]
    scale_log2 = scale * LOG2E
    if LOW_KEYS:
        query_scale = tl.load(query_scale_ptr + row)
        tile_q = tl.arange(0, BLOCK_Q)[:, None] * D_PAD + offs_d[None, :]
        query = tl.load(low_query_ptr + row * (BLOCK_Q * D_PAD) + tile_q)
    else:
        query = load_rows(query_block_ptr, stride_ql, rows_q, BLOCK_Q, D, D_PAD)
    if LOW_KEYS:
        scale_log2 = scale_log2 * query_scale
        key_head_ptr = low_keys_ptr + first_block * (BLOCK_K * D_PAD)
    if LOW_VALUES:
        value_head_ptr = low_values_ptr + first_block * (BLOCK_K * D_PAD)
    # log2 of the largest P.
    peak = 0.0
    if SPARSE_DTYPE == "int8_fp8":
        peak = 8.807354922057604
    if SPARSE_DTYPE == "int8_int8":
        peak = 6.988684686772166

    # An integer s added to the bits of 1.5 * 2^23 makes the float 1.5 * 2^23 + s: no conversion.
    BITS: tl.constexpr = 0x4B400000
    OFFSET: tl.constexpr = 12582912.0
    # As a float it is about -4e37, whatever is added: the score of an absent key.
    ABSENT_BITS: tl.constexpr = -0x2000000
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    # FP8 matrix units of Hopper add with 14 bits: what they sum is one block, in halves of V.
    HALF: tl.constexpr = D_PAD // 2
    if SPARSE_DTYPE == "int8_fp8":
        tile_t = tl.arange(0, HALF)[:, None] * BLOCK_K + offs_k[None, :]
        acc_left = tl.zeros([BLOCK_Q, HALF], tl.float32)
        acc_right = tl.zeros([BLOCK_Q, HALF], tl.float32)
    else:
        acc = tl.zeros([BLOCK_Q, D_PAD], tl.float32)
    for i in range(0, count):
        index = tl.load(indices_row_ptr + i)
        n = index.to(tl.int64)
        rows_k = length - index * BLOCK_K
        if places_ptr is not None and not LOW_VALUES:
            places = load_places(places_ptr, bh, length, n * BLOCK_K, rows_k, BLOCK_K)
        # [BLOCK_Q, BLOCK_K]
        if LOW_KEYS:
            key = tl.load(key_head_ptr + n * (BLOCK_K * D_PAD) + tile)
            step = scale_log2 * tl.load(key_scale_ptr + first_block + n)
            # Two bits less, so that OFFSET = 3 * 2^22 times it is exact.
            step = (step.to(tl.int32, bitcast=True) & -4).to(tl.float32, bitcast=True)
            bits = tl.where(offs_k < rows_k, BITS, ABSENT_BITS)[None, :]
            bits = tl.broadcast_to(bits, (BLOCK_Q, BLOCK_K))
            bits = tl.dot(query, tl.trans(key), bits, out_dtype=tl.int32)
            scores = bits.to(tl.float32, bitcast=True)
            top = tl.max(scores, 1) - OFFSET
        else:
            if places_ptr is None:
                start_ptr = key_head_ptr + n * BLOCK_K * stride_kl
                key = load_rows(start_ptr, stride_kl, rows_k, BLOCK_K, D, D_PAD)
            else:
                key = load_rows_at(key_head_ptr, places, stride_kl, rows_k, BLOCK_K, D, D_PAD)
            step = scale_log2
            scores = tl.dot(query, tl.trans(key), input_precision="tf32x3")
            if rows_k < BLOCK_K:
                scores = tl.where((offs_k < rows_k)[None, :], scores, float("-inf"))
            top = tl.max(scores, 1)
        # Scales are positive, so scaling the maximum is enough.
        top = top * step
        if bias_row_ptr is not None:
            bias = tl.load(bias_row_ptr + index)
            top = top + bias
        new_max = tl.maximum(row_max, top)
        shift = new_max - peak
        if LOW_KEYS:
            # The sum is rounded: what it stands for is the maximum from here on.
            shift = shift + OFFSET * step
            new_max = (shift - OFFSET * step) + peak
        powers = scores * step - shift[:, None]
        if bias_row_ptr is not None:
            powers = powers + bias
        weights = tl.exp2(powers)
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        row_max = new_max
        if SPARSE_DTYPE == "int8_fp8":
            low = in_matrix_order(weights.to(tl.float8e4nv), BLOCK_Q, BLOCK_K)
            left_ptr = value_head_ptr + n * (BLOCK_K * D_PAD)
            left = tl.load(left_ptr + tile_t)
            acc_left = acc_left * correction[:, None] + tl.dot(low, tl.trans(left))
            right = tl.load(left_ptr + HALF * BLOCK_K + tile_t)
            acc_right = acc_right * correction[:, None] + tl.dot(low, tl.trans(right))
        elif SPARSE_DTYPE == "int8_int8":
            value_t = tl.load(value_head_ptr + n * (BLOCK_K * D_PAD) + tile_t)
            low = in_matrix_order(round_to_int8(weights), BLOCK_Q, BLOCK_K)
            low = tl.dot(low, tl.trans(value_t), out_dtype=tl.int32)
            acc = acc * correction[:, None] + low.to(tl.float32)
        else:
            if places_ptr is None:
                start_ptr = value_head_ptr + n * BLOCK_K * stride_vl
                value = load_rows(start_ptr, stride_vl, rows_k, BLOCK_K, D, D_PAD)
            else:
                value = load_rows_at(value_head_ptr, places, stride_vl, rows_k, BLOCK_K, D, D_PAD)
            acc = acc * correction[:, None]
            acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="tf32x3")

    if SPARSE_DTYPE == "int8_fp8":
        acc = tl.permute(tl.join(acc_left, acc_right), (0, 2, 1))
        acc = tl.reshape(acc, (BLOCK_Q, D_PAD))
    out = acc * (1.0 / row_sum)[:, None]
    if LOW_VALUES:
        out = out * tl.load(value_scale_ptr + bh * D_PAD + offs_d)[None, :]
    lse = (row_max + tl.log2(row_sum) - peak) * (1.0 / LOG2E)
    if LOW_KEYS and NEED_LSE:
        mean = tl.load(key_mean_ptr + bh * D + offs_d, mask=offs_d < D, other=0.0)
        exact = load_rows(query_block_ptr, stride_ql, rows_q, BLOCK_Q, D, D_PAD)
        lse += tl.sum(exact.to(tl.float32) * mean[None, :], 1) * scale
    return out, lse
