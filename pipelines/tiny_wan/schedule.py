"""Learning rates over wall-clock time, for training that has a budget of minutes.

The processes of one run must take the same steps at the same rates, though their clocks differ a
little: they agree on the time every few steps, and everything else follows from what they agreed.
"""

from __future__ import annotations

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


def stage_seconds(minutes: list[float], wall_minutes: float | None) -> float:
    """Time for the first of some stages whose planned `minutes` are given.

    With a wall-clock budget, what is left of it is shared out in proportion to the plan.
    """
    if wall_minutes is None:
        return minutes[0] * 60
    left = wall_minutes * 60 - process_seconds() - RESERVE_SECONDS
    return max(0.0, left) * minutes[0] / sum(minutes)


class Schedule:
    """Warm up over the first steps, hold, cool down linearly to zero at the end of the time.

    Args:
        seconds: the time budget; it starts when the schedule is made.
        warmup_steps: steps until the full rate.
        cooldown: last fraction of the time.
        max_steps: an end that may come before the time's; 0 for none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        seconds: float,
        *,
        warmup_steps: int = 100,
        cooldown: float = 0.3,
        max_steps: int = 0,
    ) -> None:
        self.accelerator = accelerator
        self.seconds = seconds
        self.warmup_steps = warmup_steps
        self.cooldown = cooldown
        self.max_steps = max_steps
        self.begun = time.monotonic()
        self.steps = 0
        self.fraction = 0.0
        self.synced = True

    @property
    def elapsed(self) -> float:
        return self.fraction * self.seconds

    @property
    def factor(self) -> float:
        """What to multiply the peak learning rate by, for the next step."""
        warm = min(1.0, (self.steps + 1) / self.warmup_steps)
        cool = min(1.0, (1 - self.fraction) / self.cooldown) if self.cooldown else 1.0
        return warm * max(0.0, cool)

    def advance(self) -> bool:
        """Count a step; False when that was the last one."""
        self.steps += 1
        self.synced = self.steps % SYNC_EVERY == 0 or self.steps == self.max_steps
        if self.synced:
            fraction = (time.monotonic() - self.begun) / max(self.seconds, 1e-6)
            clock = torch.tensor([fraction], device=self.accelerator.device)
            self.fraction = float(self.accelerator.reduce(clock, "max").item())
        return self.fraction < 1 and self.steps != self.max_steps
