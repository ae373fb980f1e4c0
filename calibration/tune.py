"""Choose the settings of a model's sparse attention by measuring: capture, measure, choose, check.

Which order of the tokens a transformer gets, which sparsity each of its layers, and what refines
that (`tuning_refinements.py`). What was measured is kept in a file until all of it is there, so
that a run may end at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video.calibration.calibrated_model import CalibratedModel, load_model
from sla_video.calibration.deadline import Deadline, TimeIsUpError
from sla_video.calibration.tune_request import (
    TunePlan,
    TuneRequest,
    measured_settings,
    plan_tuning,
)
from sla_video.calibration.tuning_run import TuneRun
from sla_video.calibration.tuning_state import TuningState
from sla_video.config import SLAConfig
from sla_video.pipelines.environment import device_name
from sla_video.pipelines.errors import InputError, is_out_of_memory, one_line
from sla_video.pipelines.progress import NoProgress, Progress
from sla_video.pipelines.recipe import Recipe, TunedSize, save_recipe
from sla_video.pipelines.recipe_routers import RecipeRouters

if TYPE_CHECKING:
    from sla_video.calibration.tuning_choice import OrderChoice
    from sla_video.pipelines.router_set import RouterSet


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
            recipe, complete = _tune(
                TuneRun(
                    request=request,
                    plan=plan,
                    model=model,
                    routers=routers,
                    state=state,
                    deadline=deadline,
                )
            )
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


def _tune(run: TuneRun) -> tuple[Recipe, bool]:
    from sla_video.calibration.tuning_check import describe, mean_for_time, measure_steps
    from sla_video.calibration.tuning_refinements import REFINEMENTS

    goal, value = run.request.goal
    base = run.model.base.replace(
        sparse_dtype=run.request.sparse_dtype, layer_sparsity={}, impl="auto"
    )
    if goal in ("seconds_per_step", "time_ratio"):
        goal, value = "mean_sparsity", mean_for_time(run, base)
    complete = True
    try:
        _measure_all(run)
    except TimeIsUpError:
        complete = False
    choices = _choose_all(run, goal, value)
    recipe = _recipe(run, {c: _config(run.model, base, found[0]) for c, found in choices.items()})
    steps = {} if run.deadline.passed else measure_steps(run, recipe)
    refined: dict[str, Any] = {}
    for refine in REFINEMENTS if complete else ():
        try:
            found = dataclasses.replace(recipe, configs=refine.choose(run, recipe))
            if found == recipe or not steps:
                continue
            better = measure_steps(run, found)
        except TimeIsUpError:
            complete = False
            break
        pays = refine.pays(steps, better)
        refined[refine.name] = {"kept": pays, "without": steps, "with": better}
        if pays:
            recipe, steps = found, better
    if complete:
        run.end()
    measured = {
        "complete": complete,
        "settings": measured_settings(run.request, run.plan),
        "transformers": {name: describe(run, found) for name, found in choices.items()},
        "refinements": refined,
        **({"device": device_name(run.model.device), "steps": steps} if steps else {}),
    }
    return dataclasses.replace(recipe, measured=measured), complete


def _measure_all(run: TuneRun) -> None:
    """Fill the state with the curve of each layer in each order.

    Raises:
        TimeIsUpError: some are missing.
    """
    from sla_video.calibration.tuning_measures import measure_layer

    names, orders, state = list(run.model.layers), run.orders, run.state
    todo = [name for name in names if any(state.get(order, name) is None for order in orders)]
    if not todo:
        return
    for number, (name, calls) in enumerate(run.calls(todo)):
        count = len(names) - len(todo) + number + 1
        run.deadline.stage(f"measuring layer {count}/{len(names)}", len(orders))
        for order in orders:
            if state.get(order, name) is None:
                curve = measure_layer(
                    calls,
                    run.order(order, name),
                    run.router(name),
                    run.model.base,
                    held_out=run.held_out,
                    device=run.model.device,
                    seed=run.request.seed,
                )
                state.put(order, name, curve)
            run.deadline.advance()


def _choose_all(run: TuneRun, goal: str, value: float) -> dict[str, list[OrderChoice]]:
    """The choices of each transformer, the best order first."""
    from sla_video.calibration.tuning_choice import best_order, choose_sparsities
    from sla_video.calibration.tuning_measures import worst_of

    found, state = {}, run.state
    for component in run.components:
        names = [name for name in run.model.layers if name.startswith(f"{component}.")]
        known = [n for n in names if all(state.get(order, n) is not None for order in run.orders)]
        if not known:
            raise InputError(
                f"{run.request.max_minutes:g} minutes were too short to measure a layer of "
                f"{component!r}: give more --max-minutes, fewer prompts, or --spill FOLDER, which "
                "keeps captures for the next run"
            )
        choices = []
        for order in run.orders:
            curves = {name: state.get(order, name) for name in known}
            worst = worst_of(curves.values())
            every = {name: curves.get(name, worst) for name in names}
            choices.append(choose_sparsities(order, every, goal, value))
        best = best_order(choices, goal)
        found[component] = [best, *(choice for choice in choices if choice is not best)]
    return found


def _config(model: CalibratedModel, base: SLAConfig, choice: OrderChoice) -> SLAConfig:
    per_layer = {model.layer_number(name): s for name, s in choice.sparsities.items()}
    sparse = {layer: sparsity for layer, sparsity in sorted(per_layer.items()) if sparsity > 0}
    dense = [layer for layer, sparsity in sorted(per_layer.items()) if sparsity == 0]
    # What the caller keeps dense may be counted from the end.
    total = len(per_layer) + len(base.dense_layers)
    kept = [layer % total for layer in base.dense_layers]
    mean = statistics.fmean(sparse.values()) if sparse else base.sparsity
    return base.replace(
        sparsity=round(mean, 6),
        layer_sparsity=sparse,
        dense_layers=sorted([*dense, *kept]),
        token_order=choice.order,
    )


def _recipe(run: TuneRun, configs: Mapping[str, SLAConfig]) -> Recipe:
    sizes = {name: getattr(run.plan.captures, name) for name in ("frames", "height", "width")}
    grids = {run.grid(component) for component in configs}
    goal, value = run.request.goal
    routers = None
    if run.routers is not None:
        assert run.request.routers is not None
        routers = RecipeRouters.of(run.request.routers, run.routers)
    try:
        return Recipe(
            configs=configs,
            models=run.model.identities,
            sizes=tuple(TunedSize(**sizes, grid=grid) for grid in sorted(grids)),
            routers=routers,
            target={goal: value},
        )
    except ValueError as error:
        raise InputError(one_line(error)) from error
