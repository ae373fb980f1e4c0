"""Keeps a recipe to the video sizes that it was measured at."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sla_video.pipelines.errors import InputError
from sla_video.pipelines.families.family import Family
from sla_video.pipelines.recipe import Recipe


class RecipeGuard:
    """Forward pre-hook of a transformer, with keyword arguments: refuses other grids of tokens.

    Raises:
        InputError: the grid of that family's videos cannot be seen from outside.
    """

    def __init__(self, recipe: Recipe, family: Family) -> None:
        if family.token_places is None:
            raise InputError(
                f"recipes are for Wan's models, whose grid of tokens can be checked, not for "
                f"{family.name}: pass its settings as `config`"
            )
        # Compiled code follows a look into a tuple, but not the making of the message.
        self._grids = recipe.grids
        self._refused = recipe.refusal("another grid of tokens")
        self._recipe = recipe

    def __call__(self, transformer: Any, args: Any, kwargs: Any) -> None:
        hidden_states = args[0] if args else kwargs.get("hidden_states")
        if hidden_states is None or hidden_states.dim() != 5:
            return  # the transformer will say so
        patches = transformer.config.patch_size
        t, h, w = (size // p for size, p in zip(hidden_states.shape[2:], patches, strict=True))
        if (t, h, w) in self._grids:
            return
        if torch.compiler.is_compiling():
            raise InputError(self._refused)
        self._recipe.check_grid((t, h, w))

    def install(self, transformer: nn.Module) -> Any:
        """Put the hook in place; returns what removes it."""
        return transformer.register_forward_pre_hook(self, with_kwargs=True)
