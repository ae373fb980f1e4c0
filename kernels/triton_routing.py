"""Routing from block means, for the Triton implementation.

The same decisions as `routing.route`, which reads Q and K itself: scores are a small matrix product
by torch, then one kernel turns each row of scores into the list of its `num_selected` best key
blocks and the logit of the softmax mass they hold:

    logit(p_m) = LSE_{n in sel(m)}(s_mn + log c_n) - LSE_{n not in sel(m)}(s_mn + log c_n)

One program owns one row and keeps it in registers. Floats, mapped to integers that sort as they do,
are bisected between the smallest and the largest score until K are left, or only equal ones to
choose from: those are taken from the left. Lists are ascending: programs that run at the same time
then walk the keys in the same order, and a shorter last block comes last.

Nothing is larger than the `[M, N]` scores of a head, and nothing waits for the device. The choice
has no gradient; the logit has one, from scores that are computed again:

    dlogit / ds_mn = softmax over sel(m) of (s + log c), negative and over the others where n is not
                     in sel(m), 0 in a row that drops nothing
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.options import Options, most_selected
from sla_video.kernels.router import Router
from sla_video.kernels.routing import block_counts, mass_logit, mix_alpha, select_top_p
from sla_video.kernels.triton_tiles import launch_on


class BlockPlan(NamedTuple):
    """What the kernels visit.

    Attributes:
        indices: `[B, H, M, K]` int32, distinct key blocks of each query block.
        counts: `[B, H, M]` int32, how many entries of a row to visit; None when all.
        alpha: `[B, H, M]` float32, weight of the sparse branch; None when nothing is dropped
            anywhere.
    """

    indices: Tensor
    counts: Tensor | None
    alpha: Tensor | None


@triton.jit(do_not_specialize=["num_k", "num_selected"])
def _select_top_k_kernel(
    scores_ptr, indices_ptr, logit_ptr, num_k, num_selected, log_tail, ROW: tl.constexpr
):
    """log_tail: log of the share of a whole block that the last one holds."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, ROW)
    exists = offs < num_k
    scores = tl.load(scores_ptr + row * num_k + offs, mask=exists, other=float("-inf"))
    # Negative floats sort backwards: flip all of their bits, and the sign of the others.
    bits = scores.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    order = tl.where(exists, order, 0)

    # At least K scores reach `low`, fewer reach `high`.
    low = tl.min(tl.where(exists, order, 0xFFFFFFFF), 0)
    high = tl.max(order, 0) + 1
    found = num_k
    while (found != num_selected) & (high - low > 1):
        middle = low + (high - low) // 2
        count = tl.sum((order >= middle).to(tl.int32), 0)
        enough = count >= num_selected
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        found = tl.where(enough, count, found)
    selected = (order >= low).to(tl.int32)
    if found != num_selected:
        equal = (order == low).to(tl.int32)
        above = selected - equal
        wanted = num_selected - tl.sum(above, 0)
        selected = above + equal * (tl.cumsum(equal, 0) <= wanted).to(tl.int32)
    position = tl.cumsum(selected, 0) - 1
    row_ptr = indices_ptr + row * num_selected
    tl.store(row_ptr + position, offs, mask=selected > 0)

    log_mass = scores + tl.where(offs == num_k - 1, log_tail, 0.0)
    kept_max = tl.max(tl.where(selected > 0, log_mass, float("-inf")), 0)
    dropped_max = tl.max(tl.where(selected > 0, float("-inf"), log_mass), 0)
    mass = tl.exp(log_mass - tl.where(selected > 0, kept_max, dropped_max))
    kept = tl.sum(tl.where(selected > 0, mass, 0.0), 0)
    dropped = tl.sum(tl.where(selected > 0, 0.0, mass), 0)
    tl.store(logit_ptr + row, kept_max + tl.log(kept) - dropped_max - tl.log(dropped))


def select_top_k(scores: Tensor, num_selected: int, log_tail: float = 0.0) -> tuple[Tensor, Tensor]:
    """The best key blocks of each row, and the logit of the softmax mass they hold.

    Args:
        scores: `[B, H, M, N]` float32.
        num_selected: K, from 1 to N - 1.
        log_tail: log of the share of a whole block that the last block holds.

    Returns:
        ascending indices `[B, H, M, K]` int32 and logits `[B, H, M]` float32. Of equal scores, the
        leftmost are taken.
    """
    total = scores.shape[-1]
    scores = scores.contiguous()
    shape = scores.shape[:-1]
    indices = torch.empty(*shape, num_selected, dtype=torch.int32, device=scores.device)
    logit = torch.empty(shape, dtype=torch.float32, device=scores.device)
    row = max(32, triton.next_power_of_2(total))
    with launch_on(scores):
        _select_top_k_kernel[(logit.numel(),)](
            scores,
            indices,
            logit,
            total,
            num_selected,
            log_tail,
            ROW=row,
            # 32 elements of the row in each thread.
            num_warps=min(16, max(1, row // 1024)),
        )
    return indices, logit


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    heads_first = queries.shape[:2]
    queries, keys = queries.flatten(0, 1), keys.flatten(0, 1)
    # The scale costs no pass of its own; the first argument is not read.
    scores = torch.baddbmm(
        queries.new_empty(1), queries, keys.mT, beta=0, alpha=queries.shape[-1] ** -0.5
    )
    return scores.view(*heads_first, *scores.shape[1:])


def _log_tail(length: int, block_k: int) -> float:
    """Log of the share of a whole block that the last one holds."""
    tail = length % block_k
    return math.log(tail / block_k) if tail else 0.0


@torch.library.custom_op("sla_video::select_blocks", mutates_args=())
def _select(
    queries: Tensor,
    keys: Tensor,
    length: int,
    block_k: int,
    most: int,
    top_p: float | None,
    floor: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The logit of the mass that is selected, indices, and counts (nothing for top-k).

    Scores are products of queries `[B, H, M, D]` and keys `[B, H, N, D]`, router features in
    float32.
    """
    scores, log_tail = _scores(queries, keys), _log_tail(length, block_k)
    if top_p is None:
        indices, logit = select_top_k(scores, most, log_tail)
        return logit, indices, indices.new_empty(0)
    # A shorter last block holds fewer tokens, hence less mass at the same score.
    scores[..., -1] += log_tail
    indices, valid = select_top_p(scores, top_p, floor, most)
    dropped = torch.ones_like(scores).scatter_(-1, indices, (~valid).to(scores.dtype))
    return mass_logit(scores, dropped), indices.int(), valid.sum(-1, dtype=torch.int32)


@_select.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    length: int,
    block_k: int,
    most: int,
    top_p: float | None,
    floor: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = queries.shape[:-1]
    indices = queries.new_empty(*shape, most, dtype=torch.int32)
    counts = indices.new_empty(0 if top_p is None else shape)
    return queries.new_empty(shape), indices, counts


def _remember_selection(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, keys, ctx.length, ctx.block_k, _, top_p, _ = inputs
    _, indices, counts = output
    ctx.save_for_backward(queries, keys, indices, None if top_p is None else counts)
    ctx.set_materialize_grads(False)


def _gradients_of_logit(
    ctx: Any, logit: Tensor | None, _indices: None, _counts: None
) -> tuple[Tensor | None, ...]:
    if logit is None:
        return (None,) * 7
    queries, keys, indices, counts = ctx.saved_tensors
    # Also where the backward pass runs under autocast.
    with torch.autocast(queries.device.type, enabled=False):
        log_mass = _scores(queries, keys) + block_counts(ctx.length, ctx.block_k, queries).log()
        rank = torch.arange(indices.shape[-1], device=indices.device)
        valid = torch.ones_like(indices) if counts is None else rank < counts[..., None]
        kept = torch.zeros_like(log_mass).scatter(-1, indices.long(), valid.to(log_mass.dtype))
        grad_kept = torch.softmax(log_mass.masked_fill(kept == 0, -torch.inf), -1)
        # In a row that drops nothing, both are the softmax over all: their difference is zero.
        partly = (kept == 0).any(-1, keepdim=True)
        grad_rest = torch.softmax(log_mass.masked_fill((kept != 0) & partly, -torch.inf), -1)
        grad_scores = (grad_kept - grad_rest) * (logit * queries.shape[-1] ** -0.5)[..., None]
        return grad_scores @ keys, grad_scores.mT @ queries, None, None, None, None, None


_select.register_autograd(_gradients_of_logit, setup_context=_remember_selection)


def plan_blocks(
    query_means: Tensor,
    key_means: Tensor,
    key_mean: Tensor,
    length: int,
    router: Router | None,
    options: Options,
) -> BlockPlan:
    """Select key blocks and mix weights from block means; hard selections only.

    Args:
        query_means, key_means: `[B, H, M, D]`, `[B, H, N, D]` float32, of keys as given.
        key_mean: `[B, H, D]` float32, mean key over the `length` tokens.
    """
    total = key_means.shape[-2]
    most = most_selected(options, total)
    if most == total and options.selection == "top_k":
        every = torch.arange(total, device=key_means.device, dtype=torch.int32)
        return BlockPlan(every.expand(*query_means.shape[:-1], total).contiguous(), None, None)
    queries, keys = query_means, key_means - key_mean[:, :, None]
    if router is not None:
        queries = queries @ router.query_proj.to(queries.dtype)
        keys = keys @ router.key_proj.to(keys.dtype)
    top_p = options.top_p if options.selection == "top_p" else None
    floor = min(options.min_selected, total)
    logit, indices, counts = _select(queries, keys, length, options.block_k, most, top_p, floor)
    alpha = mix_alpha(logit, router)
    if top_p is None:
        return BlockPlan(indices, None, alpha)
    return BlockPlan(indices, counts, alpha.masked_fill(counts == total, 1.0))
