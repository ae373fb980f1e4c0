"""Help and start-up of the command line."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import typer
from cli_tools import call, program, seconds_of_programs

import sla_video
from sla_video.cli import app, main

COMMANDS = ("generate", "calibrate", "tune", "finetune", "report", "compare", "bench", "info")


def test_the_commands_are_these() -> None:
    assert tuple(typer.main.get_command(app).commands) == COMMANDS


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_of_every_command_has_an_example(command: str) -> None:
    outcome = call(*command.split(), "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    assert "Example" in outcome.out
    assert f"\n  sla-video {command}".rstrip() in outcome.out.replace("    sla", "  sla")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_and_option_has_help(command: str) -> None:
    group = typer.main.get_command(app)
    found = group.commands[command] if command else group
    assert len(found.help) > 20
    for parameter in found.params:
        assert parameter.help, f"{parameter.name} of {command or 'sla-video'} has no help"
        assert parameter.help.rstrip().endswith((".", "]")), parameter.help


def test_without_arguments_it_prints_the_help() -> None:
    assert call() == call("--help")


def test_version() -> None:
    assert call("--version").out.strip() == sla_video.__version__


def test_entry_point_is_main() -> None:
    (script,) = entry_points(group="console_scripts", name="sla-video")
    assert script.load() is main


def test_help_answers_in_under_half_a_second() -> None:
    def seconds() -> float:
        before = seconds_of_programs()
        subprocess.run(program("--help"), check=True, capture_output=True)
        return seconds_of_programs() - before

    # Of a CPU, which a busy machine shares out; it can only make them more, so any run will do.
    assert any(seconds() < 0.5 for _ in range(20))


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["generate", ""]])
def test_nothing_heavy_is_imported_before_it_is_needed(arguments: list[str]) -> None:
    code = (
        f"import sys; from sla_video.cli import main; main({arguments!r});"
        "print(sorted({'torch', 'diffusers', 'transformers', 'triton', 'numpy', 'imageio'}"
        " & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"
