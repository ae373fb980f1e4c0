"""What people do to a pipeline besides enabling SLA attention: one function each.

Each changes a pipeline in place, or gives another one.
"""

from __future__ import annotations

import copy
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


def fuse_lora_for_good(pipe: Any) -> None:
    fuse_lora(pipe)
    pipe.unload_lora_weights()


def disable_lora(pipe: Any) -> None:
    load_lora(pipe)
    pipe.disable_lora()


def delete_lora(pipe: Any) -> None:
    load_lora(pipe)
    pipe.delete_adapters("style")


def silence_lora(pipe: Any) -> None:
    load_lora(pipe)
    pipe.set_adapters("style", 0.0)


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
        MagCacheConfig(threshold=0.5, num_inference_steps=4, mag_ratios=[1.0, 1.01, 1.02, 0.99])
    )


def sea_cache(pipe: Any) -> None:
    from diffusers.hooks.sea_cache import SeaCacheConfig

    pipe.transformer.enable_cache(SeaCacheConfig(threshold=5.0))


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


def bf16_layerwise_casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.bfloat16)


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
