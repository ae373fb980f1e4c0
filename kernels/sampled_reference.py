"""The reference for a few query blocks of a long sequence: the same formulas, bounded memory.

`reference.py` forms every score of every query block, which at L = 32,760 takes minutes and a
hundred gigabytes. What one query block gets depends on no other, so a sample can be had alone: the
selection and alpha from block means of all of Q and K, then both branches of the sampled blocks
against all keys, head by head, in float64. Letters: B batch, H heads, L tokens, D head dimension,
M query blocks, N key blocks, S sampled query blocks, R rows in them.

Two roundings of one score can rank two nearly equal blocks differently, and both are right.
`margin` says how clearly each selection was won, so that a comparison can leave out what hangs on
rounding.

Differentiable: with a loss on the sampled rows alone, gradients of Q, K and V are those that the
whole operator has for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.kernels.options import Options, most_selected
from sla_video.kernels.reference import (
    block_scores,
    linear_branch,
    mix_weight,
    sparse_branch,
    top_k_mask,
)
from sla_video.kernels.router import Router


class SampledReference(NamedTuple):
    """Outputs of the sampled rows, float64.

    Attributes:
        rows: `[R]` int64, the tokens of the sampled query blocks.
        output: `[B, R, H, D]`.
        lse: `[B, H, R]`, log-sum-exp of the selected part.
        dense: `[B, R, H, D]`, full attention of the same rows; None unless asked for.
        selected: `[B, H, S, N]` bool, key blocks of each sampled query block.
        alpha: `[B, H, S]`, weight of the sparse branch.
        margin: `[B, H, R]`, how far the worst score kept is above the best one dropped, in standard
            deviations of the scores of the row; infinite where nothing is dropped.
    """

    rows: Tensor
    output: Tensor
    lse: Tensor
    dense: Tensor | None
    selected: Tensor
    alpha: Tensor
    margin: Tensor


def sampled_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    router: Router | None,
    options: Options,
    blocks: Sequence[int],
    *,
    need_dense: bool = False,
) -> SampledReference:
    """`sla2_reference` on query, key, value `[B, L, H, D]` for the query blocks `blocks`.

    Raises:
        ValueError: a selection other than top-k, or a block that is not there.
    """
    if options.selection != "top_k":
        raise ValueError(f"`selection` must be 'top_k', got {options.selection!r}")
    batch, length, heads, _ = query.shape
    block_q, block_k = options.block_q, options.block_k
    num_q = -(-length // block_q)
    for m in blocks:
        if not 0 <= m < num_q:
            raise ValueError(f"`blocks` must be from 0 to {num_q - 1}, got {m}")

    spans = [slice(m * block_q, min(length, (m + 1) * block_q)) for m in blocks]
    # [B, H, S, D] and [B, H, N, D]; each mean is a block of one token.
    query_means = torch.stack([query[:, span].double().mean(1) for span in spans], 2)
    key_means, tokens = _block_means(key, block_k)
    key_mean = (key_means * tokens[:, None]).sum(2, keepdim=True) / length
    scores = block_scores(query_means, key_means - key_mean, router, 1, 1)
    log_mass = torch.log_softmax(scores + tokens.log(), -1)
    most = most_selected(options, len(tokens))
    keep = top_k_mask(scores, most)
    log_keep, log_drop = keep.double().log(), (~keep).double().log()
    if router is not None and router.alpha == "per_block":
        # The table is interpolated over all query blocks. These drop something, others may not.
        every = log_mass.new_zeros(batch, heads, num_q, 1)
        alpha = mix_weight(every, every, every, router)[:, :, list(blocks)]
        alpha = alpha.masked_fill(keep.all(-1), 1)
    else:
        alpha = mix_weight(log_mass, log_keep, log_drop, router)

    outputs, lses, denses = [], [], []
    for b in range(batch):
        for h in range(heads):
            # [1, 1, L, D]
            q, k, v = (x[None, b, :, h].unsqueeze(1).double() for x in (query, key, value))
            features = k - k.mean(2, keepdim=True) if options.phi_k == "smoothed" else k
            phi_keys = torch.softmax(features, -1)
            for i, rows in enumerate(spans):
                # [1, 1, 1, L]
                kept = log_keep[b, h, i].repeat_interleave(block_k)[None, None, None, :length]
                dropped = log_drop[b, h, i].exp().repeat_interleave(block_k)[:length]
                out, lse = sparse_branch(q[:, :, rows], k, v, kept, block_k, options.sparse_dtype)
                linear = linear_branch(
                    torch.softmax(q[:, :, rows], -1), phi_keys, v, dropped[None, None, None]
                )
                outputs.append(alpha[b, h, i] * out[0, 0] + (1 - alpha[b, h, i]) * linear[0, 0])
                lses.append(lse[0, 0])
                if need_dense:
                    denses.append(F.scaled_dot_product_attention(q[:, :, rows], k, v)[0, 0])

    def by_token(parts: list[Tensor]) -> Tensor:
        per_head = [torch.cat(parts[i : i + len(spans)]) for i in range(0, len(parts), len(spans))]
        stacked: Tensor = torch.stack(per_head).unflatten(0, (batch, heads))
        return stacked.transpose(1, 2)

    sampled = torch.cat([torch.arange(span.start, span.stop) for span in spans])
    of_block = torch.cat([torch.full((x.stop - x.start,), i) for i, x in enumerate(spans)])
    return SampledReference(
        sampled.to(query.device),
        by_token(outputs),
        by_token([x[:, None] for x in lses])[..., 0].transpose(1, 2),
        by_token(denses) if need_dense else None,
        keep,
        alpha,
        _margin(scores.detach(), most)[:, :, of_block.to(query.device)],
    )


def spread_blocks(length: int, block_q: int, count: int) -> list[int]:
    """At most `count` query blocks of a sequence, evenly spread, with the first and the last."""
    num_q = -(-length // block_q)
    if count >= num_q:
        return list(range(num_q))
    return sorted({round(i * (num_q - 1) / max(1, count - 1)) for i in range(count)})


def clear_error(got: Tensor, wanted: SampledReference, *, margin: float = 1e-4) -> float:
    """Relative L2 error of an output `[B, L, H, D]` on the rows whose selection is clear.

    Scores in float32 are off by about 1e-6 of `margin`'s unit, 2e-5 where keys have large offsets.
    """
    clear = (wanted.margin > margin).transpose(1, 2)[..., None]
    expected = torch.where(clear, wanted.output, 0)
    found = torch.where(clear, got[:, wanted.rows].to(expected.dtype), 0)
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def _block_means(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Means of blocks `[B, H, N, D]` of x `[B, L, H, D]`, and the tokens of each block `[N]`."""
    tokens = torch.tensor([part.shape[1] for part in x.split(block, 1)], device=x.device).double()
    # One head at a time: a copy of all in float64 would be four times the input.
    padding = (0, 0, 0, len(tokens) * block - x.shape[1])
    sums = [
        F.pad(x[:, :, h].double(), padding).unflatten(1, (-1, block)).sum(2)
        for h in range(x.shape[2])
    ]
    return torch.stack(sums, 1) / tokens[:, None], tokens


def _margin(scores: Tensor, most: int) -> Tensor:
    """`[B, H, S]`: last score kept minus first one dropped, in standard deviations of the row."""
    if most == scores.shape[-1]:
        return scores.new_full(scores.shape[:-1], torch.inf)
    best = scores.topk(most + 1, -1).values
    return (best[..., -2] - best[..., -1]) / scores.std(-1)
