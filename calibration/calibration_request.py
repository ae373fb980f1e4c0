"""What to calibrate: the caller's settings, checked, and completed with the model's defaults.

Nothing in this file imports torch or diffusers: a bad setting is refused at once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sla_video.calibration.fit_options import Trainable
from sla_video.config import AlphaKind, PhiKey, SLAConfig
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.generation_request import check_sparsity, check_token_order
from sla_video.pipelines.model_source import EMBEDDED_MODEL, ModelSource, find_model

DEFAULT_SPARSITIES = (0.95,)
# Noise levels of a shorter schedule are those of a longer one, at a fraction of the time.
_MOST_DENOISING_STEPS = 12
_EMBEDDED_DENOISING_STEPS = 6
_EMBEDDED_PROMPTS = 4
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class CaptureRequest:
    """How a dense model is run and looked at. `None` means the model's own default.

    Attributes:
        prompts: run with dense attention. Empty: for the embedded model some of its world.
        model: "tiny-wan", a local folder or a hub id.
        dense_layers: layers that keep the model's attention; -1 is the last.
        dense_steps: first denoising steps that keep it; they are not captured.
        capture_steps: calls captured of each prompt, spread over the denoising steps.
        denoising_steps: of the dense pipeline.
        guidance_scale, negative_prompt, frames, height, width: of the dense pipeline.
        memory: GiB of host memory for captures.
        spill: keep captures in this folder instead, where an interrupted run goes on.
        seed: of noise and samples.
        device, dtype, offload: as in `generate`.
        overwrite: replace what is there.

    Raises:
        InputError: a setting out of range.
    """

    prompts: tuple[str, ...] = ()
    model: str = EMBEDDED_MODEL
    dense_layers: tuple[int, ...] = ()
    dense_steps: int | None = None
    capture_steps: int = 4
    denoising_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    memory: float = 8.0
    spill: Path | None = None
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    offload: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if any(not prompt.strip() for prompt in self.prompts):
            raise InputError("`prompt` is empty: say what the video should show")
        if not self.prompts and self.model != EMBEDDED_MODEL:
            raise InputError(
                'no prompts given: a few of the kind the model is for, for instance "a cat surfing"'
            )
        for name, low in (("capture_steps", 1), ("denoising_steps", 1)):
            _check_whole(name, getattr(self, name), low)
        for name, low in (("dense_steps", 0), ("frames", 1), ("height", 1), ("width", 1)):
            _check_whole(name, getattr(self, name), low)
        _check_whole("seed", self.seed, 0, _MAX_SEED - len(self.prompts))
        _check_positive("memory", self.memory)
        scale = self.guidance_scale
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise InputError(f"`guidance_scale` must be a number of at least 0, got {scale}")


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest(CaptureRequest):
    """Settings of `calibrate`, besides those of the base. `None` means the model's own default.

    Attributes:
        out: folder of the routers; with several sparsities one folder for each is made in it.
        sparsities: shares of the key blocks left to the linear branch; routers for each. Empty is
            0.95, unless one of the next two is given.
        mean_sparsity: choose each layer's sparsity so that they have this mean at the least error.
        target_recall: choose each layer's sparsity, the highest with this mean recall.
        steps: of the fit of each layer; 0 writes training-free routers.
        trainable: "router+alpha", "router" or "alpha".
        learning_rate: of the router.
        tau: temperature of SoftTop-k at the end.
        alpha, router_per_head, phi_k, token_order: as in `SLAConfig`.

    Raises:
        InputError: a setting out of range, or two that contradict each other.
    """

    out: Path
    sparsities: tuple[float, ...] = ()
    mean_sparsity: float | None = None
    target_recall: float | None = None
    steps: int = 300
    trainable: Trainable = "router+alpha"
    learning_rate: float | None = None
    tau: float | None = None
    alpha: AlphaKind = "adaptive"
    router_per_head: bool = False
    phi_k: PhiKey = "smoothed"
    token_order: str = "raster"

    def __post_init__(self) -> None:
        super().__post_init__()
        goals = {
            "sparsity": self.sparsities or None,
            "mean_sparsity": self.mean_sparsity,
            "target_recall": self.target_recall,
        }
        given = [f"`{name}`" for name, value in goals.items() if value is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} exclude each other: give one of them")
        for value in self.sparsities:
            check_sparsity(value)
        if len(set(self.sparsities)) != len(self.sparsities):
            raise InputError(f"`sparsity` is given twice: {', '.join(map(str, self.sparsities))}")
        if self.mean_sparsity is not None and not 0 < self.mean_sparsity < 1:
            raise InputError(f"`mean_sparsity` must be in (0, 1), got {self.mean_sparsity}")
        if self.target_recall is not None and not 0 < self.target_recall < 1:
            raise InputError(f"`target_recall` must be in (0, 1), got {self.target_recall}")
        _check_choice("trainable", self.trainable, get_args(Trainable))
        _check_choice("alpha", self.alpha, get_args(AlphaKind))
        _check_choice("phi_k", self.phi_k, get_args(PhiKey))
        check_token_order(self.token_order)
        _check_whole("steps", self.steps, 0)
        for name in ("learning_rate", "tau"):
            _check_positive(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """A request that has passed every check that needs no weights, with all defaults filled in.

    Attributes:
        sparsities: empty when they are still to be chosen.
        num_layers: self-attention layers of each transformer.
        folders: of the routers, one for each sparsity; `out` itself where there is only one.
    """

    source: ModelSource
    prompts: tuple[str, ...]
    sparsities: tuple[float, ...]
    num_layers: int
    denoising_steps: int
    dense_steps: int
    guidance_scale: float
    frames: int
    height: int
    width: int
    max_sequence_length: int
    folders: tuple[Path, ...]


def plan_calibration(request: CalibrationRequest, *, name_folders: bool = True) -> CalibrationPlan:
    """Find the model and check the request against it.

    Args:
        name_folders: whether routers will be written, into folders that are not taken.

    Raises:
        InputError: no such model, sizes that it cannot make, layers it does not have, or an output
            that is taken.
    """
    source = find_model(request.model)
    defaults = source.defaults
    values = {
        name: getattr(defaults if getattr(request, name) is None else request, name)
        for name in ("guidance_scale", "frames", "height", "width", "dense_steps")
    }
    source.geometry.check(values["frames"], values["height"], values["width"])
    config = source.transformer_config
    num_layers = int(config.get("num_layers") or 0) + len(config.get("vace_layers") or ())
    _check_layers(request, num_layers)
    sparsities = request.sparsities
    if not sparsities and request.mean_sparsity is None and request.target_recall is None:
        sparsities = DEFAULT_SPARSITIES
    steps = request.denoising_steps
    embedded = request.model == EMBEDDED_MODEL
    if steps is None:
        most = _EMBEDDED_DENOISING_STEPS if embedded else _MOST_DENOISING_STEPS
        steps = min(defaults.steps, most)
    names = [Path(f"{value:g}") for value in sparsities] if len(sparsities) > 1 else [Path()]
    folders = tuple(request.out.expanduser() / name for name in names if name_folders)
    if name_folders:
        _check_free(request, folders)
    prompts = tuple(" ".join(prompt.split()) for prompt in request.prompts)
    return CalibrationPlan(
        source=source,
        prompts=prompts or world_prompts(_EMBEDDED_PROMPTS, request.seed),
        sparsities=sparsities,
        num_layers=num_layers,
        denoising_steps=steps,
        max_sequence_length=defaults.max_sequence_length,
        folders=folders,
        **values,
    )


def world_prompts(count: int, seed: int) -> tuple[str, ...]:
    """Captions of the embedded model's world, from the scenes that it was trained on."""
    from sla_video.pipelines.tiny_wan.grammar import caption
    from sla_video.pipelines.tiny_wan.scenes import sample_scene

    rng = random.Random(f"calibration/{seed}")
    return tuple(caption(sample_scene(rng, held_out=False), rng) for _ in range(count))


def settings_of(request: CalibrationRequest, plan: CalibrationPlan) -> dict[str, Any]:
    """The settings as used, as JSON can hold them. They go into the files of the routers."""
    names = ("model", "mean_sparsity", "target_recall", "steps", "trainable", "capture_steps")
    filled = ("denoising_steps", "guidance_scale", "frames", "height", "width")
    return {
        **{name: getattr(request, name) for name in (*names, "negative_prompt", "seed", "dtype")},
        **{name: getattr(plan, name) for name in filled},
        "prompts": list(plan.prompts),
    }


def _check_layers(request: CalibrationRequest, num_layers: int) -> None:
    try:
        layers = SLAConfig(dense_layers=request.dense_layers).layer_plan(num_layers)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    if all(sparsity is None for sparsity in layers):
        raise InputError("`dense_layers` names all layers: there is nothing left to calibrate")


def _check_free(request: CalibrationRequest, folders: Sequence[Path]) -> None:
    out = request.out.expanduser()
    if out.exists() and not out.is_dir():
        raise InputError(f"`out` must be a folder, got the file {out}")
    if request.overwrite:
        return
    for folder in dict.fromkeys((out, *folders)):
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(
                f"{folder} exists and is not empty: give another --out, or --overwrite to replace "
                "the routers in it"
            )


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}")


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise InputError(f"`{name}` must be a positive number, got {value}")


def _check_whole(name: str, value: int | None, low: int, high: int | None = None) -> None:
    if value is None:
        return
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"`{name}` must be {limit}, got {value}")
