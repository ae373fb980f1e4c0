"""Choose the settings of a model's sparse attention by measuring: capture, measure, choose, check.

Which order of the tokens a transformer gets, and which sparsity each of its layers. What was
measured is kept in a file until all of it is there, so that a run may end at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video.calibration.calibrated_model import CalibratedModel, capture_source, load_model
from sla_video.calibration.deadline import Deadline, TimeIsUpError
from sla_video.calibration.tune_request import (
    TunePlan,
    TuneRequest,
    measured_settings,
    plan_tuning,
)
from sla_video.calibration.tuning_state import TuningState
from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError, is_out_of_memory, one_line
from sla_video.pipelines.progress import NoProgress, Progress
from sla_video.pipelines.recipe import Recipe, TunedSize, save_recipe
from sla_video.pipelines.recipe_routers import RecipeRouters

if TYPE_CHECKING:
    from sla_video.calibration.tuning_choice import OrderChoice
    from sla_video.pipelines.router_set import RouterSet

# A multiple of the golden ratio's fraction: layers measured first are spread over the model.
_SPREAD = 0.618034


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What `tune` made.

    Attributes:
        complete: False if the time was up before all layers were measured.
        resumed: measurements of an earlier run that were used.
    """

    path: Path
    recipe: Recipe
    complete: bool
    resumed: int
    seconds: float


def tune(request: TuneRequest, *, progress: Progress | None = None) -> TuneResult:
    """Choose settings and write them as a recipe.

    Everything that can be checked without the weights is checked first. When the time is up, the
    recipe is made of what is known: a layer that was not measured is taken to be as hard as the
    hardest in each respect. The same request goes on from there.

    Raises:
        InputError: anything the caller can mend: bad settings, a goal out of reach, files that
            cannot be read or written, too little memory, or too little time for a first layer.
    """
    start = time.perf_counter()
    deadline = Deadline(progress or NoProgress(), request.max_minutes)
    plan = plan_tuning(request)
    with contextlib.ExitStack() as stack:
        stack.callback(deadline.close)
        state = TuningState(plan.state, measured_settings(request, plan), anew=request.overwrite)
        routers = _read_routers(request, plan)
        model = load_model(request.captures, plan.captures, deadline, routers)
        try:
            recipe, complete = _tune(request, plan, model, routers, state, deadline)
        except Exception as error:
            if is_out_of_memory(error):
                raise InputError(
                    f"out of memory on {model.device} while measuring: try --offload, a smaller "
                    "--memory, fewer --frames, or a smaller --height and --width"
                ) from error
            raise
    path = save_recipe(plan.out, recipe)
    if complete:
        state.remove()
    return TuneResult(
        path=path,
        recipe=recipe,
        complete=complete,
        resumed=state.resumed,
        seconds=time.perf_counter() - start,
    )


def _read_routers(request: TuneRequest, plan: TunePlan) -> RouterSet | None:
    if request.routers is None:
        return None
    from sla_video.pipelines.router_files import load_routers

    routers = load_routers(request.routers)
    order = routers.config.token_order
    if any(other != order for other in plan.token_orders):
        raise InputError(
            f"the routers in {request.routers} were trained in the token order {order!r}, and "
            f"others were asked for ({', '.join(plan.token_orders)}): leave --token-order out"
        )
    return routers


def _tune(
    request: TuneRequest,
    plan: TunePlan,
    model: CalibratedModel,
    routers: RouterSet | None,
    state: TuningState,
    deadline: Deadline,
) -> tuple[Recipe, bool]:
    from sla_video.calibration.tuning_check import describe, mean_for_time, measure_steps
    from sla_video.calibration.tuning_refinements import REFINEMENTS

    orders = plan.token_orders or (model.base.token_order,)
    base = model.base.replace(sparse_dtype=request.sparse_dtype, layer_sparsity={}, impl="auto")
    goal, value = request.goal
    if goal in ("seconds_per_step", "time_ratio"):
        value = mean_for_time(request, plan, model, base, deadline)
        goal = "mean_sparsity"
    complete = True
    chosen: dict[str, OrderChoice] = {}
    configs: dict[str, SLAConfig] = {}
    try:
        _measure_all(request, plan, model, routers, orders, state, deadline)
    except TimeIsUpError:
        complete = False
    all_choices = _choose_all(model, orders, state, (goal, value), request)
    for component, choices in all_choices.items():
        chosen[component] = choices[0]
        configs[component] = _config(model, base, choices[0])
    for refine in REFINEMENTS:
        try:
            configs = refine(request, plan, model, routers, configs, state, deadline)
        except TimeIsUpError:
            complete = False
    recipe = _recipe(request, plan, model, routers, configs)
    measured: dict[str, Any] = {"complete": complete, "settings": measured_settings(request, plan)}
    measured["transformers"] = {
        component: describe(choices, state, model) for component, choices in all_choices.items()
    }
    if not deadline.passed:
        measured |= measure_steps(request, plan, model, recipe, deadline)
    return dataclasses.replace(recipe, measured=measured), complete


def _measure_all(
    request: TuneRequest,
    plan: TunePlan,
    model: CalibratedModel,
    routers: RouterSet | None,
    orders: tuple[str, ...],
    state: TuningState,
    deadline: Deadline,
) -> None:
    """Fill `state` with the curve of each layer in each order.

    Raises:
        TimeIsUpError: some are missing.
    """
    names = list(model.layers)
    spread = sorted(names, key=lambda name: (names.index(name) + 0.5) * _SPREAD % 1)
    todo = [name for name in spread if any(state.get(order, name) is None for order in orders)]
    if not todo:
        return
    deadline.check()
    from sla_video.calibration.capture import token_grid
    from sla_video.calibration.tuning_measures import measure_layer
    from sla_video.pipelines.token_order import make_order

    sizes = (plan.captures.frames, plan.captures.height, plan.captures.width)
    missing = dataclasses.replace(model, layers={name: model.layers[name] for name in todo})
    source, spill = capture_source(
        request.captures, plan.captures, missing, deadline, token_order="raster"
    )
    several = len(plan.captures.prompts) > 1
    for number, (name, calls) in enumerate(source):
        count = len(names) - len(todo) + number + 1
        deadline.stage(f"measuring layer {count}/{len(names)}", len(orders))
        grid = token_grid(model.pipe, *sizes, name.partition(".")[0])
        for order in orders:
            if state.get(order, name) is None:
                curve = measure_layer(
                    calls,
                    make_order(order, grid),
                    None if routers is None else routers.routers[name],
                    model.base,
                    held_out=request.capture_steps if several else 0,
                    device=model.device,
                    seed=request.seed,
                )
                state.put(order, name, curve)
            deadline.advance()
    if spill is not None:
        spill.remove()


def _choose_all(
    model: CalibratedModel,
    orders: tuple[str, ...],
    state: TuningState,
    goal: tuple[str, float],
    request: TuneRequest,
) -> dict[str, list[OrderChoice]]:
    """The choices of each transformer, the best order first."""
    from sla_video.calibration.tuning_choice import best_order, choose_sparsities
    from sla_video.calibration.tuning_measures import worst_of

    found = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in model.layers):
        names = [name for name in model.layers if name.startswith(f"{component}.")]
        known = [n for n in names if all(state.get(order, n) is not None for order in orders)]
        if not known:
            raise InputError(
                f"{request.max_minutes:g} minutes were too short to measure a layer of "
                f"{component!r}: give more --max-minutes, fewer prompts, or --spill FOLDER, which "
                "keeps captures for the next run"
            )
        choices = []
        for order in orders:
            curves = {name: state.get(order, name) for name in known}
            worst = worst_of(curves.values())
            every = {name: curves.get(name, worst) for name in names}
            choices.append(choose_sparsities(order, every, *goal))
        best = best_order(choices, goal[0])
        found[component] = [best, *(choice for choice in choices if choice is not best)]
    return found


def _config(model: CalibratedModel, base: SLAConfig, choice: OrderChoice) -> SLAConfig:
    per_layer = {model.layer_number(name): s for name, s in choice.sparsities.items()}
    sparse = {layer: sparsity for layer, sparsity in sorted(per_layer.items()) if sparsity > 0}
    dense = [layer for layer, sparsity in sorted(per_layer.items()) if sparsity == 0]
    # What the caller keeps dense may be counted from the end.
    total = len(per_layer) + len(base.dense_layers)
    kept = [layer % total for layer in base.dense_layers]
    mean = sum(sparse.values()) / len(sparse) if sparse else base.sparsity
    return base.replace(
        sparsity=round(mean, 6),
        layer_sparsity=sparse,
        dense_layers=sorted([*dense, *kept]),
        token_order=choice.order,
    )


def _recipe(
    request: TuneRequest,
    plan: TunePlan,
    model: CalibratedModel,
    routers: RouterSet | None,
    configs: Mapping[str, SLAConfig],
) -> Recipe:
    from sla_video.calibration.capture import token_grid

    sizes = {name: getattr(plan.captures, name) for name in ("frames", "height", "width")}
    grids = {token_grid(model.pipe, **sizes, component=component) for component in configs}
    goal, value = request.goal
    named = None
    if routers is not None:
        assert request.routers is not None
        named = RecipeRouters.of(request.routers, routers)
    try:
        return Recipe(
            configs=configs,
            models=model.identities,
            sizes=tuple(TunedSize(**sizes, grid=grid) for grid in sorted(grids)),
            routers=named,
            target={goal: value},
        )
    except ValueError as error:
        raise InputError(one_line(error)) from error
