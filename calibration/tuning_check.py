"""What a recipe costs and gains, as it is written into the recipe: by layer, and by whole steps."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

from sla_video.calibration.tune_request import TunePlan
from sla_video.calibration.tuning_choice import OrderChoice, quality_at
from sla_video.calibration.tuning_run import TuneRun
from sla_video.calibration.tuning_timing import (
    TIMED,
    Inputs,
    Timed,
    distance,
    middle_inputs,
    sparsity_for,
    time_kept_shares,
    time_steps,
)
from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.recipe import Recipe

_FIELDS = ("recall", "rel_l1", "error")


def describe(run: TuneRun, choices: list[OrderChoice]) -> dict[str, Any]:
    """What was measured of one transformer, as JSON can hold it.

    Args:
        choices: the best order first.
    """
    best = choices[0]
    layers: dict[str, dict[str, Any]] = {}
    for name, sparsity in best.sparsities.items():
        curve = run.state.get(best.order, name)
        layers[name] = {"layer": run.model.layer_number(name), "sparsity": sparsity}
        layers[name]["measured"] = curve is not None
        if curve is None:
            continue
        layers[name]["density"] = curve["density"]
        for part in ("fit", "held_out"):
            quality = quality_at(curve, part, sparsity)
            layers[name][part] = None if quality is None else {f: quality[f] for f in _FIELDS}
    return {
        "token_order": best.order,
        "mean_sparsity": best.mean_sparsity,
        "fit": _mean(layers, "fit"),
        "held_out": _mean(layers, "held_out"),
        "orders": {
            choice.order: {
                "mean_sparsity": choice.mean_sparsity,
                "recall": choice.recall,
                "error": choice.error,
            }
            for choice in choices
        },
        "layers": layers,
    }


def _mean(layers: dict[str, dict[str, Any]], part: str) -> dict[str, float] | None:
    found = [layer[part] for layer in layers.values() if layer.get(part) is not None]
    if not found:
        return None
    return {name: statistics.fmean(each[name] for each in found) for name in _FIELDS}


def mean_for_time(run: TuneRun, base: SLAConfig) -> float:
    """The mean sparsity at which a step takes the time that is asked for.

    Raises:
        InputError: no sparsity is fast enough.
    """
    progress, pipe = run.deadline.progress, run.model.pipe
    progress.stage("timing", 1 + len(TIMED))
    inputs = inputs_of(run)[0]
    progress.advance()
    seconds = run.request.seconds_per_step
    if run.request.time_ratio is not None:
        dense = time_dense(run, "transformer").seconds
        seconds = run.request.time_ratio * dense * _forwards(run.plan)
    assert seconds is not None
    timed = time_kept_shares(pipe, inputs, base, progress.advance)
    return sparsity_for(seconds, timed, _forwards(run.plan))


def measure_steps(run: TuneRun, recipe: Recipe) -> dict[str, Any]:
    """Seconds of a step of each transformer, and the relative L2 error of its velocity."""
    progress = run.deadline.progress
    progress.stage("checking", 2 * len(recipe.configs))
    found: dict[str, Any] = {}
    for component in recipe.configs:
        dense = time_dense(run, component)
        progress.advance()
        with applied(run, recipe):
            sparse = time_steps(*in_steps(run, component))
        progress.advance()
        found[component] = {
            "dense_seconds": _forwards(run.plan) * dense.seconds,
            "seconds": _forwards(run.plan) * sparse.seconds,
            "velocity_error": distance(sparse, dense),
        }
    return found


@contextlib.contextmanager
def applied(run: TuneRun, recipe: Recipe) -> Iterator[None]:
    """The recipe in place from the first step on: what comes before it in a video is dense or full.

    Raises:
        InputError: it does not fit the model.
    """
    configs = {
        component: config
        if config.compression is None
        else config.replace(compression=dataclasses.replace(config.compression, full_steps=1))
        for component, config in recipe.configs.items()
    }
    recipe = dataclasses.replace(recipe, configs=configs)
    try:
        with enable_sla(run.model.pipe, recipe=recipe, dense_steps=0):
            yield
    except (TypeError, ValueError) as error:
        raise InputError(f"the settings that were chosen cannot be used: {error}") from error


def in_steps(run: TuneRun, component: str) -> tuple[Any, list[Inputs], Any]:
    """A transformer, the forwards to time it by, and the scheduler that counts them."""
    pipe = run.model.pipe
    return getattr(pipe, component), inputs_of(run), pipe.scheduler


def inputs_of(run: TuneRun) -> list[Inputs]:
    """Made once: at large sizes it is minutes."""
    if run.inputs is None:
        run.inputs = middle_inputs(run.model.pipe, run.plan.captures, run.request.seed)
    return run.inputs


def time_dense(run: TuneRun, component: str) -> Timed:
    """With full attention; measured once."""
    if component not in run.dense:
        run.dense[component] = time_steps(*in_steps(run, component))
    return run.dense[component]


def _forwards(plan: TunePlan) -> int:
    """Of a denoising step: with guidance there are two."""
    return 2 if plan.captures.guidance_scale > 1 else 1
