"""SLA2 whose keys have an order, written apart from the operator: no key is ever moved.

Only block means and the list of a block's tokens know of the order. Letters: B batch, H heads,
L tokens, D head dimension, M query blocks, N key blocks.
"""

from __future__ import annotations

import torch

from sla_video.kernels.options import num_selected
from sla_video.kernels.reference import block_scores, linear_branch, mix_weight, sparse_branch
from sla_video.kernels.token_order import inverse_order


def sla2_with_key_order(
    query, key, value, order, router=None, *, sparsity=0.95, block_q=128, block_k=64, top_p=None
):
    """Output `[B, L, H, D]` and log-sum-exp of the selected part `[B, H, L]`."""
    dtype = query.dtype
    # [B, H, L, D]
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))
    smooth = k - k.mean(2, keepdim=True)
    ordered = smooth.gather(2, order.places.long()[..., None].expand_as(smooth))
    scores = block_scores(q, ordered, router, block_q, block_k)
    tokens = torch.tensor([part.shape[2] for part in k.split(block_k, 2)]).to(scores)
    log_mass = torch.log_softmax(scores + tokens.log(), -1)
    most = num_selected(sparsity, scores.shape[-1])
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for b, h, m in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        ranks = scores[b, h, m] if top_p is None else log_mass[b, h, m]
        leading = list(range(int(order.always[h])))
        best = [n for n in ranks.argsort(descending=True).tolist() if n not in leading]
        kept = (leading + best)[:most]
        if top_p is not None:
            mass = log_mass[b, h, m, kept].exp().cumsum(0)
            needed = 1 + int((mass < top_p).sum())
            kept = kept[: max(needed, len(leading))]
        keep[b, h, m, kept] = True
    log_keep, log_drop = keep.to(dtype).log(), (~keep).to(dtype).log()
    alpha = mix_weight(log_mass, log_keep, log_drop, router)
    # The block of each token, where it lies: [B, H, L].
    flat = order.places.long().flatten(0, 1)
    block_of = torch.stack([inverse_order(row) for row in flat]).view_as(order.places) // block_k
    outputs, lses = [], []
    for m, rows in enumerate(q.split(block_q, 2)):
        on_tokens = log_keep[:, :, m].gather(-1, block_of)[:, :, None]
        drop = log_drop[:, :, m].exp().gather(-1, block_of)[:, :, None]
        sparse, lse = sparse_branch(rows, k, v, on_tokens, block_k, "bf16")
        linear = linear_branch(torch.softmax(rows, -1), torch.softmax(smooth, -1), v, drop)
        a = alpha[:, :, m, None, None]
        outputs.append(a * sparse + (1 - a) * linear)
        lses.append(lse)
    return torch.cat(outputs, 2).transpose(1, 2), torch.cat(lses, 2)
