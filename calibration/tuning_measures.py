"""What one layer loses in one order of the tokens, at every sparsity that it may get."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sla_video.calibration.budget import GRID
from sla_video.calibration.capture import Capture
from sla_video.calibration.layer_data import judge_tables
from sla_video.calibration.row_tables import RowTables, build_tables
from sla_video.kernels.measures import measured_blocks
from sla_video.kernels.reference import block_scores
from sla_video.kernels.routing import num_blocks

if TYPE_CHECKING:
    from sla_video.config import SLAConfig
    from sla_video.kernels.router import Router

# Query blocks looked at in each call, and rows in each of them; large models look at fewer rows.
_BLOCKS = 16
_ROWS = 16
_CALL_MEMORY = 2**30
# Softmax mass that the density is said at.
COVERAGE = 0.95


@torch.no_grad()
def measure_layer(
    calls: Sequence[Capture],
    order: Tensor,
    router: Router | None,
    config: SLAConfig,
    *,
    held_out: int,
    device: torch.device,
    seed: int,
) -> dict[str, Any]:
    """As JSON can hold it: "fit" and "held_out", each sparsity -> the fields of `Quality`.

    Args:
        calls: in raster order.
        order: `[L]` of the tokens.
        held_out: how many of the last calls judge; with 0 "held_out" is None.
    """
    tables = [_tables(call, order, config, device, seed + i) for i, call in enumerate(calls)]
    first = len(calls) - held_out
    router = None if router is None else router.to(device)
    return {
        "fit": _curve(tables[:first], router),
        "held_out": _curve(tables[first:], router) if held_out else None,
        "density": sum(_density(table, router) for table in tables[:first]) / first,
    }


def _curve(tables: Sequence[RowTables], router: Router | None) -> dict[str, dict[str, float]]:
    return {f"{sparsity:g}": asdict(judge_tables(tables, router, sparsity)) for sparsity in GRID}


def _tables(
    call: Capture, order: Tensor, config: SLAConfig, device: torch.device, seed: int
) -> RowTables:
    order = order.to(call.query.device)
    query, key, value = (part[:, order].to(device) for part in call)
    length = query.shape[1]
    blocks = measured_blocks(length, config.block_q, _BLOCKS).tolist()
    # Bytes that one row of each block takes.
    row = call.query.nbytes // length * num_blocks(length, config.block_k) * len(blocks)
    return build_tables(
        query,
        key,
        value,
        blocks,
        rows=max(1, min(_ROWS, _CALL_MEMORY // row)),
        block_q=config.block_q,
        block_k=config.block_k,
        phi_k=config.phi_k,
        generator=torch.Generator().manual_seed(seed),
    )


def _density(tables: RowTables, router: Router | None) -> float:
    """Share of the key blocks that hold `COVERAGE` of the mass, the router's best first."""
    # [B, H, S, R, N]
    mass = torch.softmax(tables.block_lse, -1) * tables.row_weight[:, :, None]
    # [B, H, S, N]
    mass = mass.sum(3) / tables.row_weight.sum(1)[:, None]
    scores = block_scores(tables.query_means, tables.key_means, router, 1, 1)
    reached = mass.gather(-1, scores.argsort(-1, descending=True)).cumsum(-1)
    needed = ((reached < COVERAGE).sum(-1) + 1).clamp(max=mass.shape[-1])
    return float(needed.to(mass.dtype).mean() / mass.shape[-1])


def worst_of(curves: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A curve for a layer that was not measured: at each sparsity the worst of the others'."""
    every = [curve["fit"] for curve in curves]
    return {
        "fit": {
            sparsity: {
                name: (min if name == "recall" else max)(fit[sparsity][name] for fit in every)
                for name in fit_fields
            }
            for sparsity, fit_fields in every[0].items()
        },
        "held_out": None,
        "density": None,
    }
