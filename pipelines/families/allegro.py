"""Allegro, after `attention_processor.AllegroAttnProcessor2_0`: no norm of queries and keys."""

from __future__ import annotations

from typing import Any

import torch

from sla_video.pipelines.families.family import (
    Family,
    Operate,
    layers_named,
    mask_or_other_keys,
)
from sla_video.pipelines.families.wan import project_out


def attend(
    attn: Any,
    operate: Operate,
    hidden_states: torch.Tensor,
    encoder_hidden_states: None = None,
    attention_mask: None = None,
    temb: None = None,
    image_rotary_emb: tuple[Any, Any] | None = None,
) -> torch.Tensor:
    """Self-attention of `hidden_states` `[B, L, H*D]`, to the same shape.

    `image_rotary_emb` is ((cos, sin) of each axis, positions of the tokens on each axis).
    """
    from diffusers.models.embeddings import apply_rotary_emb_allegro

    parts = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    # [B, L, H, D]
    query, key, value = (part.unflatten(2, (attn.heads, -1)) for part in parts)
    if image_rotary_emb is not None:
        # Diffusers' function takes [B, H, L, D].
        query, key = (
            apply_rotary_emb_allegro(part.transpose(1, 2), *image_rotary_emb).transpose(1, 2)
            for part in (query, key)
        )
    return project_out(attn, operate(query, key, value))


ALLEGRO = Family(
    name="Allegro",
    transformers=("AllegroTransformer3DModel",),
    processors=("AllegroAttnProcessor2_0",),
    layers=layers_named("transformer_blocks.attn1"),
    identity_fields=(
        "patch_size",
        "patch_size_t",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "out_channels",
        "num_layers",
        "cross_attention_dim",
        "attention_bias",
        "norm_elementwise_affine",
        "norm_eps",
        "caption_channels",
        "interpolation_scale_h",
        "interpolation_scale_w",
        "interpolation_scale_t",
    ),
    attend=attend,
    why_dense=mask_or_other_keys,
)
