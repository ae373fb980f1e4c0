"""What happened in the attention of each layer, counted without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sla_video.kernels.options import Options
from sla_video.kernels.router import Router
from sla_video.kernels.routing import (
    block_counts,
    block_means,
    mass_logit,
    route,
    router_scores,
)

# Finished timers are folded into the sum once this many are waiting.
_MAX_PENDING = 256


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
        seconds: total time of its self-attention with its projections. Device time on CUDA, time
            on the host elsewhere.
    """

    name: str
    calls: int
    dense_calls: int
    sparsity: float | None
    router_recall: float | None
    recall: float | None
    seconds: float


class LayerRecorder:
    """Collects the numbers of one layer.

    Nothing here waits for the device: tensors stay where they are until `read`.
    """

    def __init__(self) -> None:
        self.router_recall = False
        self.recall = False
        self.reset()

    def reset(self) -> None:
        """Forget everything that was collected."""
        self.calls = 0
        self.dense_calls = 0
        self._seconds = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def call(self, device: torch.device, *, dense: bool) -> Iterator[None]:
        """Count and time one call of the layer."""
        self.calls += 1
        self.dense_calls += dense
        if dense:
            self.add("sparsity", 0.0)
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._pending.append((begin, end))
        if len(self._pending) > _MAX_PENDING:
            self._fold(wait=False)

    def __getstate__(self) -> dict[str, Any]:
        # Device timers can be neither copied nor saved with the model that holds this.
        return {**vars(self), "_pending": []}

    def add(self, name: str, value: torch.Tensor | float) -> None:
        """Add one observation; of a tensor, its mean."""
        if isinstance(value, torch.Tensor):
            value = value.detach().float().mean()
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, name: str) -> LayerStats:
        """The averages so far. Waits for the device."""
        self._fold(wait=True)
        return LayerStats(
            name=name,
            calls=self.calls,
            dense_calls=self.dense_calls,
            sparsity=self._mean("sparsity"),
            router_recall=self._mean("router_recall"),
            recall=self._mean("recall"),
            seconds=self._seconds,
        )

    def _mean(self, name: str) -> float | None:
        count = self._counts.get(name, 0)
        return float(self._sums[name]) / count if count else None

    def _fold(self, *, wait: bool) -> None:
        waiting = []
        for begin, end in self._pending:
            if wait:
                end.synchronize()
            if end.query():
                self._seconds += begin.elapsed_time(end) / 1000
            else:
                waiting.append((begin, end))
        self._pending = waiting


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
    query: torch.Tensor, key: torch.Tensor, router: Router | None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the router does with query, key `[B, L, H, D]`, and how much mass it thinks it keeps.

    Args:
        options: those of `sla2_attention`.

    Returns:
        the share of dropped key blocks, a scalar, and the softmax mass of the selected ones by
        the router's scores, `[B, H, M]` for M query blocks (a scalar 1 when nothing is dropped).
    """
    checked = Options(**{"tau": 1.0, **options})
    plan = route(query, key, router, checked)
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
