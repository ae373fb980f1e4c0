"""Muon with all matrices of one shape orthogonalized together.

`torch.optim.Muon` takes the matrices one by one: on a network of many small ones its kernel
launches cost more than the forward and backward passes (measured: see benchmarks/NOTES.md). The
mathematics here is the same, one batched product for every shape.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic iteration of Keller Jordan's Muon, as in torch.optim.Muon.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, of `[N, R, C]`.

    In bfloat16 on a GPU, as torch does; CPUs without such arithmetic are far slower in it.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class BatchedMuon(torch.optim.Optimizer):
    """Muon for two-dimensional parameters, with updates of AdamW's size (Liu et al. 2025).

    Args:
        params: matrices; every other parameter belongs to another optimizer.
        lr: as for AdamW: an update's root mean square is 0.2 `lr`.
        momentum: of the Nesterov average of the gradients.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        matrices = list(params)
        wrong = next((tuple(p.shape) for p in matrices if p.ndim != 2), None)
        if wrong is not None:
            raise ValueError(f"Muon takes matrices, got a parameter of shape {wrong}")
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                self._step_shape(shape, params, group)
        return loss

    def _step_shape(self, shape: torch.Size, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        gradients = [p.grad for p in params if p.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        updates = orthogonalize(torch.stack(tuple(ahead))).float().unbind()
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * 0.2 * math.sqrt(max(shape))
        torch._foreach_add_(params, updates, alpha=-rate)
