"""SLA2 sparse-linear attention for Wan video pipelines in Diffusers.

Names are resolved on first use, so that `import sla_video` stays instant: it loads neither torch
nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sla_video.config import SLAConfig as SLAConfig
    from sla_video.config_compression import TokenCompression as TokenCompression
    from sla_video.kernels.api import exact_recall as exact_recall
    from sla_video.kernels.api import sla2_attention as sla2_attention
    from sla_video.kernels.router import Router as Router
    from sla_video.kernels.warmup import warmup as warmup
    from sla_video.pipelines.handle import SLAHandle as SLAHandle
    from sla_video.pipelines.patching import disable_sla as disable_sla
    from sla_video.pipelines.patching import enable_sla as enable_sla
    from sla_video.pipelines.recipe import Recipe as Recipe
    from sla_video.pipelines.recipe import load_recipe as load_recipe
    from sla_video.pipelines.recipe import save_recipe as save_recipe
    from sla_video.pipelines.router_files import load_routers as load_routers
    from sla_video.pipelines.router_files import save_routers as save_routers

__version__ = "0.1.0"

_MODULE_OF = {
    "Recipe": "sla_video.pipelines.recipe",
    "Router": "sla_video.kernels.router",
    "SLAConfig": "sla_video.config",
    "SLAHandle": "sla_video.pipelines.handle",
    "TokenCompression": "sla_video.config_compression",
    "disable_sla": "sla_video.pipelines.patching",
    "enable_sla": "sla_video.pipelines.patching",
    "exact_recall": "sla_video.kernels.api",
    "load_recipe": "sla_video.pipelines.recipe",
    "load_routers": "sla_video.pipelines.router_files",
    "save_recipe": "sla_video.pipelines.recipe",
    "save_routers": "sla_video.pipelines.router_files",
    "sla2_attention": "sla_video.kernels.api",
    "warmup": "sla_video.kernels.warmup",
}

__all__ = [
    "Recipe",
    "Router",
    "SLAConfig",
    "SLAHandle",
    "TokenCompression",
    "__version__",
    "disable_sla",
    "enable_sla",
    "exact_recall",
    "load_recipe",
    "load_routers",
    "save_recipe",
    "save_routers",
    "sla2_attention",
    "warmup",
]


if not TYPE_CHECKING:  # type checkers see the imports above, and so still catch a misspelt name

    def __getattr__(name: str) -> Any:
        module = _MODULE_OF.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(module), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
