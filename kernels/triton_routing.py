"""Routing from block means, for the Triton implementation.

The same decisions as `routing.route`, which reads Q and K itself: `triton_selection` turns the
features of query and key blocks into the list of the `num_selected` best key blocks of each query
block and the logit of the softmax mass they hold. Nothing is larger than the `[M, N]` scores of a
head, and nothing waits for the device. The choice has no gradient; the logit has one, from scores
that are computed again:

    dlogit / ds_mn = softmax over sel(m) of (s + log c), negative and over the others where n is not
                     in sel(m), 0 in a row that drops nothing
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sla_video.kernels.options import Options, most_selected
from sla_video.kernels.router import Router
from sla_video.kernels.routing import mass_logit, mix_alpha, select_top_p
from sla_video.kernels.triton_backward_routing import mass_logit_backward
from sla_video.kernels.triton_selection import block_scores, select_rows
from sla_video.kernels.triton_tiles import padded_row


class BlockPlan(NamedTuple):
    """What the kernels visit.

    Attributes:
        indices: `[B, H, M, K]` int32, distinct key blocks of each query block.
        counts: `[B, H, M]` int32, how many entries of a row to visit; None when all.
        alpha: `[B, H, M]` float32, weight of the sparse branch; None when nothing is dropped
            anywhere.
        dropped: `[B, H, M, N]`, then columns of zeros to a multiple of 16; 1 where a key block is
            dropped, else 0. None like alpha.
    """

    indices: Tensor
    counts: Tensor | None
    alpha: Tensor | None
    dropped: Tensor | None


def _log_tail(length: int, block_k: int) -> float:
    """Log of the share of a whole block that the last one holds."""
    tail = length % block_k
    return math.log(tail / block_k) if tail else 0.0


@torch.library.custom_op("sla_video::select_blocks", mutates_args=())
def _select(
    queries: Tensor,
    keys: Tensor,
    key_mean: Tensor | None,
    length: int,
    block_k: int,
    most: int,
    top_p: float | None,
    floor: int,
    need_alpha: bool,
    dtype: torch.dtype,
    always: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The logit of the mass that is selected, its sigmoid, indices, counts, and the table.

    Scores are products of queries `[B, H, M, D]` and keys `[B, H, N, D]`, router features, the
    latter less key_mean `[B, H, D]`. The sigmoid is empty unless wanted, counts are for top-p. The
    table is that of `BlockPlan`. always `[H]`: leading blocks that are selected before all others.
    """
    total = keys.shape[-2]
    scores, log_tail = block_scores(queries, keys, key_mean), _log_tail(length, block_k)
    if top_p is None:
        indices, logit, alpha, table = select_rows(
            scores, total, most, log_tail, dtype=dtype, need_alpha=need_alpha, always=always
        )
        no_alpha, no_counts = logit.new_empty(0), indices.new_empty(0)
        return logit, no_alpha if alpha is None else alpha, indices, no_counts, table
    table = torch.ones_like(scores, dtype=dtype)
    table[..., total:] = 0
    scores = scores[..., :total]
    # A shorter last block holds fewer tokens, hence less mass at the same score.
    scores[..., -1] += log_tail
    indices, valid = select_top_p(scores, top_p, floor, most, always)
    table.scatter_(-1, indices, (~valid).to(dtype))
    logit = mass_logit(scores, table[..., :total].to(scores.dtype))
    counts = valid.sum(-1, dtype=torch.int32)
    alpha = logit.sigmoid() if need_alpha else logit.new_empty(0)
    return logit, alpha, indices.int(), counts, table


@_select.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    key_mean: Tensor | None,
    length: int,
    block_k: int,
    most: int,
    top_p: float | None,
    floor: int,
    need_alpha: bool,
    dtype: torch.dtype,
    always: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = queries.shape[:-1]
    indices = queries.new_empty(*shape, most, dtype=torch.int32)
    counts = indices.new_empty(0 if top_p is None else shape)
    logit = queries.new_empty(shape, dtype=torch.float32)
    table = queries.new_empty(*shape, padded_row(keys.shape[-2]), dtype=dtype)
    return logit, logit.new_empty(shape if need_alpha else 0), indices, counts, table


def _remember_selection(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, keys, key_mean, ctx.length, ctx.block_k, _, top_p, _, ctx.need_alpha, *_ = inputs
    _, alpha, indices, counts, _ = output
    ctx.save_for_backward(
        queries, keys, key_mean, alpha, indices, None if top_p is None else counts
    )
    ctx.set_materialize_grads(False)


def _gradients_of_logit(
    ctx: Any, grad: Tensor | None, grad_alpha: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    queries, keys, key_mean, alpha, indices, counts = ctx.saved_tensors
    if ctx.need_alpha and grad_alpha is not None:
        through_alpha = grad_alpha * alpha * (1 - alpha)
        grad = through_alpha if grad is None else grad + through_alpha
    if grad is None:
        return (None,) * 11
    gradients = mass_logit_backward(
        queries, keys, key_mean, indices, counts, grad, ctx.length, ctx.block_k
    )
    # Rows of the gradient of the scores sum to zero: key_mean has none.
    return *gradients, *(None,) * 9


_select.register_autograd(_gradients_of_logit, setup_context=_remember_selection)


def plan_blocks(
    query_means: Tensor,
    key_means: Tensor,
    key_mean: Tensor,
    length: int,
    router: Router | None,
    options: Options,
    dtype: torch.dtype,
    always: Tensor | None = None,
) -> BlockPlan:
    """Select key blocks and mix weights from block means; hard selections only.

    Args:
        query_means, key_means: `[B, H, M, D]`, `[B, H, N, D]` float32, of keys as given.
        key_mean: `[B, H, D]` float32, mean key over the `length` tokens.
        dtype: of the table of what is dropped, that of the values.
        always: `[H]` int32, leading key blocks of each head that are selected before all others.
    """
    total = key_means.shape[-2]
    most = most_selected(options, total)
    if most == total and options.selection != "top_p":
        every = torch.arange(total, device=key_means.device, dtype=torch.int32)
        indices = every.expand(*query_means.shape[:-1], total).contiguous()
        return BlockPlan(indices, None, None, None)
    queries, keys = query_means, key_means
    if router is not None:
        queries = queries @ router.query_proj.to(queries.dtype)
        keys = (keys - key_mean[:, :, None]) @ router.key_proj.to(keys.dtype)
    top_p = options.top_p if options.selection == "top_p" else None
    logit, alpha, indices, counts, table = _select(
        queries,
        keys,
        key_mean if router is None else None,
        length,
        options.block_k,
        most,
        top_p,
        min(options.min_selected, total),
        router is None,
        dtype,
        always,
    )
    if router is not None:
        alpha = mix_alpha(logit, router)
    if top_p is None:
        return BlockPlan(indices, None, alpha, table)
    return BlockPlan(indices, counts, alpha.masked_fill(counts == total, 1.0), table)
