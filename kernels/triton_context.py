"""Exact attention to the context, mixed into the output of SLA2 in one pass over queries.

    O <- sigmoid(l_v - l_c) O + sigmoid(l_c - l_v) O_c,    l_v = lse_s - log(alpha)

One program owns one query block of one head, walks the context as FlashAttention does and updates
the output in place. Inference only: `context.with_context` has gradients.

Layouts: query and output are `[B, L, H, D]`, key and value of the context `[B, C, H, D]`, with any
strides but 1 along D. Hardware: compute capability 8.0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.context import SMALLEST_ALPHA
from sla_video.kernels.launch_lists import LaunchConfig
from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_tiles import (
    LOG2E,
    launch_on,
    load_rows,
    padded_dim,
    store_rows,
    strides,
)


@triton.jit(do_not_specialize=["heads", "length", "num_q", "count"])
def _context_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    lse_ptr,
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
    stride_ob,
    stride_ol,
    stride_oh,
    heads,
    length,
    num_q,
    count,
    scale,
    smallest_alpha,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`mask_ptr`: one byte for each token of the context, 0 where it is not there; or None."""
    m = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    start_q = m.to(tl.int64) * BLOCK_Q
    rows_q = length - m * BLOCK_Q
    offs_q = tl.arange(0, BLOCK_Q)
    offs_c = tl.arange(0, BLOCK_C)
    query_block_ptr = query_ptr + b * stride_qb + h * stride_qh + start_q * stride_ql
    query = load_rows(query_block_ptr, stride_ql, rows_q, BLOCK_Q, D, D_PAD)
    key_rows_ptr = key_ptr + b * stride_kb + h * stride_kh
    value_rows_ptr = value_ptr + b * stride_vb + h * stride_vh
    if mask_ptr is not None:
        mask_ptr += b * count
    scale_log2 = scale * LOG2E
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D_PAD], tl.float32)
    rows_c = count
    for _ in range(0, tl.cdiv(count, BLOCK_C)):
        key = load_rows(key_rows_ptr, stride_kl, rows_c, BLOCK_C, D, D_PAD)
        # [BLOCK_Q, BLOCK_C]
        scores = tl.dot(query, tl.trans(key), input_precision="tf32x3") * scale_log2
        if mask_ptr is not None:
            there = tl.load(mask_ptr + offs_c, mask=offs_c < rows_c, other=0)
            # Finite, so that a context that is all masked has a softmax, of no weight.
            scores = tl.where((there != 0)[None, :], scores, -1e30)
            mask_ptr += BLOCK_C
        scores = tl.where((offs_c < rows_c)[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        row_max = new_max
        value = load_rows(value_rows_ptr, stride_vl, rows_c, BLOCK_C, D, D_PAD)
        acc = acc * correction[:, None]
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="tf32x3")
        key_rows_ptr += BLOCK_C * stride_kl
        value_rows_ptr += BLOCK_C * stride_vl
        rows_c -= BLOCK_C
    lse_block_ptr = lse_ptr + bh.to(tl.int64) * length + start_q
    mass = tl.load(lse_block_ptr + offs_q, mask=offs_q < rows_q, other=0.0) * LOG2E
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr + bh.to(tl.int64) * num_q + m)
        mass -= tl.log2(tl.maximum(alpha, smallest_alpha))
    share = 1.0 / (1.0 + tl.exp2(row_max + tl.log2(row_sum) - mass))
    out_block_ptr = out_ptr + b * stride_ob + h * stride_oh + start_q * stride_ol
    video = load_rows(out_block_ptr, stride_ol, rows_q, BLOCK_Q, D, D_PAD).to(tl.float32)
    mixed = video * share[:, None] + acc * ((1.0 - share) / row_sum)[:, None]
    store_rows(out_block_ptr, stride_ol, mixed, rows_q, BLOCK_Q, D, D_PAD)


@torch.library.custom_op("sla_video::mix_context", mutates_args={"out"})
def mix_context(
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    alpha: Tensor | None,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    block_q: int,
) -> None:
    """Mix attention to the context into `out`; for the arguments see `context.with_context`.

    query, out, key and value have to be contiguous along D.
    """
    batch, length, heads, head_dim = query.shape
    single = query.dtype == torch.float32
    config = LaunchConfig(8, 1) if single else LaunchConfig(8 if head_dim > 64 else 4, 2)
    with launch_on(query):
        _context_kernel[(num_blocks(length, block_q), batch * heads)](
            query,
            key,
            value,
            None if mask is None else mask.contiguous().view(torch.uint8),
            lse.contiguous(),
            None if alpha is None else alpha.contiguous(),
            out,
            *strides(query),
            *strides(key),
            *strides(value),
            *strides(out),
            heads,
            length,
            num_blocks(length, block_q),
            key.shape[1],
            head_dim**-0.5,
            SMALLEST_ALPHA,
            D=head_dim,
            D_PAD=padded_dim(head_dim),
            BLOCK_Q=block_q,
            BLOCK_C=32 if single else 64,
            **config.keywords(),
        )


@mix_context.register_fake
def _(
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    alpha: Tensor | None,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    block_q: int,
) -> None:
    return
