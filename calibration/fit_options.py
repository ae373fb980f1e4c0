"""Settings of the fit of one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

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
