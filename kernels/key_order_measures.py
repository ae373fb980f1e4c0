"""What orders of the keys are worth: how many blocks it takes to hold the softmax mass.

Blocks are taken in the order of the router's scores, after those that are always kept. Letters:
B batch, H heads, L tokens, D head dimension, N key blocks, m measured query blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sla_video.kernels.key_places import KeyOrder, leading_first, take_tokens
from sla_video.kernels.router import Router, router_heads
from sla_video.kernels.routing import block_means, compute_dtype, num_blocks, router_scores

# Weights formed at once, in elements: 256 MiB in float32, and a few copies of them.
_CHUNK_ELEMENTS = 64 * 2**20

_Name = TypeVar("_Name", bound=str)


class OrderMeasures(NamedTuple):
    """What an order of keys is worth, `[H]` each, mean over batch and query blocks.

    Attributes:
        density: share of the key blocks that reach the recall asked for.
        recall: softmax mass of as many blocks as were asked for.
    """

    density: Tensor
    recall: Tensor


@torch.no_grad()
def measure_orders(
    query: Tensor,
    key: Tensor,
    orders: Mapping[_Name, KeyOrder],
    router: Router | None = None,
    *,
    recall: float = 0.95,
    selected: int = 1,
    block_q: int = 128,
    block_k: int = 64,
    every: int = 1,
) -> dict[_Name, OrderMeasures]:
    """Measure orders by name, at one query block in `every`.

    The mass of a block is that of all queries of a query block. Costs full attention of these
    blocks once, whatever the number of orders.

    Args:
        query, key: `[B, L, H, D]`.
        recall: softmax mass that the density has to reach, in (0, 1].
        selected: blocks whose mass is `OrderMeasures.recall`.
    """
    batch, length, heads, _ = query.shape
    measured = num_blocks(num_blocks(length, block_q), every)
    some = max(1, _CHUNK_ELEMENTS // (batch * length * max(block_q, measured)))
    parts: dict[_Name, list[OrderMeasures]] = {name: [] for name in orders}
    for h in range(0, heads, some):
        own = slice(h, h + some)
        q, k = query[:, :, own], key[:, :, own]
        mass = _token_mass(q, k, block_q, every)
        their = None if router is None else router_heads(router, h, min(h + some, heads))
        query_means = block_means(q, block_q)[:, :, ::every]
        for name, order in orders.items():
            places, always = order.places[:, own], order.always[own]
            key_means = block_means(take_tokens(k, places), block_k)
            # All scores of a row shift alike with the mean key, but without it they are exact.
            smooth = key_means - key_means.mean(2, keepdim=True)
            scores = router_scores(query_means, smooth, their)
            best_first = leading_first(scores, always, scores.shape[-1])
            best_first = best_first.argsort(dim=-1, descending=True, stable=True)
            # [B, h, m, N]
            reached = _block_mass(mass, places, block_k).gather(-1, best_first).cumsum(-1)
            total = reached.shape[-1]
            needed = (reached < recall).sum(-1) + 1
            # All the mass may add up to less than a recall of one.
            needed = needed.clamp(max=total).maximum(always[:, None])
            density = needed.to(mass.dtype).mean((0, 2)) / total
            parts[name].append(OrderMeasures(density, reached[..., selected - 1].mean((0, 2))))
    return {
        name: OrderMeasures(*(torch.cat(field) for field in zip(*each, strict=True)))
        for name, each in parts.items()
    }


def _token_mass(query: Tensor, key: Tensor, block_q: int, every: int) -> Tensor:
    """Softmax weight `[B, h, m, L]` of each token, mean over the queries of a block."""
    dtype = compute_dtype(query.dtype)
    # [B, h, L, D]
    q, k = (part.transpose(1, 2).to(dtype) for part in (query, key))
    scaled = q * q.shape[-1] ** -0.5
    rows = [torch.softmax(part @ k.mT, -1).mean(2) for part in scaled.split(block_q, 2)[::every]]
    return torch.stack(rows, 2)


def _block_mass(mass: Tensor, places: Tensor, block_k: int) -> Tensor:
    """`[B, h, m, N]` from the mass of tokens `[B, h, m, L]`, blocks cut in that order."""
    ordered = mass.gather(-1, places.long()[:, :, None].expand_as(mass))
    missing = -mass.shape[-1] % block_k
    blocks: Tensor = F.pad(ordered, (0, missing)).unflatten(-1, (-1, block_k))
    return blocks.sum(-1)
