"""What sparse attention loses, measured against full attention on the same query, key and value.

Letters: B batch, H heads, L tokens, D head dimension, M query blocks, N key blocks, m measured
query blocks. Nothing here waits for the device, and memory does not grow with L squared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.kernels.context import Context
from sla_video.kernels.router import Router
from sla_video.kernels.routing import block_means, compute_dtype, num_blocks, router_scores

# Scores formed at once, in elements: 64 MiB in float32, and a few copies of them.
_CHUNK_ELEMENTS = 16 * 2**20


class Losses(NamedTuple):
    """What the measured query blocks lose.

    Attributes:
        recall: `[B, H, m]` share of the softmax mass that the selected tokens hold, mean over the
            queries of a block: `exp(lse_selected - lse_full)`.
        error: `[B, H]` mean of |output - full attention|.
        magnitude: `[B, H]` mean of |full attention|; `error / magnitude` is the relative L1.
        oracle_density: `[B, H, m]` smallest share of the key blocks that holds `coverage` of the
            mass of a query block: what a perfect router would have to keep.
        router_density: `[B, H, m]` the share that holds it when blocks are taken in the order of
            the router's scores.
    """

    recall: Tensor
    error: Tensor
    magnitude: Tensor
    oracle_density: Tensor
    router_density: Tensor


def check_settings(coverage: float, most_blocks: int | None) -> None:
    """Raise `ValueError` if `measure_losses` would."""
    if not 0 < coverage <= 1:
        raise ValueError(f"`coverage` must be in (0, 1], got {coverage}")
    if most_blocks is not None and most_blocks < 1:
        raise ValueError(f"`most_blocks` must be at least 1, got {most_blocks}")


def measured_blocks(
    length: int, block_q: int, most: int | None, device: torch.device | str | None = None
) -> Tensor:
    """Which query blocks are measured, `[m]`: all, or `most` of them, evenly spread."""
    total = num_blocks(length, block_q)
    count = total if most is None else min(most, total)
    # The middle of each of `count` equal pieces.
    return (2 * torch.arange(count, device=device) + 1) * total // (2 * count)


@torch.no_grad()
def measure_losses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse_selected: Tensor,
    router: Router | None = None,
    *,
    block_q: int,
    block_k: int,
    coverage: float = 0.95,
    most_blocks: int | None = None,
    context: Context | None = None,
) -> Losses:
    """Compare `output` of `sla2_attention` with full attention, for each head and query block.

    Costs full attention in float32 for the measured query blocks.

    Args:
        query, key, value, output: `[B, L, H, D]`.
        lse_selected: `[B, H, L]`, of `sla2_attention(..., return_lse=True)`.
        router: whose order of blocks `router_density` follows; None is the training-free one.
        block_q, block_k: tokens per query block and per key block.
        coverage: softmax mass that the densities have to reach, in (0, 1].
        most_blocks: measure this many query blocks, evenly spread, instead of all.
        context: what the queries attended to besides the sequence. It counts in the error; recall
            and densities are of the sequence alone.

    Raises:
        ValueError: `coverage` or `most_blocks` out of range.
    """
    check_settings(coverage, most_blocks)
    batch, length, heads, _ = query.shape
    blocks = measured_blocks(length, block_q, most_blocks, query.device)
    at_once = max(1, _CHUNK_ELEMENTS // (block_q * length))
    heads_at_once = min(heads, at_once)
    blocks_at_once = max(1, at_once // heads_at_once)
    # [B, H, M, N]; the mean key shifts all scores of a row alike, but removing it is more precise.
    key_means = block_means(key, block_k)
    scores = router_scores(
        block_means(query, block_q), key_means - key_means.mean(2, keepdim=True), router
    )
    rows = []
    for b in range(batch):
        for first in range(0, heads, heads_at_once):
            some = slice(first, first + heads_at_once)
            # Each [h, L, D], those of the context [h, C, D]
            q, k, v, out, *beside = (
                x[b, :, some].transpose(0, 1).to(compute_dtype(query.dtype))
                for x in (query, key, value, output, *(() if context is None else context[:2]))
            )
            if context is not None and context.mask is not None:
                beside.append(context.mask[b])
            parts = [
                _measure(
                    q,
                    k,
                    v,
                    beside,
                    out,
                    lse_selected[b, some],
                    scores[b, some],
                    some_blocks,
                    block_q,
                    block_k,
                    coverage,
                )
                for some_blocks in blocks.split(blocks_at_once)
            ]
            rows.append([torch.cat(part, -1) for part in zip(*parts, strict=True)])
    # Heads and batch were walked through in this order.
    recall, error, magnitude, oracle, by_router = (
        torch.cat(part).unflatten(0, (batch, heads)) for part in zip(*rows, strict=True)
    )
    measured = (length - blocks * block_q).clamp(max=block_q).sum()
    return Losses(recall, error.sum(-1) / measured, magnitude.sum(-1) / measured, oracle, by_router)


def _measure(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beside: list[Tensor],
    output: Tensor,
    lse_selected: Tensor,
    scores: Tensor,
    blocks: Tensor,
    block_q: int,
    block_k: int,
    coverage: float,
) -> tuple[Tensor, ...]:
    """The fields of `Losses` of some query blocks, `[h, m]` each; error and magnitude as sums.

    Args:
        query, key, value, output: `[h, L, D]`; lse_selected `[h, L]`, scores `[h, M, N]`.
        beside: key and value `[h, C, D]` of the context and its mask `[C]`, if there are any.
        blocks: `[m]`.
    """
    length = query.shape[1]
    # [m, block_q]; the last block may be shorter.
    tokens = blocks[:, None] * block_q + torch.arange(block_q, device=query.device)
    real = (tokens < length).to(query.dtype)
    tokens = tokens.clamp(max=length - 1)

    def over_tokens(x: Tensor) -> Tensor:
        """Sum over the queries of each block, of x `[h, m, block_q, ...]`."""
        return (x * real.view(*real.shape, *[1] * (x.dim() - 3))).sum(2)

    # [h, m * block_q, L]
    scaled = query[:, tokens.flatten()] * query.shape[-1] ** -0.5
    logits = scaled @ key.mT
    lse = logits.logsumexp(-1, keepdim=True)
    probabilities = (logits - lse).exp_()
    attended = probabilities @ value
    if beside:
        key_beside, value_beside, *mask = beside
        # [h, m * block_q, C]
        more = scaled @ key_beside.mT
        if mask:
            more = more.masked_fill(~mask[0], -torch.inf)
        lse_all = torch.logaddexp(lse, more.logsumexp(-1, keepdim=True))
        attended = (lse - lse_all).exp() * attended + (more - lse_all).exp() @ value_beside
    full = attended.unflatten(1, tokens.shape)
    recall = torch.exp(lse_selected[:, tokens].to(lse.dtype) - lse.view(-1, *tokens.shape))
    error = over_tokens((output[:, tokens] - full).abs()).mean(-1)
    magnitude = over_tokens(full.abs()).mean(-1)
    # [m]
    counts = real.sum(-1)

    total = num_blocks(length, block_k)
    padded = F.pad(probabilities, (0, total * block_k - length))
    # [h, m, N]
    mass = over_tokens(padded.unflatten(-1, (total, block_k)).sum(-1).unflatten(1, tokens.shape))
    mass = mass / counts[:, None]
    best_first = mass.sort(-1, descending=True).values
    router_first = mass.gather(-1, scores[:, blocks].argsort(-1, descending=True))
    densities = [
        # Rounding may keep the sum of all below a coverage of 1.
        ((ordered.cumsum(-1) < coverage).sum(-1) + 1).clamp(max=total) / total
        for ordered in (best_first, router_first)
    ]
    return over_tokens(recall) / counts, error, magnitude, densities[0], densities[1]
