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

Layouts: query, key, value and the output are `[B, L, H, D]`, low-bit operands are those of
`triton_statistics` and `triton_prepare`. Hardware: compute capability 8.0; FP8 8.9.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.options import SparseDtype
from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_prepare import KeyOperands
from sla_video.kernels.triton_tiles import (
    LaunchConfig,
    capability,
    in_matrix_order,
    launch_on,
    load_rows,
    padded_dim,
    round_to_int8,
    store_rows,
    strides,
)


@triton.jit(do_not_specialize=["length", "num_q", "num_k", "num_selected"])
def _sparse_forward_kernel(
    query_ptr,
    low_query_ptr,
    key_ptr,
    value_ptr,
    query_scale_ptr,
    key_scale_ptr,
    value_scale_ptr,
    key_mean_ptr,
    indices_ptr,
    counts_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
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
    HAS_COUNTS: tl.constexpr,
    NEED_LSE: tl.constexpr,
):
    m = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    LOW_KEYS: tl.constexpr = SPARSE_DTYPE != "bf16"
    LOW_VALUES: tl.constexpr = SPARSE_DTYPE == "int8_fp8" or SPARSE_DTYPE == "int8_int8"
    offs_d = tl.arange(0, D_PAD)
    offs_k = tl.arange(0, BLOCK_K)
    tile = offs_k[:, None] * D_PAD + offs_d[None, :]
    tile_t = offs_d[:, None] * BLOCK_K + offs_k[None, :]

    start_q = m.to(tl.int64) * BLOCK_Q
    rows_q = length - m * BLOCK_Q
    query_base_ptr = query_ptr + b * stride_qb + h * stride_qh + start_q * stride_ql
    row = bh.to(tl.int64) * num_q + m
    scale_log2 = scale * 1.4426950408889634
    first_block = bh.to(tl.int64) * num_k
    if LOW_KEYS:
        query_scale = tl.load(query_scale_ptr + row)
        offs_q = tl.arange(0, BLOCK_Q)
        tile_q = offs_q[:, None] * D_PAD + offs_d[None, :]
        query = tl.load(low_query_ptr + row * (BLOCK_Q * D_PAD) + tile_q)
    else:
        query = load_rows(query_base_ptr, stride_ql, rows_q, BLOCK_Q, D, D_PAD)
    if LOW_KEYS:
        scale_log2 = scale_log2 * query_scale
        key_base_ptr = key_ptr + first_block * (BLOCK_K * D_PAD)
    else:
        key_base_ptr = key_ptr + b * stride_kb + h * stride_kh
    if LOW_VALUES:
        value_base_ptr = value_ptr + first_block * (BLOCK_K * D_PAD)
    else:
        value_base_ptr = value_ptr + b * stride_vb + h * stride_vh
    # log2 of the largest P.
    peak = 0.0
    if SPARSE_DTYPE == "int8_fp8":
        peak = 8.807354922057604
    if SPARSE_DTYPE == "int8_int8":
        peak = 6.988684686772166

    indices_row_ptr = indices_ptr + row * num_selected
    count = num_selected
    if HAS_COUNTS:
        count = tl.load(counts_ptr + row)
    # Without a way around the loop, its matrix products need not wait for each other.
    tl.assume(count > 0)
    # An integer s added to the bits of 1.5 * 2^23 makes the float 1.5 * 2^23 + s: no conversion.
    BITS: tl.constexpr = 0x4B400000
    OFFSET: tl.constexpr = 12582912.0
    # As a float it is about -4e37, whatever is added: the score of an absent key.
    ABSENT_BITS: tl.constexpr = -0x2000000
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D_PAD], tl.float32)
    for i in range(0, count):
        index = tl.load(indices_row_ptr + i)
        n = index.to(tl.int64)
        rows_k = length - index * BLOCK_K
        # [BLOCK_Q, BLOCK_K]
        if LOW_KEYS:
            key = tl.load(key_base_ptr + n * (BLOCK_K * D_PAD) + tile)
            step = scale_log2 * tl.load(key_scale_ptr + first_block + n)
            bits = tl.where(offs_k < rows_k, BITS, ABSENT_BITS)[None, :]
            bits = tl.broadcast_to(bits, (BLOCK_Q, BLOCK_K))
            bits = tl.dot(query, tl.trans(key), bits, out_dtype=tl.int32)
            scores = bits.to(tl.float32, bitcast=True)
            top = tl.max(scores, 1) - OFFSET
        else:
            start_ptr = key_base_ptr + n * BLOCK_K * stride_kl
            key = load_rows(start_ptr, stride_kl, rows_k, BLOCK_K, D, D_PAD)
            step = scale_log2
            scores = tl.dot(query, tl.trans(key), input_precision="tf32x3")
            if rows_k < BLOCK_K:
                scores = tl.where((offs_k < rows_k)[None, :], scores, float("-inf"))
            top = tl.max(scores, 1)
        # Scales are positive, so scaling the maximum is enough.
        new_max = tl.maximum(row_max, top * step)
        shift = new_max - peak
        if LOW_KEYS:
            shift += OFFSET * step
        weights = tl.exp2(scores * step - shift[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        row_max = new_max
        acc = acc * correction[:, None]
        if SPARSE_DTYPE == "int8_fp8":
            value_t = tl.load(value_base_ptr + n * (BLOCK_K * D_PAD) + tile_t)
            low = in_matrix_order(weights.to(tl.float8e4nv), BLOCK_Q, BLOCK_K)
            acc = tl.dot(low, tl.trans(value_t), acc)
        elif SPARSE_DTYPE == "int8_int8":
            value_t = tl.load(value_base_ptr + n * (BLOCK_K * D_PAD) + tile_t)
            low = in_matrix_order(round_to_int8(weights), BLOCK_Q, BLOCK_K)
            acc += tl.dot(low, tl.trans(value_t), out_dtype=tl.int32).to(tl.float32)
        else:
            start_ptr = value_base_ptr + n * BLOCK_K * stride_vl
            value = load_rows(start_ptr, stride_vl, rows_k, BLOCK_K, D, D_PAD)
            acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="tf32x3")

    out = acc * (1.0 / row_sum)[:, None]
    if LOW_VALUES:
        out = out * tl.load(value_scale_ptr + bh * D_PAD + offs_d)[None, :]
    out_base_ptr = out_ptr + b * stride_ob + h * stride_oh + start_q * stride_ol
    store_rows(out_base_ptr, stride_ol, out, rows_q, BLOCK_Q, D, D_PAD)
    if NEED_LSE:
        lse = (row_max + tl.log2(row_sum) - peak) * 0.6931471805599453
        if LOW_KEYS:
            mean = tl.load(key_mean_ptr + bh * D + offs_d, mask=offs_d < D, other=0.0)
            exact = load_rows(query_base_ptr, stride_ql, rows_q, BLOCK_Q, D, D_PAD)
            lse += tl.sum(exact.to(tl.float32) * mean[None, :], 1) * scale
        offs_q = tl.arange(0, BLOCK_Q)
        lse_base_ptr = lse_ptr + bh.to(tl.int64) * length + start_q
        tl.store(lse_base_ptr + offs_q, lse, mask=offs_q < rows_q)


# By GPU generation, arithmetic and padded D. The entries of generation 0 are the safe ones: their
# tiles fit the 99 KiB of shared memory of the smallest GPUs.
_CONFIGS = {
    (9, "bf16", 128): LaunchConfig(8, 3),
    (9, "int8", 128): LaunchConfig(4, 5),
    (9, "int8_fp8", 128): LaunchConfig(4, 5),
    (9, "int8_int8", 128): LaunchConfig(8, 3),
    (0, "bf16", 128): LaunchConfig(8, 2),
    (0, "int8", 128): LaunchConfig(8, 2),
    (0, "int8_fp8", 128): LaunchConfig(8, 2),
    (0, "int8_int8", 128): LaunchConfig(8, 2),
}


def _config(query: Tensor, sparse_dtype: SparseDtype, pad: int) -> LaunchConfig:
    if query.dtype == torch.float32:
        return LaunchConfig(8, 1)
    if pad < 128:
        return LaunchConfig(4, 3)
    generation = capability(query.device)[0]
    safe = _CONFIGS[0, sparse_dtype, pad]
    return _CONFIGS.get((generation, sparse_dtype, pad), safe)


def sparse_forward(
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
    sparse_dtype: SparseDtype = "bf16",
    low_query: Tensor | None = None,
    query_scale: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of each query block to the key blocks listed for it.

    Args:
        query, key, value: `[B, L, H, D]`, each contiguous along D.
        indices: `[B, H, M, K]` int32, distinct key blocks of each query block.
        counts: `[B, H, M]` int32, from 1 to K: only the first `counts` entries of a row are
            visited. None visits all.
        key_mean: `[B, H, D]` float32, mean key over tokens.
        operands: what `prepare_keys` made of key and value for this `sparse_dtype`.
        low_query, query_scale: of `block_statistics`, for low-bit keys.
        need_lse: return the log-sum-exp too.

    Returns:
        the output `[B, L, H, D]` in the dtype of `query`, and the log-sum-exp `[B, H, L]` in
        float32, in terms of the keys as given (None unless `need_lse`).
    """
    batch, length, heads, head_dim = query.shape
    pad = padded_dim(head_dim)
    assert (low_query is None) == (operands.low_keys is None), "Q and K are multiplied as one type"
    keys = key if operands.low_keys is None else operands.low_keys
    values = value if operands.low_values is None else operands.low_values
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = None
    if need_lse:
        lse = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    with launch_on(query):
        _sparse_forward_kernel[(num_blocks(length, block_q), batch * heads)](
            query,
            low_query,
            keys,
            values,
            query_scale,
            operands.key_scale,
            operands.value_scale,
            key_mean.contiguous(),
            indices.contiguous(),
            None if counts is None else counts.contiguous(),
            out,
            lse,
            *strides(query),
            *strides(key),
            *strides(value),
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
            HAS_COUNTS=counts is not None,
            NEED_LSE=need_lse,
            **_config(query, sparse_dtype, pad).keywords(),
        )
    return out, lse
