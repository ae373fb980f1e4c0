"""The JSON sidecar of a video: everything needed to make it again, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.environment import device_name, versions
from sla_video.pipelines.generation_plan import (
    GenerationPlan,
    VideoPlan,
    settings_of,
)
from sla_video.pipelines.generation_request import GenerationRequest
from sla_video.pipelines.video_files import recording_of

if TYPE_CHECKING:
    import torch

    from sla_video.pipelines.handle import SLAHandle


def describe_video(
    request: GenerationRequest,
    plan: GenerationPlan,
    video: VideoPlan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    handle: SLAHandle | None,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """What the sidecar of `video` holds, as JSON can hold it.

    Args:
        handle: `None` if attention was dense and nothing was compressed.
        seconds: stage -> seconds.
    """
    settings = settings_of(request, plan)
    settings |= {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    return {
        "prompt": video.prompt,
        "seed": video.seed,
        "pipeline": plan.pipeline.name,
        "settings": settings,
        "attention": _describe_attention(plan, handle),
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "device_name": device_name(device),
        "versions": versions(),
        **({"recording": recording_of(video.path).name} if request.record else {}),
    }


def _describe_attention(plan: GenerationPlan, handle: SLAHandle | None) -> dict[str, Any]:
    if handle is None:
        return {"kind": "dense"}
    stats = handle.stats()
    return {
        "kind": "compressed" if plan.dense else "sla2",
        "achieved_sparsity": stats.sparsity,
        "config": handle.config.to_dict(),
        **_of_each_transformer(handle),
        "layers": [dict(vars(layer)) for layer in stats.layers],
    }


def _of_each_transformer(handle: SLAHandle) -> dict[str, Any]:
    """Settings by name where a recipe gives two transformers different ones."""
    if all(config == handle.config for config in handle.configs.values()):
        return {}
    return {"configs": {name: config.to_dict() for name, config in handle.configs.items()}}
