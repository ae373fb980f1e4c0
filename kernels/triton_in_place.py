"""The forward after routing with O in the memory of Q: for inference, where Q is not read again.

An operator of its own that says so to compilers, which would copy Q if it were.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sla_video.kernels.options import Options, PhiK, SparseDtype
from sla_video.kernels.triton_forward import attend_all, forward_arguments
from sla_video.kernels.triton_routing import BlockPlan
from sla_video.kernels.triton_statistics import BlockStatistics


@torch.library.custom_op("sla_video::attention_in_query", mutates_args={"query"})
def _attention_in_query(
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
    block_q: int,
    block_k: int,
    sparse_dtype: str,
    phi_k: str,
    need_lse: bool,
) -> Tensor:
    """The log-sum-exp `[B, H, L]`, empty unless needed; O `[B, L, H, D]` goes over `query`."""
    return attend_all(
        query,
        key,
        value,
        key_mean,
        value_max,
        low_query,
        query_scale,
        query_norm,
        indices,
        counts,
        alpha,
        dropped,
        block_q=block_q,
        block_k=block_k,
        sparse_dtype=cast(SparseDtype, sparse_dtype),
        phi_k=cast(PhiK, phi_k),
        need_lse=need_lse,
        keep_sparse=False,
        out=query,
    )[1]


@_attention_in_query.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, key_mean: Tensor, *more: Any) -> Tensor:
    batch, length, heads, _ = query.shape
    return key_mean.new_empty((batch, heads, length) if more[-1] else 0)


def rows_apart(x: Tensor) -> bool:
    """Whether x `[B, L, H, D]` lies in memory token by token, in rows that share none of it.

    So do the results of a projection, also those that are one part of a larger one.
    """
    batch, length, heads, head_dim = x.shape
    return (
        x.stride(3) == 1
        and (heads == 1 or x.stride(2) == head_dim)
        and (length == 1 or x.stride(1) >= heads * head_dim)
        and (batch == 1 or x.stride(0) >= length * x.stride(1))
    )


def attention_in_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    statistics: BlockStatistics,
    plan: BlockPlan,
    options: Options,
    *,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`triton_autograd.mixed_attention` without gradients: its first result is `query`.

    Args:
        query: `[B, L, H, D]`, `rows_apart`, sharing no memory with any other argument.
    """
    lse = _attention_in_query(
        query,
        key,
        value,
        *forward_arguments(statistics, plan, options),
        need_lse,
    )
    return query, lse if need_lse else None
