"""`benchmarks/`: its page names every script, and `on_gpu.sh` asks only for what there is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from cli_tools import call

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
ON_GPU = (FOLDER / "on_gpu.sh").read_text()
# "[name]='command'", the command over several lines perhaps.
COMMANDS = {
    name: " ".join(command.split())
    for name, command in re.findall(r"^  \[([\w-]+)\]='([^']*)'$", ON_GPU, re.MULTILINE)
}


def on_gpu(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", FOLDER / "on_gpu.sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_page_names_every_script() -> None:
    page = (FOLDER / "README.md").read_text()
    # "`end_to_end.py` (…, `_video`)" names end_to_end_video.py.
    stem = "end_to_end"
    named = set(re.findall(r"`(\w+\.(?:py|sh|json))`", page))
    named |= {f"{stem}{ending}.py" for ending in re.findall(r"`(_\w+)`", page)}
    scripts = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".sh", ".json")} - {
        "on_gpu.sh"
    }
    assert named == scripts


def test_parts_are_listed() -> None:
    assert on_gpu("--list").stdout.split() == sorted(COMMANDS)


@pytest.mark.parametrize("part", COMMANDS)
def test_a_part_asks_for_what_there_is(part: str) -> None:
    command = COMMANDS[part]
    for path in re.findall(r"\b(?:tests|benchmarks)/[\w*/]+\.(?:py|json)", command):
        assert list(ROOT.glob(path)), path
    for script, rest in re.findall(r"(benchmarks/\w+\.py)(.*)", command):
        source = (ROOT / script).read_text()
        for option in re.findall(r"--[\w-]+", rest):
            assert f'"{option}"' in source, option
    for rest in re.findall(r"sla_video\.cli bench(.*)", command):
        said = call("bench", "--help").out
        for option in re.findall(r"--[\w-]+", rest):
            assert f"{option} " in said, option


def test_a_part_that_is_not_there_is_refused_before_anything_runs(tmp_path: Path) -> None:
    result = on_gpu(tmp_path / "out", "tuning", "tunning")
    assert result.returncode == 2
    assert "no part 'tunning'; there are: compression, " in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_is_told_and_logged(tmp_path: Path) -> None:
    """`parallel` fails wherever `torchrun` counts no GPU; elsewhere one second is too little."""
    environment_limit = ["env", "LIMIT=1", "bash", str(FOLDER / "on_gpu.sh"), str(tmp_path)]
    result = subprocess.run(
        [*environment_limit, "parallel"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert re.match(r"parallel: failed, exit code \d+, see .*parallel\.log, \d+ s", result.stdout)
    assert (tmp_path / "parallel.log").exists()
