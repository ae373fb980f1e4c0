"""Seconds of one stage after another."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def lap_timer(device: torch.device) -> Callable[[], float]:
    """A function that returns the seconds since it was last called, queued GPU work included."""
    import torch

    last = time.perf_counter()

    def lap() -> float:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        elapsed, last = now - last, now
        return elapsed

    return lap
