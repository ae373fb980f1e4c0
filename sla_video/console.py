"""How the command line speaks: messages on stderr, one line for each failure, and exit codes."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from sla_video.pipelines.errors import InputError, ReportedElsewhere, one_line

if TYPE_CHECKING:
    from sla_video.pipelines.generation import GeneratedVideo
    from sla_video.pipelines.processes import Team

PROGRAM = "sla-video"
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143
# What a path, or the machine, is to blame for, wherever it is met.
_NOT_OURS = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC}


class _MessageFormatter(logging.Formatter):
    """`sla-video: warning: text` for warnings, the text alone for less."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            return f"{PROGRAM}: {record.levelname.lower()}: {text}"
        return text


class _StderrHandler(logging.Handler):
    """Writes to whatever stderr is at the moment, so that a progress bar can stand aside."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


def set_up_messages(*, verbose: bool) -> None:
    """Our own messages go to stderr; those of the libraries below stay quiet unless `verbose`."""
    logger = logging.getLogger("sla_video")
    for old in [h for h in logger.handlers if isinstance(h, _StderrHandler)]:
        logger.removeHandler(old)
    handler = _StderrHandler()
    handler.setFormatter(_MessageFormatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:
        warnings.simplefilter("ignore")
        # Read by the libraries when they are imported. They log errors that they also raise, and
        # those are reported here in one line. What the user has set stays.
        for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
            os.environ.setdefault(name, "critical")
        # Where torchao is installed, Diffusers imports it, and it logs what it cannot use here.
        for name in ("torchao", "torch.utils._pytree"):
            library = logging.getLogger(name)
            if library.level == logging.NOTSET:
                library.setLevel(logging.ERROR)


def print_videos(videos: Iterable[GeneratedVideo], team: Team) -> None:
    """Print the path of each video once it is there; the first of several processes sums up.

    Raises:
        ReportedElsewhere: in that one, another failed.
    """
    start = time.monotonic()
    made = kept = 0
    for video in videos:
        if video.seconds:
            made += 1
            stages = ", ".join(f"{name} {value:.1f} s" for name, value in video.seconds.items())
        else:
            kept += 1
            stages = "finished by an earlier run"
        typer.echo(f"seed {video.seed}: {stages}", err=True)
        typer.echo(video.path)
    results, failed = team.end(made)
    if team.rank or (team.size == 1 and not kept):
        return
    processes = "1 process" if team.size == 1 else f"{team.size} processes"
    summary = f"{sum(results)} made by {processes} in {time.monotonic() - start:.1f} s"
    if kept:
        summary += f", {kept} finished by an earlier run"
    if failed:
        summary += f"; {len(failed)} of the processes failed: --resume makes the rest"
    typer.echo(summary, err=True)
    if failed:
        raise ReportedElsewhere(failed[0])


def run_command(call: Callable[[], Any]) -> int:
    """Call a command and return its exit code, with one line on stderr for a failure.

    0 for success, 2 for input that cannot be used, 130 after Ctrl-C, 143 after SIGTERM, 1 for a
    defect of this program (SLA_VIDEO_TRACEBACK=1 shows where).
    """
    with _ending_cleanly():
        try:
            code = call()
        except ReportedElsewhere:
            return BAD_INPUT
        except InputError as error:
            return _fail(one_line(error), BAD_INPUT)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except _usage_error() as error:
            context = getattr(error, "ctx", None)
            path = context.command_path if context is not None else PROGRAM
            text = one_line(error.format_message())
            return _fail(f"{text} (see {path} --help)", BAD_INPUT)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _NOT_OURS:
                return _fail(one_line(error), BAD_INPUT)
            if os.environ.get("SLA_VIDEO_TRACEBACK"):
                raise
            text = f"unexpected {type(error).__name__}: {one_line(error)}"
            return _fail(f"{text} (SLA_VIDEO_TRACEBACK=1 shows where)", FAILED)
    if code == INTERRUPTED:
        return _fail("interrupted; nothing unfinished is left", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _usage_error() -> Any:
    """The class that every usage error of Typer derives from.

    It has been in `click` and in a private module of Typer; `BadParameter` has always been public.
    """
    return typer.BadParameter.__mro__[2]


def _fail(message: str, code: int) -> int:
    typer.echo(f"{PROGRAM}: {message}", err=True)
    return code


@contextlib.contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Let SIGTERM unwind the program as Ctrl-C does, and let neither of them get lost."""

    def unwind(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    def send_again(lost: sys.UnraisableHookArgs) -> None:
        # An exception that a signal raises inside a destructor is only reported, so the program
        # would run on. Sent once more from outside, it meets other code.
        for kind, number in ((KeyboardInterrupt, signal.SIGINT), (SystemExit, signal.SIGTERM)):
            if issubclass(lost.exc_type, kind):
                timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
                timer.daemon = True
                timer.start()
                return
        sys.__unraisablehook__(lost)

    if threading.current_thread() is not threading.main_thread():  # signals belong to that one
        yield
        return
    before = signal.signal(signal.SIGTERM, unwind)
    hook_before, sys.unraisablehook = sys.unraisablehook, send_again
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook_before
