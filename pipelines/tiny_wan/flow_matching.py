"""The training objective of `tiny-wan`: flow matching over transformer and text encoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UMT5EncoderModel

from sla_video.pipelines.families.wan import project_in, project_out
from sla_video.pipelines.tiny_wan.data import TEXT_LENGTH
from sla_video.pipelines.tiny_wan.models import TEXT_POSITIONS

CAPTION_DROPOUT = 0.1


class PaddedTextAttention:
    """Cross-attention to a caption and one pad slot that stands for all the pads of a pipeline.

    `WanPipeline` pads text embeddings with zeros and Wan attends to every pad. They are all alike,
    so a single one with log(count) added to its logit has the same effect. `bias` is that
    logarithm, a tensor that changes from step to step.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb):  # type: ignore[no-untyped-def]
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1))
        # [B, H, L, S]
        bias = F.pad(self.bias.to(query.dtype).view(1), (key.shape[1] - 1, 0))
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], -1)
        out = F.scaled_dot_product_attention(
            query, key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias
        )
        return project_out(attn, out.transpose(1, 2))


class DenseSelfAttention:
    """The stock self-attention with the rotary embedding of `SLAAttnProcessor`.

    Where blocks are compiled, the stock formula with its writes in place becomes a kernel that took
    18% of a training step on an H100.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb):  # type: ignore[no-untyped-def]
        query, key, value = project_in(attn, hidden_states, rotary_emb)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        return project_out(attn, out.transpose(1, 2))


class TextToVideo(nn.Module):
    """Transformer and text encoder under one loss: flow matching, velocity prediction."""

    def __init__(self, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        # Noise levels are logit-normal, shifted towards noise as clips grow (Esser et al. 2024).
        self.shift = 1.0
        pads = [math.log(positions - TEXT_LENGTH) for positions in TEXT_POSITIONS]
        self.pad_bias: Tensor
        self.pad_biases: Tensor
        self.register_buffer("pad_biases", torch.tensor(pads), persistent=False)
        self.register_buffer("pad_bias", torch.tensor(pads[-1]), persistent=False)
        self.share_pad_bias()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.share_pad_bias()
        return self

    def share_pad_bias(self) -> None:
        """Hand this module's own tensor to every cross-attention, anew when it has moved."""
        for block in self.transformer.blocks:
            block.attn2.processor = PaddedTextAttention(self.pad_bias)

    def embed_text(self, ids: Tensor) -> Tensor:
        """`[B, TEXT_LENGTH + 1, C]` from ids `[B, TEXT_LENGTH]`: zeros on pads and the pad slot."""
        mask = (ids > 0).long()
        hidden = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.pad(hidden * mask[..., None], (0, 0, 0, 1))

    def forward(self, latents: Tensor, ids: Tensor) -> Tensor:
        """Mean squared error of the velocity at random noise levels."""
        count, device = len(latents), latents.device
        dropped = torch.rand(count, 1, device=device) < CAPTION_DROPOUT
        empty = F.one_hot(torch.zeros(1, dtype=torch.long, device=device), ids.shape[1])
        ids = torch.where(dropped, empty, ids)
        choice = torch.randint(len(self.pad_biases), (), device=device)
        self.pad_bias.copy_(self.pad_biases[choice])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            text = self.embed_text(ids)
            u = torch.randn(count, device=device).sigmoid()
            sigma = self.shift * u / (1 + (self.shift - 1) * u)
            noise = torch.randn_like(latents)
            level = sigma.view(-1, 1, 1, 1, 1)
            noisy = latents + level * (noise - latents)
            velocity = self.transformer(noisy, sigma * 1000, text, return_dict=False)[0]
        return F.mse_loss(velocity.float(), noise - latents)


def spread_rotary_positions(transformer: WanTransformer3DModel, side: int, full_side: int) -> None:
    """Place the `side` x `side` tokens of a small clip where they would be in a full-size one."""
    rope = transformer.rope
    stride = full_side / side
    positions = (torch.arange(rope.freqs_cos.shape[0]) + 0.5) * stride - 0.5
    for name, function in (("freqs_cos", torch.cos), ("freqs_sin", torch.sin)):
        table = getattr(rope, name)
        columns = [table[:, : rope.t_dim]]
        for dim in (rope.h_dim, rope.w_dim):
            rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles = torch.outer(positions.double(), rates).repeat_interleave(2, dim=1)
            columns.append(function(angles).to(table))
        setattr(rope, name, torch.cat(columns, dim=1))
