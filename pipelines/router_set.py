"""The routers of one pipeline, with all that is needed to know which model they fit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sla_video.config import SLAConfig
from sla_video.kernels.router import Router
from sla_video.pipelines.lora import LoraAdapter
from sla_video.pipelines.model_identity import ModelIdentity as ModelIdentity


@dataclass(frozen=True, kw_only=True)
class RouterSet:
    """Routers of all layers of a pipeline's transformers.

    Attributes:
        routers: "transformer.blocks.0.attn1" -> router, for each layer that is not dense.
        config: the settings that the routers were trained with.
        models: "transformer" (and "transformer_2") -> the kind of model.
        lora: "transformer" -> corrections of its projections, where they were trained.
        resolution: (frames, height, width) in pixels of the training, if known.
        metrics: whatever was measured; anything that JSON can hold.
    """

    routers: Mapping[str, Router]
    config: SLAConfig
    models: Mapping[str, ModelIdentity]
    lora: Mapping[str, LoraAdapter] = field(default_factory=dict)
    resolution: tuple[int, int, int] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def snapshot(
        cls,
        routers: Mapping[str, Router],
        *,
        config: SLAConfig,
        models: Mapping[str, ModelIdentity],
        lora: Mapping[str, LoraAdapter] | None = None,
        resolution: tuple[int, int, int] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> RouterSet:
        """A set of copies of `routers`, which further training leaves alone."""
        return cls(
            routers={name: copy.deepcopy(router) for name, router in routers.items()},
            config=config,
            models=dict(models),
            lora=dict(lora or {}),
            resolution=resolution,
            metrics=dict(metrics or {}),
        )

    def check_fits(self, component: str, model: ModelIdentity) -> None:
        """Raise a ValueError that names both sides unless the set was made for `model`."""
        made_for = self.models.get(component)
        if made_for is None:
            raise ValueError(
                f"the model has a {component!r}, but these routers are for "
                f"{', '.join(map(repr, self.models))}"
            )
        if made_for != model:
            raise ValueError(
                f"these routers were made for {made_for}, but the model's {component!r} is "
                f"{model}; they differ in {made_for.differences(model) or 'family'}"
            )
