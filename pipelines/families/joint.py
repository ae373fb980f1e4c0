"""What the families share whose text and video tokens attend to each other.

The video tokens are SLA's sequence, and the text its context: every video token attends to all of
the text. The text tokens, few as they are, attend to everything. Nothing of the text is sparse.
Letters: B batch, H heads, L video tokens, C text tokens, D head dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sla_video.pipelines.families.family import Operate
from sla_video.pipelines.families.rotary import rotate

Rotary = tuple[torch.Tensor, torch.Tensor]


class Projected(NamedTuple):
    """Query, key and value of one kind of token, `[B, L, H, D]` or `[B, C, H, D]`, normed."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def project(attn: Any, hidden_states: torch.Tensor) -> Projected:
    """By the projections of the video, `[B, L, H*D]`."""
    states = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    return normed(attn.heads, states, attn.norm_q, attn.norm_k)


def project_text(attn: Any, text: torch.Tensor) -> Projected:
    """By the projections of the text, `[B, C, H*D]`; by those of the video where it has none."""
    if getattr(attn, "add_q_proj", None) is None:
        return project(attn, text)
    states = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    return normed(attn.heads, states, attn.norm_added_q, attn.norm_added_k)


def normed(
    heads: int, states: tuple[torch.Tensor, torch.Tensor, torch.Tensor], norm_q: Any, norm_k: Any
) -> Projected:
    """Split `[B, L, H*D]` into heads, then norm each; None is no norm."""
    query, key, value = (x.unflatten(2, (heads, -1)) for x in states)
    query = query if norm_q is None else norm_q(query)
    key = key if norm_k is None else norm_k(key)
    return Projected(query, key, value)


def rotated(video: Projected, rotary: Rotary | None) -> Projected:
    """With the rotary embedding (cos, sin), each `[L, D]`; the text has none."""
    if rotary is None:
        return video
    cos, sin = (x[None, :, None] for x in rotary)
    return Projected(*rotate(video.query, video.key, cos, sin), video.value)


def joint_attention(
    operate: Operate, video: Projected, text: Projected, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the video `[B, L, H, D]` and of the text `[B, C, H, D]`.

    Args:
        mask: `[B, C]` boolean, False on padding. Nobody attends to it, but it attends to the rest.
    """
    out = operate(*video, context=(text.key, text.value), context_mask=mask)
    # [B, H, L + C, D]
    key = torch.cat((video.key, text.key), 1).transpose(1, 2)
    value = torch.cat((video.value, text.value), 1).transpose(1, 2)
    if mask is not None:
        mask = F.pad(mask, (video.key.shape[1], 0), value=True)[:, None, None]
    query = text.query.transpose(1, 2)
    text_out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out, text_out.transpose(1, 2)


def masked_attention(
    attn: Any, operate: Operate, video: Projected, text: Projected, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`joint_attention` projected out, with nothing at the padding of the text.

    Args:
        mask: `[B, C]`, zero on padding.
    """
    there = mask.bool()
    out, text_out = joint_attention(operate, video, text, there)
    return project_out(attn, out, text_out.masked_fill(~there[..., None, None], 0))


def project_out(
    attn: Any, video: torch.Tensor, text: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Video and text `[B, L, H*D]` of outputs by head; as they are where a projection is missing.

    Blocks that treat both alike project later.
    """
    video, text = video.flatten(2, 3), text.flatten(2, 3)
    for module in getattr(attn, "to_out", None) or ():  # projection, dropout
        video = module(video)
    if getattr(attn, "to_add_out", None) is not None:
        text = attn.to_add_out(text)
    return video, text
