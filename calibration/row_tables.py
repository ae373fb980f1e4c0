"""SLA2 for a few rows of a captured call, cheap enough to be fitted hundreds of times.

A router acts on whole key blocks, so what a row of queries gets from each block can be computed
once: the log-sum-exp of its scores there, the block's normalised output, and the state of the
linear branch. With soft or hard selection m on top,

    O_s = sum_n w_n o_n,  w = softmax_n(lse_n + log m_n)
    O_l = phi(q) sum_n (1 - m_n) S_n / phi(q) sum_n (1 - m_n) z_n,  S_n = phi(K_n)^T V_n

which is exactly what `kernels/reference.py` computes for these rows, without a score left to form.
Letters: B batch, H heads, L tokens, D head dimension, M query blocks, N key blocks, S sampled query
blocks, R sampled rows in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.kernels.options import PhiK
from sla_video.kernels.reference import block_scores, mix_weight, soft_selection, top_k_mask
from sla_video.kernels.router import Router
from sla_video.kernels.routing import block_counts, block_means, compute_dtype, num_blocks


@dataclass(frozen=True, kw_only=True)
class RowTables:
    """What the sampled rows of one call get from each key block.

    Attributes:
        blocks: `[S]` int64, the sampled query blocks, out of `num_query_blocks`.
        row_weight: `[S, R]`, 1 for a row that counts and 0 for one that only fills up the block.
        query_means: `[B, H, S, D]`; key_means: `[B, H, N, D]`, smoothed; counts: `[N]` tokens.
        block_lse: `[B, H, S, R, N]`, log-sum-exp of the scores of each key block.
        block_output: `[B, H, S, R, N, D]`, attention to each key block alone.
        phi_query: `[B, H, S, R, D]`.
        state: `[B, H, N, D, D]`, `phi(K)^T V` of each key block; state_sum: `[B, H, N, D]`.
        target: `[B, H, S, R, D]`, full attention.
    """

    blocks: Tensor
    num_query_blocks: int
    row_weight: Tensor
    query_means: Tensor
    key_means: Tensor
    counts: Tensor
    block_lse: Tensor
    block_output: Tensor
    phi_query: Tensor
    state: Tensor
    state_sum: Tensor
    target: Tensor

    @property
    def num_key_blocks(self) -> int:
        """N."""
        return self.key_means.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))


class RowResult(NamedTuple):
    """SLA2 on the rows of a `RowTables`.

    Attributes:
        output: `[B, H, S, R, D]`.
        recall: `[B, H, S, R]`, exact share of the softmax mass that the selection holds.
        alpha: `[B, H, S]`.
    """

    output: Tensor
    recall: Tensor
    alpha: Tensor


@torch.no_grad()
def build_tables(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[int],
    *,
    rows: int,
    block_q: int,
    block_k: int,
    phi_k: PhiK,
    generator: torch.Generator | None = None,
) -> RowTables:
    """Tables of `rows` random rows in each of the query blocks `blocks`.

    Args:
        query, key, value: `[B, L, H, D]`. Sums are in float32, in float64 for float64; with 16-bit
            inputs the two large tables are kept in 16 bits.
        rows: R; all rows of a block if it has no more.
        generator: on the CPU.

    Raises:
        ValueError: a block that is not there.
    """
    batch, length, heads, _ = query.shape
    num_query = num_blocks(length, block_q)
    if any(not 0 <= m < num_query for m in blocks):
        raise ValueError(f"`blocks` must be from 0 to {num_query - 1}, got {list(blocks)}")
    index, weight = _sample_rows(blocks, rows, block_q, length, generator)
    index, dtype, kept = index.to(query.device), compute_dtype(query.dtype), query.dtype
    shape = (len(blocks), index.shape[1])

    key_means = block_means(key, block_k)
    counts = block_counts(length, block_k, key_means)
    key_mean = (key_means * counts[:, None]).sum(2) / length
    tables: dict[str, list[Tensor]] = {
        name: [] for name in ("block_lse", "block_output", "state", "state_sum", "target", "phi")
    }
    for b in range(batch):
        for h in range(heads):
            # [S * R, D], [L, D]
            q = query[b, index.flatten(), h].to(dtype)
            k, v = key[b, :, h].to(dtype), value[b, :, h].to(dtype)
            lse, output = _by_block(q, k, v, block_k)
            features = torch.softmax(k - key_mean[b, h] if phi_k == "smoothed" else k, -1)
            # [N, block_k, D]; padding has no features, so that it adds nothing.
            features, v = _in_blocks(features, block_k), _in_blocks(v, block_k)
            tables["block_lse"].append(lse.unflatten(0, shape))
            tables["block_output"].append(output.to(kept).unflatten(0, shape))
            target = (torch.softmax(lse, -1)[:, None] @ output).squeeze(1)
            tables["target"].append(target.unflatten(0, shape))
            tables["phi"].append(torch.softmax(q, -1).unflatten(0, shape))
            tables["state"].append((features.mT @ v).to(kept))
            tables["state_sum"].append(features.sum(1))
    stacked = {
        name: torch.stack(parts).unflatten(0, (batch, heads)) for name, parts in tables.items()
    }
    query_means = block_means(query, block_q)
    where = torch.tensor(list(blocks), device=query.device)
    return RowTables(
        blocks=where,
        num_query_blocks=num_query,
        row_weight=weight.to(query.device, dtype),
        query_means=query_means[:, :, where],
        key_means=key_means - key_mean[:, :, None],
        counts=counts,
        phi_query=stacked.pop("phi"),
        **stacked,
    )


def attend(tables: RowTables, router: Router | None, count: int, tau: float | None) -> RowResult:
    """SLA2 with `count` key blocks selected; gradients reach the router alone.

    Args:
        tau: temperature of SoftTop-k; None selects the `count` best blocks, where only the mix
            weight has a gradient.
    """
    scores = block_scores(tables.query_means, tables.key_means, router, 1, 1)
    log_mass = torch.log_softmax(scores + tables.counts.log(), -1)
    if tau is None:
        keep = top_k_mask(scores, count)
        log_keep, log_drop = keep.to(scores.dtype).log(), (~keep).to(scores.dtype).log()
    else:
        log_keep, log_drop = soft_selection(scores, count, tau)
    alpha = _mix(tables, log_mass, log_keep, log_drop, router)

    logits = tables.block_lse + log_keep[:, :, :, None]
    weights = torch.softmax(logits, -1)
    table = tables.block_output
    sparse = (weights[..., None, :].to(table.dtype) @ table).squeeze(-2).to(scores.dtype)
    drop = log_drop.exp()
    # [B, H, S, D, D] and [B, H, S, D]
    states = drop.to(tables.state.dtype) @ tables.state.flatten(-2)
    head_dim = tables.phi_query.shape[-1]
    states = states.unflatten(-1, (head_dim, head_dim)).to(scores.dtype)
    total = tables.phi_query @ (drop @ tables.state_sum)[..., None]
    linear = (tables.phi_query @ states) / total.masked_fill(total == 0, 1)
    a = alpha[..., None, None]
    recall = torch.exp(logits.detach().logsumexp(-1) - tables.block_lse.logsumexp(-1))
    return RowResult(a * sparse + (1 - a) * linear, recall, alpha)


def _mix(
    tables: RowTables, log_mass: Tensor, log_keep: Tensor, log_drop: Tensor, router: Router | None
) -> Tensor:
    """alpha `[B, H, S]`."""
    if router is None or router.alpha == "adaptive":
        return mix_weight(log_mass, log_keep, log_drop, router)
    # The table is interpolated over all query blocks, sampled or not. Zeros: something is dropped.
    batch, heads = log_mass.shape[:2]
    every = log_mass.new_zeros(batch, heads, tables.num_query_blocks, 1)
    alpha: Tensor = mix_weight(every, every, every, router)[:, :, tables.blocks]
    return alpha.masked_fill((log_drop == -torch.inf).all(-1), 1)


def _sample_rows(
    blocks: Sequence[int], rows: int, block_q: int, length: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Token numbers `[S, R]` of random rows, and 0 where a short block's row is there twice."""
    rows = min(rows, block_q)
    index, weight = torch.empty(len(blocks), rows, dtype=torch.long), torch.zeros(len(blocks), rows)
    for i, m in enumerate(blocks):
        tokens = min(block_q, length - m * block_q)
        drawn = torch.randperm(tokens, generator=generator)[:rows].sort().values
        index[i] = m * block_q + F.pad(drawn, (0, rows - len(drawn)))
        weight[i, : len(drawn)] = 1
    return index, weight


def _in_blocks(x: Tensor, block: int) -> Tensor:
    """`[L, D]` as `[N, block, D]`, zeros after the end."""
    padded: Tensor = F.pad(x, (0, 0, 0, -x.shape[0] % block))
    blocks: Tensor = padded.unflatten(0, (-1, block))
    return blocks


def _by_block(q: Tensor, k: Tensor, v: Tensor, block_k: int) -> tuple[Tensor, Tensor]:
    """Attention of rows q `[T, D]` to each block of k, v `[L, D]` alone.

    Returns:
        log-sum-exps `[T, N]` and outputs `[T, N, D]`.
    """
    logits = q @ k.mT * q.shape[-1] ** -0.5
    logits = F.pad(logits, (0, -k.shape[0] % block_k), value=-torch.inf)
    # [T, N, block_k]
    logits = logits.unflatten(1, (-1, block_k))
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse[..., None])
    output = (weights.transpose(0, 1) @ _in_blocks(v, block_k)).transpose(0, 1)
    return lse, output.contiguous()
