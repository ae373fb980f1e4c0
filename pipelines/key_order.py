"""An order of keys for each head of a layer, measured while a pipeline denoises.

`SLAConfig.key_orders` names the kind of each head. What it makes of the keys at hand is measured
anew every few denoising steps and kept in between, apart for each call of a step, since guidance
shows a layer two prompts in turn. In between costs memory: 4 bytes for each layer, call of a step,
head and token (12 MB for a layer of Wan 14B at 720p). Nothing waits for the device.
Letters: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from sla_video.config import KeyOrderKind, SLAConfig
from sla_video.kernels.api import num_selected
from sla_video.kernels.context import needs_gradients
from sla_video.kernels.key_order import HOT_SHARE, hot_blocks, key_importance, make_key_order
from sla_video.kernels.key_places import KeyOrder
from sla_video.kernels.routing import num_blocks
from sla_video.pipelines.families.family import Family
from sla_video.pipelines.pipeline_steps import PipelineSteps


class LayerKeyOrder:
    """Makes the key order of one layer's calls, and keeps it for some steps.

    Args:
        kinds: of the H heads.
        settings: of the patch; block_k, the refresh and the room for hot blocks are taken from it.
        sparsity: of the layer.
        steps: counted in the transformer, as a hook of it.
    """

    def __init__(
        self,
        kinds: tuple[KeyOrderKind, ...],
        settings: SLAConfig,
        sparsity: float,
        steps: PipelineSteps,
    ) -> None:
        self.kinds = kinds
        self.steps = steps
        self._settings, self._sparsity = settings, sparsity
        self._video = -1
        # Call of a step -> the step that it was measured in, and the order.
        self._kept: dict[tuple[int, int, int], tuple[int, Tensor]] = {}
        # For compiled code, which finds us by it; a tensor, for a number would be compiled in.
        self._number = torch.tensor(next(_numbers))
        _layers[int(self._number)] = self

    def __reduce__(self) -> Any:
        # A copy has a number of its own, and measures for itself.
        return LayerKeyOrder, (self.kinds, self._settings, self._sparsity, self.steps)

    def __call__(
        self, query: Tensor, key: Tensor, heads: tuple[int, int] | None = None
    ) -> KeyOrder:
        """The order for query and key `[B, L, H, D]`.

        Args:
            heads: the first of the layer's heads that are here, and the one after the last; None
                for all.
        """
        start, stop = (0, len(self.kinds)) if heads is None else heads
        # A backward pass may compute them again, and has to find the same.
        anew = needs_gradients(query, key)
        if torch.compiler.is_compiling():
            # To the compiler one step that it does not look into: it could not follow our counting.
            order = _make_places(query.detach(), key.detach(), self._number, start, stop, anew)
            return KeyOrder(*order)
        return self.make(query, key, start, stop, anew)

    @torch.no_grad()
    def make(self, query: Tensor, key: Tensor, start: int, stop: int, anew: bool) -> KeyOrder:
        """The order of the heads `start` to `stop`, which query and key hold."""
        kinds = self.kinds[start:stop]
        settings = self._settings
        hot = hot_room(key.shape[1], settings.block_k, self._sparsity)
        always = _always(kinds, hot, str(key.device))
        refresh = settings.key_order_refresh
        if refresh == 1 or anew:
            return KeyOrder(self._measure(kinds, hot, query, key), always)
        if self._video != self.steps.video:
            self._video = self.steps.video
            self._kept.clear()
        call = (self.steps.branch, start, stop)
        if call in self._kept:
            step, places = self._kept[call]
            fits = places.shape == _shape(key) and places.device == key.device
            if fits and self.steps.step - step < refresh:
                return KeyOrder(places, always)
        places = self._measure(kinds, hot, query, key)
        self._kept[call] = self.steps.step, places
        return KeyOrder(places, always)

    def _measure(
        self, kinds: tuple[KeyOrderKind, ...], hot: int, query: Tensor, key: Tensor
    ) -> Tensor:
        """Places `[B, H, L]` int32."""
        token = torch.arange(key.shape[1], dtype=torch.int32, device=key.device)
        places = token.expand(_shape(key)).contiguous()
        for kind in sorted(set(kinds) - {"identity"}):
            heads = _heads_of(kinds, kind, str(key.device))
            importance = key_importance(query.index_select(2, heads), key.index_select(2, heads))
            order = make_key_order(kind, importance, block_k=self._settings.block_k, most_hot=hot)
            places.index_copy_(1, heads, order.places)
        return places


_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, LayerKeyOrder] = weakref.WeakValueDictionary()


@torch.library.custom_op("sla_video::key_places", mutates_args=())
def _make_places(
    query: Tensor, key: Tensor, number: Tensor, start: int, stop: int, anew: bool
) -> tuple[Tensor, Tensor]:
    places, always = _layers[int(number)].make(query, key, start, stop, anew)
    # Copies, since compiled code may write into what it got.
    return places.clone(), always.clone()


@_make_places.register_fake
def _(
    query: Tensor, key: Tensor, number: Tensor, start: int, stop: int, anew: bool
) -> tuple[Tensor, Tensor]:
    empty = functools.partial(key.new_empty, dtype=torch.int32)
    return empty(_shape(key)), empty(key.shape[2])


def hot_room(length: int, block_k: int, sparsity: float) -> int:
    """Blocks of hot keys in a layer: at most half of those that it selects."""
    most = num_selected(sparsity, num_blocks(length, block_k)) // 2
    return hot_blocks(length, block_k, HOT_SHARE, most)


def make_layer_orders(
    component: str,
    family: Family,
    layers: Mapping[str, Any],
    settings: SLAConfig,
    pipe: Any,
) -> dict[str, LayerKeyOrder]:
    """The orders of the layers that `settings.key_orders` names, by the names of `layers`.

    Layers whose heads all keep their keys in place have none.

    Raises:
        ValueError: a layer that is not there or runs dense, or another number of heads.
    """
    plan = dict(zip(layers, settings.layer_plan(len(layers)), strict=True))
    steps = PipelineSteps(pipe)
    orders = {}
    for full_name, kinds in settings.key_orders.items():
        owner, _, name = full_name.partition(".")
        if owner != component:
            continue
        sparsity = plan.get(name)
        if sparsity is None:
            known = f"{component}.{next(iter(layers))}"
            what = "runs dense" if name in layers else f"is not there: names are like {known}"
            raise ValueError(f"`key_orders` names the layer {full_name}, which {what}")
        heads, _ = family.heads_and_dim(layers[name])
        if len(kinds) != heads:
            raise ValueError(
                f"`key_orders` has {len(kinds)} kinds for {full_name}, which has {heads} heads"
            )
        if set(kinds) != {"identity"}:
            kinds = cast(tuple[KeyOrderKind, ...], kinds)
            orders[name] = LayerKeyOrder(kinds, settings, sparsity, steps)
    return orders


def _shape(key: Tensor) -> tuple[int, int, int]:
    """[B, H, L] of key `[B, L, H, D]`."""
    return key.shape[0], key.shape[2], key.shape[1]


# Made once, since a copy from the host to the device may have to wait for it.
@functools.lru_cache(maxsize=1024)
def _heads_of(kinds: tuple[str, ...], kind: str, device: str) -> Tensor:
    """The heads of that kind."""
    with torch.inference_mode(False):
        return torch.tensor([h for h, other in enumerate(kinds) if other == kind], device=device)


@functools.lru_cache(maxsize=1024)
def _always(kinds: tuple[str, ...], hot: int, device: str) -> Tensor:
    """`[H]` int32."""
    with torch.inference_mode(False):
        counts = [hot if kind == "hot_peel" else 0 for kind in kinds]
        return torch.tensor(counts, dtype=torch.int32, device=device)
