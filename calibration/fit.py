"""Stage 1: fit the router and the mix weight of one layer to its full attention (SLA2, section 4).

Minimises the squared error of SLA2 against full attention on captured Q, K, V. Two phases: the
selection is a SoftTop-k that hardens as its temperature falls and everything asked for is trained;
then it is the hard top-k of inference and the mix weight alone settles on it. What is kept is
decided by the hard top-k on calls that training never saw, and the training-free router is among
the candidates: a fit never ships something worse. Letters: B batch, H heads, L tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sla_video.calibration.capture import Capture
from sla_video.calibration.row_tables import RowTables, attend, build_tables
from sla_video.config import SLAConfig
from sla_video.kernels.options import num_selected
from sla_video.kernels.router import AlphaKind, Router
from sla_video.kernels.routing import num_blocks
from sla_video.pipelines.errors import InputError

Trainable = Literal["router+alpha", "router", "alpha"]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How one layer is fitted.

    Attributes:
        steps: of the optimizer; 0 keeps the training-free router.
        trainable: "alpha" leaves the router at its heuristic, "router" the mix weight at its
            estimate.
        learning_rate: of the router's projections; alpha_learning_rate: of the mix weight.
        tau_start, tau: temperature of SoftTop-k at the start and at the end of the soft phase, in
            between on a geometric line.
        decay: pull of the projections towards the identity, without which they learn the prompts
            by heart: added to the loss, times their mean squared distance per row.
        hard_share: share of the steps in the hard phase.
        blocks: query blocks sampled from each call; rows: rows sampled from each of them.
        held_out_rows: rows of each held-out block.
        call_memory: bytes of the tables of one call; large models sample fewer rows to keep it.
        table_memory: bytes of tables that are kept; further ones are computed again at each use.

    Raises:
        InputError: a setting out of range.
    """

    steps: int = 300
    trainable: Trainable = "router+alpha"
    learning_rate: float = 3e-3
    alpha_learning_rate: float = 3e-2
    tau_start: float = 0.1
    tau: float = 0.03
    decay: float = 0.2
    hard_share: float = 0.2
    blocks: int = 64
    rows: int = 4
    held_out_rows: int = 32
    call_memory: int = 4 * 2**30
    table_memory: int = 3 * 2**30

    def __post_init__(self) -> None:
        if self.trainable not in get_args(Trainable):
            choices = ", ".join(get_args(Trainable))
            raise InputError(f"`trainable` must be one of {choices}, got {self.trainable!r}")
        if self.steps < 0:
            raise InputError(f"`steps` must be at least 0, got {self.steps}")
        for name in ("blocks", "rows", "held_out_rows", "call_memory", "table_memory"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise InputError(f"`decay` must be a number of at least 0, got {self.decay}")
        for name in ("learning_rate", "alpha_learning_rate", "tau_start", "tau"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"`{name}` must be a positive number, got {value}")
        if not 0 <= self.hard_share <= 1:
            raise InputError(f"`hard_share` must be in [0, 1], got {self.hard_share}")


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Attention of one layer with hard selection against full attention, on held-out rows.

    Attributes:
        error: mean over calls and heads of the squared error over the squared norm. What is
            minimised: every head counts, however small its values are.
        rel_l1, rel_l2: of all heads together, mean over calls.
        recall: mean softmax mass of the selected tokens, exact.
    """

    error: float
    rel_l1: float
    rel_l2: float
    recall: float


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


class LayerData:
    """The sampled rows of one layer: some to train on, others to judge by.

    The last calls are held out, with all their query blocks; of the others, the query blocks that
    are sampled for training.

    Args:
        calls: in the order of `CaptureSource.calls_of`.
        held_out: how many of the last ones judge; 0 judges by other query blocks of the same calls.

    Attributes:
        table_bytes: of all tables that are kept.
    """

    def __init__(
        self,
        calls: Sequence[Capture],
        *,
        held_out: int,
        config: SLAConfig,
        options: FitOptions,
        device: torch.device,
        seed: int,
    ) -> None:
        if not calls or not 0 <= held_out < len(calls):
            raise ValueError(f"`held_out` must be below the number of calls, {len(calls)}")
        self._generator = torch.Generator().manual_seed(seed)
        self._config, self._options, self._device = config, options, device
        _, length, self.heads, self.head_dim = calls[0].query.shape
        self.num_query_blocks = num_blocks(length, config.block_q)
        self.num_key_blocks = num_blocks(length, config.block_k)
        self.table_bytes = 0
        judged = calls[len(calls) - held_out :] if held_out else calls
        self._train, self._test = [], []
        for call in calls[: len(calls) - held_out]:
            drawn = self._draw()
            self._train.append(self._tables(call, drawn, options.rows))
            if not held_out:
                others = sorted(set(range(self.num_query_blocks)) - set(drawn)) or drawn
                self._test.append(self._tables(call, others, options.held_out_rows))
        if held_out:
            for call in judged:
                self._test.append(self._tables(call, self._draw(), options.held_out_rows))

    def batches(self) -> Iterator[RowTables]:
        """Training tables, one call at a time, in a new random order each round, without end."""
        while True:
            for index in torch.randperm(len(self._train), generator=self._generator).tolist():
                yield self._train[index]()

    def held_out(self) -> Iterator[RowTables]:
        """The tables to judge by."""
        return (make() for make in self._test)

    def _draw(self) -> list[int]:
        count = min(self._options.blocks, self.num_query_blocks)
        order = torch.randperm(self.num_query_blocks, generator=self._generator)
        return sorted(order[:count].tolist())

    def _tables(self, call: Capture, blocks: list[int], rows: int) -> Callable[[], RowTables]:
        """Makes the tables now if there is room for them, else whenever they are asked for."""
        seed = int(torch.randint(2**31, (), generator=self._generator))
        row = call.query.nbytes // call.query.shape[1] * self.num_key_blocks * len(blocks)
        rows = max(1, min(rows, self._options.call_memory // row))

        def make() -> RowTables:
            return build_tables(
                call.query.to(self._device),
                call.key.to(self._device),
                call.value.to(self._device),
                blocks,
                rows=rows,
                block_q=self._config.block_q,
                block_k=self._config.block_k,
                phi_k=self._config.phi_k,
                generator=torch.Generator().manual_seed(seed),
            )

        if self.table_bytes >= self._options.table_memory:
            return make
        made = make()
        self.table_bytes += made.nbytes
        return lambda: made


def new_router(data: LayerData, *, alpha: AlphaKind, per_head: bool, device: Any) -> Router:
    """The training-free router of a layer."""
    return Router(
        data.heads,
        data.head_dim,
        per_head=per_head,
        alpha=alpha,
        num_query_blocks=data.num_query_blocks if alpha == "per_block" else None,
    ).to(device)


@torch.no_grad()
def judge(data: LayerData, router: Router | None, sparsity: float) -> Quality:
    """SLA2 with hard selection on the held-out rows."""
    count = num_selected(sparsity, data.num_key_blocks)
    sums = torch.zeros(4, dtype=torch.float64)
    calls = 0
    for tables in data.held_out():
        result = attend(tables, router, count, None)
        weight = tables.row_weight[:, :, None]
        error = (result.output - tables.target) * weight
        target = tables.target * weight
        rows = tables.row_weight.expand_as(result.recall)
        sums += torch.stack(
            [
                relative_error(result.output, tables).mean(),
                error.abs().sum() / target.abs().sum(),
                error.norm() / target.norm(),
                (result.recall * rows).sum() / rows.sum(),
            ]
        ).cpu()
        calls += 1
    error_, rel_l1, rel_l2, recall = (sums / calls).tolist()
    return Quality(error=error_, rel_l1=rel_l1, rel_l2=rel_l2, recall=recall)


def relative_error(output: Tensor, tables: RowTables) -> Tensor:
    """`[B, H]`: squared error of the rows over their squared norm."""
    weight = tables.row_weight[:, :, None]
    error = ((output - tables.target).square() * weight).sum((2, 3, 4))
    norm = (tables.target.square() * weight).sum((2, 3, 4))
    return error / norm.clamp_min(torch.finfo(norm.dtype).tiny)


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
