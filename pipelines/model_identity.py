"""Which kind of transformer something was made for: routers, or a recipe. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


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
        from sla_video.pipelines.families.registry import family_of

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
