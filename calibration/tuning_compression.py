"""Which layers attend among fewer tokens in most steps, under all that was chosen before.

A layer is compressed where that makes it faster on this device, and where it is among the half
that changes the hidden state least, as in a pipeline that chooses for itself
(`TokenCompression.quantile`; Token Sparse Attention, arXiv 2602.03216).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sla_video.calibration.tuning_check import applied, in_steps
from sla_video.calibration.tuning_run import TuneRun
from sla_video.calibration.tuning_timing import forward, time_steps, wait_for
from sla_video.config import SLAConfig
from sla_video.config_compression import TokenCompression
from sla_video.pipelines.environment import device_name
from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.families.registry import family_of
from sla_video.pipelines.hidden_drift import DriftMeter, quiet_layers
from sla_video.pipelines.recipe import Recipe

logger = logging.getLogger(__name__)

# Of the query-key pairs.
_PAIRS = 0.5
# What a layer has to take, of its time on all tokens.
_FASTER = 0.97


def compression(run: TuneRun, recipe: Recipe) -> dict[str, SLAConfig]:
    """Token compression in the layers that gain by it, in each transformer.

    Raises:
        TimeIsUpError: some layers are not measured.
    """
    if not run.request.compression:
        return dict(recipe.configs)
    return {
        component: config.replace(compression=_choose(run, recipe, component))
        for component, config in recipe.configs.items()
    }


def _choose(run: TuneRun, recipe: Recipe, component: str) -> TokenCompression | None:
    measured = _measure(run, recipe, component)
    if measured is None:
        return None
    quiet = quiet_layers(measured["drift"], TokenCompression.quantile)
    chosen = [
        number
        for number, name in enumerate(measured["drift"])
        if name in quiet and measured["short"][name] < measured["whole"][name] * _FASTER
    ]
    return TokenCompression(pairs=_PAIRS, layers=chosen) if chosen else None


def _measure(run: TuneRun, recipe: Recipe, component: str) -> dict[str, dict[str, float]] | None:
    """Of each self-attention, by name in the transformer and in the order of `SLAConfig`'s layers:

    "whole" and "short", mean seconds over a window of steps without and with compression, and
    "drift", by which it changes the hidden state. None where compression is not supported.
    """
    config = recipe.configs[component]
    known = json.dumps([config.to_dict(), device_name(run.model.device)], sort_keys=True)
    topic = f"compression {hashlib.sha256(known.encode()).hexdigest()}"
    found = run.state.get(topic, component)
    if found is None:
        run.deadline.stage("measuring compression", 3)
        transformer = getattr(run.model.pipe, component)
        names = list(family_of(transformer).layers(transformer))
        everywhere = TokenCompression(pairs=_PAIRS, layers=range(len(names)))
        try:
            short = _seconds(run, recipe, component, names, everywhere)
        except InputError as error:
            logger.info("%s is not compressed: %s", component, one_line(error))
            return None
        run.deadline.advance()
        whole = _seconds(run, recipe, component, names, None)
        run.deadline.advance()
        found = {"short": short, "whole": whole, "drift": _drifts(run, component, names)}
        run.state.put(topic, component, found)
        run.deadline.advance()
    measured: dict[str, dict[str, float]] = found
    return measured


def _seconds(
    run: TuneRun,
    recipe: Recipe,
    component: str,
    names: list[str],
    settings: TokenCompression | None,
) -> dict[str, float]:
    """Of each self-attention with its projections, mean over the steps."""
    config = recipe.configs[component].replace(compression=settings)
    recipe = dataclasses.replace(recipe, configs={**recipe.configs, component: config})
    transformer, inputs, scheduler = in_steps(run, component)
    with applied(run, recipe), _timing(transformer, names) as seconds:
        time_steps(transformer, inputs, scheduler)
    # Those that do not count came first.
    return {name: statistics.fmean(each[-len(inputs) :]) for name, each in seconds.items()}


@contextmanager
def _timing(transformer: nn.Module, names: list[str]) -> Iterator[dict[str, list[float]]]:
    seconds: dict[str, list[float]] = {name: [] for name in names}
    device = next(transformer.parameters()).device
    start = 0.0

    def begin(_module: nn.Module, _args: Any) -> None:
        nonlocal start
        wait_for(device)
        start = time.perf_counter()

    with ExitStack() as stack:
        for name in names:

            def end(_module: nn.Module, _args: Any, _output: Any, name: str = name) -> None:
                wait_for(device)
                seconds[name].append(time.perf_counter() - start)

            attention = transformer.get_submodule(name)
            stack.callback(attention.register_forward_pre_hook(begin).remove)
            stack.callback(attention.register_forward_hook(end).remove)
        yield seconds


@torch.no_grad()
def _drifts(run: TuneRun, component: str, names: list[str]) -> dict[str, float]:
    """With full attention, in the first of the steps."""
    transformer, inputs, _ = in_steps(run, component)
    meter = DriftMeter(names)
    with ExitStack() as stack:
        for handle in meter.install(transformer):
            stack.callback(handle.remove)
        meter.begin()
        forward(transformer, inputs[0])
        meter.end()
    drifts = meter.read()
    assert drifts is not None, "all blocks have run"
    return drifts
