"""Stage 1: fit the router and the mix weight of one layer to its full attention (SLA2, section 4).

Minimises the squared error of SLA2 against full attention on captured Q, K, V. Two phases: the
selection is a SoftTop-k that hardens as its temperature falls and everything asked for is trained;
then it is the hard top-k of inference and the mix weight alone settles on it. What is kept is
decided by the hard top-k on calls that training never saw, and the training-free router is among
the candidates: a fit never ships something worse.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sla_video.calibration.fit_options import FitOptions
from sla_video.calibration.layer_data import LayerData, Quality, judge, relative_error
from sla_video.calibration.row_tables import attend
from sla_video.kernels.options import num_selected
from sla_video.kernels.router import AlphaKind, Router
from sla_video.pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """The outcome for one layer at one sparsity.

    Attributes:
        router: what to use.
        chosen: "training-free", or which parameters were trained.
        before, after: of the training-free router and of `router`.
    """

    router: Router
    sparsity: float
    chosen: str
    before: Quality
    after: Quality


def new_router(data: LayerData, *, alpha: AlphaKind, per_head: bool, device: Any) -> Router:
    """The training-free router of a layer."""
    return Router(
        data.heads,
        data.head_dim,
        per_head=per_head,
        alpha=alpha,
        num_query_blocks=data.num_query_blocks if alpha == "per_block" else None,
    ).to(device)


def fit_layer(
    data: LayerData,
    sparsity: float,
    options: FitOptions,
    *,
    alpha: AlphaKind = "adaptive",
    per_head: bool = False,
    device: torch.device | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> LayerFit:
    """Fit the router of one layer at one sparsity.

    Raises:
        InputError: the error is not a number.
    """
    start = new_router(data, alpha=alpha, per_head=per_head, device=device or "cpu")
    before = judge(data, start, sparsity)
    best = LayerFit(
        router=start, sparsity=sparsity, chosen="training-free", before=before, after=before
    )
    count = num_selected(sparsity, data.num_key_blocks)
    if not math.isfinite(before.error):
        raise InputError("the error of the training-free router is not a number")
    if count == data.num_key_blocks:  # full attention: nothing depends on the router
        return best
    for name, router in _candidates(data, start, count, options, on_step):
        after = judge(data, router, sparsity)
        # A fit that went wrong has an error that is not a number, and no comparison is true of it.
        if after.error < best.after.error:
            best = LayerFit(
                router=router, sparsity=sparsity, chosen=name, before=before, after=after
            )
    return best


def _candidates(
    data: LayerData, start: Router, count: int, options: FitOptions, on_step: Callable[[], None]
) -> Iterator[tuple[str, Router]]:
    """Routers worth judging, by what was trained in them."""
    hard_steps = round(options.steps * options.hard_share)
    if options.trainable == "router":
        hard_steps = 0
    router = copy.deepcopy(start)
    if options.trainable != "alpha":
        alone = copy.deepcopy(start)
        soft_steps = options.steps - hard_steps
        _train(data, router, count, soft_steps, options, soft=True, on_step=on_step)
        yield options.trainable, copy.deepcopy(router)
        if not hard_steps:
            return
        _train(data, router, count, hard_steps, options, soft=False, on_step=on_step)
        yield options.trainable, router
        # Where the router has nothing to win, the mix weight may still have.
        _train(data, alone, count, hard_steps, options, soft=False, on_step=lambda: None)
        yield "alpha", alone
    else:
        _train(data, router, count, options.steps, options, soft=False, on_step=on_step)
        yield "alpha", router


def _train(
    data: LayerData,
    router: Router,
    count: int,
    steps: int,
    options: FitOptions,
    *,
    soft: bool,
    on_step: Callable[[], None],
) -> None:
    projections = [router.query_proj, router.key_proj]
    mix = [p for p in router.parameters() if all(p is not other for other in projections)]
    groups: list[dict[str, Any]] = []
    trained: list[Tensor] = []
    if soft:
        groups.append({"params": projections, "lr": options.learning_rate})
        trained += projections
    if options.trainable != "router":
        groups.append({"params": mix, "lr": options.alpha_learning_rate})
        trained += mix
    for parameter in router.parameters():
        parameter.requires_grad_(any(parameter is p for p in trained))
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for step, tables in zip(range(steps), data.batches(), strict=False):
        tau = None
        if soft:
            cooling = options.tau / options.tau_start
            tau = options.tau_start * cooling ** (step / max(1, steps - 1))
        loss = relative_error(attend(tables, router, count, tau).output, tables).mean()
        if soft and options.decay:
            eye = torch.eye(router.head_dim, device=router.query_proj.device)
            distance = torch.stack([(p - eye).square().mean() for p in projections]).sum()
            loss = loss + options.decay * router.head_dim * distance
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, error_if_nonfinite=False)
        optimizer.step()
        schedule.step()
        on_step()
    for parameter in router.parameters():
        parameter.requires_grad_(True)
