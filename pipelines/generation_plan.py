"""A request completed with the model's defaults, after every check that needs no weights.

Nothing in this file imports torch or diffusers: a bad setting is refused at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sla_video.pipelines.earlier_videos import EarlierVideos
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.generation_inputs import read_inputs
from sla_video.pipelines.generation_request import (
    NO_ROUTERS,
    GenerationRequest,
    check_sparsity,
)
from sla_video.pipelines.model_defaults import ModelDefaults
from sla_video.pipelines.model_source import ModelSource, find_model
from sla_video.pipelines.pipeline_kinds import (
    INPUTS,
    PIPELINE_KINDS,
    PipelineKind,
    choose_pipeline,
)
from sla_video.pipelines.recipe import Recipe, load_recipe
from sla_video.pipelines.video_files import plan_outputs

_STRENGTH = 0.8  # Diffusers' own


@dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """One video to make: its prompt, its seed and its file.

    Attributes:
        finished: the file is there already, from an earlier run.
    """

    prompt: str
    seed: int
    path: Path
    finished: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """A request that has passed every check that needs no weights, with all defaults filled in.

    Attributes:
        pipeline: how the pipeline is called that `source` and the inputs call for.
        inputs: arguments of its call: pictures and videos at their size.
        digests: "image_sha256" and so on -> hexadecimal digits, of the files of these and of the
            recipe.
        remarks: what the caller may not expect of them.
        chosen: the recipe, read.
        sparsity, dense_steps, token_order: `None` with dense attention, or to use those of the
            routers or the recipe.
        compress: share of the query-key pairs, `None` for all.
        strength: `None` where there is no video to keep a part of.
        denoising_steps: those of `steps` that are made; fewer where `strength` is below 1.
        max_sequence_length: `None` to leave it to the pipeline.
    """

    source: ModelSource
    pipeline: PipelineKind
    inputs: Mapping[str, Any]
    digests: Mapping[str, str]
    remarks: tuple[str, ...]
    videos: tuple[VideoPlan, ...]
    routers: str | None
    chosen: Recipe | None
    dense: bool
    sparsity: float | None
    dense_steps: int | None
    token_order: str | None
    compress: float | None
    strength: float | None
    steps: int
    denoising_steps: int
    guidance_scale: float
    negative_prompt: str | None
    frames: int
    height: int
    width: int
    fps: float
    max_sequence_length: int | None


def plan_generation(request: GenerationRequest, *, name_files: bool = True) -> GenerationPlan:
    """Find the model and check the request against it.

    Args:
        name_files: whether to plan the videos, with files that are not taken.

    Raises:
        InputError: no such model, inputs that it lacks, does not take or cannot read, sizes that
            it cannot make, or an output that is taken.
    """
    source = find_model(request.model, tuple(PIPELINE_KINDS))
    recipe = None if request.recipe is None else _read_recipe(request.recipe, source)
    defaults = _sized(source.defaults, recipe)
    files = {name: path for name in INPUTS if (path := getattr(request, name)) is not None}
    kind = choose_pipeline(source.name, source.index, source.transformer_config, files)
    values: dict[str, Any] = {
        field: getattr(defaults if getattr(request, field) is None else request, field)
        for field in ("steps", "guidance_scale")
    }
    values |= _strength(request, kind, values["steps"])
    inputs = read_inputs(files, defaults.frames if request.frames is None else request.frames)
    values |= inputs.choose_size(vars(request), defaults, source.geometry)
    size = (values["frames"], values["height"], values["width"])
    source.geometry.check(*size)
    if recipe is not None:
        recipe.check_size(*size)
    values |= _attention(request, defaults)
    plan = GenerationPlan(
        source=source,
        pipeline=kind,
        inputs=inputs.arguments(kind, *size),
        digests=inputs.digests() | ({} if recipe is None else {"recipe_sha256": recipe.digest}),
        remarks=inputs.remarks(*size),
        videos=(),
        chosen=recipe,
        dense=request.dense,
        compress=request.compress,
        negative_prompt=request.negative_prompt,
        max_sequence_length=(
            defaults.max_sequence_length
            if kind.like_wan
            else source.transformer_config.get("max_text_seq_length")  # of CogVideoX
        ),
        **values,
    )
    return dataclasses.replace(plan, videos=_videos_of(request, plan)) if name_files else plan


def _read_recipe(name: str, source: ModelSource) -> Recipe:
    """Read a recipe, and refuse that of another model before the weights are loaded."""
    recipe = load_recipe(name)
    made_for = recipe.models.get("transformer")
    if made_for is None:
        raise InputError(
            f"the recipe {name} is for {', '.join(recipe.models)} alone, and a video needs the "
            "model's 'transformer': tune a recipe with `sla-video tune`"
        )
    config = {**source.transformer_config}
    fields = {**made_for.fields, "_class_name": made_for.family}
    different = [
        f"{field.lstrip('_')}: {value} / {config[field]}"
        for field, value in fields.items()
        if field in config and config[field] != value
    ]
    if different:
        raise InputError(
            f"the recipe {name} was made for {made_for}, not for {source.name}; "
            f"they differ in {', '.join(different)}"
        )
    return recipe


def _sized(defaults: ModelDefaults, recipe: Recipe | None) -> ModelDefaults:
    """With the video size of the recipe."""
    if recipe is None:
        return defaults
    size = recipe.sizes[0]
    sizes = {name: getattr(size, name) for name in ("frames", "height", "width")}
    return dataclasses.replace(defaults, **sizes)


def _strength(request: GenerationRequest, kind: PipelineKind, steps: int) -> dict[str, Any]:
    """Strength, and how many of `steps` it leaves."""
    if not kind.fixed_length:
        if request.strength is not None:
            raise InputError(
                "`strength` is how much of --video a text-to-video model makes anew: leave it out"
            )
        return {"strength": None, "denoising_steps": steps}
    strength = _STRENGTH if request.strength is None else request.strength
    denoising_steps = min(int(steps * strength), steps)
    if denoising_steps == 0:
        raise InputError(
            f"`strength` {strength} of {steps} steps is no step at all: give more of one"
        )
    return {"strength": strength, "denoising_steps": denoising_steps}


def _attention(request: GenerationRequest, defaults: ModelDefaults) -> dict[str, Any]:
    """Sparsity, dense steps and routers."""
    values: dict[str, Any] = {}
    for field in ("sparsity", "dense_steps"):
        value = getattr(request, field)
        own = request.routers in (None, NO_ROUTERS) and request.recipe is None
        if value is None and own and not request.dense:
            value = getattr(defaults, field)
        values[field] = value
    if values["sparsity"] is not None:
        check_sparsity(values["sparsity"])
    routers, order = request.routers, request.token_order
    # Those of the embedded model were trained in raster order.
    trained = not request.dense and values["sparsity"] is not None and order in (None, "raster")
    if routers is None and trained and values["sparsity"] >= defaults.routers_sparsity:
        routers = defaults.routers
    return {**values, "token_order": order, "routers": None if routers == NO_ROUTERS else routers}


def _videos_of(request: GenerationRequest, plan: GenerationPlan) -> tuple[VideoPlan, ...]:
    """All videos of `request`, with their files."""
    prompts = [" ".join(p.split()) for p in request.prompts for _ in range(request.num_videos)]
    assert request.seed is not None  # drawn in __post_init__
    seeds = [request.seed + index for index in range(len(prompts))]
    earlier = EarlierVideos(settings_of(request, plan)) if request.resume else None
    paths = plan_outputs(request.out, prompts, seeds, overwrite=request.overwrite, earlier=earlier)
    return tuple(
        # Only a file of the same video is named although it exists.
        VideoPlan(prompt=prompt, seed=seed, path=path, finished=request.resume and path.exists())
        for prompt, seed, path in zip(prompts, seeds, paths, strict=True)
    )


def settings_of(request: GenerationRequest, plan: GenerationPlan) -> dict[str, object]:
    """Every setting as used, as JSON can hold it; seed and prompt are those of single videos."""
    settings = {
        field.name: getattr(plan, field.name, getattr(request, field.name))
        for field in dataclasses.fields(request)
        if field.name not in ("prompts", "seed", "out")
    }
    for name in INPUTS:
        settings[name] = None if settings[name] is None else str(settings[name])
    return {**settings, **plan.digests, "max_sequence_length": plan.max_sequence_length}
