"""The sampled rows of one layer: some to train on, others to judge a router by.

Letters: B batch, H heads, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sla_video.calibration.capture import Capture
from sla_video.calibration.fit_options import FitOptions
from sla_video.calibration.row_tables import RowTables, attend, build_tables
from sla_video.config import SLAConfig
from sla_video.kernels.options import num_selected
from sla_video.kernels.router import Router
from sla_video.kernels.routing import num_blocks


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


def judge(data: LayerData, router: Router | None, sparsity: float) -> Quality:
    """SLA2 with hard selection on the held-out rows."""
    return judge_tables(data.held_out(), router, sparsity)


@torch.no_grad()
def judge_tables(calls: Iterable[RowTables], router: Router | None, sparsity: float) -> Quality:
    """SLA2 with hard selection on the rows of these calls."""
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for tables in calls:
        result = attend(tables, router, num_selected(sparsity, tables.num_key_blocks), None)
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
        count += 1
    error_, rel_l1, rel_l2, recall = (sums / count).tolist()
    return Quality(error=error_, rel_l1=rel_l1, rel_l2=rel_l2, recall=recall)


def relative_error(output: Tensor, tables: RowTables) -> Tensor:
    """`[B, H]`: squared error of the rows over their squared norm."""
    weight = tables.row_weight[:, :, None]
    error = ((output - tables.target).square() * weight).sum((2, 3, 4))
    norm = (tables.target.square() * weight).sum((2, 3, 4))
    return error / norm.clamp_min(torch.finfo(norm.dtype).tiny)
