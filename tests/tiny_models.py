"""Tiny random Diffusers models for the tests. Nothing here is trained or downloaded.

Shapes: with the default pipeline, 9 frames of 64 x 64 pixels become 3 x 8 x 8 = 192 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ["a", "the", "red", "blue", "circle", "square", "moves", "left", "right", "and", "on"]
TEXT_DIM = 16
LATENT_CHANNELS = 4
# Arguments of a pipeline call that takes a fraction of a second.
TINY_CALL: dict[str, Any] = {
    "prompt": "a red circle moves left",
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
}


def transformer_config(**overrides: Any) -> dict[str, Any]:
    """Arguments of a tiny `WanTransformer3DModel`: 3 layers, 2 heads x 16."""
    config: dict[str, Any] = {
        "patch_size": (1, 1, 1),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    }
    return {**config, **overrides}


def seeded(build: Any, config: dict[str, Any], seed: int) -> Any:
    """`build(**config)` in eval mode, with weights from `seed` and nothing left at zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(**config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norm weights of one would hide a norm at the wrong place.
                if "norm" in name and parameter.ndim == 1:
                    parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return model


def build_tiny_transformer(*, seed: int = 0, **overrides: Any) -> WanTransformer3DModel:
    """A random text-to-video transformer; `overrides` change its configuration."""
    return seeded(WanTransformer3DModel, transformer_config(**overrides), seed)


def build_tiny_i2v_transformer(*, seed: int = 0, **overrides: Any) -> WanTransformer3DModel:
    """A random image-to-video transformer: image keys are added to the cross-attention."""
    return build_tiny_transformer(
        seed=seed, **{"image_dim": 24, "added_kv_proj_dim": 32, **overrides}
    )


def build_tiny_vace_transformer(*, seed: int = 0, **overrides: Any) -> WanVACETransformer3DModel:
    """A random VACE transformer: 3 blocks and 2 control blocks."""
    config = transformer_config(vace_layers=[0, 2], vace_in_channels=6, **overrides)
    return seeded(WanVACETransformer3DModel, config, seed)


def transformer_inputs(
    *,
    grid: tuple[int, int, int] = (3, 8, 8),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    text_tokens: int = 7,
) -> dict[str, Any]:
    """Forward arguments of a tiny transformer; `grid` is the latent (frames, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, LATENT_CHANNELS, *grid, generator=generator).to(dtype),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, text_tokens, TEXT_DIM, generator=generator).to(
            dtype
        ),
        "return_dict": False,
    }


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def build_tiny_pipeline(
    *, two_transformers: bool = False, seed: int = 0, **transformer_overrides: Any
) -> WanPipeline:
    """A complete random `WanPipeline` with a silent progress bar.

    Args:
        two_transformers: add a `transformer_2` that takes over below half of the noise (Wan2.2).
    """
    vae = seeded(
        AutoencoderKLWan,
        {
            "base_dim": 4,
            "z_dim": LATENT_CHANNELS,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
            "latents_mean": [0.0] * LATENT_CHANNELS,
            "latents_std": [1.0] * LATENT_CHANNELS,
        },
        seed,
    )
    tokenizer = build_tiny_tokenizer()
    text_config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=seeded(UMT5EncoderModel, {"config": text_config}, seed),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=build_tiny_transformer(seed=seed, **transformer_overrides),
        transformer_2=(
            build_tiny_transformer(seed=seed + 1, **transformer_overrides)
            if two_transformers
            else None
        ),
        boundary_ratio=0.5 if two_transformers else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
