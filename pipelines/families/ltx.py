"""LTX-Video, after `transformer_ltx.LTXVideoAttnProcessor`.

RMSNorm and the rotary embedding go over all heads at once, before they are split.
"""

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

Rotary = tuple[torch.Tensor, torch.Tensor]


def attend(
    attn: Any,
    operate: Operate,
    hidden_states: torch.Tensor,
    encoder_hidden_states: None = None,
    attention_mask: None = None,
    image_rotary_emb: Rotary | None = None,
) -> torch.Tensor:
    """Self-attention of `hidden_states` `[B, L, H*D]`, to the same shape.

    `image_rotary_emb` is (cos, sin), each `[B, L, H*D]`.
    """
    from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

    query = attn.norm_q(attn.to_q(hidden_states))
    key = attn.norm_k(attn.to_k(hidden_states))
    value = attn.to_v(hidden_states)
    if image_rotary_emb is not None:
        query = apply_rotary_emb(query, image_rotary_emb)
        key = apply_rotary_emb(key, image_rotary_emb)
    # [B, L, H, D]
    query, key, value = (part.unflatten(2, (attn.heads, -1)) for part in (query, key, value))
    return project_out(attn, operate(query, key, value))


LTX = Family(
    name="LTX-Video",
    transformers=("LTXVideoTransformer3DModel",),
    processors=("LTXVideoAttnProcessor",),
    layers=layers_named("transformer_blocks.attn1"),
    identity_fields=(
        "patch_size",
        "patch_size_t",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "out_channels",
        "cross_attention_dim",
        "num_layers",
        "qk_norm",
        "norm_eps",
        "norm_elementwise_affine",
        "caption_channels",
        "attention_bias",
        "attention_out_bias",
    ),
    attend=attend,
    why_dense=mask_or_other_keys,
)
