"""The learned parameters of SLA2 for one attention layer.

Shapes: H heads, D head dimension, M query blocks (see `kernels/README.md` for the legend).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

AlphaKind = Literal["adaptive", "per_block"]


class Router(nn.Module):
    """Router projections and mix parameters of one SLA2 layer (SLA2, arXiv 2602.12675, eq. 5-9).

    A fresh router is the training-free mode: identity projections select blocks by the heuristic
    top-k on block means, and the adaptive mix weight equals the router's own estimate of the
    softmax mass it selected.

    Args:
        heads: H.
        head_dim: D.
        per_head: one pair of projections per head `[H, D, D]` instead of one per layer `[D, D]`.
        alpha: `"adaptive"`: `sigmoid(alpha_scale[h] * logit(p) + alpha_bias[h])` with p the router
            softmax mass on the selected blocks; `"per_block"`: the paper's table, `[H, M]` logits.
        num_query_blocks: M of the resolution the `"per_block"` table was made for.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        per_head: bool = False,
        alpha: AlphaKind = "adaptive",
        num_query_blocks: int | None = None,
    ) -> None:
        super().__init__()
        if alpha not in ("adaptive", "per_block"):
            raise ValueError(f"`alpha` must be 'adaptive' or 'per_block', got {alpha!r}")
        self.heads = heads
        self.head_dim = head_dim
        self.per_head = per_head
        self.alpha = alpha
        eye = torch.eye(head_dim, dtype=torch.float32)
        eye = eye.repeat(heads, 1, 1) if per_head else eye
        self.query_proj = nn.Parameter(eye.clone())
        self.key_proj = nn.Parameter(eye.clone())
        if alpha == "adaptive":
            self.alpha_scale = nn.Parameter(torch.ones(heads, dtype=torch.float32))
            self.alpha_bias = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        else:
            if num_query_blocks is None or num_query_blocks < 1:
                raise ValueError(
                    "`num_query_blocks` must be a positive count when alpha='per_block', "
                    f"got {num_query_blocks}"
                )
            self.alpha_table = nn.Parameter(
                torch.zeros(heads, num_query_blocks, dtype=torch.float32)
            )

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, head_dim={self.head_dim}, "
            f"per_head={self.per_head}, alpha={self.alpha!r}"
        )


@dataclass(frozen=True, kw_only=True)
class _RouterHeads:
    """What `Router` has, of some heads: views, so that gradients reach the whole one."""

    heads: int
    head_dim: int
    per_head: bool
    alpha: AlphaKind
    query_proj: Tensor
    key_proj: Tensor
    alpha_scale: Tensor | None = None
    alpha_bias: Tensor | None = None
    alpha_table: Tensor | None = None


def router_heads(router: Router, start: int, stop: int) -> Router:
    """The heads `start` to `stop` of `router`, as the operator takes a router of so many heads.

    Not a module: it has no parameters of its own, and compiled code can make it.
    """
    own = slice(start, stop)
    projections = own if router.per_head else slice(None)
    mix = ("alpha_scale", "alpha_bias") if router.alpha == "adaptive" else ("alpha_table",)
    part = _RouterHeads(
        heads=stop - start,
        head_dim=router.head_dim,
        per_head=router.per_head,
        alpha=router.alpha,
        query_proj=router.query_proj[projections],
        key_proj=router.key_proj[projections],
        **{name: getattr(router, name)[own] for name in mix},
    )
    # The operator reads these fields of a router, and nothing else.
    return cast(Router, part)
