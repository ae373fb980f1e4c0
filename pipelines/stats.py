"""What happened in the attention of each layer, as numbers to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sla_video.kernels.key_places import KeyOrder, take_tokens
from sla_video.kernels.options import Options
from sla_video.kernels.router import Router
from sla_video.kernels.routing import (
    block_counts,
    block_means,
    mass_logit,
    route,
    router_scores,
)


@dataclass(frozen=True, kw_only=True)
class LayerStats:
    """Averages of one layer since it was patched or since `reset_stats`.

    Attributes:
        name: for instance "transformer.blocks.0.attn1".
        calls: how often its self-attention ran, in eager mode; compiled blocks are not counted.
        dense_calls: how many of these ran with Diffusers' own attention.
        sparsity: mean share of the key blocks that were left to the linear branch, counting dense
            calls as 0; None before the first call.
        router_recall: mean softmax mass of the selected blocks by the router's own estimate; None
            unless it was recorded.
        recall: mean softmax mass of the selected tokens, exact; None unless it was recorded.
        relative_l1: mean over calls of |SLA2 - full attention| / |full attention|, in L1 and over
            all heads; None unless recorded per step, as the next two.
        oracle_density: smallest share of the key blocks that holds the mass asked for (95%).
        router_density: the share that holds it in the order of the router.
        pairs: with token compression, mean share of the query-key pairs that took part, counting
            full steps as 1; None without.
        cached_bytes: memory that token compression holds just now for the steps to come.
        seconds: total time of its self-attention with its projections. Device time on CUDA, time
            on the host elsewhere.
    """

    name: str
    calls: int
    dense_calls: int
    sparsity: float | None
    router_recall: float | None
    recall: float | None
    relative_l1: float | None = None
    oracle_density: float | None = None
    router_density: float | None = None
    pairs: float | None = None
    cached_bytes: int = 0
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SLAStats:
    """The layers of all patched transformers, and their averages."""

    layers: tuple[LayerStats, ...]

    @property
    def sparsity(self) -> float | None:
        """Mean over all calls of all layers, dense ones included; None before the first call."""
        return self._mean("sparsity")

    @property
    def recall(self) -> float | None:
        """Mean exact recall over the layers that recorded it, else None."""
        return self._mean("recall")

    @property
    def router_recall(self) -> float | None:
        """Mean recall by the routers' estimate over the layers that recorded it, else None."""
        return self._mean("router_recall")

    @property
    def seconds(self) -> float:
        """Time of all self-attention."""
        return sum(layer.seconds for layer in self.layers)

    def _mean(self, name: str) -> float | None:
        weighted = [
            (getattr(layer, name), layer.calls if name == "sparsity" else 1)
            for layer in self.layers
            if getattr(layer, name) is not None
        ]
        total = sum(weight for _, weight in weighted)
        return sum(value * weight for value, weight in weighted) / total if total else None

    def to_dict(self) -> dict[str, Any]:
        """The averages and the layers as JSON can hold them."""
        return {
            "sparsity": self.sparsity,
            "router_recall": self.router_recall,
            "recall": self.recall,
            "seconds": self.seconds,
            "layers": [dict(vars(layer)) for layer in self.layers],
        }


def router_estimate(
    query: torch.Tensor,
    key: torch.Tensor,
    router: Router | None,
    order: KeyOrder | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the router does with query, key `[B, L, H, D]`, and how much mass it thinks it keeps.

    Args:
        order: of the keys of each head.
        options: those of `sla2_attention`.

    Returns:
        the share of dropped key blocks, a scalar, and the softmax mass of the selected ones by
        the router's scores, `[B, H, M]` for M query blocks (a scalar 1 when nothing is dropped).
    """
    checked = Options(**{"tau": 1.0, **options})
    always = None
    if order is not None:
        key, always = take_tokens(key, order.places), order.always
    plan = route(query, key, router, checked, always)
    if plan.dropped is None:
        return key.new_zeros(()), key.new_ones(())
    # [B, H, N, D], [B, H, M, N]
    key_means = block_means(key, checked.block_k) - plan.key_mean[:, :, None]
    scores = router_scores(block_means(query, checked.block_q), key_means, router)
    log_mass = scores + block_counts(key.shape[1], checked.block_k, scores).log()
    mass = torch.sigmoid(mass_logit(log_mass, plan.dropped))
    # The logit says nothing of a row that drops no block.
    mass = torch.where(plan.dropped.any(-1), mass, torch.ones_like(mass))
    return plan.dropped.mean(), mass
