"""The forward after routing put together, some heads at a time, which bounds the memory of states.

triton_prepare   low-bit K and V, states of key blocks
triton_linear    states summed over what each query block drops
triton_attend    O_s and its log-sum-exp, and in the same kernel the mix with O_l
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sla_video.kernels.options import Options, PhiK, SparseDtype
from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_attend import attend
from sla_video.kernels.triton_linear import sum_dropped_states
from sla_video.kernels.triton_prepare import prepare_keys
from sla_video.kernels.triton_routing import BlockPlan
from sla_video.kernels.triton_statistics import BlockStatistics
from sla_video.kernels.triton_tiles import padded_dim

# What the states of the heads that are worked on together may take, with their sums.
_STATE_BYTES = 2**29


def forward_arguments(
    statistics: BlockStatistics, plan: BlockPlan, options: Options
) -> tuple[Any, ...]:
    """What operators of the forward take after Q, K and V, in the order of `attend_all`."""
    return (
        statistics.key_mean,
        statistics.value_max,
        statistics.low_query,
        statistics.query_scale,
        statistics.query_norm,
        plan.indices,
        plan.counts,
        plan.alpha,
        plan.dropped,
        options.block_q,
        options.block_k,
        options.sparse_dtype,
        options.phi_k,
    )


def attend_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    value_max: Tensor | None,
    low_query: Tensor | None,
    query_scale: Tensor | None,
    query_norm: Tensor | None,
    indices: Tensor,
    counts: Tensor | None,
    alpha: Tensor | None,
    dropped: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    sparse_dtype: SparseDtype,
    phi_k: PhiK,
    need_lse: bool,
    keep_sparse: bool,
    bias: Tensor | None = None,
    places: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """O `[B, L, H, D]`, the log-sum-exp `[B, H, L]`, and O_s where it is not O.

    The last two are empty unless `need_lse` and `keep_sparse` ask for them.

    Args:
        key_mean, value_max, low_query, query_scale, query_norm: of `block_statistics`.
        indices, counts, alpha, dropped: of a `BlockPlan`.
        bias: `[B, H, M, N]` float32, what is added to the logits of a key block, in powers of two.
        places: `[B, H, L]` int32 of a `KeyOrder`.
        out: where O goes, `query` itself perhaps; None for new memory.
    """
    batch, length, heads, _ = query.shape
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = key_mean.new_empty((batch, heads, length) if need_lse else 0)
    sparse = torch.empty_like(out) if keep_sparse and alpha is not None else query.new_empty(0)
    num_q, num_k = indices.shape[2], num_blocks(length, block_k)
    for own in _shares(key, num_q, num_k, alpha is not None):
        # Views `[b, L, h, D]` and, of what has the heads before the tokens, `[b, h, ...]`.
        part = own[0], slice(None), own[1]
        operands = prepare_keys(
            key[part],
            value[part],
            key_mean[own],
            _of(value_max, own),
            block_k=block_k,
            sparse_dtype=sparse_dtype,
            phi_k=phi_k,
            need_states=alpha is not None,
            need_key_norm=query_norm is not None,
            places=_of(places, own),
        )
        sums = None
        if operands.states is not None and dropped is not None:
            sums = sum_dropped_states(operands.states, dropped[own])
            # Their memory serves the next heads.
            operands = operands._replace(states=None)
        attend(
            query[part],
            key[part],
            value[part],
            indices[own],
            _of(counts, own),
            key_mean[own],
            operands=operands,
            block_q=block_q,
            block_k=block_k,
            out=out[part],
            lse=lse[own] if need_lse else None,
            out_sparse=sparse[part] if sparse.numel() else None,
            bias=_of(bias, own),
            alpha=_of(alpha, own),
            sums=sums,
            sparse_dtype=sparse_dtype,
            low_query=_of(low_query, own),
            query_scale=_of(query_scale, own),
            query_norm=_of(query_norm, own),
            places=_of(places, own),
        )
    return out, lse, sparse


def _shares(key: Tensor, num_q: int, num_k: int, linear: bool) -> Iterator[tuple[slice, slice]]:
    """Sequences and heads to prepare and attend together: all of them, if there are no states.

    Else as many whole sequences as may be, or some heads of one.
    """
    batch, _, heads, head_dim = key.shape
    pad = padded_dim(head_dim)
    each = (num_q + num_k) * (pad + 1) * pad * key.element_size() if linear else 0
    rounds = max(1, -(-heads * each // _STATE_BYTES))
    some_heads = -(-heads // rounds)
    sequences = max(1, _STATE_BYTES // (heads * each)) if linear else batch
    for b in range(0, batch, sequences):
        for h in range(0, heads, some_heads):
            yield slice(b, b + sequences), slice(h, h + some_heads)


def _of(x: Tensor | None, own: tuple[slice, slice]) -> Tensor | None:
    return None if x is None else x[own]
