"""The rows of the quality table: ways to choose blocks, to mix and to train."""

from __future__ import annotations

import dataclasses
from typing import Any

from sla_video.pipelines.tiny_wan.models import GUIDANCE_SCALE

_SPARSE_ONLY = 40.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way to attend.

    Attributes:
        calibration: changes to stage 1; None for training-free routers.
        training: changes to stage 2; None for no training.
        mix: a fixed mix weight, as its logit; None for the routers' own.
        sla: a projection of the linear branch over all keys is added, as in SLA.
        judged_in: number format of the sparse branch.
        like: the row whose trained routers are judged here.
    """

    calibration: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    mix: float | None = None
    sla: bool = False
    judged_in: str = "bf16"
    like: str | None = None


def _ssa(sides: str) -> Row:
    return Row(calibration={}, training={"loss": "ssa", "alignment": sides})


# Of stage 2, where a row says nothing else.
TRAINING: dict[str, Any] = {
    "trainable": "lora",
    "loss": "distill",
    "levels": "uniform",
    "guidance": GUIDANCE_SCALE,
    "lora_rank": 64,
    "learning_rate": 1e-3,
    "ema": 0.99,
}
DISTILLED = "SLA2 stage 2"
ROWS = {
    "sparse only": Row(mix=_SPARSE_ONLY),
    "SLA2 training-free": Row(),
    "SLA2 stage 1": Row(calibration={}),
    DISTILLED: Row(calibration={}, training={}),
    "sparse only, stage 2": Row(mix=_SPARSE_ONLY, training={"train_alpha": False}),
    "SLA, stage 2": Row(sla=True, mix=_SPARSE_ONLY, training={}),
    "SLA2 stage 2, heuristic router": Row(calibration={"trainable": "alpha"}, training={}),
    "SLA2 stage 2, alpha 1/2": Row(calibration={}, mix=0.0, training={"train_alpha": False}),
    "SLA2 stage 2, diffusion loss": Row(calibration={}, training={"loss": "flow", "guidance": 0.0}),
    "SLA2 stage 2, SSA": _ssa("both"),
    "SLA2 stage 2, SSA of the full side": _ssa("full"),
    "SLA2 stage 2, SSA of the sparse side": _ssa("sparse"),
    "SLA2 stage 2, alpha per block": Row(calibration={"alpha": "per_block"}, training={}),
    "SLA2 stage 2, raw keys in phi": Row(calibration={"phi_k": "raw"}, training={}),
    "SLA2 stage 2, router per head": Row(calibration={"router_per_head": True}, training={}),
    "INT8 after training": Row(like=DISTILLED, judged_in="int8"),
    "INT8 and FP8 after training": Row(like=DISTILLED, judged_in="int8_fp8"),
    "INT8 in training": Row(calibration={}, training={"sparse_dtype": "int8"}, judged_in="int8"),
    "INT8 and FP8 in training": Row(
        calibration={}, training={"sparse_dtype": "int8_fp8"}, judged_in="int8_fp8"
    ),
}
# Rows that tell methods apart, rather than settings of one.
METHODS = (
    DISTILLED,
    "SLA, stage 2",
    "sparse only, stage 2",
    "SLA2 training-free",
    "sparse only",
    "SLA2 stage 1",
)
