"""HunyuanVideo-1.5: blocks of two streams only; with the text come the tokens of a picture.

Follows `diffusers.models.transformers.transformer_hunyuan_video15.HunyuanVideo15AttnProcessor2_0`.
Its mask of pairs of tokens says that nobody attends to padding and padding attends to nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from sla_video.pipelines.families.family import Family, Operate, layers_named
from sla_video.pipelines.families.joint import (
    Rotary,
    masked_attention,
    project,
    project_text,
    rotated,
)


def attend(
    attn: Any,
    operate: Operate,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    image_rotary_emb: Rotary | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint attention of video `[B, L, H*D]` and text `[B, C, H*D]`, to the same shapes.

    `attention_mask` is `[B, C]`, and `image_rotary_emb` (cos, sin), each `[L, D]`.
    """
    video = rotated(project(attn, hidden_states), image_rotary_emb)
    text = project_text(attn, encoder_hidden_states)
    return masked_attention(attn, operate, video, text, attention_mask)


def why_dense(
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: Rotary | None = None,
) -> str | None:
    """Masks that are not of the text, one token each."""
    if encoder_hidden_states is None:
        return "no text"
    if attention_mask is None or attention_mask.shape != encoder_hidden_states.shape[:2]:
        return "an attention mask that is not of the text"
    return None


HUNYUAN15 = Family(
    name="HunyuanVideo-1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    processors=("HunyuanVideo15AttnProcessor2_0",),
    layers=layers_named("transformer_blocks.attn"),
    identity_fields=(
        "in_channels",
        "out_channels",
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "num_refiner_layers",
        "mlp_ratio",
        "patch_size",
        "patch_size_t",
        "qk_norm",
        "text_embed_dim",
        "text_embed_2_dim",
        "image_embed_dim",
        "rope_theta",
        "rope_axes_dim",
        "task_type",
        "use_meanflow",
    ),
    attend=attend,
    why_dense=why_dense,
)
