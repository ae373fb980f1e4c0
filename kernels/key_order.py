"""An order of the keys for each head, found from what its queries attend to (PBS-Attn, 2510.21270).

Which keys share a block is free to choose for each head and each call. Keys that many queries want
can be brought together, so that fewer blocks hold them. What that does to a head with other habits
is much harm: a head that looks around itself needs its neighbours together. So an order is chosen
for each head, offline, by the share of blocks that it needs (`choose_key_orders`).

A language model's last block of queries says which keys matter. Video attention has no last block:
probes are spread over all queries. Queries keep their order, for blocks of them share a selection.
Orders are lists of places and K and V are not copied: `sla2_with_key_order` says how an
implementation finds its keys. Letters: B batch, H heads, L tokens, D head dimension, M query
blocks, N key blocks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sla_video.kernels.options import num_selected
from sla_video.kernels.reference import (
    block_scores,
    linear_branch,
    mix_weight,
    sparse_branch,
    top_k_mask,
)
from sla_video.kernels.router import Router
from sla_video.kernels.token_order import inverse_order

KeyOrderKind = Literal["identity", "segment_sort", "hot_peel"]


class KeyOrder(NamedTuple):
    """Where the keys of each head are.

    Attributes:
        places: `[B, H, L]` int64; block n of head h holds the tokens `places[b, h, n * block_k:]`.
        always: `[H]` int64: leading blocks that every query keeps.
    """

    places: Tensor
    always: Tensor


def key_importance(
    query: Tensor, key: Tensor, probes: int = 128, *, rows: Tensor | None = None
) -> Tensor:
    """Mean softmax weight `[B, H, L]` of each key, over `probes` queries evenly spread.

    Args:
        query, key: `[B, L, H, D]`.
        rows: places `[P]` of other queries to probe with.
    """
    length = query.shape[1]
    if rows is None:
        count = min(probes, length)
        # The middle of each of `count` equal runs.
        rows = ((torch.arange(count, device=query.device) + 0.5) * length / count).long()
    q, k = query[:, rows].transpose(1, 2), key.transpose(1, 2)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = q.to(dtype) @ k.to(dtype).mT / query.shape[-1] ** 0.5
    return torch.softmax(logits, -1).mean(2)


def make_key_order(
    kind: KeyOrderKind,
    importance: Tensor,
    *,
    block_k: int = 64,
    segment: int = 512,
    hot_share: float = 0.02,
) -> KeyOrder:
    """The order of one kind for all heads.

    Args:
        kind: "identity"; "segment_sort": by falling importance within each run of `segment`
            tokens; "hot_peel": the most important `hot_share` of the keys, rounded up to blocks,
            before all others, which keep their order.
        importance: `[B, H, L]` of `key_importance`.

    Raises:
        ValueError: an unknown kind, or numbers out of range.
    """
    if kind not in get_args(KeyOrderKind):
        kinds = ", ".join(get_args(KeyOrderKind))
        raise ValueError(f"`kind` must be one of {kinds}, got {kind!r}")
    if segment < 1 or not 0 < hot_share <= 1:
        raise ValueError(
            f"`segment` must be at least 1 and `hot_share` in (0, 1], got {segment} and {hot_share}"
        )
    heads, length = importance.shape[1:]
    always = torch.zeros(heads, dtype=torch.int64, device=importance.device)
    falling = importance.argsort(dim=-1, descending=True, stable=True)
    if kind == "identity":
        places = torch.arange(length, device=importance.device).expand(importance.shape)
    elif kind == "segment_sort":
        places = falling.gather(-1, (falling // segment).argsort(dim=-1, stable=True))
    else:
        blocks = -(-max(1, round(hot_share * length)) // block_k)
        cold = torch.ones(importance.shape, dtype=torch.int64, device=importance.device)
        cold.scatter_(-1, falling[..., : blocks * block_k], 0)
        places = cold.argsort(dim=-1, stable=True)
        always += blocks
    return KeyOrder(places, always)


def choose_key_orders(
    query: Tensor,
    key: Tensor,
    router: Router | None = None,
    *,
    recall: float = 0.95,
    least_gain: float = 0.02,
    block_q: int = 128,
    block_k: int = 64,
    every: int = 4,
    segment: int = 512,
    hot_share: float = 0.02,
) -> tuple[list[KeyOrderKind], dict[KeyOrderKind, Tensor]]:
    """For each head the kind that needs the least density, on captured queries and keys.

    Args:
        query, key: `[B, L, H, D]`, as captured.
        recall: softmax mass to reach.
        least_gain: share of the density that a kind other than "identity" has to save.
        every: looks at one query block in so many.

    Returns:
        the kinds of the heads, and the density `[H]` that each kind needs.
    """
    importance = key_importance(query, key)
    densities: dict[KeyOrderKind, Tensor] = {}
    for kind in get_args(KeyOrderKind):
        order = make_key_order(
            kind, importance, block_k=block_k, segment=segment, hot_share=hot_share
        )
        densities[kind] = density_at_recall(
            query, key, order, router, recall=recall, block_q=block_q, block_k=block_k, every=every
        )
    limit = densities["identity"] * (1 - least_gain)
    chosen: list[KeyOrderKind] = []
    for head in range(query.shape[2]):
        best = min(densities, key=lambda kind: float(densities[kind][head]))
        chosen.append(best if densities[best][head] <= limit[head] else "identity")
    return chosen, densities


def density_at_recall(
    query: Tensor,
    key: Tensor,
    order: KeyOrder,
    router: Router | None = None,
    *,
    recall: float = 0.95,
    block_q: int = 128,
    block_k: int = 64,
    every: int = 1,
) -> Tensor:
    """Share `[H]` of the key blocks that reach `recall`, best scores of the router first.

    Mean over batch and query blocks. The mass of a block is that of all queries of a query block.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    # [B, H, L, D]
    q, k = (part.transpose(1, 2).to(dtype) for part in (query, key))
    ordered = _take(k - k.mean(2, keepdim=True), order.places)
    scores = _ranked(block_scores(q, ordered, router, block_q, block_k), order.always)
    masses = []
    for rows in q.split(block_q, 2)[::every]:
        weights = torch.softmax(rows @ ordered.mT / q.shape[-1] ** 0.5, -1).mean(2)
        masses.append(torch.stack([part.sum(-1) for part in weights.split(block_k, -1)], -1))
    # [B, H, M', N]
    mass = torch.stack(masses, 2)
    best_first = scores[:, :, ::every].argsort(dim=-1, descending=True, stable=True)
    reached = mass.gather(-1, best_first).cumsum(-1)
    needed = (reached < recall).sum(-1) + 1
    # All the mass may add up to less than a recall of one.
    needed = needed.clamp(min=1, max=mass.shape[-1]).maximum(order.always[:, None])
    return needed.to(dtype).mean((0, 2)) / mass.shape[-1]


def sla2_with_key_order(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: KeyOrder,
    router: Router | None = None,
    *,
    sparsity: float = 0.95,
    block_q: int = 128,
    block_k: int = 64,
) -> Tensor:
    """SLA2 whose key blocks hold the keys that `order` says: the specification.

    Only block means and the list of a block's tokens know of the order. Keys and values stay where
    they are, and so do the queries, so that the output `[B, L, H, D]` needs no way back.

    Raises:
        ValueError: more blocks are always kept than `sparsity` leaves.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    # [B, H, L, D]
    q, k, v = (part.transpose(1, 2).to(dtype) for part in (query, key, value))
    smooth = k - k.mean(2, keepdim=True)
    scores = block_scores(q, _take(smooth, order.places), router, block_q, block_k)
    count = num_selected(sparsity, scores.shape[-1])
    if int(order.always.max()) > count:
        raise ValueError(
            f"{int(order.always.max())} key blocks are always kept, but sparsity {sparsity} keeps "
            f"{count} of {scores.shape[-1]}: peel off a smaller share, or lower the sparsity"
        )
    keep = top_k_mask(_ranked(scores, order.always), count)
    tokens = torch.tensor([part.shape[2] for part in k.split(block_k, 2)]).to(scores)
    log_mass = torch.log_softmax(scores + tokens.log(), -1)
    log_keep, log_drop = keep.to(dtype).log(), (~keep).to(dtype).log()
    alpha = mix_weight(log_mass, log_keep, log_drop, router)
    # The block of each token, where it lies: [B, H, L].
    flat = order.places.flatten(0, 1)
    block_of = torch.stack([inverse_order(row) for row in flat]).view_as(order.places) // block_k
    outputs = []
    for m, rows in enumerate(q.split(block_q, 2)):
        on_tokens = log_keep[:, :, m].gather(-1, block_of)[:, :, None]
        drop = log_drop[:, :, m].exp().gather(-1, block_of)[:, :, None]
        sparse, _ = sparse_branch(rows, k, v, on_tokens, block_k, "bf16")
        linear = linear_branch(torch.softmax(rows, -1), torch.softmax(smooth, -1), v, drop)
        a = alpha[:, :, m, None, None]
        outputs.append(a * sparse + (1 - a) * linear)
    return torch.cat(outputs, 2).transpose(1, 2).to(query.dtype)


def join_key_orders(kinds: list[KeyOrderKind], orders: dict[KeyOrderKind, KeyOrder]) -> KeyOrder:
    """The order in which head h is of kind `kinds[h]`."""
    places = [orders[kind].places[:, head] for head, kind in enumerate(kinds)]
    always = [orders[kind].always[head] for head, kind in enumerate(kinds)]
    return KeyOrder(torch.stack(places, 1), torch.stack(always))


def _take(x: Tensor, places: Tensor) -> Tensor:
    """The tokens of `[B, H, L, D]` in that order."""
    return x.gather(2, places[..., None].expand_as(x))


def _ranked(scores: Tensor, always: Tensor) -> Tensor:
    """Scores `[B, H, M, N]` with those of blocks that are always kept above all others."""
    block = torch.arange(scores.shape[-1], device=scores.device)
    # [H, 1, N]
    kept = (block < always[:, None])[:, None]
    return scores.masked_fill(kept, torch.inf)
