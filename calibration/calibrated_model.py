"""A loaded model whose self-attention is captured, and where its captures come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sla_video.calibration.calibration_request import CalibrationPlan, CalibrationRequest
from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.progress import Progress

if TYPE_CHECKING:
    import torch

    from sla_video.calibration.capture_store import CaptureSource, SpillStore
    from sla_video.pipelines.model_identity import ModelIdentity
    from sla_video.pipelines.router_set import RouterSet

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class CalibratedModel:
    """A loaded pipeline and its self-attention layers.

    Attributes:
        layers: "transformer.blocks.0.attn1" -> the attention module, of those that are not dense.
        base: settings of the operator, with the first steps that stay dense.
    """

    pipe: Any
    layers: Mapping[str, Any]
    identities: Mapping[str, ModelIdentity]
    device: torch.device
    base: SLAConfig

    def layer_number(self, name: str) -> int:
        """As `SLAConfig` counts layers: `blocks`, then `vace_blocks`."""
        component, blocks, index, _ = name.split(".")
        first = len(getattr(self.pipe, component).blocks) if blocks != "blocks" else 0
        return first + int(index)


def load_model(
    request: CalibrationRequest,
    plan: CalibrationPlan,
    progress: Progress,
    routers: RouterSet | None = None,
) -> CalibratedModel:
    """Load the pipeline and find its layers.

    Args:
        routers: whose settings hold, in the place of those of `request`.

    Raises:
        InputError: a device or weights that are not there, a model that cannot be patched or
            captured, or routers of another model.
    """
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
    if routers is None:
        base = SLAConfig(
            dense_layers=request.dense_layers,
            router_per_head=request.router_per_head,
            phi_k=request.phi_k,
            token_order=request.token_order,
        )
    else:
        base = routers.config.replace(
            dense_layers=request.dense_layers or routers.config.dense_layers
        )
    try:
        # Finds the layers, and says what is wrong with a model that cannot be patched.
        with enable_sla(pipe, routers, config=base) as handle:
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
    if request.alpha == "per_block" and routers is None:
        length = sequence_length(pipe, plan.frames, plan.height, plan.width)
        count = num_blocks(length, base.block_q)
        base = base.replace(alpha="per_block", num_query_blocks=count)
    layers = {}
    for name in names:
        component, _, layer = name.partition(".")
        layers[name] = getattr(pipe, component).get_submodule(layer)
    base = base.replace(dense_steps=plan.dense_steps)
    return CalibratedModel(
        pipe=pipe, layers=layers, identities=identities, device=device, base=base
    )


def capture_source(
    request: CalibrationRequest,
    plan: CalibrationPlan,
    model: CalibratedModel,
    progress: Progress,
    *,
    token_order: str | None = None,
) -> tuple[CaptureSource, SpillStore | None]:
    """Where the captured calls of each layer come from, and the folder that they may be kept in.

    Args:
        token_order: of what is captured; None is the model's.

    Raises:
        InputError: calls that cannot be captured, too little memory, or an unusable folder.
    """
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
        token_order=model.base.token_order if token_order is None else token_order,
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
