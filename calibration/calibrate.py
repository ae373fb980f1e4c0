"""Stage 1 as one call: load, capture, choose sparsities, fit each layer, save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sla_video.calibration.calibrated_model import (
    CalibratedModel,
    capture_source,
    load_model,
)
from sla_video.calibration.calibrated_routers import CalibratedRouters, save_all
from sla_video.calibration.calibration_request import (
    CalibrationPlan,
    CalibrationRequest,
    plan_calibration,
)
from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError, is_out_of_memory
from sla_video.pipelines.progress import NoProgress, Progress
from sla_video.pipelines.video_files import OutputFolder

if TYPE_CHECKING:
    import torch

    from sla_video.calibration.capture_store import CaptureSource
    from sla_video.calibration.fit import LayerFit
    from sla_video.calibration.fit_options import FitOptions
    from sla_video.calibration.layer_data import LayerData, Quality

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """What `calibrate` made.

    Attributes:
        routers: one for each sparsity asked for.
        seconds: of each stage: load, capture, fit, save.
    """

    routers: tuple[CalibratedRouters, ...]
    seconds: Mapping[str, float]


def calibrate(
    request: CalibrationRequest, *, progress: Progress | None = None
) -> CalibrationResult:
    """Fit routers to a model and save them where `enable_sla` finds them.

    Everything that can be checked without the weights is checked first. All folders are written at
    the end; until then nothing in `request.out` changes.

    Raises:
        InputError: anything the caller can mend: bad settings, files that cannot be read or
            written, values that are not numbers, a budget out of reach, too little memory.
    """
    progress = progress or NoProgress()
    plan = plan_calibration(request)
    clock = _Clock()
    with OutputFolder(request.out.expanduser()), contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        model = load_model(request, plan, progress)
        clock.lap("load")
        source, spill = capture_source(request, plan, model, progress)
        try:
            configs = _configs(request, plan, model, source, progress, clock)
            fits = _fit_all(request, plan, model, configs, source, progress, clock)
        except Exception as error:
            if is_out_of_memory(error):
                raise InputError(
                    f"out of memory on {model.device} while fitting: try --offload, a smaller "
                    "--memory, fewer --frames, or a smaller --height and --width"
                ) from error
            raise
        progress.stage("saving")
        routers = save_all(request, plan, model.identities, configs, fits)
        if spill is not None:
            spill.remove()
        clock.lap("save")
    return CalibrationResult(routers=routers, seconds=clock.seconds)


def _configs(
    request: CalibrationRequest,
    plan: CalibrationPlan,
    model: CalibratedModel,
    source: CaptureSource,
    progress: Progress,
    clock: _Clock,
) -> list[SLAConfig]:
    """The settings of each set of routers; with a budget, after measuring what layers can do."""
    if plan.sparsities:
        return [model.base.replace(sparsity=sparsity) for sparsity in plan.sparsities]
    from sla_video.calibration.budget import GRID, choose_for_mean, choose_for_recall
    from sla_video.calibration.layer_data import judge

    curves: dict[int, list[dict[float, Quality]]] = {}
    for name, data in _data(request, model, source, progress, clock, "measuring", len(GRID)):
        curve = {}
        for sparsity in GRID:
            curve[sparsity] = judge(data, None, sparsity)
            progress.advance()
        curves.setdefault(model.layer_number(name), []).append(curve)
        clock.lap("fit")

    def means(field: str) -> list[dict[float, float]]:
        # Layer i of both transformers has one sparsity.
        return [
            {s: sum(getattr(c[s], field) for c in layer) / len(layer) for s in GRID}
            for _, layer in sorted(curves.items())
        ]

    if request.mean_sparsity is not None:
        chosen = choose_for_mean(means("error"), request.mean_sparsity)
    else:
        assert request.target_recall is not None
        chosen = choose_for_recall(means("recall"), request.target_recall)
    per_layer = dict(zip(sorted(curves), chosen, strict=True))
    mean = round(sum(chosen) / len(chosen), 6)
    return [model.base.replace(sparsity=mean, layer_sparsity=per_layer)]


def _data(
    request: CalibrationRequest,
    model: CalibratedModel,
    source: CaptureSource,
    progress: Progress,
    clock: _Clock,
    doing: str,
    steps: int,
) -> Iterator[tuple[str, LayerData]]:
    """Each layer with its sampled rows; the pipeline runs in between where it has to."""
    from sla_video.calibration.layer_data import LayerData

    prompts = len({key.prompt for keys in source.calls.values() for key in keys})
    for number, (name, calls) in enumerate(source):
        clock.lap("capture")
        progress.stage(f"{doing} layer {number + 1}/{len(model.layers)}", steps)
        yield (
            name,
            LayerData(
                calls,
                # The calls of the last prompt; a single prompt is judged by other query blocks.
                held_out=request.capture_steps if prompts > 1 else 0,
                config=model.base,
                options=_fit_options(request, model.device),
                device=model.device,
                seed=request.seed,
            ),
        )


def _fit_options(request: CalibrationRequest, device: torch.device) -> FitOptions:
    from sla_video.calibration.fit_options import FitOptions

    options: dict[str, Any] = {"steps": request.steps, "trainable": request.trainable}
    given = {"learning_rate": request.learning_rate, "tau": request.tau}
    options |= {name: value for name, value in given.items() if value is not None}
    if device.type == "cuda":
        import torch

        options["table_memory"] = max(_GIB, torch.cuda.mem_get_info(device)[0] // 2)
    return FitOptions(**options)


def _fit_all(
    request: CalibrationRequest,
    plan: CalibrationPlan,
    model: CalibratedModel,
    configs: Sequence[SLAConfig],
    source: CaptureSource,
    progress: Progress,
    clock: _Clock,
) -> list[dict[str, LayerFit]]:
    from sla_video.calibration.fit import fit_layer

    fits: list[dict[str, LayerFit]] = [{} for _ in configs]
    plans = [config.layer_plan(plan.num_layers) for config in configs]
    steps = request.steps * len(configs)
    for name, data in _data(request, model, source, progress, clock, "fitting", steps):
        for found, layer_plan in zip(fits, plans, strict=True):
            sparsity = layer_plan[model.layer_number(name)]
            assert sparsity is not None  # dense layers are not captured
            try:
                found[name] = fit_layer(
                    data,
                    sparsity,
                    _fit_options(request, model.device),
                    alpha=request.alpha,
                    per_head=request.router_per_head,
                    device=model.device,
                    on_step=progress.advance,
                )
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
        clock.lap("fit")
    return fits


class _Clock:
    """Adds up the seconds of stages that take turns."""

    def __init__(self) -> None:
        self.seconds = {"load": 0.0, "capture": 0.0, "fit": 0.0, "save": 0.0}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The time since the last lap was `stage`."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now
