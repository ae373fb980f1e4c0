"""The routers that a recipe was measured with: where they are, and whether these are they."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.model_source import EMBEDDED_MODEL, embedded_folder

if TYPE_CHECKING:
    from sla_video.pipelines.router_set import RouterSet


@dataclass(frozen=True, kw_only=True)
class RecipeRouters:
    """Routers by name.

    Attributes:
        source: a folder, or a hub id.
        sha256: of their weights.
    """

    source: str
    sha256: str

    @classmethod
    def of(cls, source: str, routers: RouterSet) -> RecipeRouters:
        """Routers that were loaded from `source`."""
        return cls(source=source, sha256=digest(routers))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], folder: Path) -> RecipeRouters:
        """The inverse of `to_dict`."""
        source = str(values["source"])
        if source == EMBEDDED_MODEL:
            source = str(_embedded())
        elif (folder / source).expanduser().is_dir() or source.startswith("."):
            source = str(folder / source)
        return cls(source=source, sha256=str(values["sha256"]))

    def to_dict(self, folder: Path) -> dict[str, str]:
        """As a recipe in `folder` holds it: what lies on this machine by the way from there."""
        source, found = self.source, Path(self.source).expanduser()
        if found.is_dir():
            embedded = _embedded().is_dir() and found.samefile(_embedded())
            way = os.path.relpath(found.resolve(), folder.resolve())
            # With a dot, no folder looks like a hub id.
            source = EMBEDDED_MODEL if embedded else os.path.join(".", way)
        return {"source": source, "sha256": self.sha256}

    def load(self, configs: Mapping[str, SLAConfig]) -> RouterSet:
        """Read them, for a recipe with these settings.

        Raises:
            ValueError: they are not there, are others, or were trained in another token order.
        """
        from sla_video.pipelines.router_files import load_routers

        routers = load_routers(self.source)
        if digest(routers) != self.sha256:
            raise InputError(
                f"the routers in {self.source} are not those that the recipe was measured with: "
                "bring those back, or tune a recipe with these"
            )
        for component, config in configs.items():
            if config.token_order != routers.config.token_order:
                raise InputError(
                    f"the recipe has the token order {config.token_order!r} in {component!r}, but "
                    f"its routers in {self.source} were trained in {routers.config.token_order!r}"
                )
        return routers


def digest(routers: RouterSet) -> str:
    """SHA-256 of all weights and their names, as hexadecimal digits."""
    tensors = {
        f"{name}.{key}": tensor
        for name, router in routers.routers.items()
        for key, tensor in router.state_dict().items()
    }
    for component, adapter in routers.lora.items():
        tensors |= {f"{component}.lora.{key}": tensor for key, tensor in adapter.tensors.items()}
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        # LoRA may be in 16 bits, which NumPy does not have.
        found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _embedded() -> Path:
    return embedded_folder() / "routers"
