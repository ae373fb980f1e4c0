"""First pass of the Triton implementation over Q, K and V: means and largest magnitudes of blocks.

    query_means[m] = mean of Q over block m,  key_means[n] = mean of K over block n
    key_mean       = mean of K over all tokens, from the block means
    value_max[d]   = max_j |V[j, d]|, where P V will be low-bit
    low_query[m]   = round(Q[m] / s_m), s_m = max|Q[m]| / 127, where Q K^T will be
    query_norm[m]  = max_i |q_i| over block m, where logits are to be bounded (`triton_bounded`)

Where heads have an order of keys, block n of K is a block of that order; V's maxima need none.
Inputs are `[B, L, H, D]` with any strides but 1 along D, each read once from memory. Nothing here
has a gradient; that of the means is in `triton_backward_routing`. Hardware: compute capability 8.0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.launch_choice import launch_config
from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_tiles import (
    launch_on,
    load_places,
    load_rows,
    load_rows_at,
    padded_dim,
    quantization_scale,
    round_to_int8,
    strides,
)


class BlockStatistics(NamedTuple):
    """What one pass over the inputs tells: float32, D not padded.

    Attributes:
        query_means, key_means: `[B, H, M, D]`, `[B, H, N, D]`, means over the tokens of a block.
        key_mean: `[B, H, D]`, mean over all tokens.
        value_max: `[B, H, D]`, largest |v| of each channel; None unless asked for.
        low_query, query_scale: INT8 `[B, H, M, block_q, P]`, padded with zeros to whole blocks and
            to P = `padded_dim(D)`, and its scales `[B, H, M]`; None unless asked for.
        query_norm: `[B, H, M]`, largest norm of a query of the block; None unless asked for.
    """

    query_means: Tensor
    key_means: Tensor
    key_mean: Tensor
    value_max: Tensor | None
    low_query: Tensor | None = None
    query_scale: Tensor | None = None
    query_norm: Tensor | None = None


@triton.jit(do_not_specialize=["heads", "length", "num_q", "num_k", "all_q"])
def _block_statistics_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    query_means_ptr,
    key_means_ptr,
    value_max_ptr,
    low_query_ptr,
    query_scale_ptr,
    query_norm_ptr,
    places_ptr,
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
    all_q,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
):
    """One program per block: those of queries of all heads, then those of keys and values.

    In this order the L2 cache holds keys and values at the end, which are read again.
    """
    offs_d = tl.arange(0, D_PAD)
    index = tl.program_id(0)
    if index < all_q:
        bh = index // num_q
        block = index % num_q
        b = (bh // heads).to(tl.int64)
        h = bh % heads
        row = bh.to(tl.int64) * num_q + block
        start = block * BLOCK_Q
        rows = length - start
        base_ptr = query_ptr + b * stride_qb + h * stride_qh + start.to(tl.int64) * stride_ql
        total = tl.zeros([TILE_Q, D_PAD], tl.float32)
        peak = tl.zeros([TILE_Q, D_PAD], tl.float32)
        square = tl.zeros([TILE_Q], tl.float32)
        for offset in range(0, BLOCK_Q, TILE_Q):
            tile_ptr = base_ptr + tl.cast(offset, tl.int64) * stride_ql
            query = load_rows(tile_ptr, stride_ql, rows - offset, TILE_Q, D, D_PAD).to(tl.float32)
            total += query
            if low_query_ptr is not None:
                peak = tl.maximum(peak, tl.abs(query))
                if query_norm_ptr is not None:
                    square = tl.maximum(square, tl.sum(query * query, 1))
        mean = tl.sum(total, 0) / tl.minimum(rows, BLOCK_Q)
        tl.store(query_means_ptr + row * D + offs_d, mean, mask=offs_d < D)
        if low_query_ptr is not None:
            if query_norm_ptr is not None:
                tl.store(query_norm_ptr + row, tl.sqrt(tl.max(square)))
            scale = quantization_scale(tl.max(peak), 127.0)
            tl.store(query_scale_ptr + row, scale)
            low_base_ptr = low_query_ptr + row * (BLOCK_Q * D_PAD)
            tile = tl.arange(0, TILE_Q)[:, None] * D_PAD + offs_d[None, :]
            for offset in range(0, BLOCK_Q, TILE_Q):
                # From a cache: with whole blocks in registers, too few programs run at a time.
                tile_ptr = base_ptr + tl.cast(offset, tl.int64) * stride_ql
                query = load_rows(tile_ptr, stride_ql, rows - offset, TILE_Q, D, D_PAD)
                low = round_to_int8(query.to(tl.float32) * (1.0 / scale))
                tl.store(low_base_ptr + offset * D_PAD + tile, low)
    else:
        bh = (index - all_q) // num_k
        block = (index - all_q) % num_k
        b = (bh // heads).to(tl.int64)
        h = bh % heads
        start = block * BLOCK_K
        rows = length - start
        base_ptr = key_ptr + b * stride_kb + h * stride_kh
        if places_ptr is None:
            base_ptr += start.to(tl.int64) * stride_kl
            key = load_rows(base_ptr, stride_kl, rows, BLOCK_K, D, D_PAD).to(tl.float32)
        else:
            places = load_places(places_ptr, bh, length, start, rows, BLOCK_K)
            key = load_rows_at(base_ptr, places, stride_kl, rows, BLOCK_K, D, D_PAD).to(tl.float32)
        offs = (bh.to(tl.int64) * num_k + block) * D + offs_d
        if value_max_ptr is not None:
            base_ptr = value_ptr + b * stride_vb + h * stride_vh + start.to(tl.int64) * stride_vl
            value = load_rows(base_ptr, stride_vl, rows, BLOCK_K, D, D_PAD)
            largest = tl.max(tl.abs(value.to(tl.float32)), 0)
            tl.store(value_max_ptr + offs, largest, mask=offs_d < D)
        mean = tl.sum(key, 0) / tl.minimum(rows, BLOCK_K)
        tl.store(key_means_ptr + offs, mean, mask=offs_d < D)


@triton.jit(do_not_specialize=["length", "num_k"])
def _all_blocks_kernel(
    key_means_ptr,
    value_max_ptr,
    key_mean_ptr,
    largest_ptr,
    length,
    num_k,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean of the key means, weighted by the tokens of a block, and largest of the maxima."""
    bh = tl.program_id(1)
    offs_d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = bh.to(tl.int64) * num_k
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    largest = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, num_k, ROWS):
        offs_n = start + tl.arange(0, ROWS)
        mask = (offs_n < num_k)[:, None] & (offs_d < D)[None, :]
        offs = (first + offs_n)[:, None] * D + offs_d[None, :]
        tokens = tl.minimum(length - offs_n * BLOCK_K, BLOCK_K).to(tl.float32)
        total += tl.load(key_means_ptr + offs, mask=mask, other=0.0) * tokens[:, None]
        if value_max_ptr is not None:
            largest = tl.maximum(largest, tl.load(value_max_ptr + offs, mask=mask, other=0.0))
    tl.store(key_mean_ptr + bh * D + offs_d, tl.sum(total, 0) / length, mask=offs_d < D)
    if value_max_ptr is not None:
        tl.store(largest_ptr + bh * D + offs_d, tl.max(largest, 0), mask=offs_d < D)


@torch.library.custom_op("sla_video::block_statistics", mutates_args=())
def _block_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_q: int,
    block_k: int,
    need_value_max: bool,
    need_low_query: bool,
    need_query_norm: bool,
    places: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `BlockStatistics`, empty tensors for what is not wanted."""
    batch, length, heads, head_dim = query.shape
    num_q, num_k = num_blocks(length, block_q), num_blocks(length, block_k)
    pad = padded_dim(head_dim)
    empty = partial(torch.empty, dtype=torch.float32, device=query.device)
    query_means = empty(batch, heads, num_q, head_dim)
    key_means = empty(batch, heads, num_k, head_dim)
    key_mean = empty(batch, heads, head_dim)
    value_max = empty(batch, heads, num_k, head_dim) if need_value_max else None
    largest = empty(batch, heads, head_dim) if need_value_max else empty(0)
    low_shape = (batch, heads, num_q, block_q, pad) if need_low_query else (0,)
    low_query = torch.empty(low_shape, dtype=torch.int8, device=query.device)
    query_scale = empty(batch, heads, num_q) if need_low_query else empty(0)
    query_norm = empty(batch, heads, num_q) if need_query_norm else empty(0)
    columns = 32
    config = launch_config("block_statistics", query, block_q=block_q, block_k=block_k)
    with launch_on(query):
        _block_statistics_kernel[((num_q + num_k) * batch * heads,)](
            query,
            key,
            value,
            query_means,
            key_means,
            value_max,
            low_query if need_low_query else None,
            query_scale if need_low_query else None,
            query_norm if need_query_norm else None,
            places,
            *strides(query),
            *strides(key),
            *strides(value),
            heads,
            length,
            num_q,
            num_k,
            num_q * batch * heads,
            D=head_dim,
            D_PAD=pad,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            TILE_Q=min(block_q, config.tile_q),
            **config.keywords(),
        )
        _all_blocks_kernel[(pad // columns, batch * heads)](
            key_means,
            value_max,
            key_mean,
            largest if need_value_max else None,
            length,
            num_k,
            D=head_dim,
            BLOCK_K=block_k,
            ROWS=512,
            COLUMNS=columns,
            num_warps=8,
        )
    return query_means, key_means, key_mean, largest, low_query, query_scale, query_norm


@_block_statistics.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_q: int,
    block_k: int,
    need_value_max: bool,
    need_low_query: bool,
    need_query_norm: bool,
    places: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, head_dim = query.shape
    num_q = num_blocks(length, block_q)
    empty = partial(torch.empty, dtype=torch.float32, device=query.device)
    low_shape = (batch, heads, num_q, block_q, padded_dim(head_dim)) if need_low_query else (0,)
    return (
        empty(batch, heads, num_q, head_dim),
        empty(batch, heads, num_blocks(length, block_k), head_dim),
        empty(batch, heads, head_dim),
        empty(batch, heads, head_dim) if need_value_max else empty(0),
        torch.empty(low_shape, dtype=torch.int8, device=query.device),
        empty(batch, heads, num_q) if need_low_query else empty(0),
        empty(batch, heads, num_q) if need_query_norm else empty(0),
    )


def block_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_q: int,
    block_k: int,
    need_value_max: bool,
    need_low_query: bool = False,
    need_query_norm: bool = False,
    places: Tensor | None = None,
) -> BlockStatistics:
    """Pass 1 over query, key (and value) `[B, L, H, D]`, each contiguous along D.

    `need_query_norm`: with low_query only.
    `places`: `[B, H, L]` int32, contiguous, of a `KeyOrder`.
    """
    assert need_low_query or not need_query_norm, "norms are for low-bit logits"
    query_means, key_means, key_mean, value_max, *of_query = _block_statistics(
        query.detach(),
        key.detach(),
        value.detach(),
        block_q,
        block_k,
        need_value_max,
        need_low_query,
        need_query_norm,
        places,
    )
    low_query, query_scale, query_norm = of_query
    return BlockStatistics(
        query_means,
        key_means,
        key_mean,
        value_max if need_value_max else None,
        low_query if need_low_query else None,
        query_scale if need_low_query else None,
        query_norm if need_query_norm else None,
    )
