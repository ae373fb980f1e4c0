"""Stage 1 as one call: load, capture, choose sparsities, fit each layer, save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sla_video.calibration.calibrated_routers import CalibratedRouters, save_all
from sla_video.calibration.calibration_request import (
    CalibrationPlan,
    CalibrationRequest,
    plan_calibration,
)
from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError, is_out_of_memory, one_line
from sla_video.pipelines.progress import NoProgress, Progress
from sla_video.pipelines.video_files import OutputFolder

if TYPE_CHECKING:
    import torch

    from sla_video.calibration.capture_store import CaptureSource, SpillStore
    from sla_video.calibration.fit import LayerFit
    from sla_video.calibration.fit_options import FitOptions
    from sla_video.calibration.layer_data import LayerData, Quality
    from sla_video.pipelines.router_set import ModelIdentity

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


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A loaded pipeline and its self-attention layers."""

    pipe: Any
    layers: Mapping[str, Any]
    identities: Mapping[str, ModelIdentity]
    device: torch.device
    base: SLAConfig


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
    with contextlib.ExitStack() as stack:
        stack.enter_context(OutputFolder(request.out.expanduser()))
        stack.callback(progress.close)
        model = _load(request, plan, progress)
        clock.lap("load")
        source, spill = _capture_source(request, plan, model, progress)
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


def _load(request: CalibrationRequest, plan: CalibrationPlan, progress: Progress) -> _Model:
    progress.stage(f"loading {plan.source.name}")
    from sla_video.calibration.capture import sequence_length
    from sla_video.kernels.routing import num_blocks
    from sla_video.pipelines.families.registry import family_of
    from sla_video.pipelines.families.wan import attend
    from sla_video.pipelines.loading import download, find_device, find_dtype, load_pipeline
    from sla_video.pipelines.patching import enable_sla

    device = find_device(request.device)
    dtype = find_dtype(request.dtype, device)
    if request.offload and device.type == "cpu":
        raise InputError("`offload` moves idle parts from a GPU to host memory: it needs a GPU")
    folder = plan.source.folder
    if folder is None:
        progress.close()  # a download shows bars of its own
        folder = download(plan.source.name)
        progress.stage(f"loading {plan.source.name}")
    pipe = load_pipeline(folder, device=device, dtype=dtype, offload=request.offload)
    base = SLAConfig(
        dense_layers=request.dense_layers,
        router_per_head=request.router_per_head,
        phi_k=request.phi_k,
        token_order=request.token_order,
    )
    try:
        # Finds the layers, and says what is wrong with a model that cannot be patched.
        with enable_sla(pipe, config=base) as handle:
            names, identities = list(handle.routers), handle.router_set().models
    except (ValueError, TypeError) as error:
        raise InputError(one_line(error)) from error
    for component in identities:
        family = family_of(getattr(pipe, component))
        if family.attend is not attend:
            raise InputError(
                "calibration reads queries and keys as Wan's models make them, and "
                f"{plan.source.name} is of the family {family.name}: use SLA attention without "
                "trained routers there"
            )
    if request.alpha == "per_block":
        length = sequence_length(pipe, plan.frames, plan.height, plan.width)
        count = num_blocks(length, base.block_q)
        base = base.replace(alpha="per_block", num_query_blocks=count)
    layers = {}
    for name in names:
        component, _, layer = name.partition(".")
        layers[name] = getattr(pipe, component).get_submodule(layer)
    base = base.replace(dense_steps=plan.dense_steps)
    return _Model(pipe=pipe, layers=layers, identities=identities, device=device, base=base)


def _capture_source(
    request: CalibrationRequest, plan: CalibrationPlan, model: _Model, progress: Progress
) -> tuple[CaptureSource, SpillStore | None]:
    from sla_video.calibration.capture import CapturePlan, plan_calls
    from sla_video.calibration.capture_store import CaptureSource, SpillStore

    captures = CapturePlan(
        prompts=plan.prompts,
        capture_steps=request.capture_steps,
        denoising_steps=plan.denoising_steps,
        guidance_scale=plan.guidance_scale,
        negative_prompt=request.negative_prompt,
        frames=plan.frames,
        height=plan.height,
        width=plan.width,
        max_sequence_length=plan.max_sequence_length,
        dense_steps=plan.dense_steps,
        seed=request.seed,
        token_order=model.base.token_order,
    )
    plan_calls(model.pipe, captures)  # refuses what cannot be captured before a folder is made
    spill = None
    if request.spill is not None:
        dtype = str(model.pipe.transformer.dtype)
        hashes = {name: identity.config_hash for name, identity in model.identities.items()}
        about = {"model": plan.source.name, "configurations": hashes, "dtype": dtype}
        spill = SpillStore(request.spill, {**about, **captures.to_dict()})
    source = CaptureSource(
        model.pipe,
        model.layers,
        captures,
        memory=int(min(request.memory, 2**40) * _GIB),
        spill=spill,
        progress=progress,
    )
    return source, spill


def _configs(
    request: CalibrationRequest,
    plan: CalibrationPlan,
    model: _Model,
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
    numbers = _layer_numbers(plan, model)
    for name, data in _data(request, model, source, progress, clock, "measuring", len(GRID)):
        curve = {}
        for sparsity in GRID:
            curve[sparsity] = judge(data, None, sparsity)
            progress.advance()
        curves.setdefault(numbers[name], []).append(curve)
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


def _layer_numbers(plan: CalibrationPlan, model: _Model) -> dict[str, int]:
    """The number of each layer as `SLAConfig` counts them: `blocks`, then `vace_blocks`."""
    numbers = {}
    for name in model.layers:
        component, blocks, index, _ = name.split(".")
        first = len(getattr(model.pipe, component).blocks) if blocks != "blocks" else 0
        numbers[name] = first + int(index)
    return numbers


def _data(
    request: CalibrationRequest,
    model: _Model,
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
    model: _Model,
    configs: Sequence[SLAConfig],
    source: CaptureSource,
    progress: Progress,
    clock: _Clock,
) -> list[dict[str, LayerFit]]:
    from sla_video.calibration.fit import fit_layer

    fits: list[dict[str, LayerFit]] = [{} for _ in configs]
    plans = [config.layer_plan(plan.num_layers) for config in configs]
    numbers = _layer_numbers(plan, model)
    steps = request.steps * len(configs)
    for name, data in _data(request, model, source, progress, clock, "fitting", steps):
        for found, layer_plan in zip(fits, plans, strict=True):
            sparsity = layer_plan[numbers[name]]
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
