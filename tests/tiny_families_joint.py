"""Tiny random pipelines whose text and video attend to each other, in Diffusers' own classes.

Clips of 9 frames of 64 x 64 pixels. Text comes as embeddings where its encoder cannot be had small
and offline: 9 tokens of which the last are padding.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from family_cases import Case, picture
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel, T5Config
from transformers import T5EncoderModel as T5

from tiny_models import LATENT_CHANNELS, TEXT_DIM, build_tiny_tokenizer, seeded

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
LATENTS: dict[str, Any] = {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS}
POOLED_DIM = 8
IMAGE_DIM = 12
# Text comes as embeddings.
NO_PROMPT = dict.fromkeys(("prompt", "guidance_scale", "max_sequence_length"))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers that are the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(suffix: str = "", *, dim: int = TEXT_DIM, mask: str = "prompt_attention_mask") -> Any:
    """Embeddings of a prompt of 6 tokens and of a negative one of 4, both padded to 9."""
    call = {}
    for name, seed, count in (("prompt", 0, 6), ("negative_prompt", 1, 4)):
        call[f"{name}_embeds{suffix}"] = noise(1, 9, dim, seed=seed)
        masked = mask.replace("prompt", name, 1)
        call[masked + suffix] = (torch.arange(9) < count)[None].long()
    return call


def silent(pipe: Any) -> Any:
    """Without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def hunyuan_vae() -> Any:
    return seeded(
        diffusers.AutoencoderKLHunyuanVideo,
        {
            "latent_channels": LATENT_CHANNELS,
            "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
            "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
        0,
    )


def hunyuan_config(**overrides: Any) -> dict[str, Any]:
    """Two dual-stream blocks and one single-stream block."""
    return {
        **HEADS,
        **LATENTS,
        "num_layers": 2,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": POOLED_DIM,
        "rope_axes_dim": (4, 6, 6),
        **overrides,
    }


def hunyuan(kind: str = "HunyuanVideoPipeline", **overrides: Any) -> Any:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    if "ImageToVideo" in kind:
        parts["image_processor"] = None
    transformer = seeded(diffusers.HunyuanVideoTransformer3DModel, hunyuan_config(**overrides), 0)
    return silent(
        getattr(diffusers, kind)(
            **parts,
            transformer=transformer,
            vae=hunyuan_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        )
    )


def framepack() -> Any:
    """History in tokens, and a picture beside the text."""
    config = hunyuan_config(
        patch_size=2,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=IMAGE_DIM,
        has_clean_x_embedder=True,
    )
    vision = SiglipVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    size = {"height": 8, "width": 8}
    return silent(
        diffusers.HunyuanVideoFramepackPipeline(
            **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
            transformer=seeded(diffusers.HunyuanVideoFramepackTransformer3DModel, config, 0),
            vae=hunyuan_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                shift=7.0, use_dynamic_shifting=True, time_shift_type="exponential"
            ),
            image_encoder=seeded(SiglipVisionModel, {"config": vision}, 1),
            feature_extractor=SiglipImageProcessor(size=size),
        )
    )


def hunyuan15() -> Any:
    """Text of two encoders, and tokens of a picture that text to video leaves out."""
    transformer = seeded(
        diffusers.HunyuanVideo15Transformer3DModel,
        {
            **HEADS,
            "in_channels": 2 * LATENT_CHANNELS + 1,
            "out_channels": LATENT_CHANNELS,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "text_embed_dim": TEXT_DIM,
            "text_embed_2_dim": POOLED_DIM,
            "image_embed_dim": IMAGE_DIM,
            "rope_axes_dim": (4, 6, 6),
            "target_size": 64,
            "task_type": "t2v",
        },
        0,
    )
    vae = seeded(
        diffusers.AutoencoderKLHunyuanVideo15,
        {
            "latent_channels": LATENT_CHANNELS,
            "block_out_channels": (16, 16, 16, 16),
            "layers_per_block": 1,
            "spatial_compression_ratio": 8,
            "temporal_compression_ratio": 4,
            "downsample_match_channel": False,
            "upsample_match_channel": False,
        },
        0,
    )
    return silent(
        diffusers.HunyuanVideo15Pipeline(
            **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
            transformer=transformer,
            vae=vae,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        )
    )


def t5() -> dict[str, Any]:
    """A text encoder and its tokenizer."""
    tokenizer = build_tiny_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return {"tokenizer": tokenizer, "text_encoder": seeded(T5, {"config": config}, 0)}


def cogvideox_vae() -> Any:
    return seeded(
        diffusers.AutoencoderKLCogVideoX,
        {
            "latent_channels": LATENT_CHANNELS,
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "sample_height": 64,
            "sample_width": 64,
        },
        0,
    )


def cogvideox_config(**overrides: Any) -> dict[str, Any]:
    return {
        **HEADS,
        **LATENTS,
        "time_embed_dim": 8,
        "text_embed_dim": TEXT_DIM,
        "num_layers": 3,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "patch_size": 1,
        "max_text_seq_length": 16,
        **overrides,
    }


def cogvideox(kind: str = "CogVideoXPipeline", *, fused: bool = False, **overrides: Any) -> Any:
    transformer = seeded(diffusers.CogVideoXTransformer3DModel, cogvideox_config(**overrides), 0)
    if fused:
        transformer.fuse_qkv_projections()
    scheduler = diffusers.CogVideoXDDIMScheduler()
    parts = {"transformer": transformer, "vae": cogvideox_vae(), "scheduler": scheduler}
    return silent(getattr(diffusers, kind)(**t5(), **parts))


def mochi() -> Any:
    transformer = seeded(
        diffusers.MochiTransformer3DModel,
        {
            **HEADS,
            "in_channels": 12,
            "patch_size": 2,
            "num_layers": 3,
            "pooled_projection_dim": 16,
            "text_embed_dim": TEXT_DIM,
            "time_embed_dim": 8,
            "max_sequence_length": 16,
        },
        0,
    )
    with torch.no_grad():
        # Zeros, as they are before training, would rotate nothing.
        transformer.pos_frequencies.copy_(noise(*transformer.pos_frequencies.shape))
    vae = seeded(
        diffusers.AutoencoderKLMochi,
        {
            "latent_channels": 12,
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
        },
        0,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
    return silent(diffusers.MochiPipeline(**t5(), **parts, force_zeros_for_empty_prompt=True))


def easyanimate() -> Any:
    """Two blocks with projections for the text, and one that shares them."""
    transformer = seeded(
        diffusers.EasyAnimateTransformer3DModel,
        {
            **HEADS,
            **LATENTS,
            "num_layers": 3,
            "mmdit_layers": 2,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT_DIM,
            "sample_width": 16,
            "sample_height": 16,
            "patch_size": 2,
        },
        0,
    )
    vae = seeded(
        diffusers.AutoencoderKLMagvit,
        {
            "latent_channels": LATENT_CHANNELS,
            "down_block_types": ("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
            "up_block_types": ("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "spatial_group_norm": False,
        },
        0,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
    return silent(diffusers.EasyAnimatePipeline(text_encoder=None, tokenizer=None, **parts))


POOLED = {"pooled_prompt_embeds": noise(1, POOLED_DIM)}
NEGATIVE_POOLED = {"negative_pooled_prompt_embeds": noise(1, POOLED_DIM, seed=1)}
HUNYUAN_TEXT = {**NO_PROMPT, **text(), **POOLED, **NEGATIVE_POOLED, "true_cfg_scale": 3.0}

CASES = {
    "hunyuan": Case(hunyuan, HUNYUAN_TEXT),
    "hunyuan i2v": Case(
        lambda: hunyuan(
            "HunyuanVideoImageToVideoPipeline",
            in_channels=2 * LATENT_CHANNELS + 1,
            image_condition_type="latent_concat",
        ),
        {**HUNYUAN_TEXT, "image": picture()},
    ),
    "hunyuan i2v replaced": Case(
        lambda: hunyuan("HunyuanVideoImageToVideoPipeline", image_condition_type="token_replace"),
        {**HUNYUAN_TEXT, "image": picture()},
    ),
    "framepack": Case(
        framepack,
        {**HUNYUAN_TEXT, "image": picture(), "latent_window_size": 3},
    ),
    "hunyuan 1.5": Case(
        hunyuan15,
        {
            **NO_PROMPT,
            **text(mask="prompt_embeds_mask"),
            **text("_2", dim=POOLED_DIM, mask="prompt_embeds_mask"),
        },
    ),
    "cogvideox": Case(cogvideox),
    "cogvideox 1.5": Case(
        lambda: cogvideox(
            patch_size=2, patch_size_t=1, use_rotary_positional_embeddings=True, fused=True
        ),
    ),
    "cogvideox i2v": Case(
        lambda: cogvideox(
            "CogVideoXImageToVideoPipeline",
            in_channels=2 * LATENT_CHANNELS,
            use_rotary_positional_embeddings=True,
        ),
        {"image": picture()},
    ),
    "mochi": Case(mochi, {"num_frames": 13}),
    "easyanimate": Case(easyanimate, {**NO_PROMPT, **text(), "guidance_scale": 3.0}),
}
