"""What people do to a pipeline besides enabling SLA attention: the rows of the compatibility table.

Each is one function that changes a pipeline as its documentation says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import cpu_offload
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.hooks import LayerSkipConfig, TaylorSeerCacheConfig, apply_layer_skip
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
PROMPTS = ["a red circle moves left", "the blue square on the right"]

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


def lora_weights(seed: int = 5, rank: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA for the tiny transformer, as trainers save it: of attention and feed-forward."""
    generator = torch.Generator().manual_seed(seed)
    targets = {
        f"blocks.{block}.{layer}": size
        for block in range(3)
        for layer, size in (
            ("attn1.to_q", (32, 32)),
            ("attn1.to_v", (32, 32)),
            ("attn2.to_k", (32, 32)),
            ("ffn.net.2", (32, 48)),
        )
    }
    return {
        f"transformer.{name}.{part}.weight": torch.randn(shape, generator=generator) / 2
        for name, (out, inner) in targets.items()
        for part, shape in (("lora_A", (rank, inner)), ("lora_B", (out, rank)))
    }


def load_lora(pipe: Any) -> None:
    pipe.load_lora_weights(lora_weights(), adapter_name="style")


def fuse_lora(pipe: Any) -> None:
    load_lora(pipe)
    pipe.fuse_lora(components=["transformer"])


def unfuse_lora(pipe: Any) -> None:
    fuse_lora(pipe)
    pipe.unfuse_lora(components=["transformer"])


def unload_lora(pipe: Any) -> None:
    load_lora(pipe)
    pipe.unload_lora_weights()


def switch_lora_adapters(pipe: Any) -> None:
    load_lora(pipe)
    pipe.load_lora_weights(lora_weights(seed=6), adapter_name="other")
    pipe.set_adapters(["style", "other"], [0.5, 0.25])


def fuse_qkv(pipe: Any) -> None:
    pipe.transformer.fuse_qkv_projections()


def unfuse_qkv(pipe: Any) -> None:
    pipe.transformer.fuse_qkv_projections()
    pipe.transformer.unfuse_qkv_projections()


def first_block_cache(pipe: Any) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))


def taylorseer(pipe: Any) -> None:
    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=3,
            disable_cache_before_step=2,
            taylor_factors_dtype=torch.float32,
            # The default patterns match no layer of Wan.
            cache_identifiers=[r"blocks\.\d+\.attn\d"],
        )
    )


def taylorseer_lite(pipe: Any) -> None:
    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=3,
            disable_cache_before_step=2,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=True,
        )
    )


def mag_cache(pipe: Any) -> None:
    pipe.transformer.enable_cache(
        MagCacheConfig(
            threshold=0.5, num_inference_steps=5, mag_ratios=[1.0, 1.01, 1.02, 0.99, 1.0]
        )
    )


def pyramid_attention_broadcast(pipe: Any) -> None:
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=3,
            spatial_attention_timestep_skip_range=(100, 950),
            cross_attention_timestep_skip_range=(100, 950),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )


def faster_cache(pipe: Any) -> None:
    pipe.transformer.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 950),
            is_guidance_distilled=True,
            attention_weight_callback=lambda _: 0.5,
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )


def smoothed_energy_guidance(pipe: Any) -> None:
    config = SmoothedEnergyGuidanceConfig(indices=[1], fqn="blocks")
    _apply_smoothed_energy_guidance_hook(pipe.transformer, config, blur_sigma=2.0)


def skip_layer(pipe: Any) -> None:
    apply_layer_skip(pipe.transformer, LayerSkipConfig(indices=[1], fqn="blocks"))


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device=CPU)


def sequential_offload(pipe: Any) -> None:
    cpu_offload(pipe.transformer, execution_device=CPU)


def group_offload_blocks(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


def group_offload_leaves(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    )


def layerwise_casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)


def torchao_int8(pipe: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def torchao_fp8(pipe: Any) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Float8WeightOnlyConfig())


def attention_backend(pipe: Any) -> None:
    pipe.transformer.set_attention_backend("_native_math")


def to_bfloat16(pipe: Any) -> None:
    pipe.to(torch.bfloat16)


def deep_copy(pipe: Any) -> Any:
    return copy.deepcopy(pipe)


ATTENTION = "Attention modules"
LORA = "LoRA (PEFT)"
CACHES = "Caches"
GUIDANCE = "Guidance"
MEMORY = "Memory"
WEIGHTS = "Quantized weights"
CALLS = "Calls"

FEATURES = [
    Feature(group=ATTENTION, name="`fuse_qkv_projections()`", apply=fuse_qkv, effect="none"),
    Feature(
        group=ATTENTION,
        name="`fuse_qkv_projections()`, then `unfuse_qkv_projections()`",
        apply=unfuse_qkv,
        effect="none",
    ),
    Feature(
        group=ATTENTION,
        name="`set_attention_backend(...)`",
        apply=attention_backend,
        effect="none",
        note="It chooses the kernel of cross-attention and of dense calls; SLA2 has its own.",
    ),
    Feature(group=LORA, name="`load_lora_weights`", apply=load_lora),
    Feature(group=LORA, name="`load_lora_weights`, `fuse_lora`", apply=fuse_lora),
    Feature(group=LORA, name="`fuse_lora`, `unfuse_lora`", apply=unfuse_lora),
    Feature(group=LORA, name="`unload_lora_weights`", apply=unload_lora, effect="none"),
    Feature(group=LORA, name="`set_adapters` with weights", apply=switch_lora_adapters),
    Feature(group=CACHES, name="`FirstBlockCacheConfig`", apply=first_block_cache),
    Feature(
        group=CACHES,
        name="`TaylorSeerCacheConfig`",
        apply=taylorseer,
        note="Its default patterns match no layer of Wan: name them in `cache_identifiers`.",
    ),
    Feature(
        group=CACHES, name="`TaylorSeerCacheConfig(use_lite_mode=True)`", apply=taylorseer_lite
    ),
    Feature(group=CACHES, name="`MagCacheConfig`", apply=mag_cache),
    Feature(
        group=CACHES,
        name="`PyramidAttentionBroadcastConfig`",
        apply=pyramid_attention_broadcast,
        note="It leaves out whole calls of the attention; `stats()` counts those that were made.",
    ),
    Feature(
        group=CACHES,
        name="`FasterCacheConfig(is_guidance_distilled=True)`",
        apply=faster_cache,
        note="Without `is_guidance_distilled` it needs both halves of guidance in one batch, "
        "which Wan pipelines do not have, with or without SLA.",
    ),
    Feature(group=GUIDANCE, name="Smoothed energy guidance", apply=smoothed_energy_guidance),
    Feature(group=GUIDANCE, name="Skipped layers (`apply_layer_skip`)", apply=skip_layer),
    Feature(
        group=MEMORY,
        name="`enable_model_cpu_offload()`",
        apply=model_offload,
        effect="none",
    ),
    Feature(
        group=MEMORY,
        name="Sequential offload (Accelerate's `cpu_offload`)",
        apply=sequential_offload,
        effect="none",
    ),
    Feature(
        group=MEMORY,
        name='`enable_group_offload(offload_type="block_level")`',
        apply=group_offload_blocks,
        effect="none",
    ),
    Feature(
        group=MEMORY,
        name='`enable_group_offload(offload_type="leaf_level")`',
        apply=group_offload_leaves,
        effect="none",
    ),
    Feature(
        group=MEMORY,
        name="`enable_layerwise_casting` with FP8 storage",
        apply=layerwise_casting,
        note="Routers stay in FP32.",
    ),
    Feature(
        group=WEIGHTS,
        name="torchao INT8 weights",
        apply=torchao_int8,
        needs="torchao",
    ),
    Feature(
        group=WEIGHTS,
        name="torchao FP8 weights",
        apply=torchao_fp8,
        needs="torchao",
    ),
    Feature(
        group=CALLS,
        name="`pipe.to(torch.bfloat16)`",
        apply=to_bfloat16,
        error=1e-2,
        note="Routers stay in FP32.",
    ),
    Feature(group=CALLS, name="Several prompts at once", call={"prompt": PROMPTS}),
    Feature(
        group=CALLS,
        name="`num_videos_per_prompt` above 1",
        call={"num_videos_per_prompt": 2},
    ),
    Feature(group=CALLS, name="Without guidance", call={"guidance_scale": 1.0}),
]
