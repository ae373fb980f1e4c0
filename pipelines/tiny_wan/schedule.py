"""Learning rates over wall-clock time, for training that has a budget of minutes.

The processes of one run must take the same steps at the same rates, though their clocks differ a
little: they agree on the time every few steps, and everything else follows from what they agreed.
"""

from __future__ import annotations

import math
import time

import psutil
import torch
from accelerate import Accelerator

SYNC_EVERY = 20
# Kept free at the end of a wall-clock budget, for the last checkpoint.
RESERVE_SECONDS = 15.0


def process_seconds() -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - float(psutil.Process().create_time())


class Schedule:
    """Warm up over the first steps, hold, cool down linearly to zero at the end of the time.

    The time begins when the first step is done: that step compiles.

    Args:
        minutes: the whole time budget.
        before: minutes of it that earlier runs have used.
        wall_minutes: stop this long after the start of the process, to be continued later.
        warmup_steps: steps until the full rate.
        cooldown: last fraction of the time.
        max_steps: an end that may come before the time's; 0 for none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        minutes: float,
        *,
        before: float = 0.0,
        wall_minutes: float | None = None,
        warmup_steps: int = 100,
        cooldown: float = 0.3,
        max_steps: int = 0,
    ) -> None:
        self.accelerator = accelerator
        self.minutes = minutes
        self.before = before
        self.wall_minutes = math.inf if wall_minutes is None else wall_minutes
        self.warmup_steps = warmup_steps
        self.cooldown = cooldown
        self.max_steps = max_steps
        self.begun = time.monotonic()
        self.steps = 0
        self.elapsed = 0.0
        self.synced = True
        self.out_of_time = False

    @property
    def fraction(self) -> float:
        """How much of the budget is used up."""
        return (self.before + self.elapsed) / max(self.minutes, 1e-9)

    @property
    def factor(self) -> float:
        """What to multiply the peak learning rate by, for the next step."""
        warm = min(1.0, (self.steps + 1) / self.warmup_steps)
        cool = min(1.0, (1 - self.fraction) / self.cooldown) if self.cooldown else 1.0
        return warm * max(0.0, cool)

    @property
    def finished(self) -> bool:
        return self.fraction > 1 - 1e-6 or self.steps == self.max_steps > 0

    def advance(self) -> bool:
        """Count a step; False when that was the last one of this run."""
        self.steps += 1
        if self.steps == 1:
            self.begun = time.monotonic()
        self.synced = self.steps % SYNC_EVERY == 0 or self.steps == self.max_steps
        if self.synced:
            minutes = [(time.monotonic() - self.begun) / 60, process_seconds() / 60]
            clocks = torch.tensor(minutes, device=self.accelerator.device)
            self.elapsed, process = self.accelerator.reduce(clocks, "sum").tolist()
            count = self.accelerator.num_processes
            self.elapsed /= count
            self.out_of_time = process / count + RESERVE_SECONDS / 60 >= self.wall_minutes
        return not (self.finished or self.out_of_time)
