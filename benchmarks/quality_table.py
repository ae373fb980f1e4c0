"""The quality table of tiny-wan: attention against attention at equal sparsity, trained alike.

    python benchmarks/quality_table.py --out runs/quality --steps 400
    python benchmarks/quality_table.py --out runs/quality --table

A row is a way to choose blocks, mix and train. Each is calibrated and fine-tuned with the same number
of steps, and judged on the held-out prompts. Everything that is finished lies in --out and is
not done again, so that a run may be stopped at any time. Several GPUs share the rows: `--shard 0/2`.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from sla_video.pipelines.tiny_wan import evaluate

SPARSITIES = (0.97, 0.95, 0.9, 0.8)
COLUMNS = {
    "attention_rel_l1": "rel-L1",
    "recall": "recall",
    "velocity_error": "velocity error",
    "psnr_to_first": "PSNR",
    "ssim_to_first": "SSIM",
    "colour": "colour",
    "shape": "shape",
    "direction": "direction",
    "all": "all",
    "seconds_per_video": "s/video",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way to attend.

    Attributes:
        calibration: settings of stage 1; None for the training-free routers.
        training: settings of stage 2; None for none.
        mix: a fixed mix weight of the sparse branch, in logits; None for the routers' own.
        sla: SLA instead of SLA2: a projection of the linear branch over all keys is added.
        judged_in: number format of the sparse branch when judged.
        like: train nothing, take the result of that row.
    """

    calibration: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    mix: float | None = None
    sla: bool = False
    judged_in: str = "bf16"
    like: str | None = None


_SPARSE_ONLY = 40.0  # logits: no weight is left for the linear branch
ROWS = {
    "sparse only": Row(mix=_SPARSE_ONLY),
    "sparse only, stage 2": Row(mix=_SPARSE_ONLY, training={"train_alpha": False}),
    "SLA, stage 2": Row(sla=True, mix=_SPARSE_ONLY, training={}),
    "SLA2 training-free": Row(),
    "SLA2 stage 1": Row(calibration={}),
    "SLA2 stage 2, distill": Row(calibration={}, training={}),
    "SLA2 stage 2, flow": Row(calibration={}, training={"loss": "flow"}),
    "SLA2 stage 2, ssa": Row(calibration={}, training={"loss": "ssa"}),
    "SLA2 stage 2, ssa, full side": Row(
        calibration={}, training={"loss": "ssa", "alignment": "full"}
    ),
    "SLA2 stage 2, ssa, sparse side": Row(
        calibration={}, training={"loss": "ssa", "alignment": "sparse"}
    ),
    "heuristic router, stage 2": Row(calibration={"trainable": "alpha"}, training={}),
    "alpha 1/2, stage 2": Row(calibration={}, mix=0.0, training={"train_alpha": False}),
    "alpha per block, stage 2": Row(calibration={"alpha": "per_block"}, training={}),
    "raw keys in phi, stage 2": Row(calibration={"phi_k": "raw"}, training={}),
    "router per head, stage 2": Row(calibration={"router_per_head": True}, training={}),
    "INT8 after training": Row(like="SLA2 stage 2, distill", judged_in="int8"),
    "INT8+FP8 after training": Row(like="SLA2 stage 2, distill", judged_in="int8_fp8"),
    "INT8 in training": Row(calibration={}, training={"sparse_dtype": "int8"}, judged_in="int8"),
    "INT8+FP8 in training": Row(
        calibration={}, training={"sparse_dtype": "int8_fp8"}, judged_in="int8_fp8"
    ),
}


def folder_of(name: str, sparsity: float, args: argparse.Namespace) -> Path:
    """Where everything of a row lies."""
    plain = "".join(c if c.isalnum() else "-" for c in name)
    return Path(args.out) / f"{plain}@{sparsity:g}-seed{args.seed}"


def stage_1(row: Row, sparsity: float, folder: Path, args: argparse.Namespace) -> Path:
    """Routers of a row before stage 2."""
    settings = row.calibration
    if settings is None:
        routers = folder / "start"
        with evaluate.load_pipeline(args.model, None, "ema") as pipe:
            pass
    raise NotImplementedError
