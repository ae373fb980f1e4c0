"""Counts what happens in the attention of a layer, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sla_video.kernels.api import exact_recall
from sla_video.kernels.context import Context
from sla_video.kernels.key_places import KeyOrder, take_tokens
from sla_video.kernels.measures import check_settings, measure_losses
from sla_video.kernels.router import Router
from sla_video.pipelines.recording import CallLog, ForwardClock
from sla_video.pipelines.stats import LayerStats

# Finished timers are folded into the sum once this many are waiting.
_MAX_PENDING = 256


class LayerRecorder:
    """Collects the numbers of one layer.

    Nothing here waits for the device: tensors stay where they are until `read`.
    """

    def __init__(self) -> None:
        self.router_recall = False
        self.recall = False
        # Stays readable when the recording has ended.
        self.log: CallLog | None = None
        self.logging = False
        self.reset()

    @property
    def needs_lse(self) -> bool:
        """Whether `observe_output` is to be called, with the LSE of the selected part."""
        return self.recall or self.logging

    def reset(self) -> None:
        """Forget everything that was collected."""
        if self.log is not None:
            self.log.reset()
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
        if self.log is not None and self.logging:
            self.log.begin()
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
        if name == "sparsity" and self.log is not None and self.logging:
            self.log.note_sparsity(value)

    @torch.no_grad()
    def observe_output(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        router: Router | None,
        *,
        block_q: int,
        block_k: int,
        context: tuple[torch.Tensor, torch.Tensor] | None = None,
        context_mask: torch.Tensor | None = None,
        key_order: KeyOrder | None = None,
        **_: Any,
    ) -> None:
        """Compare the output of one call with full attention. Does not wait for the device.

        Args:
            query, key, value, output: `[B, L, H, D]`.
            lse: `[B, H, L]` of the selected part.
            block_q, block_k, context, context_mask, key_order: of `sla2_attention`; others are
                ignored.
        """
        if self.recall:
            self.add("recall", exact_recall(query, key, lse))
        if self.log is None or not self.logging:
            return
        if key_order is not None:
            # Densities are of blocks of keys.
            key, value = (take_tokens(part, key_order.places) for part in (key, value))
        losses = measure_losses(
            query,
            key,
            value,
            output,
            lse,
            router,
            block_q=block_q,
            block_k=block_k,
            coverage=self.log.coverage,
            most_blocks=self.log.most_blocks,
            context=None if context is None else Context(*context, context_mask),
        )
        self.log.note(losses)
        if not self.recall:
            self.add("recall", losses.recall)
        self.add("relative_l1", losses.error.sum() / losses.magnitude.sum())
        self.add("oracle_density", losses.oracle_density)
        self.add("router_density", losses.router_density)

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
            relative_l1=self._mean("relative_l1"),
            oracle_density=self._mean("oracle_density"),
            router_density=self._mean("router_density"),
            pairs=self._mean("pairs"),
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


@contextmanager
def averaging_recall(recorders: Iterable[LayerRecorder], *, exact: bool) -> Iterator[None]:
    """Within the block, average the recall by the routers' estimate, and the `exact` one."""
    before = [(recorder, recorder.router_recall, recorder.recall) for recorder in recorders]
    for recorder, *_ in before:
        recorder.router_recall, recorder.recall = True, exact
    try:
        yield
    finally:
        for recorder, router_recall, recall in before:
            recorder.router_recall, recorder.recall = router_recall, recall


@contextmanager
def logging_calls(
    recorders: Mapping[str, LayerRecorder],
    transformers: Iterable[nn.Module],
    *,
    coverage: float,
    most_blocks: int | None,
) -> Iterator[None]:
    """Within the block, keep a log of every call, anew for each block.

    Raises:
        ValueError: a recording is running, or a setting is out of range.
    """
    if any(recorder.logging for recorder in recorders.values()):
        raise ValueError("a recording per step is running already: end it before the next")
    check_settings(coverage, most_blocks)
    clock = ForwardClock()
    hooks = [t.register_forward_pre_hook(clock, with_kwargs=True) for t in transformers]
    for recorder in recorders.values():
        recorder.log = CallLog(clock, coverage=coverage, most_blocks=most_blocks)
        recorder.logging = True
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for recorder in recorders.values():
            recorder.logging = False
