"""What `enable_sla` gives back, and the record of what it changed in one transformer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sla_video.config import SLAConfig
from sla_video.kernels.router import Router
from sla_video.pipelines.first_steps import FirstStepsDense
from sla_video.pipelines.layer_recorder import averaging_recall, logging_calls
from sla_video.pipelines.lora import (
    LoraAdapter,
    detach_lora,
    hide_lora,
    lora_of,
    lora_parameters,
    switch_lora,
)
from sla_video.pipelines.lora_guard import LoraGuard
from sla_video.pipelines.processor import DenseSwitch, SLAAttnProcessor
from sla_video.pipelines.recipe_guard import RecipeGuard
from sla_video.pipelines.recording import Recording, read_logs
from sla_video.pipelines.router_set import ModelIdentity, RouterSet
from sla_video.pipelines.stats import SLAStats
from sla_video.pipelines.token_compression import TransformerCompression
from sla_video.pipelines.token_order import TokenOrder

logger = logging.getLogger("sla_video")

# Where the record of a patch lies on the transformer.
_PATCH_ATTRIBUTE = "_sla_patch"


class TransformerPatch:
    """The patch of one transformer: its processors, by the name of their attention module.

    Kept on the transformer itself, so that a copy of the transformer takes it along.
    """

    def __init__(self, layers: Mapping[str, nn.Module], switch: DenseSwitch) -> None:
        self.layers = dict(layers)
        self.switch = switch
        self.processors: dict[str, SLAAttnProcessor] = {}
        self._hooks: list[
            torch.utils.hooks.RemovableHandle | TokenOrder | TransformerCompression
        ] = []
        self._hide_lora: Any = None
        # What the transformer had when the patch was taken off.
        self.removed_lora: LoraAdapter | None = None

    @staticmethod
    def of(transformer: nn.Module) -> TransformerPatch | None:
        """The patch that `transformer` carries, if any."""
        patch = transformer.__dict__.get(_PATCH_ATTRIBUTE)
        return patch if isinstance(patch, TransformerPatch) else None

    def install(
        self,
        transformer: nn.Module,
        processors: Mapping[str, SLAAttnProcessor],
        hook: FirstStepsDense | None,
        others: Iterable[TokenOrder | TransformerCompression | RecipeGuard | None] = (),
    ) -> None:
        """Put the processors in place. Everything that can fail has to be checked before."""
        self.processors = dict(processors)
        for name, processor in self.processors.items():
            # Not `set_processor`, which the attention of Mochi does not have.
            self.layers[name].processor = processor
        # Before the step decides whether our LoRA has an effect, it has to be there.
        hooks = [LoraGuard(transformer)] if lora_parameters(transformer) else []
        orders = [p.key_order for p in self.processors.values() if p.key_order is not None]
        # One for all layers.
        counters = [order.steps for order in orders[:1]]
        for each in (*hooks, hook, *counters):
            if each is not None:
                self._hooks.append(transformer.register_forward_pre_hook(each))
        for other in others:
            if other is not None:
                self._hooks.append(other.install(transformer))
        self._hide_lora = hide_lora(transformer)
        setattr(transformer, _PATCH_ATTRIBUTE, self)

    def remove(self, transformer: nn.Module) -> None:
        """Put the very same original processors back."""
        for name, processor in self.processors.items():
            layer: Any = self.layers[name]
            if layer.processor is processor:
                # Not `set_processor`, which would announce that trained weights are lost.
                del layer.processor
                layer.processor = processor.original
            else:
                logger.warning(
                    "%s has been given another processor since `enable_sla`: it keeps that", name
                )
        for hook in self._hooks:
            hook.remove()
        self._hide_lora.remove()
        self.removed_lora = lora_of(transformer)
        detach_lora(transformer)
        delattr(transformer, _PATCH_ATTRIBUTE)


class SLAHandle:
    """SLA attention as enabled in a pipeline or a transformer. Made by `enable_sla`.

    As a context manager it removes itself at the end of the block.

    Attributes:
        config: the settings in use; of two transformers that differ in them, those of the first.
        configs: "transformer" (and "transformer_2") -> its settings.
    """

    def __init__(
        self,
        transformers: Mapping[str, nn.Module],
        identities: Mapping[str, ModelIdentity],
        configs: Mapping[str, SLAConfig],
    ) -> None:
        self.configs = dict(configs)
        self.config = next(iter(self.configs.values()))
        self._transformers = dict(transformers)
        self._identities = dict(identities)
        self._patches = {
            component: patch
            for component, transformer in transformers.items()
            if (patch := TransformerPatch.of(transformer)) is not None
        }

    @property
    def active(self) -> bool:
        """Whether the patch is still in place, in one transformer at least."""
        return bool(self._in_place())

    def _in_place(self) -> dict[str, nn.Module]:
        return {
            component: transformer
            for component, transformer in self._transformers.items()
            if TransformerPatch.of(transformer) is self._patches[component]
        }

    @property
    def processors(self) -> dict[str, SLAAttnProcessor]:
        """The processors by name, for instance "transformer.blocks.0.attn1"."""
        return {
            f"{component}.{name}": processor
            for component, patch in self._patches.items()
            for name, processor in patch.processors.items()
        }

    @property
    def routers(self) -> dict[str, Router]:
        """The routers of all layers that are not dense, by the names of `processors`.

        They are in none of the transformer's `parameters()`: give these to the optimizer, and, for
        data parallelism, to the module that is wrapped.
        """
        return {
            name: processor.router
            for name, processor in self.processors.items()
            if processor.router is not None
        }

    def router_set(
        self,
        *,
        resolution: tuple[int, int, int] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> RouterSet:
        """A copy of the routers, and of LoRA beside them, with all that `save_routers` writes.

        Args:
            resolution: (frames, height, width) in pixels that the routers were trained at.
            metrics: anything that JSON can hold.

        Raises:
            ValueError: two transformers have different settings, which a set has no room for.
        """
        if any(config != self.config for config in self.configs.values()):
            raise ValueError(
                "the transformers have settings of their own, from a recipe, and files of routers "
                "hold one for both: keep the routers that the recipe names, and the recipe"
            )
        return RouterSet.snapshot(
            self.routers,
            config=self.config,
            models=self._identities,
            lora=self._lora(),
            resolution=resolution,
            metrics=metrics,
        )

    def _lora(self) -> dict[str, LoraAdapter]:
        in_place = self._in_place()
        found = {
            component: lora_of(in_place[component]) if component in in_place else patch.removed_lora
            for component, patch in self._patches.items()
        }
        return {component: adapter for component, adapter in found.items() if adapter is not None}

    def stats(self) -> SLAStats:
        """What each layer did since it was patched or since `reset_stats`. Waits for the device.

        In context parallelism these are the means over the heads of this rank.
        """
        return SLAStats(
            layers=tuple(
                replace(
                    processor.recorder.read(name),
                    cached_bytes=0
                    if processor.compression is None
                    else processor.compression.bytes,
                )
                for name, processor in self.processors.items()
            )
        )

    def reset_stats(self) -> None:
        """Start counting anew."""
        for processor in self.processors.values():
            processor.recorder.reset()

    @contextmanager
    def recording(
        self,
        *,
        exact_recall: bool = False,
        per_step: bool = False,
        coverage: float = 0.95,
        most_blocks: int | None = None,
    ) -> Iterator[SLAHandle]:
        """Within the block, record the recall as the routers estimate it. No output changes by it.

        Args:
            exact_recall: also the true recall, at the price of full attention scores.
            per_step: also recall, error and density for `recorded`, at the price of full
                attention in float32.
            coverage: softmax mass that the densities have to reach, in (0, 1].
            most_blocks: with `per_step`, measure this many query blocks, evenly spread; None: all.
        """
        recorders = {name: processor.recorder for name, processor in self.processors.items()}
        with ExitStack() as stack:
            if per_step:
                stack.enter_context(
                    logging_calls(
                        recorders,
                        self._transformers.values(),
                        coverage=coverage,
                        most_blocks=most_blocks,
                    )
                )
            stack.enter_context(averaging_recall(recorders.values(), exact=exact_recall))
            yield self

    def recorded(self) -> Recording:
        """What the last recording with `per_step` holds. Waits for the device.

        Raises:
            ValueError: nothing has been recorded.
        """
        logs = {name: processor.recorder.log for name, processor in self.processors.items()}
        found = {name: log for name, log in logs.items() if log is not None}
        if not any(log.calls for log in found.values()):
            raise ValueError(
                "nothing has been recorded: run the pipeline within "
                "`with handle.recording(per_step=True):`"
            )
        return read_logs(found)

    @contextmanager
    def dense(self) -> Iterator[SLAHandle]:
        """Within the block all layers run Diffusers' own attention, for instance as a teacher.

        LoRA that came with the routers is off there: this is the model as it was.
        """
        with ExitStack() as stack:
            for patch in self._patches.values():
                stack.enter_context(patch.switch.forced())
            self._follow_switches()
            try:
                yield self
            finally:
                stack.close()
                self._follow_switches()

    def _follow_switches(self) -> None:
        """LoRA belongs to sparse attention: it is off where the transformer runs dense."""
        for component, transformer in self._in_place().items():
            switch_lora(transformer, on=not self._patches[component].switch.dense)

    def remove(self) -> None:
        """Put the original processors back. Routers and LoRA stay readable in this handle.

        Raises:
            ValueError: the patch is not in place any more.
        """
        if not self.active:
            raise ValueError("SLA attention has already been removed from this model")
        for component, transformer in self._in_place().items():
            self._patches[component].remove(transformer)

    def __enter__(self) -> SLAHandle:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.active:
            self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return f"SLAHandle({', '.join(self._transformers)}: {len(self.processors)} layers, {state})"
