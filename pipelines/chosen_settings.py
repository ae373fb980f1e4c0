"""Which settings each transformer gets, from all that `enable_sla` was given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.recipe import Recipe, load_recipe
from sla_video.pipelines.router_files import load_routers
from sla_video.pipelines.router_set import RouterSet

_T = TypeVar("_T", RouterSet, Recipe)
# Settings that routers are trained for: other values would make them choose worse in silence.
_TRAINED_SETTINGS = (
    "block_q",
    "block_k",
    "alpha",
    "num_query_blocks",
    "router_per_head",
    "phi_k",
    "token_order",
)
# What does not change which choices of a recipe are good.
_BESIDE_A_RECIPE = ("dense_steps", "sparse_dtype", "impl")


def choose_settings(
    components: Iterable[str],
    routers: str | os.PathLike[str] | RouterSet | None,
    recipe: str | os.PathLike[str] | Recipe | None,
    config: SLAConfig | None,
    changes: Mapping[str, Any],
) -> tuple[dict[str, SLAConfig], RouterSet | None, Recipe | None]:
    """The settings of each component, and the routers and the recipe, read if they are files.

    Args:
        changes: single fields of `SLAConfig`, None for those to leave alone.

    Raises:
        TypeError, ValueError: what is given contradicts itself or cannot be read.
    """
    router_set = _read(routers, "routers", RouterSet, load_routers, "folder")
    read = _read(recipe, "recipe", Recipe, load_recipe, "file")
    given = {name: value for name, value in changes.items() if value is not None}
    if read is None:
        base = config or (router_set.config if router_set is not None else SLAConfig())
        found = dict.fromkeys(components, base.replace(**given))
    else:
        decided = [name for name in given if name not in _BESIDE_A_RECIPE]
        if config is not None or decided:
            name = "config" if config is not None else decided[0].replace("layer_", "")
            raise InputError(
                f"`{name}` is what a recipe decides: give one of the two, or change "
                f"`recipe.configs` of what `load_recipe` returned"
            )
        if router_set is None:
            router_set = read.router_set()
        found = {}
        for name in components:
            if name not in read.configs:
                known = ", ".join(map(repr, read.configs))
                raise InputError(f"the model has a {name!r}, but this recipe is for {known}")
            found[name] = read.configs[name].replace(**given)
    if router_set is not None:
        for settings in found.values():
            _check_trained_settings(router_set.config, settings)
    return found, router_set, read


def _read(
    given: Any, name: str, kind: type[_T], load: Callable[[Any], _T], place: str
) -> _T | None:
    """What a call was given under `name`, read if it is a file."""
    if given is None or isinstance(given, kind):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(
            f"`{name}` must be a {place}, a hub id, what `{load.__name__}` returned, or None, "
            f"got a {type(given).__name__}"
        )
    return load(given)


def _check_trained_settings(trained: SLAConfig, settings: SLAConfig) -> None:
    different = [
        f"{name} {getattr(trained, name)!r} against {getattr(settings, name)!r} here"
        for name in _TRAINED_SETTINGS
        if getattr(trained, name) != getattr(settings, name)
    ]
    if different:
        raise ValueError(
            f"these routers were trained with other settings: {', '.join(different)}; "
            "use the trained ones, or train routers for yours"
        )
