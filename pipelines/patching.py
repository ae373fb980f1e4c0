"""Put SLA attention into a Diffusers pipeline, and take it out again."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from sla_video.config import Implementation, SLAConfig, SparseDtype
from sla_video.config_compression import TokenCompression
from sla_video.kernels.api import available_implementations
from sla_video.kernels.router import Router
from sla_video.pipelines.chosen_settings import choose_settings
from sla_video.pipelines.families.family import Family
from sla_video.pipelines.families.registry import (
    family_of,
    find_family,
    supported_transformers,
)
from sla_video.pipelines.first_steps import FirstStepsDense
from sla_video.pipelines.handle import SLAHandle, TransformerPatch
from sla_video.pipelines.key_order import make_layer_orders
from sla_video.pipelines.lora import LoraAdapter, attach_lora, detach_lora
from sla_video.pipelines.parallel import Ulysses
from sla_video.pipelines.processor import DenseSwitch, SLAAttnProcessor
from sla_video.pipelines.recipe import Recipe
from sla_video.pipelines.recipe_guard import RecipeGuard
from sla_video.pipelines.router_set import ModelIdentity, RouterSet
from sla_video.pipelines.token_compression import TransformerCompression
from sla_video.pipelines.token_order import TokenOrder

logger = logging.getLogger("sla_video")

_COMPONENTS = ("transformer", "transformer_2")


def enable_sla(
    pipe_or_transformer: Any,
    routers: str | os.PathLike[str] | RouterSet | None = None,
    *,
    sparsity: float | Sequence[float] | Mapping[int, float] | None = None,
    dense_layers: Sequence[int] | None = None,
    dense_steps: int | None = None,
    sparse_dtype: SparseDtype | None = None,
    impl: Implementation | None = None,
    token_order: str | None = None,
    compression: TokenCompression | None = None,
    config: SLAConfig | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    component: str = "transformer",
) -> SLAHandle:
    """Replace the self-attention of a video pipeline or transformer by SLA2.

    Only the given instances are changed. Cross-attention stays as it is. In a pipeline both
    `transformer` and `transformer_2` are patched.

    Args:
        pipe_or_transformer: a Diffusers pipeline, or one of its transformers; classes: `families/`.
        routers: a folder of `save_routers`, a hub id, or what `load_routers` returned. None is the
            training-free mode.
        sparsity: share of the key blocks left to the linear branch, in [0, 1): one for all layers,
            one for each, or layer -> sparsity for those that differ from `config.sparsity`.
        dense_layers: layers that keep Diffusers' attention; -1 is the last.
        dense_steps: how many of the first denoising steps keep Diffusers' attention, as the
            scheduler of the pipeline counts them. Needs a pipeline.
        sparse_dtype: number format of the sparse branch.
        impl: implementation of the operator. "auto" says at INFO which it took.
        token_order: of all layers, which decides what is together in a block; see `SLAConfig`.
        compression: attention among fewer tokens in some layers and steps. Needs a pipeline.
        config: all settings at once. Default: those of `routers`, else `SLAConfig()`. The
            arguments above replace single fields of it.
        recipe: instead: settings of each transformer, with the routers they were measured with, as
            `sla-video tune` chose them; a file, a hub id, or what `load_recipe` returned. Of the
            arguments above it leaves room for `routers`, `dense_steps`, `sparse_dtype`, `impl`.
        component: for a bare transformer, which of the pipeline's it is, when `routers` hold two.

    Returns:
        The handle that removes the patch and reads its statistics.

    Raises:
        TypeError: neither a pipeline with a supported transformer nor such a transformer.
        ValueError: already enabled, a setting out of range, routers of another model or trained
            with other blocks, a recipe of another model, or a kind of parallelism other than
            Ulysses in use. A recipe refuses videos of other sizes when they are made.
    """
    transformers = _find_transformers(pipe_or_transformer, component)
    families = {name: family_of(transformer) for name, transformer in transformers.items()}
    for name, transformer in transformers.items():
        _check_patchable(name, transformer, families[name])
    changes: dict[str, Any] = {
        "dense_layers": dense_layers,
        "dense_steps": dense_steps,
        "sparse_dtype": sparse_dtype,
        "impl": impl,
        "token_order": token_order,
        "compression": compression,
        **_sparsity_fields(sparsity),
    }
    chosen, router_set, found = choose_settings(transformers, routers, recipe, config, changes)
    pipe = None if isinstance(pipe_or_transformer, nn.Module) else pipe_or_transformer
    for settings in chosen.values():
        available = available_implementations().get(settings.impl, "available")
        if available != "available":
            raise ValueError(f"impl={settings.impl!r} cannot run here: {available}")
        if settings.dense_steps and pipe is None:
            source = "recipe asks" if found is not None else "routers ask"
            asked = f" (as the {source})" if dense_steps is None and config is None else ""
            raise ValueError(
                f"`dense_steps`={settings.dense_steps}{asked} needs the pipeline, whose scheduler "
                "counts the steps: pass the pipeline, or dense_steps=0 and run the first calls "
                "within `with handle.dense():`"
            )

    # Everything is built before anything is changed, so that an error leaves the model alone.
    prepared = []
    identities = {}
    for name, transformer in transformers.items():
        settings = chosen[name]
        identities[name] = ModelIdentity.of(transformer)
        guard = None
        if found is not None:
            found.check_fits(name, identities[name])
            guard = RecipeGuard(found, families[name])
        if router_set is not None:
            router_set.check_fits(name, identities[name])
        layers = families[name].layers(transformer)
        if isinstance(sparsity, Sequence) and len(sparsity) != len(layers):
            raise ValueError(
                f"`sparsity` must hold one value for each of the {len(layers)} layers of "
                f"{name!r}, got {len(sparsity)}"
            )
        switch = DenseSwitch()
        processors = _make_processors(name, families[name], layers, settings, router_set, switch)
        orders = make_layer_orders(name, families[name], layers, settings, pipe)
        for layer, key_order in orders.items():
            processors[layer].key_order = key_order
        hook = FirstStepsDense(pipe, settings.dense_steps, switch) if settings.dense_steps else None
        order = TokenOrder.of(settings.token_order, families[name])
        patch = TransformerPatch(layers, switch)
        compress = TransformerCompression.of(
            settings, families[name], transformer, processors, pipe
        )
        prepared.append((transformer, patch, processors, hook, (order, compress, guard)))
    if router_set is not None:
        _attach_all(transformers, router_set.lora)
    for transformer, patch, processors, hook, others in prepared:
        patch.install(transformer, processors, hook, others)
    return SLAHandle(transformers, identities, chosen)


def _attach_all(transformers: Mapping[str, nn.Module], lora: Mapping[str, LoraAdapter]) -> None:
    """Add the LoRA of all components, or of none if one does not fit."""
    with ExitStack() as undo:
        for component, transformer in transformers.items():
            if component in lora:
                attach_lora(transformer, lora[component])
                undo.callback(detach_lora, transformer)
        undo.pop_all()


def disable_sla(pipe_or_transformer: Any) -> None:
    """Put the original attention processors back: the very same objects, so the same outputs.

    Raises:
        TypeError: neither a pipeline with a supported transformer nor such a transformer.
        ValueError: SLA attention is not enabled there.
    """
    patched = [
        (transformer, patch)
        for transformer in _find_transformers(pipe_or_transformer, "transformer").values()
        if (patch := TransformerPatch.of(transformer)) is not None
    ]
    if not patched:
        raise ValueError(
            f"SLA attention is not enabled in this {type(pipe_or_transformer).__name__}: "
            "there is nothing to disable"
        )
    for transformer, patch in patched:
        patch.remove(transformer)


def _find_transformers(model: Any, component: str) -> dict[str, nn.Module]:
    """The transformers by the name of their component; TypeError unless all are supported."""
    if isinstance(model, nn.Module):
        if component not in _COMPONENTS:
            raise ValueError(f"`component` must be one of {_COMPONENTS}, got {component!r}")
        found = {component: model}
    else:
        found = {
            name: transformer
            for name in _COMPONENTS
            if (transformer := getattr(model, name, None)) is not None
        }
    # `torch.compile(transformer)` wraps it.
    found = {name: getattr(module, "_orig_mod", module) for name, module in found.items()}
    wrong = {name: type(m).__name__ for name, m in found.items() if find_family(m) is None}
    if not found or wrong:
        holds = "".join(f" with a {name} {kind}" for name, kind in wrong.items() if kind) or (
            " without a transformer"
        )
        got = type(model).__name__ + ("" if isinstance(model, nn.Module) else holds)
        raise TypeError(
            f"got {got}, but SLA attention supports {', '.join(supported_transformers())} of "
            "Diffusers, and the pipelines that have one"
        )
    return found


def _check_patchable(name: str, transformer: nn.Module, family: Family) -> None:
    if TransformerPatch.of(transformer) is not None:
        raise ValueError(
            f"SLA attention is already enabled in {name!r}: call `disable_sla` (or the handle's "
            "`remove`) before enabling it anew"
        )
    # Raises for kinds of parallelism in which SLA attention is not exact.
    Ulysses.of(getattr(transformer, "_parallel_config", None))
    for layer_name, layer in family.layers(transformer).items():
        hooks = getattr(getattr(layer, "_diffusers_hook", None), "hooks", {})
        if any(getattr(hook, "skip_attention_scores", False) for hook in hooks.values()):
            raise ValueError(
                f"{name}.{layer_name} skips its attention scores (perturbed attention guidance, "
                "`LayerSkipConfig`), which SLA attention does not compute: remove that hook first"
            )
        processor = layer.processor
        if not _is_stock(processor, family):
            raise ValueError(
                f"{name}.{layer_name} has the processor {type(processor).__name__}, and SLA "
                f"attention would drop what it adds: put {' or '.join(family.processors)} back "
                "first"
            )


def _is_stock(processor: object, family: Family) -> bool:
    """By name: Diffusers has copies of a class in several of its modules, and moves them."""
    kind = type(processor)
    return kind.__name__ in family.processors and kind.__module__.startswith("diffusers.")


def _sparsity_fields(
    sparsity: float | Sequence[float] | Mapping[int, float] | None,
) -> dict[str, Any]:
    if isinstance(sparsity, Mapping):
        return {"layer_sparsity": sparsity}
    if isinstance(sparsity, Sequence) and not isinstance(sparsity, str):
        return {"layer_sparsity": dict(enumerate(sparsity))}
    # One number for all layers takes back what the settings say of single ones.
    return {} if sparsity is None else {"sparsity": sparsity, "layer_sparsity": {}}


def _make_processors(
    component: str,
    family: Family,
    layers: Mapping[str, Any],
    settings: SLAConfig,
    router_set: RouterSet | None,
    switch: DenseSwitch,
) -> dict[str, SLAAttnProcessor]:
    plan = settings.layer_plan(len(layers))
    processors = {}
    for (name, layer), sparsity in zip(layers.items(), plan, strict=True):
        router = None
        if sparsity is not None:
            router = _make_router(f"{component}.{name}", family, layer, settings, router_set)
        processors[name] = SLAAttnProcessor(
            family, layer.processor, router, settings, sparsity=sparsity, switch=switch
        )
    return processors


def _make_router(
    name: str, family: Family, layer: Any, settings: SLAConfig, router_set: RouterSet | None
) -> Router:
    if router_set is None:
        router = Router(
            *family.heads_and_dim(layer),
            per_head=settings.router_per_head,
            alpha=settings.alpha,
            num_query_blocks=settings.num_query_blocks,
        )
    elif name in router_set.routers:
        router = copy.deepcopy(router_set.routers[name])
    else:
        raise ValueError(
            f"there is no router for {name}: it was dense in training; "
            "name it in `dense_layers`, or train routers for all layers"
        )
    weight = next(layer.parameters())
    return router if weight.is_meta else router.to(weight.device)
