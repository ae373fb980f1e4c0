"""Mochi: a rotary embedding of its own for each head, and no attention to the padding of the text.

Follows `diffusers.models.attention_processor.MochiAttnProcessor2_0`, which looks for the tokens
that are there, and so waits for the device. Here they are masked. It also moves them to the front
of its output; tokenizers put them there already.
"""

from __future__ import annotations

from typing import Any

import torch

from sla_video.pipelines.families.family import Family, Operate, layers_named
from sla_video.pipelines.families.joint import (
    Projected,
    Rotary,
    masked_attention,
    project,
    project_text,
)
from sla_video.pipelines.families.rotary import turn_pairs


def attend(
    attn: Any,
    operate: Operate,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    image_rotary_emb: Rotary | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint attention of video `[B, L, H*D]` and text `[B, C, H*D]`, to the same shapes.

    `attention_mask` is `[B, C]`, and `image_rotary_emb` (cos, sin), each `[L, H, D/2]`.
    """
    video = project(attn, hidden_states)
    if image_rotary_emb is not None:
        turned = turn_pairs(video.query, video.key, *image_rotary_emb)
        video = Projected(*turned, video.value)
    text = project_text(attn, encoder_hidden_states)
    return masked_attention(attn, operate, video, text, attention_mask)


def why_dense(attn: Any, hidden_states: torch.Tensor, *others: Any, **more: Any) -> None:
    """Nothing."""


MOCHI = Family(
    name="Mochi",
    transformers=("MochiTransformer3DModel",),
    processors=("MochiAttnProcessor2_0",),
    layers=layers_named("transformer_blocks.attn1"),
    identity_fields=(
        "patch_size",
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "pooled_projection_dim",
        "in_channels",
        "out_channels",
        "qk_norm",
        "text_embed_dim",
        "time_embed_dim",
        "activation_fn",
    ),
    attend=attend,
    why_dense=why_dense,
)
