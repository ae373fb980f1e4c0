"""HunyuanVideo, and Framepack, which has the same blocks.

Follows `diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0`. In
the first blocks video and text have projections of their own, in the others they share them and are
projected out together, outside of the attention. The mask hides the padding of the text. Conditions
on a picture change tokens (of the first frame, or channels), not the attention; so does the history
of Framepack, whose tokens are of the sequence, and its picture, whose tokens come with the text.
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
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: Rotary | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint attention of video `[B, L, H*D]` and text `[B, C, H*D]`, to the same shapes.

    `attention_mask` is `[B, 1, 1, L + C]`, and `image_rotary_emb` (cos, sin), each `[L, D]`.
    """
    video = rotated(project(attn, hidden_states), image_rotary_emb)
    text = project_text(attn, encoder_hidden_states)
    mask = None if attention_mask is None else attention_mask[:, 0, 0, hidden_states.shape[1] :]
    return project_out(attn, *joint_attention(operate, video, text, mask))


def why_dense(
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: Rotary | None = None,
) -> str | None:
    """Masks other than the one that hides the padding of the text."""
    if encoder_hidden_states is None:
        return "no text"
    if attention_mask is None:
        return None
    length = hidden_states.shape[1] + encoder_hidden_states.shape[1]
    if attention_mask.dtype != torch.bool or attention_mask.shape[1:] != (1, 1, length):
        return "an attention mask of pairs of tokens"
    return None


HUNYUAN = Family(
    name="HunyuanVideo",
    transformers=("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"),
    processors=("HunyuanVideoAttnProcessor2_0",),
    layers=layers_named("transformer_blocks.attn", "single_transformer_blocks.attn"),
    identity_fields=(
        "in_channels",
        "out_channels",
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "num_single_layers",
        "num_refiner_layers",
        "mlp_ratio",
        "patch_size",
        "patch_size_t",
        "qk_norm",
        "guidance_embeds",
        "text_embed_dim",
        "pooled_projection_dim",
        "rope_theta",
        "rope_axes_dim",
        "image_condition_type",
        "has_image_proj",
        "image_proj_dim",
        "has_clean_x_embedder",
    ),
    attend=attend,
    why_dense=why_dense,
)
