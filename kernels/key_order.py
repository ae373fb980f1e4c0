"""An order of the keys for each head, found from what its queries attend to (PBS-Attn, 2510.21270).

Which keys share a block is free to choose for each head and each call. Keys that many queries want
can be brought together, so that fewer blocks hold them. What that does to a head with other habits
is much harm: a head that looks around itself needs its neighbours together. So an order is chosen
for each head, offline, by the share of blocks that it needs (`choose_key_orders`).

A language model's last block of queries says which keys matter. Video attention has no last block:
probes are spread over all queries. Queries keep their order, for blocks of them share a selection.
Orders are lists of places, which the operator takes (`key_places`). Letters: B batch, H heads,
L tokens, D head dimension, M query blocks, N key blocks.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from sla_video.kernels.key_order_measures import measure_orders
from sla_video.kernels.key_places import KeyOrder
from sla_video.kernels.router import Router
from sla_video.kernels.routing import compute_dtype

KeyOrderKind = Literal["identity", "segment_sort", "hot_peel"]

# Share of the keys that "hot_peel" moves.
HOT_SHARE = 0.02
# Logits of one chunk of `key_importance`, in elements: 256 MiB in float32.
_CHUNK_ELEMENTS = 64 * 2**20


@torch.no_grad()
def key_importance(
    query: Tensor, key: Tensor, probes: int = 128, *, rows: Tensor | None = None
) -> Tensor:
    """Mean softmax weight `[B, H, L]` of each key, over `probes` queries evenly spread.

    Of 16-bit inputs the logits are rounded, which is enough to sort by. Memory is bounded.

    Args:
        query, key: `[B, L, H, D]`.
        rows: places `[P]` of other queries to probe with.
    """
    batch, length, heads, head_dim = query.shape
    if rows is None:
        count = min(probes, length)
        # The middle of each of `count` equal runs.
        rows = ((torch.arange(count, device=query.device) + 0.5) * length / count).long()
    # [B, H, probes, D] and [B, H, D, L]
    q = query.index_select(1, rows).transpose(1, 2) * head_dim**-0.5
    k = key.permute(0, 2, 3, 1)
    some = max(1, _CHUNK_ELEMENTS // (batch * rows.numel() * length))
    importance = torch.empty(
        batch, heads, length, dtype=compute_dtype(query.dtype), device=query.device
    )
    for h in range(0, heads, some):
        logits = q[:, h : h + some] @ k[:, h : h + some]
        importance[:, h : h + some] = torch.softmax(logits, -1, dtype=importance.dtype).mean(2)
    return importance


def hot_blocks(length: int, block_k: int, hot_share: float, most: int | None = None) -> int:
    """How many leading blocks "hot_peel" fills, at most `most`."""
    blocks = -(-max(1, round(hot_share * length)) // block_k)
    return blocks if most is None else min(blocks, most)


def make_key_order(
    kind: KeyOrderKind,
    importance: Tensor,
    *,
    block_k: int = 64,
    segment: int = 512,
    hot_share: float = HOT_SHARE,
    most_hot: int | None = None,
) -> KeyOrder:
    """The order of one kind for all heads.

    Args:
        kind: "identity"; "segment_sort": by falling importance within each run of `segment`
            tokens; "hot_peel": the most important `hot_share` of the keys, rounded up to blocks,
            before all others; both they and the others keep their order.
        importance: `[B, H, L]` of `key_importance`.
        most_hot: at most so many blocks of hot keys.

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
    always = torch.zeros(heads, dtype=torch.int32, device=importance.device)
    if kind == "identity":
        token = torch.arange(length, dtype=torch.int32, device=importance.device)
        places = token.expand(importance.shape)
    elif kind == "segment_sort":
        places = _sorted_in_segments(importance, segment)
    else:
        blocks = hot_blocks(length, block_k, hot_share, most_hot)
        places = _hot_first(importance, min(blocks * block_k, length))
        always += blocks
    return KeyOrder(places, always)


def _sorted_in_segments(importance: Tensor, segment: int) -> Tensor:
    """Places `[B, H, L]` by falling importance in each segment; equal ones keep their order."""
    length = importance.shape[-1]
    count = -(-length // segment)
    padded = F.pad(importance, (0, count * segment - length), value=-torch.inf)
    runs = padded.unflatten(-1, (count, segment))
    best_first = runs.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(0, count * segment, segment, device=importance.device)
    # What is not there comes last, and is cut off.
    places: Tensor = (best_first + first[:, None]).flatten(-2)[..., :length]
    return places.to(torch.int32)


def _hot_first(importance: Tensor, count: int) -> Tensor:
    """Places `[B, H, L]` of the `count` most important keys and then of the others."""
    hot = torch.zeros(importance.shape, dtype=torch.int32, device=importance.device)
    hot.scatter_(-1, importance.topk(count, sorted=False).indices, 1)
    before = hot.cumsum(-1, dtype=torch.int32)
    token = torch.arange(hot.shape[-1], dtype=torch.int32, device=hot.device)
    position = torch.where(hot > 0, before - 1, count + token - before)
    return torch.empty_like(hot).scatter_(-1, position.long(), token.expand(hot.shape))


def choose_key_orders(
    query: Tensor,
    key: Tensor,
    router: Router | None = None,
    *,
    least_gain: float = 0.02,
    segment: int = 512,
    hot_share: float = HOT_SHARE,
    block_k: int = 64,
    every: int = 4,
    **settings: Any,
) -> tuple[list[KeyOrderKind], dict[KeyOrderKind, Tensor]]:
    """For each head the kind that needs the least density, on captured queries and keys.

    Args:
        query, key: `[B, L, H, D]`, as captured.
        least_gain: share of the density that a kind other than "identity" has to save.
        settings: of `measure_orders`, as `every` and block_k.

    Returns:
        the kinds of the heads, and the density `[H]` that each kind needs.
    """
    importance = key_importance(query, key)
    orders = {
        kind: make_key_order(
            kind, importance, block_k=block_k, segment=segment, hot_share=hot_share
        )
        for kind in get_args(KeyOrderKind)
    }
    measures = measure_orders(query, key, orders, router, block_k=block_k, every=every, **settings)
    densities = {kind: measure.density for kind, measure in measures.items()}
    return least_density(densities, least_gain), densities


def least_density(densities: dict[KeyOrderKind, Tensor], least_gain: float) -> list[KeyOrderKind]:
    """For each head the kind of the least density, "identity" where that saves too little."""
    table = {kind: density.tolist() for kind, density in densities.items()}
    chosen: list[KeyOrderKind] = []
    for head, limit in enumerate(table["identity"]):
        best = min(table, key=lambda kind: table[kind][head])
        chosen.append(best if table[best][head] <= limit * (1 - least_gain) else "identity")
    return chosen


def join_key_orders(kinds: list[KeyOrderKind], orders: dict[KeyOrderKind, KeyOrder]) -> KeyOrder:
    """The order in which head h is of kind `kinds[h]`."""
    places = [orders[kind].places[:, head] for head, kind in enumerate(kinds)]
    always = [orders[kind].always[head] for head, kind in enumerate(kinds)]
    return KeyOrder(torch.stack(places, 1), torch.stack(always))
