"""How far a training is, by steps or by time, and the learning rate that goes with it.

The processes of one run must take the same steps at the same rates, though their clocks differ a
little: they agree on the time every few steps, and everything else follows from what they agreed.
"""

from __future__ import annotations

import math
import time

import torch
from accelerate import Accelerator

SYNC_EVERY = 10


class Pace:
    """Warm up, hold, and cool down to 0 at the end of the steps or of the minutes.

    The time begins when the first step of a process is done: that step compiles.

    Args:
        max_steps, minutes: the end, whichever comes first; 0 for none.
        cooldown: last share in which the rate falls.
        shape: "linear" or "cosine".
        steps, elapsed: done by earlier runs; steps, and seconds.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        max_steps: int,
        minutes: float,
        warmup_steps: int,
        cooldown: float,
        shape: str,
        steps: int = 0,
        elapsed: float = 0.0,
    ) -> None:
        self.accelerator = accelerator
        self.max_steps = max_steps
        self.minutes = minutes
        self.warmup_steps = warmup_steps
        self.cooldown = cooldown
        self.shape = shape
        self.steps = steps
        self.elapsed = self._before = elapsed
        self._begun: float | None = None

    @property
    def fraction(self) -> float:
        """How much of the training is done, in [0, 1]."""
        by_steps = self.steps / self.max_steps if self.max_steps else 0.0
        by_time = self.elapsed / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    @property
    def factor(self) -> float:
        """What to multiply the peak learning rate by, for the next step."""
        warm = min(1.0, (self.steps + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        left = min(1.0, (1 - self.fraction) / self.cooldown) if self.cooldown else 1.0
        cool = left if self.shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
        return warm * cool

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.fraction >= 1

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the time to the end; None before there is anything to go by."""
        if self.fraction <= 0 or self.elapsed <= 0:
            return None
        return self.elapsed * (1 - self.fraction) / self.fraction

    def advance(self) -> None:
        """Count a step, and now and then agree on the time."""
        self.steps += 1
        if self._begun is None:
            self._begun = time.monotonic()
        if self.steps % SYNC_EVERY == 0:
            self.agree()

    def agree(self) -> None:
        """Let all processes have one time: the mean of theirs."""
        own = 0.0 if self._begun is None else time.monotonic() - self._begun
        if self.accelerator.num_processes > 1:
            clock = torch.tensor(own, device=self.accelerator.device)
            own = float(self.accelerator.reduce(clock, "mean").item())
        self.elapsed = self._before + own
