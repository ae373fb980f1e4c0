"""First pass of the Triton implementation over Q, K and V: means and largest magnitudes of blocks.

    query_means[m] = mean of Q over block m,  key_means[n] = mean of K over block n
    key_mean       = mean of K over all tokens, from the block means
    value_max[d]   = max_j |V[j, d]|, where P V will be low-bit

Inputs are `[B, L, H, D]` with any strides but 1 along D, each read once. A token gets the gradient
of its block's mean divided by the tokens of the block. Hardware: compute capability 8.0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.routing import block_counts, num_blocks
from sla_video.kernels.triton_tiles import launch_on, load_rows, padded_dim, strides


class BlockStatistics(NamedTuple):
    """What one pass over the inputs tells: float32, D not padded.

    Attributes:
        query_means, key_means: `[B, H, M, D]`, `[B, H, N, D]`, means over the tokens of a block.
        key_mean: `[B, H, D]`, mean over all tokens, detached.
        value_max: `[B, H, D]`, largest |v| of each channel; None unless asked for.
    """

    query_means: Tensor
    key_means: Tensor
    key_mean: Tensor
    value_max: Tensor | None


@triton.jit
def _mean_of_rows(
    base_ptr, stride_l, rows, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):
    x = load_rows(base_ptr, stride_l, rows, ROWS, D, D_PAD).to(tl.float32)
    return tl.sum(x, 0) / tl.minimum(rows, ROWS)


@triton.jit(do_not_specialize=["length", "num_q", "num_k"])
def _block_statistics_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    query_means_ptr,
    key_means_ptr,
    value_max_ptr,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    heads,
    length,
    num_q,
    num_k,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per block: M of queries, then N of keys, then (if launched) N of values."""
    block = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    offs_d = tl.arange(0, D_PAD)
    if block < num_q:
        start = block * BLOCK_Q
        base_ptr = query_ptr + b * stride_qb + h * stride_qh + start.to(tl.int64) * stride_ql
        mean = _mean_of_rows(base_ptr, stride_ql, length - start, BLOCK_Q, D, D_PAD)
        out_ptr = query_means_ptr + (bh.to(tl.int64) * num_q + block) * D
        tl.store(out_ptr + offs_d, mean, mask=offs_d < D)
    elif block < num_q + num_k:
        start = (block - num_q) * BLOCK_K
        base_ptr = key_ptr + b * stride_kb + h * stride_kh + start.to(tl.int64) * stride_kl
        mean = _mean_of_rows(base_ptr, stride_kl, length - start, BLOCK_K, D, D_PAD)
        out_ptr = key_means_ptr + (bh.to(tl.int64) * num_k + block - num_q) * D
        tl.store(out_ptr + offs_d, mean, mask=offs_d < D)
    elif value_max_ptr is not None:
        start = (block - num_q - num_k) * BLOCK_K
        base_ptr = value_ptr + b * stride_vb + h * stride_vh + start.to(tl.int64) * stride_vl
        value = load_rows(base_ptr, stride_vl, length - start, BLOCK_K, D, D_PAD)
        out_ptr = value_max_ptr + (bh.to(tl.int64) * num_k + block - num_q - num_k) * D
        tl.store(out_ptr + offs_d, tl.max(tl.abs(value.to(tl.float32)), 0), mask=offs_d < D)


@torch.library.custom_op("sla_video::block_statistics", mutates_args=())
def _block_statistics(
    query: Tensor, key: Tensor, value: Tensor, block_q: int, block_k: int, need_value_max: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of query blocks, of key blocks and of all keys, and `value_max` (or nothing)."""
    batch, length, heads, head_dim = query.shape
    num_q, num_k = num_blocks(length, block_q), num_blocks(length, block_k)
    empty = partial(torch.empty, dtype=torch.float32, device=query.device)
    query_means = empty(batch, heads, num_q, head_dim)
    key_means = empty(batch, heads, num_k, head_dim)
    value_max = empty(batch, heads, num_k, head_dim) if need_value_max else None
    with launch_on(query):
        _block_statistics_kernel[(num_q + (2 if need_value_max else 1) * num_k, batch * heads)](
            query,
            key,
            value,
            query_means,
            key_means,
            value_max,
            *strides(query),
            *strides(key),
            *strides(value),
            heads,
            length,
            num_q,
            num_k,
            D=head_dim,
            D_PAD=padded_dim(head_dim),
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            num_warps=4,
        )
    return (
        query_means,
        key_means,
        _mean_of_means(key_means, length, block_k),
        empty(0) if value_max is None else value_max.amax(2),
    )


@_block_statistics.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, block_q: int, block_k: int, need_value_max: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, head_dim = query.shape
    empty = partial(torch.empty, dtype=torch.float32, device=query.device)
    return (
        empty(batch, heads, num_blocks(length, block_q), head_dim),
        empty(batch, heads, num_blocks(length, block_k), head_dim),
        empty(batch, heads, head_dim),
        empty(batch, heads, head_dim) if need_value_max else empty(0),
    )


def _remember_blocks(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, _, _, ctx.block_q, ctx.block_k, _ = inputs
    ctx.length, ctx.dtype = query.shape[1], query.dtype


def _gradients_of_means(
    ctx: Any, query_means: Tensor, key_means: Tensor, _key_mean: Tensor, _value_max: Tensor
) -> tuple[Tensor | None, ...]:
    query = key = None
    if ctx.needs_input_grad[0]:
        query = _for_each_token(query_means, ctx.block_q, ctx.length, ctx.dtype)
    if ctx.needs_input_grad[1]:
        key = _for_each_token(key_means, ctx.block_k, ctx.length, ctx.dtype)
    return query, key, None, None, None, None


def _for_each_token(grad: Tensor, block: int, length: int, dtype: torch.dtype) -> Tensor:
    """Gradient of tokens `[B, L, H, D]` from that of the means of their blocks `[B, H, N, D]`."""
    share = grad / block_counts(length, block, grad)[:, None]
    return share.to(dtype).transpose(1, 2).repeat_interleave(block, 1)[:, :length]


_block_statistics.register_autograd(_gradients_of_means, setup_context=_remember_blocks)


def block_statistics(
    query: Tensor, key: Tensor, value: Tensor, *, block_q: int, block_k: int, need_value_max: bool
) -> BlockStatistics:
    """Pass 1 over query, key (and value) `[B, L, H, D]`, each contiguous along D."""
    # No gradient is needed of value_max, since low-bit values have those of unquantized ones, nor
    # of key_mean: neither logit(p) nor O_s depends on it, and phi(K) is differentiated elsewhere.
    query_means, key_means, key_mean, value_max = _block_statistics(
        query, key, value.detach(), block_q, block_k, need_value_max
    )
    return BlockStatistics(
        query_means, key_means, key_mean.detach(), value_max if need_value_max else None
    )


def _mean_of_means(means: Tensor, length: int, block: int) -> Tensor:
    """Mean over `length` tokens `[B, H, D]` of the block means `[B, H, N, D]`."""
    missing = means.shape[2] * block - length
    if not missing:
        return means.mean(2)
    # The last block counts for less than the others.
    return means.sum(2).sub_(means[:, :, -1], alpha=missing / block).mul_(block / length)
