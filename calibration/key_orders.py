"""Which order of its keys each head gets, from what a dense pipeline attends to.

Each kind of order is measured on every captured call, and nothing of the call is kept. A head gets
the kind that needs the fewest key blocks on the first prompts, if that is clearly less than its
keys in place need, and keeps it if it holds on prompts that had no part in the choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sla_video.calibration.capture import CallKey, Capture, CapturePlan, plan_calls, run_captures
from sla_video.config import SLAConfig
from sla_video.kernels.key_order import (
    KeyOrderKind,
    key_importance,
    least_density,
    make_key_order,
)
from sla_video.kernels.key_order_measures import OrderMeasures, measure_orders
from sla_video.kernels.options import num_selected
from sla_video.kernels.router import Router
from sla_video.kernels.routing import num_blocks
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.families.registry import family_of
from sla_video.pipelines.families.wan import attend
from sla_video.pipelines.key_order import hot_room
from sla_video.pipelines.progress import NoProgress, Progress

_COMPONENTS = ("transformer", "transformer_2")
# What a kind has to save on the prompts that it is chosen by, as a share of the density: what does
# not is not worth the measuring in every few steps.
_LEAST_GAIN = 0.05

Measures = dict[KeyOrderKind, OrderMeasures]


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """The orders of one layer's heads.

    Attributes:
        kinds: of its H heads.
        density: on held-out calls, `[H]`: share of the key blocks that holds the recall asked for,
            with these kinds.
        in_place: the same with all keys in place.
        dropped: heads that were to have another kind, which did not hold on held-out calls.
    """

    kinds: tuple[KeyOrderKind, ...]
    density: Tensor
    in_place: Tensor
    dropped: int


def choose_for_model(pipe: Any, prompts: Sequence[str], **settings: Any) -> dict[str, Any]:
    """`SLAConfig.key_orders` for a pipeline: layers whose heads have other kinds than "identity".

    Takes what `measure_model` takes.
    """
    found = measure_model(pipe, prompts, **settings)
    return {name: layer.kinds for name, layer in found.items() if {*layer.kinds} != {"identity"}}


def measure_model(
    pipe: Any,
    prompts: Sequence[str],
    *,
    frames: int,
    height: int,
    width: int,
    denoising_steps: int,
    guidance_scale: float = 1.0,
    negative_prompt: str | None = None,
    max_sequence_length: int = 512,
    config: SLAConfig | None = None,
    routers: Mapping[str, Router] | None = None,
    held_out: int = 1,
    capture_steps: int = 2,
    recall: float = 0.95,
    every: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, LayerChoice]:
    """Run a pipeline on prompts and choose a kind for each head of each layer that is sparse.

    Args:
        pipe: a Wan pipeline with its own attention.
        prompts: the last `held_out` of them judge, the others choose.
        config: blocks, sparsities, dense layers and steps, and the order of the tokens.
        routers: by the names of `SLAHandle.routers`; None ranks blocks by their means.
        capture_steps: calls looked at for each prompt in each transformer.
        recall: softmax mass that the densities have to reach.
        every: one query block in so many is looked at.

    Raises:
        InputError: too few prompts, a model that is not Wan's, or what `run_captures` refuses.
    """
    config, progress = config or SLAConfig(), progress or NoProgress()
    if not 0 < held_out < len(prompts):
        raise InputError(
            f"`held_out` must be at least 1 and leave a prompt to choose by, got {held_out} of "
            f"{len(prompts)} prompts"
        )
    layers, sparsities = _sparse_layers(pipe, config)
    plan = CapturePlan(
        prompts=tuple(prompts),
        capture_steps=capture_steps,
        denoising_steps=denoising_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        frames=frames,
        height=height,
        width=width,
        max_sequence_length=max_sequence_length,
        dense_steps=config.dense_steps,
        seed=seed,
        token_order=config.token_order,
    )
    gate = _Gate(config, sparsities, routers or {}, recall, every)
    calls = plan_calls(pipe, plan)
    run_captures(pipe, layers, plan, calls, gate, progress, label="measuring key orders")
    first_judge = len(prompts) - held_out
    return {name: _choose(found, first_judge) for name, found in gate.measured.items()}


def measure_call(
    capture: Capture,
    sparsity: float,
    config: SLAConfig,
    router: Router | None = None,
    *,
    recall: float = 0.95,
    every: int = 8,
) -> Measures:
    """What each kind of order is worth on one call of one layer, as generation makes it there."""
    query, key = capture.query, capture.key
    length, block_k = key.shape[1], config.block_k
    importance = key_importance(query, key)
    hot = hot_room(length, block_k, sparsity)
    orders = {
        kind: make_key_order(kind, importance, block_k=block_k, most_hot=hot)
        for kind in get_args(KeyOrderKind)
    }
    return measure_orders(
        query,
        key,
        orders,
        router,
        recall=recall,
        selected=num_selected(sparsity, num_blocks(length, block_k)),
        block_q=config.block_q,
        block_k=block_k,
        every=every,
    )


def choose_kinds(choosing: Sequence[Measures], judging: Sequence[Measures]) -> LayerChoice:
    """The kinds of one layer's heads, by the mean over some calls, and judged by that over others.

    A head whose kind needs more blocks on the latter than its keys in place, or whose selection
    holds less mass there, keeps its keys in place.
    """
    chosen = least_density({k: m.density for k, m in _mean(choosing).items()}, _LEAST_GAIN)
    held_out = _mean(judging)
    in_place = held_out["identity"]
    kinds: list[KeyOrderKind] = []
    density = []
    for head, kind in enumerate(chosen):
        found = held_out[kind]
        holds = bool(
            found.density[head] <= in_place.density[head]
            and found.recall[head] >= in_place.recall[head]
        )
        kinds.append(kind if holds else "identity")
        density.append(held_out[kinds[-1]].density[head])
    return LayerChoice(
        kinds=tuple(kinds),
        density=torch.stack(density),
        in_place=in_place.density,
        dropped=sum(a != b for a, b in zip(kinds, chosen, strict=True)),
    )


@dataclass
class _Gate:
    """A `CaptureSink` that measures calls instead of keeping them."""

    config: SLAConfig
    sparsities: Mapping[str, float]
    routers: Mapping[str, Router]
    recall: float
    every: int
    measured: dict[str, dict[CallKey, Measures]] = field(default_factory=dict)

    def has(self, layer: str, key: CallKey) -> bool:
        return key in self.measured.get(layer, ())

    def put(self, layer: str, key: CallKey, capture: Capture) -> None:
        router = self.routers.get(layer)
        if router is not None:
            router = router.to(capture.query.device)
        measures = measure_call(
            capture,
            self.sparsities[layer],
            self.config,
            router,
            recall=self.recall,
            every=self.every,
        )
        on_host = {k: OrderMeasures(*(x.cpu() for x in m)) for k, m in measures.items()}
        self.measured.setdefault(layer, {})[key] = on_host


def _choose(measured: Mapping[CallKey, Measures], first_judge: int) -> LayerChoice:
    return choose_kinds(
        [found for key, found in measured.items() if key.prompt < first_judge],
        [found for key, found in measured.items() if key.prompt >= first_judge],
    )


def _mean(measures: Sequence[Measures]) -> Measures:
    return {
        kind: OrderMeasures(
            *(torch.stack(x).mean(0) for x in zip(*(m[kind] for m in measures), strict=True))
        )
        for kind in measures[0]
    }


def _sparse_layers(pipe: Any, config: SLAConfig) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Attention modules and sparsities, both by the name of the layer."""
    layers, sparsities = {}, {}
    for component in _COMPONENTS:
        transformer = getattr(pipe, component, None)
        if transformer is None:
            continue
        family = family_of(transformer)
        if family.attend is not attend:
            raise InputError(
                "key orders are chosen by queries and keys as Wan's models make them, and this "
                f"pipeline has a {family.name}"
            )
        found = family.layers(transformer)
        plan = config.layer_plan(len(found))
        for (name, layer), sparsity in zip(found.items(), plan, strict=True):
            if sparsity is not None:
                layers[f"{component}.{name}"] = layer
                sparsities[f"{component}.{name}"] = sparsity
    return layers, sparsities
