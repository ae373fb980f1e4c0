"""Run the command line in the tests: in this process, or as a program of its own."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Sizes at which the tiny random pipeline of `tiny_models` takes a fraction of a second.
SMALL = ("--frames", "5", "--height", "32", "--width", "32", "--steps", "2", "--device", "cpu")


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Outcome:
    """Run `sla-video` in this process."""
    from sla_video.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def heed_interrupts() -> None:
    """In a new process: Ctrl-C counts, also where the tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def program(*arguments: object) -> list[str]:
    """The command line that runs `sla-video` as a program."""
    return [sys.executable, "-m", "sla_video.cli", *(str(argument) for argument in arguments)]


def run(*arguments: object, cwd: Path | None = None, **environment: str) -> Outcome:
    """Run `sla-video` as a program."""
    settings: dict[str, Any] = {"cwd": cwd, "env": program_environment(**environment)}
    done = subprocess.run(
        program(*arguments), capture_output=True, text=True, check=False, timeout=300, **settings
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def seconds_of_programs() -> float:
    """What the programs that have ended so far took of the CPUs, however busy the machine is."""
    times = os.times()
    return times.children_user + times.children_system


def program_environment(**environment: str) -> dict[str, str]:
    """The environment of `run`: one thread, so that tests do not get in each other's way."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **environment}


def files_below(folder: Path) -> list[str]:
    """All files and folders below `folder`, hidden ones included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_refused(outcome: Outcome, *words: str) -> None:
    """One line on stderr that holds all `words`, nothing on stdout, exit code 2."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("sla-video: ")
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err, outcome.err
