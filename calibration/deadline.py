"""Progress that ends work when its time is up."""

from __future__ import annotations

import time

from sla_video.pipelines.progress import Progress


class TimeIsUpError(Exception):
    """The work has taken the time that it may take. What is done is done."""


class Deadline:
    """Shows `progress`, and raises `TimeIsUpError` after a step that ends too late.

    Args:
        minutes: from now on; None for no end.

    Attributes:
        progress: for steps that no time ends.
    """

    def __init__(self, progress: Progress, minutes: float | None) -> None:
        self.progress = progress
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def passed(self) -> bool:
        """Whether the time is up."""
        return self._end is not None and time.monotonic() >= self._end

    def check(self) -> None:
        """Raise `TimeIsUpError` if it is."""
        if self.passed:
            raise TimeIsUpError

    def stage(self, label: str, steps: int | None = None) -> None:
        """A new stage begins."""
        self.progress.stage(label, steps)

    def advance(self) -> None:
        """One step of the stage is done."""
        self.progress.advance()
        self.check()

    def close(self) -> None:
        """The work is done."""
        self.progress.close()
