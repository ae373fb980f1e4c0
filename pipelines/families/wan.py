"""Wan 2.1 and 2.2, and what was built on them.

Follows `diffusers.models.transformers.transformer_wan.WanAttnProcessor` step by step: projections
(fused or not), RMSNorm over all heads, head split, rotary embedding, attention, output projection.
Letters: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch

from sla_video.pipelines.families.family import (
    Family,
    Operate,
    TokenPlaces,
    layers_named,
    mask_or_other_keys,
)
from sla_video.pipelines.families.rotary import norm_and_rotate

Rotary = tuple[torch.Tensor, torch.Tensor]


def attend(
    attn: Any,
    operate: Operate,
    hidden_states: torch.Tensor,
    encoder_hidden_states: None = None,
    attention_mask: None = None,
    rotary_emb: Rotary | None = None,
) -> torch.Tensor:
    """Self-attention of `hidden_states` `[B, L, H*D]`, to the same shape.

    `rotary_emb` is (cos, sin), each `[1, L, 1, D]`.
    """
    # Rotation makes a query that nobody else has. No name here holds keys and values, which go when
    # attention is done.
    output = operate(
        *project_in(attn, hidden_states, rotary_emb, impl=attn.processor.impl),
        own_query=rotary_emb is not None,
    )
    return project_out(attn, output)


def project_in(
    attn: Any,
    hidden_states: torch.Tensor,
    rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    impl: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value `[B, L, H, D]` of `[B, L, H*D]`: projected, normed, rotated.

    `impl`, of SLA attention, says whether a kernel of ours may norm and rotate.
    """
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query = attn.to_q(hidden_states)
        key = attn.to_k(hidden_states)
        value = attn.to_v(hidden_states)
    query, key = norm_and_rotate(attn, query, key, rotary_emb, impl, own=not _watched(attn))
    return query, key, value.unflatten(2, (attn.heads, -1))


def _watched(attn: Any) -> bool:
    """Whether someone may hold what the projections of queries and keys returned."""
    projections = (attn.to_qkv,) if attn.fused_projections else (attn.to_q, attn.to_k)
    return any(module._forward_hooks for root in projections for module in root.modules())


def project_out(attn: Any, output: torch.Tensor) -> torch.Tensor:
    """`[B, L, H*D]` of the attention's output `[B, L, H, D]`."""
    output = output.flatten(2, 3)
    for module in attn.to_out:  # projection, dropout
        output = module(output)
    return output


WAN = Family(
    name="Wan",
    transformers=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    processors=("WanAttnProcessor",),
    layers=layers_named("blocks.attn1", "vace_blocks.attn1"),
    identity_fields=(
        "patch_size",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "out_channels",
        "text_dim",
        "freq_dim",
        "ffn_dim",
        "num_layers",
        "cross_attn_norm",
        "qk_norm",
        "eps",
        "image_dim",
        "added_kv_proj_dim",
        "vace_layers",
        "vace_in_channels",
    ),
    attend=attend,
    why_dense=mask_or_other_keys,
    shardable=True,
    token_places=TokenPlaces(
        patches=("patch_embedding", "vace_patch_embedding"), rotary="rope", output="proj_out"
    ),
)
