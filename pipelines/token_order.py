"""The tokens of a transformer in another order, from patch embedding to output projection.

What lies between does not know where a token is, except through the rotary embedding and, in some
models, a timestep of each token: these are put into the same order. So every layer sees the tokens
in the new order, nothing is copied in any of them, and dense attention gives what it always gave.
Done by hooks on modules of the given instance. Letters: B batch, C channels, L tokens, D head
dimension; a grid is (T, H, W) tokens.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sla_video.kernels import token_order
from sla_video.kernels.token_order import Grid
from sla_video.pipelines.families.family import Family, TokenPlaces
from sla_video.pipelines.parallel import Ulysses

RASTER = "raster"


class TokenOrder:
    """Hooks that keep the tokens of one transformer in an order, until `remove`.

    Args:
        name: as `SLAConfig.token_order` takes it.
        family: of the transformer.

    Raises:
        ValueError: the tokens of that family cannot be reordered.
    """

    def __init__(self, name: str, family: Family) -> None:
        if family.token_places is None:
            raise ValueError(
                f"token_order={name!r} is not supported in {family.name}, whose layers need to "
                f"know where a token is: use {RASTER!r}"
            )
        self._name = name
        self._places: TokenPlaces = family.token_places
        # Of the forward that is running.
        self._grid: Grid = (1, 1, 1)
        self._orders: Tensor | None = None
        self._parallel: Any = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @classmethod
    def of(cls, name: str, family: Family) -> TokenOrder | None:
        """None for raster order, which takes no hooks."""
        return None if name == RASTER else cls(name, family)

    def install(self, transformer: nn.Module) -> TokenOrder:
        """Put the hooks in place."""
        places = self._places
        hooks = [transformer.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for patches in places.patches:
            if hasattr(transformer, patches):
                module = transformer.get_submodule(patches)
                hooks.append(module.register_forward_hook(self._reorder_patches))
        rotary, output = map(transformer.get_submodule, (places.rotary, places.output))
        hooks.append(rotary.register_forward_hook(self._reorder_rotary))
        hooks.append(output.register_forward_hook(self._restore))
        self._handles = hooks
        return self

    def remove(self) -> None:
        """Leave the transformer as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> TokenOrder:
        return self

    def __exit__(self, *_error: object) -> None:
        self.remove()

    def _enter(self, transformer: Any, args: Any, kwargs: Any) -> Any:
        """Learn the grid; reorder timesteps `[B, L]`."""
        given = {**dict(zip(("hidden_states", "timestep"), args, strict=False)), **kwargs}
        hidden_states, timestep = given.get("hidden_states"), given.get("timestep")
        if hidden_states is None:
            return None  # the transformer will say so
        sizes = zip(hidden_states.shape[2:], transformer.config.patch_size, strict=True)
        t, h, w = (size // patch for size, patch in sizes)
        self._grid = (t, h, w)
        self._orders = _orders(hidden_states, self._name, t, h, w)
        self._parallel = getattr(transformer, "_parallel_config", None)
        if timestep is None or timestep.ndim != 2:
            return None
        timestep = timestep.index_select(1, self._order(timestep))
        if "timestep" in kwargs:
            return args, {**kwargs, "timestep": timestep}
        return (args[0], timestep, *args[2:]), kwargs

    def _reorder_patches(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """`[B, C, T, H, W]` so that its tokens, read in raster order, are in ours."""
        # [B, L, C]
        tokens = output.flatten(2).transpose(1, 2)
        missing = math.prod(self._grid) - tokens.shape[1]
        if missing < 0:
            return output  # the transformer will say so
        if missing:
            # VACE fills up control videos that are shorter, at their end; ours is elsewhere.
            tokens = F.pad(tokens, (0, 0, 0, missing))
        tokens = tokens.index_select(1, self._order(tokens))
        reordered: Tensor = tokens.transpose(1, 2).unflatten(2, self._grid)
        return reordered

    def _reorder_rotary(
        self, module: nn.Module, args: Any, output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Tables `[1, L, 1, D]`; in context parallelism the piece of this rank."""
        whole = output
        sharded = output[0].shape[1] != math.prod(self._grid)
        if sharded:
            # Diffusers has cut the table. What it was made of is not at hand: make it again.
            whole = type(module).forward(module, *args)
        tables = tuple(table.index_select(1, self._order(table)) for table in whole)
        if sharded:
            ulysses = Ulysses.of(self._parallel)
            assert ulysses is not None
            tables = tuple(t.tensor_split(ulysses.size, dim=1)[ulysses.rank] for t in tables)
        return tables

    def _restore(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """`[B, L, C]` in raster order."""
        return output.index_select(1, self._order(output, inverse=True))

    def _order(self, like: Tensor, *, inverse: bool = False) -> Tensor:
        assert self._orders is not None, "the transformer runs"
        order: Tensor = self._orders[int(inverse)]
        return order.to(like.device)


def order_on(like: Tensor, name: str, t: int, h: int, w: int) -> Tensor:
    """`[L]`: the raster place of each token, on the device of `like`."""
    return _cached_orders(name, (t, h, w), str(like.device))[0]


@torch.library.custom_op("sla_video::token_orders", mutates_args=())
def _orders(hidden_states: Tensor, name: str, t: int, h: int, w: int) -> Tensor:
    """`[2, L]` on the device of `hidden_states`. One opaque step to compiled code."""
    # A copy, since compiled code may write into what it got and needs no more.
    return _cached_orders(name, (t, h, w), str(hidden_states.device)).clone()


@_orders.register_fake
def _(hidden_states: Tensor, name: str, t: int, h: int, w: int) -> Tensor:
    return hidden_states.new_empty((2, t * h * w), dtype=torch.int64)


@functools.lru_cache(maxsize=8)
def _cached_orders(name: str, grid: Grid, device: str) -> Tensor:
    """`[2, L]`: there and back. Kept, for walking along a curve takes half a second at 720p."""
    # A tensor made in inference mode could never be used in training.
    with torch.inference_mode(False):
        order = make_order(name, grid)
        return torch.stack((order, token_order.inverse_order(order))).to(device)


def make_order(name: str, grid: Grid) -> Tensor:
    """The order `[L]` that `SLAConfig.token_order` calls `name`."""
    kind, _, details = name.partition(":")
    if kind == "tile":
        t, h, w = map(int, details.split(","))
        return token_order.tile_order(grid, (t, h, w))
    if kind == "axes":
        return token_order.axes_order(grid, details)
    makers = {
        RASTER: token_order.raster_order,
        "morton": token_order.morton_order,
        "hilbert": token_order.hilbert_order,
    }
    return makers[kind](grid)
