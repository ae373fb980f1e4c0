"""SoftTop-k: a differentiable relaxation of "keep the k best of each row" (SLA2, arXiv 2602.12675).

    mask = sigmoid(scores / tau + threshold_row),    threshold_row such that the row sums to k

The threshold is found by bisection and differentiated implicitly: from `sum_j mask_j = k`,

    d threshold / d z_j = -w_j / sum_i w_i,    z = scores / tau,  w = mask (1 - mask).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Enough halvings to exhaust the mantissa of float64 on any bracket that occurs.
_BISECTIONS = {torch.float64: 64}
_BISECTIONS_FP32 = 40


# Opaque to a compiler, which would unroll it, for each N and k anew.
@torch.library.custom_op("sla_video::row_threshold", mutates_args=())
def _row_threshold(z: Tensor, k: int) -> Tensor:
    """threshold `[..., 1]` with `sigmoid(z + threshold).sum(-1) == k` for z `[..., N]`."""
    # At these two ends every entry is below, respectively above, k / N.
    centre = math.log(k / (z.shape[-1] - k))
    low = centre - z.amax(-1, keepdim=True)
    high = centre - z.amin(-1, keepdim=True)
    for _ in range(_BISECTIONS.get(z.dtype, _BISECTIONS_FP32)):
        middle = 0.5 * (low + high)
        too_low = torch.sigmoid(z + middle).sum(-1, keepdim=True) < k
        low = torch.where(too_low, middle, low)
        high = torch.where(too_low, high, middle)
    return 0.5 * (low + high)


@_row_threshold.register_fake
def _(z: Tensor, k: int) -> Tensor:
    return z.new_empty(*z.shape[:-1], 1)


class _RowThreshold(torch.autograd.Function):
    """`_row_threshold` with its implicit gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, k: int) -> Tensor:
        threshold: Tensor = _row_threshold(z, k)
        ctx.save_for_backward(z, threshold)
        return threshold

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Written with differentiable operations of (z, threshold): the second derivative follows.
        z, threshold = ctx.saved_tensors
        mask = torch.sigmoid(z + threshold)
        weight = mask * (1 - mask)
        # A row whose scores are far apart saturates: no entry moves, and the gradient is zero.
        total = weight.sum(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
        return -grad * weight / total, None


def soft_topk_logits(scores: Tensor, k: int, tau: float = 0.1) -> Tensor:
    """Logits `u` with `sigmoid(u).sum(-1) == k`, differentiable twice.

    The logits rather than the mask, because `log mask = logsigmoid(u)` and
    `1 - mask = sigmoid(-u)` stay exact where the mask itself rounds to 0 or 1.

    Args:
        scores: `[..., N]`, float32 or float64, finite.
        k: sum of every row, 1 <= k < N.
        tau: temperature; smaller is closer to the hard top-k.

    Raises:
        ValueError: k or tau out of range.
    """
    num_blocks = scores.shape[-1]
    if not 1 <= k < num_blocks:
        raise ValueError(f"`k` must be in [1, {num_blocks}) for {num_blocks} scores, got {k}")
    if not tau > 0:
        raise ValueError(f"`tau` must be positive, got {tau}")
    z = scores / tau
    threshold: Tensor = _RowThreshold.apply(z, k)  # type: ignore[no-untyped-call]
    return z + threshold


def soft_topk(scores: Tensor, k: int, tau: float = 0.1) -> Tensor:
    """Mask `[..., N]` in (0, 1) whose rows sum to k; all ones when k == N.

    See `soft_topk_logits` for the arguments and errors.
    """
    if k == scores.shape[-1]:
        return torch.ones_like(scores)
    return torch.sigmoid(soft_topk_logits(scores, k, tau))
