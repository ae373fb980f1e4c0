"""The rows of the compatibility table that the same tests are run for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import compatibility_features as do

# Changes a pipeline in place, or gives another one.
Apply = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One row of the table, and how it is tested before and after `enable_sla`.

    Attributes:
        group: heading in the table.
        name: what it is, in Markdown.
        apply: does it.
        call: arguments of the pipeline's call that it consists of.
        effect: "none" if the videos have to stay what they are, "some" if they have to change.
        error: relative, of full selection against Diffusers and of what must not change.
        needs: a module without which it cannot be tested.
        note: for the reader of the table.
    """

    group: str
    name: str
    apply: Apply = lambda pipe: None
    call: dict[str, Any] = field(default_factory=dict)
    effect: str = "some"
    error: float = 2e-6
    needs: str | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RouterLora:
    """A row for routers that bring LoRA.

    Attributes:
        users: (seed, weight) of the user's LoRA that has an effect afterwards.
        before: None if it works before `enable_sla`, else what the error says.
        after: the same for after it.
    """

    name: str
    apply: Apply
    users: tuple[tuple[int, float], ...] = ()
    before: str | None = None
    after: str | None = None
    group: str = "LoRA (PEFT), with routers that bring LoRA of their own"
    note: str = ""


ATTENTION = "Attention modules"
COMPILER = "Compilation"
TRAINING = "Training, files, copies"
LORA = "LoRA (PEFT)"
CACHES = "Caches"
GUIDANCE = "Guidance"
MEMORY = "Memory"
WEIGHTS = "Quantized weights"
CALLS = "Calls"

FEATURES = [
    Feature(group=ATTENTION, name="`fuse_qkv_projections()`", apply=do.fuse_qkv, effect="none"),
    Feature(
        group=ATTENTION,
        name="`fuse_qkv_projections()`, then `unfuse_qkv_projections()`",
        apply=do.unfuse_qkv,
        effect="none",
    ),
    Feature(
        group=ATTENTION,
        name="`set_attention_backend(...)`",
        apply=do.attention_backend,
        effect="none",
        note="It chooses the kernel of cross-attention and of dense calls; SLA2 has its own.",
    ),
    Feature(group=LORA, name="`load_lora_weights`", apply=do.load_lora),
    Feature(group=LORA, name="`load_lora_weights`, `fuse_lora`", apply=do.fuse_lora),
    Feature(group=LORA, name="`fuse_lora`, `unfuse_lora`", apply=do.unfuse_lora),
    Feature(group=LORA, name="`unload_lora_weights`", apply=do.unload_lora, effect="none"),
    Feature(group=LORA, name="`set_adapters` with weights", apply=do.switch_lora_adapters),
    Feature(group=CACHES, name="`FirstBlockCacheConfig`", apply=do.first_block_cache),
    Feature(
        group=CACHES,
        name="`TaylorSeerCacheConfig`",
        apply=do.taylorseer,
        note="Its default patterns match no layer of Wan: name them in `cache_identifiers`.",
    ),
    Feature(
        group=CACHES, name="`TaylorSeerCacheConfig(use_lite_mode=True)`", apply=do.taylorseer_lite
    ),
    Feature(group=CACHES, name="`MagCacheConfig`", apply=do.mag_cache),
    Feature(
        group=CACHES, name="`SeaCacheConfig`", apply=do.sea_cache, needs="diffusers.hooks.sea_cache"
    ),
    Feature(
        group=CACHES,
        name="`PyramidAttentionBroadcastConfig`",
        apply=do.pyramid_attention_broadcast,
        note="It leaves out whole calls of the attention; `stats()` counts those that were made.",
    ),
    Feature(
        group=CACHES,
        name="`FasterCacheConfig(is_guidance_distilled=True)`",
        apply=do.faster_cache,
        note="Without `is_guidance_distilled` it needs both halves of guidance in one batch, "
        "which Wan pipelines do not have, with or without SLA.",
    ),
    Feature(group=GUIDANCE, name="Smoothed energy guidance", apply=do.smoothed_energy_guidance),
    Feature(group=GUIDANCE, name="Skipped layers (`apply_layer_skip`)", apply=do.skip_layer),
    Feature(
        group=MEMORY,
        name="`enable_model_cpu_offload()`",
        apply=do.model_offload,
        effect="none",
    ),
    Feature(
        group=MEMORY,
        name="Sequential offload (Accelerate's `cpu_offload`)",
        apply=do.sequential_offload,
        effect="none",
    ),
    Feature(
        group=MEMORY,
        name='`enable_group_offload(offload_type="block_level")`',
        apply=do.group_offload_blocks,
        effect="none",
    ),
    Feature(
        group=MEMORY,
        name='`enable_group_offload(offload_type="leaf_level")`',
        apply=do.group_offload_leaves,
        effect="none",
    ),
    Feature(
        group=MEMORY,
        name="`enable_layerwise_casting` with FP8 storage",
        apply=do.layerwise_casting,
        note="Routers stay in FP32.",
    ),
    Feature(
        group=WEIGHTS,
        name="torchao INT8 weights",
        apply=do.torchao_int8,
        needs="torchao",
    ),
    Feature(
        group=WEIGHTS,
        name="torchao FP8 weights",
        apply=do.torchao_fp8,
        needs="torchao",
    ),
    Feature(
        group=CALLS,
        name="`pipe.to(torch.bfloat16)`",
        apply=do.to_bfloat16,
        error=1e-2,
        note="Routers stay in FP32.",
    ),
    Feature(
        group=CALLS,
        name="Several prompts at once",
        call={"prompt": ["a red circle moves left", "the blue square on the right"]},
    ),
    Feature(
        group=CALLS,
        name="`num_videos_per_prompt` above 1",
        call={"num_videos_per_prompt": 2},
    ),
    Feature(group=CALLS, name="Without guidance", call={"guidance_scale": 1.0}),
]

FUSED = "Fused LoRA makes a layer leave out all other LoRA."
ROUTER_LORA_ROWS = [
    RouterLora(name="`load_lora_weights`", apply=do.load_lora, users=((5, 1.0),)),
    RouterLora(
        name="`set_adapters` with weights",
        apply=do.switch_lora_adapters,
        users=((5, 0.5), (6, 0.25)),
    ),
    RouterLora(name="`delete_adapters`", apply=do.delete_lora, note="Of your own."),
    RouterLora(name="`set_adapters` with weight 0", apply=do.silence_lora, note="Of your own."),
    RouterLora(name="`fuse_lora`, `unfuse_lora`", apply=do.unfuse_lora, users=((5, 1.0),)),
    RouterLora(
        name="`load_lora_weights`, `fuse_lora`",
        apply=do.fuse_lora,
        before="LoRA is fused into the transformer",
        after="call `unfuse_lora`, or `disable_sla` before fusing",
        note=FUSED,
    ),
    RouterLora(
        name="`fuse_lora`, then `unload_lora_weights`",
        apply=do.fuse_lora_for_good,
        users=((5, 1.0),),
        after="has been taken off the transformer, as `unload_lora_weights` does",
        note="The weights stay fused.",
    ),
    RouterLora(
        name="`unload_lora_weights`",
        apply=do.unload_lora,
        after="has been taken off the transformer, as `unload_lora_weights` does",
        note="It takes all LoRA off, that of the routers too: enable SLA anew.",
    ),
    RouterLora(
        name="`disable_lora`",
        apply=do.disable_lora,
        before="call `enable_lora`, and leave your own out",
        after="call `enable_lora`, and leave your own out",
        note="It switches all LoRA off, that of the routers too.",
    ),
    RouterLora(
        name="`fuse_qkv_projections()`",
        apply=do.fuse_qkv,
        before="call `unfuse_qkv_projections` first",
        after="call `unfuse_qkv_projections`, or disable SLA before fusing",
    ),
    RouterLora(
        name="Sequential offload",
        apply=do.sequential_offload,
        before="use `enable_group_offload` or `enable_model_cpu_offload`",
        after="base_layer",
        note="After `enable_sla` it is Accelerate that refuses, with a `KeyError`.",
    ),
    RouterLora(name="`enable_model_cpu_offload()`", apply=do.model_offload),
    RouterLora(
        name='`enable_group_offload(offload_type="leaf_level")`', apply=do.group_offload_leaves
    ),
]
