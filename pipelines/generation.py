"""Generate videos: load, denoise, decode, write, and say how long each took.

Heavy imports are inside the functions, so that a bad request is refused before they begin.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video.config import SLAConfig
from sla_video.pipelines.denoising import run_pipeline
from sla_video.pipelines.errors import InputError, is_out_of_memory, one_line
from sla_video.pipelines.generation_plan import (
    GenerationPlan,
    VideoPlan,
)
from sla_video.pipelines.generation_record import describe_video
from sla_video.pipelines.generation_request import GenerationRequest
from sla_video.pipelines.generation_share import plan_share
from sla_video.pipelines.hub import hub_file, is_hub_id
from sla_video.pipelines.model_source import EMBEDDED_MODEL, ModelSource
from sla_video.pipelines.pipeline_kinds import PIPELINE_KINDS
from sla_video.pipelines.processes import Team
from sla_video.pipelines.progress import NoProgress, Progress
from sla_video.pipelines.sparse_format import choose_format
from sla_video.pipelines.video_files import (
    OutputFolder,
    check_video_writer,
    sidecar_of,
    write_video,
)

if TYPE_CHECKING:
    import torch

    from sla_video.kernels.options import SparseDtype
    from sla_video.pipelines.handle import SLAHandle
    from sla_video.pipelines.router_set import RouterSet

logger = logging.getLogger("sla_video")
# Query blocks measured of each call by `record`, evenly spread: a few per cent of a long video.
_RECORDED_BLOCKS = 16


@dataclass(frozen=True, kw_only=True)
class GeneratedVideo:
    """A video that lies on disk.

    Attributes:
        path: the MP4 file.
        sidecar: the JSON file with all settings.
        seconds: of each stage: load, text, denoise, decode, write. "load" is shared by all videos
            of one call and includes importing PyTorch and Diffusers. Empty for a video that an
            earlier run had finished.
    """

    path: Path
    sidecar: Path
    prompt: str
    seed: int
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A pipeline on its device, patched unless the request was dense."""

    pipe: Any
    handle: SLAHandle | None
    device: torch.device
    dtype: torch.dtype
    seconds: float


def generate(
    request: GenerationRequest, *, progress: Progress | None = None, team: Team | None = None
) -> Iterator[GeneratedVideo]:
    """Generate the videos of `request` one after another, and yield each once it is on disk.

    Everything that can be checked without the weights is checked first. A video and its sidecar
    appear together and complete, or not at all.

    Args:
        team: the processes that share the videos; each makes and yields its own. What earlier
            runs have finished is yielded by the first.

    Raises:
        InputError: anything the caller can mend: bad settings, files that cannot be read or
            written, a device that is not there, too little memory.
    """
    progress = progress or NoProgress()
    team = team or Team()
    plan, finished = plan_share(request, team)
    if team.rank == 0:
        _warn_about_prompts(request, plan)
        for remark in plan.remarks:
            logger.warning("%s", remark)
    check_video_writer()
    for video in finished:
        yield _describe(video, {})
    if not plan.videos:
        return
    folders = sorted({video.path.parent for video in plan.videos})
    with OutputFolder(*folders, shared=team.size > 1), ExitStack() as stack:
        stack.callback(progress.close)
        loaded = _load(request, plan, team, progress)
        for index, video in enumerate(plan.videos):
            count = f" {index + 1}/{len(plan.videos)}" if len(plan.videos) > 1 else ""
            result = _make_video(request, plan, video, loaded, progress, count)
            progress.close()
            yield result


def _warn_about_prompts(request: GenerationRequest, plan: GenerationPlan) -> None:
    """The embedded model knows a small world only: say so where a prompt leaves it."""
    if plan.source.name != EMBEDDED_MODEL:
        return
    from sla_video.pipelines.tiny_wan.grammar import check_prompt

    prompts = dict.fromkeys(" ".join(prompt.split()) for prompt in request.prompts)
    warnings = {prompt: text for prompt in prompts if (text := check_prompt(prompt))}
    for index, (prompt, text) in enumerate(warnings.items()):
        # The text holds the whole grammar, which is enough to read once.
        logger.warning("%s", text if index == 0 else f"{prompt!r} is outside the grammar too")


def _load(
    request: GenerationRequest, plan: GenerationPlan, team: Team, progress: Progress
) -> _Loaded:
    start = time.perf_counter()
    progress.stage(f"loading {plan.source.name}")
    from sla_video.pipelines.loading import download, find_device, find_dtype, load_pipeline

    device = team.own_device(find_device(request.device))
    dtype = find_dtype(request.dtype, device)
    if request.offload and device.type == "cpu":
        raise InputError("`offload` moves idle parts from a GPU to host memory: it needs a GPU")
    patched = not plan.dense or plan.compress is not None
    if patched:
        _check_family(plan.source)
    routers = None if plan.routers is None else _read_routers(plan.routers, plan.source)
    config = SLAConfig() if routers is None else routers.config
    sparse_dtype = choose_format(request.sparse_dtype, config, device, dtype)
    folder = plan.source.folder
    if folder is None:
        progress.close()  # a download shows bars of its own
        folder = download(plan.source.name, tuple(PIPELINE_KINDS))
        progress.stage(f"loading {plan.source.name}")
    pipe = load_pipeline(
        folder,
        plan.pipeline.name,
        device=device,
        dtype=dtype,
        offload=request.offload,
        tiled=plan.pipeline.tiled,
    )
    handle = _enable(pipe, routers, plan, sparse_dtype) if patched else None
    seconds = time.perf_counter() - start
    return _Loaded(pipe=pipe, handle=handle, device=device, dtype=dtype, seconds=seconds)


def _check_family(source: ModelSource) -> None:
    """Refuse a transformer that SLA attention does not know before its weights are loaded."""
    from sla_video.pipelines.families.registry import supported_transformers

    found, supported = source.transformer_config.get("_class_name"), supported_transformers()
    if found is not None and found not in supported:
        raise InputError(
            f"{source.name} holds a {found}, which SLA attention does not support: use --dense, "
            f"or a model with {', '.join(supported)}"
        )


def _read_routers(name: str, source: ModelSource) -> RouterSet:
    """Read routers, and refuse those of another model before that model's weights are loaded."""
    from sla_video.pipelines.router_files import DESCRIPTION_FILE, load_routers

    if not Path(name).expanduser().exists() and is_hub_id(name):
        hub_file(name, DESCRIPTION_FILE)  # fails at once where there is no network
    routers = load_routers(name)
    made_for = routers.models.get("transformer")
    config = source.transformer_config
    different = [
        f"{field}: {value} / {config[field]}"
        for field, value in (made_for.fields if made_for else {}).items()
        if field in config and config[field] != value
    ]
    if different:
        raise InputError(
            f"the routers in {name} were made for {made_for}, not for {source.name}; "
            f"they differ in {', '.join(different)}"
        )
    return routers


def _enable(
    pipe: Any, routers: RouterSet | None, plan: GenerationPlan, sparse_dtype: SparseDtype
) -> SLAHandle:
    from sla_video.config_compression import TokenCompression
    from sla_video.pipelines.families.registry import family_of
    from sla_video.pipelines.patching import enable_sla

    compress = plan.compress
    try:
        layers = range(len(family_of(pipe.transformer).layers(pipe.transformer)))
        return enable_sla(
            pipe,
            routers,
            sparsity=plan.sparsity,
            dense_layers=list(layers) if plan.dense else None,
            dense_steps=plan.dense_steps,
            token_order=plan.token_order,
            sparse_dtype=sparse_dtype,
            compression=None if compress is None else TokenCompression(pairs=compress),
            recipe=plan.chosen,
        )
    except (ValueError, TypeError, OSError) as error:
        raise InputError(one_line(error)) from error


def _make_video(
    request: GenerationRequest,
    plan: GenerationPlan,
    video: VideoPlan,
    loaded: _Loaded,
    progress: Progress,
    count: str,
) -> GeneratedVideo:
    seconds = {"load": loaded.seconds}
    if loaded.handle is not None:
        loaded.handle.reset_stats()
    try:
        with _recording(request, loaded.handle):
            frames = run_pipeline(
                loaded.pipe,
                plan,
                video,
                device=loaded.device,
                progress=progress,
                count=count,
                seconds=seconds,
            )
    except Exception as error:
        if is_out_of_memory(error):
            raise InputError(_memory_advice(request, plan, loaded)) from error
        raise
    progress.stage(f"writing{count}")
    start = time.perf_counter()

    def sidecar() -> dict[str, Any]:
        seconds["write"] = time.perf_counter() - start
        return describe_video(
            request,
            plan,
            video,
            device=loaded.device,
            dtype=loaded.dtype,
            handle=loaded.handle,
            seconds=seconds,
        )

    save = loaded.handle.recorded().save if loaded.handle and request.record else None
    write_video(video.path, frames, plan.fps, sidecar, save)
    return _describe(video, seconds)


def _recording(request: GenerationRequest, handle: SLAHandle | None) -> Any:
    """The context in which `handle` records what attention loses, if that was asked for."""
    if handle is None or not request.record:
        return nullcontext()
    return handle.recording(per_step=True, most_blocks=_RECORDED_BLOCKS)


def _describe(video: VideoPlan, seconds: dict[str, float]) -> GeneratedVideo:
    return GeneratedVideo(
        path=video.path,
        sidecar=sidecar_of(video.path),
        prompt=video.prompt,
        seed=video.seed,
        seconds=seconds,
    )


def _memory_advice(request: GenerationRequest, plan: GenerationPlan, loaded: _Loaded) -> str:
    options = []
    if loaded.device.type != "cpu" and not request.offload:
        options.append("--offload")
    if loaded.device.type != "cpu" and request.dtype == "fp32":
        options.append("--dtype bf16")
    if plan.dense:
        options.append("sparse attention (no --dense)")
    options += ["fewer --frames", "a smaller --height and --width"]
    return (
        f"out of memory on {loaded.device} at {plan.frames} frames of {plan.height}x{plan.width}; "
        f"try {', '.join(options[:-1])} or {options[-1]}"
    )
