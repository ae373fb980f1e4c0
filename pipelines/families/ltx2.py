"""LTX-2, after `transformer_ltx2.LTX2AudioVideoAttnProcessor` and `LTX2PerturbedAttnProcessor`.

Self-attention of the video tokens is replaced; audio has few tokens and stays as it is, and so does
the attention between the two. Spatio-temporal guidance perturbs blocks: there the values stand for
the output of the attention.
"""

from __future__ import annotations

from typing import Any

import torch

from sla_video.pipelines.families.family import Family, Operate, layers_named, mask_or_other_keys
from sla_video.pipelines.families.ltx import LTX, Rotary
from sla_video.pipelines.families.wan import project_out


def attend(
    attn: Any,
    operate: Operate,
    hidden_states: torch.Tensor,
    encoder_hidden_states: None = None,
    attention_mask: None = None,
    query_rotary_emb: Rotary | None = None,
    key_rotary_emb: Rotary | None = None,
    perturbation_mask: torch.Tensor | None = None,
    all_perturbed: bool | torch.Tensor | None = None,
) -> torch.Tensor:
    """Self-attention of `hidden_states` `[B, L, H*D]`, to the same shape.

    Rotary embeddings are (cos, sin), each `[B, L, H*D]`, or `[B, H, L, D/2]` where the model splits
    them by head. `perturbation_mask` `[B, 1, 1]` is 0 where values stand for attention.
    """
    value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
    if all_perturbed is None:
        all_perturbed = perturbation_mask is not None and torch.all(perturbation_mask == 0)
    if all_perturbed:
        output = value
    else:
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        if query_rotary_emb is not None:
            query = _rotate(attn, query, query_rotary_emb)
            key = _rotate(attn, key, key_rotary_emb or query_rotary_emb)
        # [B, L, H, D]
        query, key = (part.unflatten(2, (attn.heads, -1)) for part in (query, key))
        output = operate(query, key, value)
        if perturbation_mask is not None:
            output = torch.lerp(value, output, perturbation_mask[..., None])
    if attn.to_gate_logits is not None:
        # [B, L, H]
        output = output * (2 * torch.sigmoid(attn.to_gate_logits(hidden_states)))[..., None]
    return project_out(attn, output)


def _rotate(attn: Any, states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    from diffusers.models.transformers import transformer_ltx2

    split = attn.rope_type == "split"
    name = "apply_split_rotary_emb" if split else "apply_interleaved_rotary_emb"
    rotated: torch.Tensor = getattr(transformer_ltx2, name)(states, rotary)
    return rotated


LTX2 = Family(
    name="LTX-2",
    transformers=("LTX2VideoTransformer3DModel",),
    processors=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
    layers=layers_named("transformer_blocks.attn1"),
    identity_fields=(
        *LTX.identity_fields,
        "gated_attn",
        "cross_attn_mod",
        "rope_type",
        "rope_theta",
        "perturbed_attn",
        "vae_scale_factors",
        "audio_num_attention_heads",
        "audio_attention_head_dim",
        "audio_in_channels",
    ),
    attend=attend,
    why_dense=mask_or_other_keys,
)
