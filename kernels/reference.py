"""SLA2 as the papers define it: eager, differentiable, any float dtype. The specification.

Sparse-linear attention (SLA2, arXiv 2602.12675) splits the keys of each query block in two. The
blocks that a router selects get exact softmax attention, the others linear attention:

    O = alpha O_s + (1 - alpha) O_l

Keys outside the sequence, a context, may be added, which all queries attend to exactly.

Everything else in this folder is compared with this file, so it shares no routing code with the
fast implementations and prefers the plain formula to the quick one: it forms every score, block of
queries by block of queries. Letters: B batch, H heads, L tokens, D head dimension, M query blocks,
N key blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.kernels.context import SMALLEST_ALPHA, Context
from sla_video.kernels.key_places import KeyOrder, leading_first, take_tokens
from sla_video.kernels.options import Options, SparseDtype, most_selected
from sla_video.kernels.quantize import quantize_int8, quantize_value, quantize_weights
from sla_video.kernels.router import Router
from sla_video.kernels.soft_topk import soft_topk_logits


def sla2_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    router: Router | None,
    options: Options,
    *,
    need_lse: bool,
    context: Context | None = None,
    key_order: KeyOrder | None = None,
) -> tuple[Tensor, Tensor | None]:
    """SLA2 on query, key, value `[B, L, H, D]`; see `sla2_attention`, which checks arguments.

    Returns:
        the output `[B, L, H, D]` in the dtype of `query`, and the log-sum-exp of the selected
        part `[B, H, L]` (None unless `need_lse`).
    """
    block_q, block_k = options.block_q, options.block_k
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if key_order is not None:
        key, value = (take_tokens(x, key_order.places) for x in (key, value))
    # [B, H, L, D]
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
    length = q.shape[2]
    key_mean = k.mean(2, keepdim=True)
    smooth = k - key_mean

    scores = block_scores(q, smooth, router, block_q, block_k)
    # Tokens per key block, [N]: a shorter last block has less mass at the same score.
    tokens = torch.tensor([x.shape[2] for x in k.split(block_k, 2)]).to(scores)
    log_mass = torch.log_softmax(scores + tokens.log(), -1)
    most = most_selected(options, len(tokens))
    if options.selection == "soft_top_k":
        log_keep, log_drop = soft_selection(scores, most, options.tau)
    else:
        always = None if key_order is None else key_order.always
        if options.selection == "top_k":
            ranks = scores if always is None else leading_first(scores, always, most)
            keep = top_k_mask(ranks, most)
        else:
            keep = top_p_mask(log_mass, options.top_p, options.min_selected, most, always)
        log_keep, log_drop = keep.to(dtype).log(), (~keep).to(dtype).log()
    alpha = mix_weight(log_mass, log_keep, log_drop, router)

    phi_q = torch.softmax(q, -1)
    phi_keys = torch.softmax(smooth if options.phi_k == "smoothed" else k, -1)
    # From blocks to tokens: [B, H, M, L].
    log_keep = log_keep.repeat_interleave(block_k, -1)[..., :length]
    drop = log_drop.exp().repeat_interleave(block_k, -1)[..., :length]
    outputs, lses = [], []
    for m, start in enumerate(range(0, length, block_q)):
        rows = slice(start, start + block_q)
        sparse, lse = sparse_branch(
            q[:, :, rows], k, v, log_keep[:, :, m, None], block_k, options.sparse_dtype
        )
        linear = linear_branch(phi_q[:, :, rows], phi_keys, v, drop[:, :, m, None])
        a = alpha[:, :, m, None, None]
        output = a * sparse + (1 - a) * linear
        if context is not None:
            output = mix_with_context(q[:, :, rows], output, lse, a.squeeze(-1), context)
        outputs.append(output)
        lses.append(lse)
    joined = torch.cat(outputs, 2).transpose(1, 2).to(query.dtype)
    return joined, torch.cat(lses, 2) if need_lse else None


def block_scores(
    q: Tensor, smooth_k: Tensor, router: Router | None, block_q: int, block_k: int
) -> Tensor:
    """Router scores `[B, H, M, N]`: `(Qb Wq)(Kb Wk)^T / sqrt(D)` on block means Qb, Kb."""
    # [B, H, M, D] and [B, H, N, D]
    qb = torch.stack([x.mean(2) for x in q.split(block_q, 2)], 2)
    kb = torch.stack([x.mean(2) for x in smooth_k.split(block_k, 2)], 2)
    if router is not None:
        qb, kb = qb @ router.query_proj.to(qb), kb @ router.key_proj.to(kb)
    scores: Tensor = qb @ kb.mT / q.shape[-1] ** 0.5
    return scores


def top_k_mask(scores: Tensor, count: int) -> Tensor:
    """True on the `count` best key blocks of each row, `[B, H, M, N]`."""
    best = scores.topk(count, -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def top_p_mask(
    log_mass: Tensor, top_p: float, floor: int, cap: int, always: Tensor | None = None
) -> Tensor:
    """True on the fewest best blocks with mass >= top_p, at least `floor`, at most `cap`.

    Those that are `always` kept, `[H]` leading ones of each head, come before the best.
    """
    ranks = log_mass if always is None else leading_first(log_mass, always, cap)
    order = ranks.argsort(-1, descending=True)
    mass = log_mass.exp().gather(-1, order)
    rank = torch.arange(mass.shape[-1], device=mass.device)
    needed = (mass.cumsum(-1) - mass < top_p) | (rank < floor)
    if always is not None:
        needed |= rank < always[:, None, None]
    keep = needed & (rank < cap)
    return torch.zeros_like(keep).scatter(-1, order, keep)


def soft_selection(scores: Tensor, count: int, tau: float) -> tuple[Tensor, Tensor]:
    """`log m` and `log(1 - m)` of the SoftTop-k mask m, whose rows sum to `count`."""
    if count == scores.shape[-1]:
        return torch.zeros_like(scores), torch.full_like(scores, -torch.inf)
    u = soft_topk_logits(scores, count, tau)
    return F.logsigmoid(u), F.logsigmoid(-u)


def mix_weight(
    log_mass: Tensor, log_keep: Tensor, log_drop: Tensor, router: Router | None
) -> Tensor:
    """alpha `[B, H, M]`: 1 where nothing is dropped, else adaptive or from the router's table.

    Adaptive: `sigmoid(a logit(p) + b)`, p the softmax mass of the selected blocks. `logit(p)` is
    the difference of two log-masses, exact also where p rounds to 0 or 1.
    """
    nothing_dropped = (log_drop == -torch.inf).all(-1)
    if router is not None and router.alpha == "per_block":
        alpha = torch.sigmoid(router.alpha_table.to(log_mass))
        if alpha.shape[-1] != log_mass.shape[-2]:
            alpha = F.interpolate(alpha[None], size=log_mass.shape[-2], mode="linear")[0]
        alpha = alpha.expand(log_mass.shape[:-1])
    else:
        kept = (log_mass + log_keep).logsumexp(-1)
        # The fill value only keeps infinities away from rows that are overwritten below.
        dropped = (log_mass + log_drop.masked_fill(nothing_dropped[..., None], 0)).logsumexp(-1)
        logit_p = kept - dropped
        if router is not None:
            scale, bias = router.alpha_scale.to(logit_p), router.alpha_bias.to(logit_p)
            logit_p = scale[:, None] * logit_p + bias[:, None]
        alpha = torch.sigmoid(logit_p)
    return alpha.masked_fill(nothing_dropped, 1)


def sparse_branch(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, block_k: int, sparse_dtype: SparseDtype
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query block, selection entering as `+ log m` on the logits.

    Args:
        q: `[B, H, block_q, D]`; k, v: `[B, H, L, D]`; log_keep: `[B, H, 1, L]`.

    Returns:
        output `[B, H, block_q, D]` and log-sum-exp `[B, H, block_q]`.
    """
    logits = q @ k.mT / q.shape[-1] ** 0.5 + log_keep
    exact, exact_lse = torch.softmax(logits, -1) @ v, logits.logsumexp(-1)
    if sparse_dtype == "bf16":
        return exact, exact_lse
    with torch.no_grad():
        low, low_lse = low_bit_sparse_branch(q, k, v, log_keep, block_k, sparse_dtype)
    # Forward: the low-bit value. Backward: the gradient of the unquantized branch.
    return exact + (low - exact).detach(), exact_lse + (low_lse - exact_lse).detach()


def low_bit_sparse_branch(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, block_k: int, sparse_dtype: SparseDtype
) -> tuple[Tensor, Tensor]:
    """`sparse_branch` with the operands of both matmuls quantized (after SageAttention2++)."""
    scale = q.shape[-1] ** -0.5
    key_mean = k.mean(2, keepdim=True)
    q_low = quantize_int8(q, (-2, -1))
    k_low = [quantize_int8(x, (-2, -1)) for x in (k - key_mean).split(block_k, 2)]
    v_low = quantize_value(v, sparse_dtype)
    logits = q_low @ torch.cat(k_low, 2).mT * scale + log_keep
    largest = logits.amax(-1, keepdim=True)
    weights = torch.exp(logits - largest)
    total = weights.sum(-1, keepdim=True)
    out = quantize_weights(weights, sparse_dtype) @ v_low / total
    # Smoothing took q . mean(k) off every logit; the log-sum-exp is of the original keys.
    lse = largest + total.log() + q @ key_mean.mT * scale
    return out, lse.squeeze(-1)


def mix_with_context(
    q: Tensor, out: Tensor, lse: Tensor, alpha: Tensor, context: Context
) -> Tensor:
    """One query block's softmax over the sequence, whose mass is an estimate, and the context.

    alpha estimates the share of the softmax mass that is selected, so `lse - log(alpha)` is the
    log-mass of the whole sequence.

    Args:
        q, out: `[B, H, block_q, D]`, out of the sequence alone; lse: `[B, H, block_q]`;
            alpha: `[B, H, 1]`.
    """
    # [B, H, C, D]
    k, v = (x.transpose(1, 2).to(q) for x in (context.key, context.value))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if context.mask is not None:
        logits = logits.masked_fill(~context.mask[:, None, None], torch.finfo(q.dtype).min)
    log_mass = lse - alpha.clamp_min(SMALLEST_ALPHA).log()
    share = torch.sigmoid(log_mass - logits.logsumexp(-1)).unsqueeze(-1)
    return share * out + (1 - share) * (torch.softmax(logits, -1) @ v)


def linear_branch(phi_q: Tensor, phi_k: Tensor, v: Tensor, drop: Tensor) -> Tensor:
    """Linear attention of one query block over the tokens weighted by `drop` `[B, H, 1, L]`."""
    weights = (phi_q @ phi_k.mT) * drop
    total = weights.sum(-1, keepdim=True)
    # Rows that drop nothing have no linear part, and alpha is 1 for them.
    return (weights @ v) / total.masked_fill(total == 0, 1)
