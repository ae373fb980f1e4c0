"""Low-rank corrections of the projections around the attention, as stage 2 of the training makes.

They are a PEFT adapter named "sla" beside whatever adapters the user has. A layer that had no
adapter gets its own module back when ours is taken off, so that nothing of it stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ADAPTER_NAME = "sla"
# Weights are also stored in others, by layerwise casting and quantization.
_COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ATTENTION_PROJECTIONS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")


@dataclass(frozen=True, kw_only=True)
class LoraAdapter:
    """The adapter of one transformer, apart from it.

    Attributes:
        rank: of every correction.
        alpha: a correction is scaled by `alpha / rank`.
        targets: ends of the names of the linear layers that have one.
        tensors: "blocks.0.attn1.to_q.lora_A.weight" -> `[rank, in]`; `lora_B`: `[out, rank]`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]


def add_lora(
    transformer: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = ATTENTION_PROJECTIONS,
) -> None:
    """Add a fresh adapter, which changes nothing yet. Its weights are float32 and trainable.

    What else is trainable stays so, and other adapters stay active.

    Args:
        rank: of every correction, at least 1.
        alpha: scale times `rank`; default `rank`.
        targets: ends of the names of the linear layers to correct.

    Raises:
        ValueError: the transformer has our adapter already, its projections or other LoRA are
            fused, or it has no layer of such a name.
    """
    from peft import LoraConfig

    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}")
    if ADAPTER_NAME in getattr(transformer, "peft_config", {}):
        raise ValueError(f"the transformer has an adapter named {ADAPTER_NAME!r} already")
    if any(getattr(module, "fused_projections", False) for module in transformer.modules()):
        raise ValueError(
            "the projections are fused (`fuse_qkv_projections`), and LoRA corrects them one by "
            "one: call `unfuse_qkv_projections` first"
        )
    if any(getattr(module, "merged_adapters", None) for module in transformer.modules()):
        raise ValueError(
            "LoRA is fused into the transformer (`fuse_lora`), and a layer with fused LoRA leaves "
            "out all other: call `unfuse_lora` first, or keep the fused weights for good with "
            "`unload_lora_weights`"
        )
    check_targets(transformer, targets)
    trainable = {id(p): p.requires_grad for p in transformer.parameters()}
    active = _active_adapters(transformer)
    transformer.add_adapter(  # type: ignore[operator]
        LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type,unused-ignore]
            target_modules=list(targets),
        ),
        adapter_name=ADAPTER_NAME,
    )
    for layer, before in _tuned_layers(transformer, active):
        layer.set_adapter([*before, ADAPTER_NAME] if _has_ours(layer) else before)
    for parameter in transformer.parameters():
        parameter.requires_grad_(trainable.get(id(parameter), True))
    for parameter in lora_parameters(transformer).values():
        parameter.data = parameter.data.float()


def check_targets(transformer: nn.Module, targets: Sequence[str]) -> None:
    """Raise a ValueError unless each target ends the name of a linear layer, and of none else."""
    modules = list(transformer.named_modules())
    for target in targets:
        ending = [module for name, module in modules if name.endswith(f".{target}")]
        if not ending:
            raise ValueError(f"the transformer has no layer whose name ends with {target!r}")
        other = [type(m).__name__ for m in ending if not isinstance(_base_of(m), nn.Linear)]
        if other:
            raise ValueError(f"LoRA corrects linear layers, and {target!r} is a {other[0]}")


def attach_lora(transformer: nn.Module, adapter: LoraAdapter) -> None:
    """Add an adapter with these weights, not trainable, in the dtype that the layers compute in.

    Raises:
        ValueError: as `add_lora`, or the weights do not fit the transformer, or they are kept
            elsewhere (sequential offload).
    """
    hooks = (getattr(module, "_hf_hook", None) for module in transformer.modules())
    if any(getattr(hook, "offload", False) for hook in hooks):
        raise ValueError(
            "these routers come with LoRA, and the weights that it corrects are not there between "
            "calls (`enable_sequential_cpu_offload`): use `enable_group_offload` or "
            "`enable_model_cpu_offload`"
        )
    with torch.random.fork_rng(devices=[]):
        add_lora(transformer, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets)
    own = lora_parameters(transformer)
    wrong = sorted(set(own) ^ set(adapter.tensors)) or [
        name for name, tensor in adapter.tensors.items() if tensor.shape != own[name].shape
    ]
    if wrong:
        detach_lora(transformer)
        raise ValueError(f"the LoRA weights do not fit the transformer: see {wrong[0]!r}")
    for layer in our_layers(transformer):
        dtype = layer.get_base_layer().weight.dtype
        for part in (layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]):
            part.to(dtype if dtype in _COMPUTE_DTYPES else torch.float32)
    for name, parameter in lora_parameters(transformer).items():
        parameter.data.copy_(adapter.tensors[name])
        parameter.requires_grad_(False)
    _renew_group_offloading(transformer)


def detach_lora(transformer: nn.Module) -> None:
    """Take our adapter off. Layers that have no other one are the modules they were before."""
    config = getattr(transformer, "peft_config", {})
    if ADAPTER_NAME not in config:
        return
    names = {id(module): name for name, module in transformer.named_modules()}
    for layer in our_layers(transformer):
        fused = list(layer.merged_adapters)
        if ADAPTER_NAME in fused:
            layer.unmerge()
            if len(fused) > 1:
                layer.merge(adapter_names=[name for name in fused if name != ADAPTER_NAME])
        others = [name for name in layer.lora_A if name != ADAPTER_NAME]
        if others:
            active = [name for name in layer.active_adapters if name != ADAPTER_NAME]
            layer.set_adapter(active)
            layer.delete_adapter(ADAPTER_NAME)
        else:
            parent, _, child = names[id(layer)].rpartition(".")
            setattr(transformer.get_submodule(parent), child, layer.get_base_layer())
    config.pop(ADAPTER_NAME)
    if not config:
        del transformer.peft_config
        transformer._hf_peft_config_loaded = False  # type: ignore[assignment]
    _renew_group_offloading(transformer)


def _renew_group_offloading(transformer: nn.Module) -> None:
    """Group offloading knows the layers that it found: let it find those of now."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(transformer)


def lora_of(transformer: nn.Module) -> LoraAdapter | None:
    """A copy of our adapter on the CPU; None where there is none."""
    config = getattr(transformer, "peft_config", {}).get(ADAPTER_NAME)
    if config is None:
        return None
    return LoraAdapter(
        rank=config.r,
        alpha=config.lora_alpha,
        targets=tuple(sorted(config.target_modules)),
        tensors={
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in lora_parameters(transformer).items()
        },
    )


def lora_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of our adapter by the names of `LoraAdapter.tensors`."""
    inner = f".{ADAPTER_NAME}."
    return {
        name.replace(inner, "."): parameter
        for name, parameter in transformer.named_parameters()
        if inner in name and ("lora_A" in name or "lora_B" in name)
    }


def switch_lora(transformer: nn.Module, *, on: bool) -> None:
    """Let our adapter have its effect, or none; other adapters are left alone."""
    for layer in our_layers(transformer):
        layer.set_scale(ADAPTER_NAME, 1.0 if on else 0.0)


def check_not_fused(attn: Any) -> None:
    """Raise a ValueError if fused projections would leave our adapter out in silence."""
    fused = getattr(attn, "fused_projections", False)
    if fused and any(_has_ours(getattr(attn, n, None)) for n in ("to_q", "to_k")):
        raise ValueError(
            "these routers come with LoRA, which fused projections (`fuse_qkv_projections`) leave "
            "out: call `unfuse_qkv_projections`, or disable SLA before fusing"
        )


def hide_lora(transformer: nn.Module) -> Any:
    """Keep our adapter out of `state_dict()`: `save_pretrained` goes on writing the model itself.

    Returns the handle that ends this. With other adapters beside ours, their names stay as PEFT
    makes them.
    """
    return transformer.register_state_dict_post_hook(_hide)


def _hide(transformer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    bare = list(getattr(transformer, "peft_config", {})) == [ADAPTER_NAME]
    for name in list(state):
        if f".{ADAPTER_NAME}." in name:
            del state[name]
        elif bare and ".base_layer." in name:
            state[name.replace(".base_layer.", ".")] = state.pop(name)


def _base_of(layer: nn.Module) -> nn.Module:
    """The layer itself, without adapters around it."""
    base: nn.Module = getattr(layer, "base_layer", layer)
    return base


def _has_ours(layer: Any) -> bool:
    return ADAPTER_NAME in getattr(layer, "lora_A", {})


def our_layers(transformer: nn.Module) -> list[Any]:
    """PEFT's layers that have our adapter."""
    return [layer for layer in transformer.modules() if _has_ours(layer)]


def _active_adapters(transformer: nn.Module) -> dict[int, list[str]]:
    """Active adapters of each layer that has any, by the layer's identity."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        id(module): list(module.active_adapters)
        for module in transformer.modules()
        if isinstance(module, BaseTunerLayer)
    }


def _tuned_layers(
    transformer: nn.Module, active: Mapping[int, list[str]]
) -> list[tuple[Any, list[str]]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        (module, active.get(id(module), []))
        for module in transformer.modules()
        if isinstance(module, BaseTunerLayer)
    ]
