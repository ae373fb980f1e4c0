"""Progress of long work: the interface that library code reports to, and a bar that shows it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress(Protocol):
    """What generation reports to while it works."""

    def stage(self, label: str, steps: int | None = None) -> None:
        """A new stage begins; `steps` is `None` where their number is not known."""

    def advance(self) -> None:
        """One step of the stage is done."""

    def close(self) -> None:
        """The work is done, or results are about to be printed."""


class NoProgress:
    """Shows nothing."""

    def stage(self, label: str, steps: int | None = None) -> None:
        """Show nothing."""

    def advance(self) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Show nothing."""


class TerminalProgress:
    """A bar on stderr with the step and the time left. It vanishes when the work is done.

    Args:
        shown: False where another process shows its own.
    """

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def stage(self, label: str, steps: int | None = None) -> None:
        """Begin a stage; the one before it is done."""
        if not self._shown:
            return
        if self._bar is None:
            self._bar = _new_bar()
            self._bar.start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(
            label, total=steps, count=f"step 0/{steps}" if steps else ""
        )

    def advance(self) -> None:
        """Count one step."""
        if self._bar is None or self._task is None:
            return
        task = next(task for task in self._bar.tasks if task.id == self._task)
        count = f"step {int(task.completed) + 1}/{int(task.total)}" if task.total else ""
        self._bar.update(self._task, advance=1, count=count)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None


def _new_bar() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeftColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeftColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
        disable=not console.is_terminal,
        # What goes to stdout must stay there; warnings on stderr are shown above the bar.
        redirect_stdout=False,
    )
