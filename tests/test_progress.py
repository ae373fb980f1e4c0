"""The progress bar: on a terminal it shows the step and the time left, elsewhere nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_tools import SMALL, call

from sla_video.pipelines.progress import NoProgress, TerminalProgress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make rich take stderr for a wide terminal, whatever it is."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.usefixtures("terminal")
def test_bar_shows_the_step_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress() as progress:
        progress.stage("denoising", 3)
        for _ in range(2):
            progress.advance()
        bar = progress._bar
        assert bar is not None
        bar.refresh()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(
        r"denoising .* step 2/3 0:00:\d\d left (0:\d\d:\d\d|-:--:--)", plain(captured.err)
    )


@pytest.mark.usefixtures("terminal")
def test_bar_leaves_the_terminal_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), TerminalProgress() as progress:
        progress.stage("denoising", 3)
        raise KeyboardInterrupt
    text = capsys.readouterr().err
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"


@pytest.mark.usefixtures("terminal")
def test_generate_shows_all_stages(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    arguments = ("--model", tiny_pipeline_dir, *SMALL, "--out", tmp_path)
    outcome = call("generate", "a red circle", "a blue square", *arguments)
    assert outcome.code == 0
    shown = plain(outcome.err)
    for words in ("loading", "denoising 1/2", "decoding 1/2", "denoising 2/2"):
        assert words in shown
    assert [line.endswith(".mp4") for line in outcome.out.splitlines()] == [True, True]


def test_nothing_is_shown_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress() as progress:
        progress.stage("denoising", 3)
        progress.advance()
    assert capsys.readouterr() == ("", "")


def test_work_without_a_stage_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (NoProgress(), TerminalProgress()):
        progress.advance()
        progress.close()
    silent = NoProgress()
    silent.stage("denoising", 3)
    assert capsys.readouterr() == ("", "")
