"""Which order of its keys each head gets, under the token order and sparsity that were chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sla_video.calibration.capture import Capture
from sla_video.calibration.key_orders import Measures, choose_kinds, measure_call
from sla_video.calibration.tuning_run import TuneRun
from sla_video.config import SLAConfig
from sla_video.kernels.key_order_measures import OrderMeasures
from sla_video.pipelines.recipe import Recipe


def key_orders(run: TuneRun, recipe: Recipe) -> dict[str, SLAConfig]:
    """Kinds for the heads that need clearly fewer key blocks with them, on held-out calls too.

    With a single prompt there is nothing to judge by, and keys stay in place.

    Raises:
        TimeIsUpError: some layers are not measured.
    """
    configs = recipe.configs
    if not run.held_out or not run.request.key_orders:
        return dict(configs)
    # Layer -> its sparsity.
    sparse = {
        name: sparsity
        for name in run.model.layers
        if (sparsity := _sparsity(run, configs, name)) is not None
    }
    topics = {name: _topic(configs[_component(name)], s) for name, s in sparse.items()}
    todo = [name for name, topic in topics.items() if run.state.get(topic, name) is None]
    if todo:
        run.deadline.stage("measuring key orders", len(todo))
        for name, calls in run.calls(todo):
            config = configs[_component(name)]
            run.state.put(topics[name], name, _measure(run, name, calls, config, sparse[name]))
            run.deadline.advance()
    chosen: dict[str, dict[str, Any]] = {component: {} for component in configs}
    for name, topic in topics.items():
        measured = [_from_json(found) for found in run.state.get(topic, name)]
        choice = choose_kinds(measured[: -run.held_out], measured[-run.held_out :])
        if {*choice.kinds} != {"identity"}:
            chosen[_component(name)][name] = choice.kinds
    return {
        component: config.replace(key_orders=chosen[component])
        for component, config in configs.items()
    }


def _measure(
    run: TuneRun, name: str, calls: list[Capture], config: SLAConfig, sparsity: float
) -> list[dict[str, Any]]:
    """Of each call, as JSON can hold it."""
    order, device, router = run.order(config.token_order, name), run.model.device, run.router(name)
    found: list[dict[str, Any]] = []
    for call in calls:
        ordered = Capture(*(part[:, order].to(device) for part in call))
        here = None if router is None else router.to(device)
        measures = measure_call(ordered, sparsity, config, here)
        found.append({str(k): [part.tolist() for part in parts] for k, parts in measures.items()})
    return found


def _from_json(found: Mapping[Any, Any]) -> Measures:
    return {kind: OrderMeasures(*map(torch.tensor, parts)) for kind, parts in found.items()}


def _component(name: str) -> str:
    return name.partition(".")[0]


def _topic(config: SLAConfig, sparsity: float) -> str:
    """What the measurements depend on besides the settings of the run."""
    return f"key orders in {config.token_order} at {sparsity:g}"


def _sparsity(run: TuneRun, configs: Mapping[str, SLAConfig], name: str) -> float | None:
    """None for a layer that stays dense."""
    config, number = configs[_component(name)], run.model.layer_number(name)
    if number in config.dense_layers:
        return None
    return config.layer_sparsity.get(number, config.sparsity)
