"""SLA2 with SoftTop-k selection in bounded memory: how a router gets gradients.

Where the kernels run they do it. Elsewhere the formulas are the reference's own; it keeps all
scores for the backward pass, and here each query block is computed anew there instead, so that only
one block's scores are alive.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sla_video.kernels.options import num_selected
from sla_video.kernels.reference import (
    block_scores,
    linear_branch,
    mix_weight,
    soft_selection,
    sparse_branch,
)
from sla_video.kernels.triton_support import LARGEST_HEAD_DIM, why_unavailable
from sla_video.pipelines.processor import SLAAttnProcessor


class SoftAttention:
    """Attention of one layer whose router is trained; put into `SLAAttnProcessor.attention`.

    Args:
        tau: temperature of the selection.
    """

    def __init__(self, tau: float) -> None:
        self.tau = tau

    def __call__(
        self, processor: SLAAttnProcessor, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        impl = processor.operator_options["impl"]
        fits = query.shape[-1] <= LARGEST_HEAD_DIM
        if impl == "triton" or (
            impl == "auto" and query.is_cuda and fits and not why_unavailable()
        ):
            return processor.sla2(query, key, value, selection="soft_top_k", tau=self.tau)
        with torch.autocast(query.device.type, enabled=False):
            return self._attend(processor, query, key, value)

    def _attend(
        self, processor: SLAAttnProcessor, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        assert processor.sparsity is not None
        options, router = processor.operator_options, processor.local_router
        block_q, block_k = options["block_q"], options["block_k"]
        # [B, H, L, D]
        q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
        length = q.shape[2]
        smooth = k - k.mean(2, keepdim=True)
        scores = block_scores(q, smooth, router, block_q, block_k)
        starts = torch.arange(0, length, block_k, device=q.device)
        tokens = (length - starts).clamp(max=block_k).to(scores)
        log_mass = torch.log_softmax(scores + tokens.log(), -1)
        count = num_selected(processor.sparsity, scores.shape[-1])
        log_keep, log_drop = soft_selection(scores, count, self.tau)
        alpha = mix_weight(log_mass, log_keep, log_drop, router)
        phi_keys = torch.softmax(smooth if options["phi_k"] == "smoothed" else k, -1)
        index = torch.arange(length, device=q.device) // block_k

        def rows(q_rows: Tensor, keep: Tensor, drop: Tensor, a: Tensor) -> Tensor:
            # From blocks to tokens: [B, H, 1, L].
            keep, drop = keep[..., index], drop[..., index].exp()
            sparse, _ = sparse_branch(q_rows, k, v, keep, block_k, options["sparse_dtype"])
            linear = linear_branch(torch.softmax(q_rows, -1), phi_keys, v, drop)
            return a * sparse + (1 - a) * linear

        parts = []
        for m, start in enumerate(range(0, length, block_q)):
            given = (
                q[:, :, start : start + block_q],
                log_keep[:, :, m, None],
                log_drop[:, :, m, None],
                alpha[:, :, m, None, None],
            )
            learning = torch.is_grad_enabled()
            parts.append(
                checkpoint(rows, *given, use_reentrant=False) if learning else rows(*given)
            )
        return torch.cat(parts, 2).transpose(1, 2).to(query.dtype)
