"""Token compression in a transformer: which layers, in which steps, and what of guidance shares it.

Steps are counted by the scheduler of the pipeline, for each transformer from its own first one.
With `full_steps=2` and `refresh_every=4`:

    step     0      1        2      3      4      5        6 ...
             full   refresh  short  short  short  refresh  short

Where tokens are counted (`pairs=None`), the full step before a refresh counts. Calls within a step
are branches of guidance: each ranks its own tokens, and the first says how many are kept. A layer
that has nothing put aside for a short step (another shape, a step that a cache of Diffusers
skipped) runs full. The host waits for numbers that the device made a forward ago, never for those
of the running one: see `later`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sla_video.config import SLAConfig
from sla_video.config_compression import TokenCompression
from sla_video.kernels.token_scores import COUNT_MULTIPLE
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.families.family import Family
from sla_video.pipelines.hidden_drift import DriftMeter, quiet_layers
from sla_video.pipelines.layer_compression import (
    NOT_PARALLEL,
    ForwardPlace,
    LayerCompression,
    Role,
)
from sla_video.pipelines.parallel import Ulysses
from sla_video.pipelines.pipeline_steps import PipelineSteps
from sla_video.pipelines.processor import SLAAttnProcessor
from sla_video.pipelines.token_order import RASTER, order_on

# More calls in one step than any guidance makes are no steps of a video: nothing is put aside.
_MOST_BRANCHES = 8


class TransformerCompression:
    """Forward hooks of one transformer that tell its layers what to do, until `remove`.

    Args:
        processors: of the layers, by name.
        steps: of the pipeline.
    """

    def __init__(
        self, settings: SLAConfig, processors: Mapping[str, SLAAttnProcessor], steps: PipelineSteps
    ) -> None:
        assert settings.compression is not None
        self._settings = settings.compression
        self._token_order = settings.token_order
        self._dense_steps = settings.dense_steps
        self._steps = steps
        self._place = ForwardPlace()
        self._processors = dict(processors)
        self._layers = {
            name: LayerCompression(self._settings, self._place, processor)
            for name, processor in processors.items()
        }
        self._named = _named_layers(self._settings, list(processors))
        self._meter = DriftMeter(list(processors)) if self._named is None else None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._schedule: Any = None
        self._begin(0)

    @classmethod
    def of(
        cls,
        settings: SLAConfig,
        family: Family,
        transformer: nn.Module,
        processors: Mapping[str, SLAAttnProcessor],
        pipe: Any,
    ) -> TransformerCompression | None:
        """None where nothing is to be compressed.

        Raises:
            ValueError: compression does not go with the model, the pipeline or other settings.
        """
        compression = settings.compression
        if compression is None:
            return None
        if family.token_places is None:
            raise ValueError(
                f"`compression` is not supported in {family.name}, whose tokens are not those of "
                "one grid: use compression=None"
            )
        if pipe is None:
            raise ValueError(
                "`compression` needs the pipeline, whose scheduler counts the steps: pass the "
                "pipeline, or compression=None"
            )
        if Ulysses.of(getattr(transformer, "_parallel_config", None)) is not None:
            raise ValueError(NOT_PARALLEL)
        sparse = any(processor.sparsity is not None for processor in processors.values())
        if compression.mode == "kv" and sparse:
            if settings.alpha == "per_block":
                raise ValueError(
                    "`compression` with mode='kv' runs queries in runs, in which a table of "
                    "alpha='per_block' has no place: use mode='qkv', or alpha='adaptive'"
                )
            if COUNT_MULTIPLE % settings.block_q:
                raise ValueError(
                    f"`compression` with mode='kv' keeps multiples of {COUNT_MULTIPLE} tokens, "
                    f"which block_q={settings.block_q} does not divide: use mode='qkv'"
                )
        steps = PipelineSteps.needed_by("compression", pipe, "compression=None")
        return cls(settings, processors, steps)

    def install(self, transformer: nn.Module) -> TransformerCompression:
        """Put the hooks in place."""
        for name, processor in self._processors.items():
            processor.compression = self._layers[name]
        self._handles = [
            transformer.register_forward_pre_hook(self._enter, with_kwargs=True),
            transformer.register_forward_hook(self._leave),
        ]
        if self._meter is not None:
            self._handles += self._meter.install(transformer)
        return self

    def remove(self) -> None:
        """Leave the transformer as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for processor in self._processors.values():
            processor.compression = None
        for layer in self._layers.values():
            layer.forget()

    def __getstate__(self) -> dict[str, Any]:
        # Of the generation that runs; a copy of the model begins its own.
        return {**vars(self), "_schedule": None}

    def _begin(self, step: int) -> None:
        """A generation begins at `step`: with two transformers, not always at 0."""
        self._start = self._step = step
        self._branch = -1
        self._chosen = self._named
        for layer in self._layers.values():
            layer.forget()

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def _enter(self, transformer: Any, args: Any, kwargs: Any) -> None:
        """Before a forward: find out which one it is, and give the layers their roles."""
        step, schedule = self._steps.now(transformer), self._steps.schedule(transformer)
        known = None if self._schedule is None else self._schedule()
        if known is not schedule or step < self._step:
            self._schedule = weakref.ref(schedule)
            self._begin(step)
            if step > 0:
                # The transformer of the earlier steps has done its work.
                for other in self._steps.others(transformer):
                    _forget(other)
        self._branch = self._branch + 1 if step == self._step else 0
        self._step = step
        given = {**dict(zip(("hidden_states",), args, strict=False)), **kwargs}
        hidden_states = given.get("hidden_states")
        if hidden_states is None:
            return  # the transformer will say so
        sizes = zip(hidden_states.shape[2:], transformer.config.patch_size, strict=True)
        t, h, w = (size // patch for size, patch in sizes)
        place = self._place
        place.grid, place.branch = (t, h, w), self._branch
        place.last = step == self._steps.count(transformer) - 1
        place.order = (
            None
            if self._token_order == RASTER
            else order_on(hidden_states, self._token_order, t, h, w)
        )
        if self._meter is not None and self._branch == 0 and step == self._start:
            self._meter.begin()
        self._give_roles(step - self._start)

    def _give_roles(self, step: int) -> None:
        """What the layers do in this `step` of the transformer."""
        counted = self._settings.pairs is None
        # The last full step of those at the start; dense ones show us no queries.
        first = self._settings.full_steps - 1
        first = max(first, self._dense_steps - self._start + int(counted))
        self._place.window, since = divmod(step - first, self._settings.refresh_every)
        role: Role | None = "short" if since else "refresh"
        if step < first:
            role = "count" if counted and step == first - 1 else None
        elif role == "refresh" and self._place.last:
            role = None
        if self._branch >= _MOST_BRANCHES:
            role = None
        if role is not None and self._chosen is None and step > 0:
            self._chosen = self._choose()
        for name, layer in self._layers.items():
            if self._place.last and role != "short":
                layer.release()
            layer.role = role if self._chosen is None or name in self._chosen else None
            if layer.role is None and not torch.compiler.is_compiling():
                self._processors[name].recorder.add("pairs", 1.0)

    def _choose(self) -> list[str]:
        assert self._meter is not None
        drifts = self._meter.read()
        if drifts is None:
            raise InputError(
                "the layers to compress are chosen by how much they change the hidden state, "
                "which could not be measured in compiled or skipped blocks: name them in "
                "`TokenCompression(layers=…)`"
            )
        return quiet_layers(drifts, self._settings.quantile)

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def _leave(self, _transformer: nn.Module, _args: Any, _output: Any) -> None:
        if self._meter is not None:
            self._meter.end()


def _forget(transformer: nn.Module) -> None:
    """Drop what the layers of another transformer have put aside."""
    for module in transformer.modules():
        if isinstance(module, SLAAttnProcessor) and module.compression is not None:
            module.compression.forget()


def _named_layers(settings: TokenCompression, names: list[str]) -> list[str] | None:
    """The layers that `settings` name; None where they are to be measured."""
    if settings.layers is None:
        return None
    for layer in settings.layers:
        if not -len(names) <= layer < len(names):
            raise ValueError(
                f"`compression.layers` names layer {layer}, but the transformer has {len(names)} "
                f"layers (0 to {len(names) - 1}, or -{len(names)} to -1)"
            )
    return [names[layer] for layer in settings.layers]
