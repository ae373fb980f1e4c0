"""Which key blocks each query block attends to, and how much the sparse branch weighs.

Letters: B batch, H heads, L tokens, D head dimension, M query blocks, N key blocks, K blocks kept.
Nothing here synchronises with the host, so the fast implementations can share it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.kernels.key_places import leading_first
from sla_video.kernels.options import Options, most_selected
from sla_video.kernels.router import Router


class Routing(NamedTuple):
    """Outcome of the router for every query block.

    Attributes:
        indices: `[B, H, M, K]` int64, the key blocks to visit, each at most once.
        valid: `[B, H, M, K]` bool, False where an entry of `indices` is to be skipped;
            None when all count.
        dropped: `[B, H, M, N]`, 1 on the blocks left to the linear branch and 0 elsewhere;
            None when nothing is dropped anywhere.
        alpha: `[B, H, M]` weight of the sparse branch; None when nothing is dropped anywhere.
        key_mean: `[B, H, D]` mean key over tokens.
    """

    indices: Tensor
    valid: Tensor | None
    dropped: Tensor | None
    alpha: Tensor | None
    key_mean: Tensor


def num_blocks(length: int, block: int) -> int:
    """Number of blocks that cover `length` tokens; the last may be shorter."""
    return -(-length // block)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums and softmaxes for tensors of `dtype`: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_counts(length: int, block: int, like: Tensor) -> Tensor:
    """Tokens of each block, `[N]`, in the dtype and on the device of `like`."""
    start = torch.arange(0, length, block, device=like.device)
    return (length - start).clamp(max=block).to(like.dtype)


def block_means(x: Tensor, block: int) -> Tensor:
    """Mean of each block of tokens of x `[B, L, H, D]`, as `[B, H, N, D]`.

    A shorter last block is averaged over the tokens it has.
    """
    dtype = compute_dtype(x.dtype)
    whole = x.shape[1] // block * block
    parts = []
    if whole:
        parts.append(x[:, :whole].unflatten(1, (-1, block)).mean(2, dtype=dtype))
    if whole < x.shape[1]:
        parts.append(x[:, whole:].mean(1, keepdim=True, dtype=dtype))
    means = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    return means.transpose(1, 2)


def router_scores(query_means: Tensor, key_means: Tensor, router: Router | None) -> Tensor:
    """`(Qb Wq)(Kb Wk)^T / sqrt(D)`, `[B, H, M, N]` from block means `[B, H, M, D]`, `[B, H, N, D]`.

    Without a router the projections are the identity.
    """
    if router is not None:
        query_means = query_means @ router.query_proj.to(query_means.dtype)
        key_means = key_means @ router.key_proj.to(key_means.dtype)
    scores: Tensor = (query_means * query_means.shape[-1] ** -0.5) @ key_means.mT
    return scores


def select_top_p(
    log_mass: Tensor,
    top_p: float,
    min_selected: int,
    max_selected: int,
    always: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fewest blocks whose softmax mass reaches `top_p`, at least a floor and at most a cap.

    Args:
        log_mass: `[B, H, M, N]`, block mass up to a constant factor per row, in logs.
        always: `[H]`, leading blocks that come before all others and are always valid.

    Returns:
        indices and validity, `[B, H, M, max_selected]`, best block first.
    """
    mass = torch.softmax(log_mass, -1)
    if always is None:
        best, indices = mass.topk(max_selected, dim=-1)
    else:
        indices = leading_first(mass, always, max_selected).topk(max_selected, dim=-1).indices
        best = mass.gather(-1, indices)
    rank = torch.arange(max_selected, device=mass.device)
    # A block is needed as long as those before it fall short of top_p; the first always is.
    valid = (best.cumsum(-1) - best < top_p) | (rank < min_selected)
    if always is not None:
        valid |= rank < always[:, None, None]
    return indices, valid


def mass_logit(log_mass: Tensor, dropped: Tensor) -> Tensor:
    """`logit(p)` for p the softmax mass on the selected blocks, `[B, H, M]`.

    From two log-sum-exps, because p itself rounds to 1 long before its logit overflows.
    A row that drops nothing gets 0 (its alpha is 1 whatever this says).
    """
    is_dropped = dropped > 0
    selected = log_mass.masked_fill(is_dropped, -torch.inf).logsumexp(-1)
    none_dropped = ~is_dropped.any(-1, keepdim=True)
    rest = log_mass.masked_fill(~(is_dropped | none_dropped), -torch.inf).logsumexp(-1)
    return selected - rest


def mix_alpha(logit_p: Tensor, router: Router | None) -> Tensor:
    """Weight of the sparse branch, `[B, H, M]`, from `logit(p)` of the same shape."""
    if router is None:
        return torch.sigmoid(logit_p)
    if router.alpha == "adaptive":
        scale = router.alpha_scale.to(logit_p.dtype)[:, None]
        bias = router.alpha_bias.to(logit_p.dtype)[:, None]
        return torch.sigmoid(scale * logit_p + bias)
    alpha = torch.sigmoid(router.alpha_table.to(logit_p.dtype))
    num_query_blocks = logit_p.shape[-1]
    if alpha.shape[-1] != num_query_blocks:
        alpha = F.interpolate(alpha[None], size=num_query_blocks, mode="linear")[0]
    return alpha.expand_as(logit_p)


def route(
    query: Tensor,
    key: Tensor,
    router: Router | None,
    options: Options,
    always: Tensor | None = None,
) -> Routing:
    """Select key blocks and mix weights for query, key `[B, L, H, D]`, hard selections only.

    `always`: `[H]`, leading key blocks of each head that are selected before any others.
    """
    length, block_k = key.shape[1], options.block_k
    key_means = block_means(key, block_k)
    counts = block_counts(length, block_k, key_means)
    key_mean = (key_means * counts[:, None]).sum(2) / length
    key_means = key_means - key_mean[:, :, None]
    scores = router_scores(block_means(query, options.block_q), key_means, router)
    # A shorter last block holds fewer tokens, hence less mass at the same score.
    log_mass = scores + counts.log()
    total = scores.shape[-1]
    most = most_selected(options, total)

    if options.selection == "top_p":
        floor = min(options.min_selected, total)
        indices, valid = select_top_p(log_mass, options.top_p, floor, most, always)
        dropped = torch.ones_like(scores).scatter(-1, indices, (~valid).to(scores.dtype))
        alpha = mix_alpha(mass_logit(log_mass, dropped), router)
        alpha = torch.where(dropped.any(-1), alpha, torch.ones_like(alpha))
        return Routing(indices, valid, dropped, alpha, key_mean)
    if most == total:
        every = torch.arange(total, device=scores.device).expand(scores.shape)
        return Routing(every, None, None, None, key_mean)
    ranks = scores if always is None else leading_first(scores, always, most)
    indices = ranks.topk(most, dim=-1, sorted=False).indices
    dropped = torch.ones_like(scores).scatter(-1, indices, 0.0)
    alpha = mix_alpha(mass_logit(log_mass, dropped), router)
    return Routing(indices, None, dropped, alpha, key_mean)
