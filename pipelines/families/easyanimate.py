"""EasyAnimate: the text comes first; later blocks may share its projections with the video.

Follows `diffusers.models.transformers.transformer_easyanimate.EasyAnimateAttnProcessor2_0`.
"""

from __future__ import annotations

from typing import Any

import torch

from sla_video.pipelines.families.family import Family, Operate, layers_named
from sla_video.pipelines.families.joint import (
    Rotary,
    joint_attention,
    project,
    project_out,
    project_text,
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

    `image_rotary_emb` is (cos, sin), each `[L, D]`.
    """
    video = rotated(project(attn, hidden_states), image_rotary_emb)
    text = project_text(attn, encoder_hidden_states)
    return project_out(attn, *joint_attention(operate, video, text))


def why_dense(
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: Rotary | None = None,
) -> str | None:
    """Masks, which no pipeline of Diffusers makes for this model."""
    if encoder_hidden_states is None:
        return "no text"
    return None if attention_mask is None else "an attention mask"


EASYANIMATE = Family(
    name="EasyAnimate",
    transformers=("EasyAnimateTransformer3DModel",),
    processors=("EasyAnimateAttnProcessor2_0",),
    layers=layers_named("transformer_blocks.attn1"),
    identity_fields=(
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "out_channels",
        "patch_size",
        "num_layers",
        "mmdit_layers",
        "time_embed_dim",
        "add_norm_text_encoder",
        "text_embed_dim",
        "text_embed_dim_t5",
        "norm_eps",
        "norm_elementwise_affine",
        "time_position_encoding_type",
        "after_norm",
    ),
    attend=attend,
    why_dense=why_dense,
)
