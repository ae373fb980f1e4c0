"""CogVideoX: text and video share all projections, and the text comes first.

Follows `diffusers.models.attention_processor.CogVideoXAttnProcessor2_0` and its fused twin, which
`fuse_qkv_projections` puts in its place.
"""

from __future__ import annotations

from typing import Any

import torch

from sla_video.pipelines.families.family import Family, Operate, layers_named
from sla_video.pipelines.families.joint import (
    Projected,
    Rotary,
    joint_attention,
    normed,
    project,
    rotated,
)


def attend(
    attn: Any,
    operate: Operate,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: None = None,
    image_rotary_emb: Rotary | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint attention of video `[B, L, H*D]` and text `[B, C, H*D]`, to the same shapes.

    `image_rotary_emb` is (cos, sin), each `[L, D]`; models without it add positions to the tokens.
    """
    project_all = _project_fused if _is_fused(attn) else project
    video = rotated(project_all(attn, hidden_states), image_rotary_emb)
    text = project_all(attn, encoder_hidden_states)
    out, text_out = (x.flatten(2, 3) for x in joint_attention(operate, video, text))
    for module in attn.to_out:  # projection, dropout
        out, text_out = module(out), module(text_out)
    return out, text_out


def why_dense(
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: Rotary | None = None,
) -> str | None:
    """Masks, which no pipeline of Diffusers makes for this model."""
    return None if attention_mask is None else "an attention mask"


def _is_fused(attn: Any) -> bool:
    """Whether the stock processor would use the fused weights, which stay behind once unfused."""
    stock = getattr(attn.processor, "original", attn.processor)
    return type(stock).__name__ == "FusedCogVideoXAttnProcessor2_0"


def _project_fused(attn: Any, hidden_states: torch.Tensor) -> Projected:
    states = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    return normed(attn.heads, states, attn.norm_q, attn.norm_k)


COGVIDEOX = Family(
    name="CogVideoX",
    transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    processors=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
    layers=layers_named("transformer_blocks.attn1"),
    identity_fields=(
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "out_channels",
        "time_embed_dim",
        "ofs_embed_dim",
        "text_embed_dim",
        "num_layers",
        "attention_bias",
        "patch_size",
        "patch_size_t",
        "temporal_compression_ratio",
        "norm_elementwise_affine",
        "norm_eps",
        "spatial_interpolation_scale",
        "temporal_interpolation_scale",
        "use_rotary_positional_embeddings",
        "use_learned_positional_embeddings",
    ),
    attend=attend,
    why_dense=why_dense,
)
