"""The routers of one pipeline, with all that is needed to know which model they fit."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sla_video.config import SLAConfig
from sla_video.kernels.router import Router
from sla_video.pipelines.families.registry import family_of
from sla_video.pipelines.lora import LoraAdapter


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """The kind of transformer that routers were made for.

    Attributes:
        family: its class in Diffusers.
        fields: the fields of its configuration that matter.
    """

    family: str
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, transformer: nn.Module) -> ModelIdentity:
        """The identity of a Diffusers transformer; TypeError if it is of no supported class."""
        fields = family_of(transformer).identity_fields
        config: Mapping[str, Any] = transformer.config  # type: ignore[assignment]
        present = {name: config[name] for name in fields if name in config}
        # Through JSON, so that a tuple equals the list that comes back from a file.
        return cls(family=type(transformer).__name__, fields=json.loads(json.dumps(present)))

    @property
    def config_hash(self) -> str:
        """16 hexadecimal digits that stand for `family` and `fields`."""
        text = json.dumps([self.family, dict(self.fields)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        fields = self.fields
        return (
            f"{self.family} of {fields.get('num_layers')} layers with "
            f"{fields.get('num_attention_heads')} heads x {fields.get('attention_head_dim')} "
            f"(configuration {self.config_hash})"
        )

    def differences(self, other: ModelIdentity) -> str:
        """The fields in which the two differ, as "name: mine / theirs"."""
        names = sorted({*self.fields, *other.fields})
        return ", ".join(
            f"{name}: {self.fields.get(name)} / {other.fields.get(name)}"
            for name in names
            if self.fields.get(name) != other.fields.get(name)
        )


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
