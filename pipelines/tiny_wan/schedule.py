"""A learning-rate schedule over wall-clock time, for training that has a budget of minutes."""

from __future__ import annotations

import time


class Deadline:
    """Warm up, hold, and cool down linearly to zero at the end of a time budget.

    Args:
        minutes: the whole budget, from the first `start`.
        warmup, cooldown: fractions of the budget.
    """

    def __init__(self, minutes: float, *, warmup: float = 0.03, cooldown: float = 0.3) -> None:
        self.seconds = minutes * 60
        self.warmup = warmup
        self.cooldown = cooldown
        self.begun = time.monotonic()

    def start(self) -> None:
        """Count from now: called once compilation is behind."""
        self.begun = time.monotonic()

    @property
    def fraction(self) -> float:
        return (time.monotonic() - self.begun) / self.seconds

    @property
    def factor(self) -> float:
        """What to multiply the peak learning rate by, now."""
        done = self.fraction
        warm = min(1.0, (done + 1e-3) / self.warmup) if self.warmup else 1.0
        cool = max(0.0, min(1.0, (1 - done) / self.cooldown)) if self.cooldown else 1.0
        return min(warm, cool)
