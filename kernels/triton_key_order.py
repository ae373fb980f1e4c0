"""The kernels after routing where heads have an order of their keys; without gradients.

K and V stay where they are: the kernels that read them ask `places` for the rows of a block. K is
read through it by the pass over its blocks and by the one that makes low-bit copies and states,
which are then in the new order; only what is not low-bit is looked up again by the kernel that
attends. For gradients K and V are moved instead, in front of the operator that has them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sla_video.kernels.context import needs_gradients
from sla_video.kernels.key_places import KeyOrder, take_tokens
from sla_video.kernels.options import Options, PhiK, SparseDtype
from sla_video.kernels.router import Router
from sla_video.kernels.triton_forward import attend_all, forward_arguments
from sla_video.kernels.triton_routing import BlockPlan
from sla_video.kernels.triton_statistics import BlockStatistics


def places_or_move(
    query: Tensor, key: Tensor, value: Tensor, router: Router | None, order: KeyOrder
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Key, value and the places `[B, H, L]` int32 to read them at; where gradients are wanted,
    both moved and None."""
    learned = () if router is None else (router.query_proj, router.key_proj, *_mix(router))
    if needs_gradients(query, key, value, *learned):
        return take_tokens(key, order.places), take_tokens(value, order.places), None
    return key, value, order.places.to(torch.int32).contiguous()


def _mix(router: Router) -> tuple[Tensor, ...]:
    if router.alpha == "per_block":
        return (router.alpha_table,)
    return router.alpha_scale, router.alpha_bias


@torch.library.custom_op("sla_video::ordered_attention", mutates_args=())
def _ordered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """O `[B, L, H, D]` and the log-sum-exp `[B, H, L]`, empty unless `need_lse`."""
    out, lse, _ = attend_all(
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
        places=places,
    )
    return out, lse


@_ordered_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, places: Tensor, key_mean: Tensor, *more: Any
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    lse = (batch, heads, length) if more[-1] else (0,)
    return query.new_empty(query.shape), key_mean.new_empty(lse)


def ordered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    statistics: BlockStatistics,
    plan: BlockPlan,
    options: Options,
    *,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """What `mixed_attention` gives, of keys and values at `places` `[B, H, L]` int32."""
    out, lse = _ordered_attention(
        query,
        key,
        value,
        places,
        *forward_arguments(statistics, plan, options),
        need_lse,
    )
    return out, lse if need_lse else None
