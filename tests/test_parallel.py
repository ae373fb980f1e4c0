"""Context parallelism on CPUs: two and four processes against one, case by case."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("parallel_cases.py")


@pytest.mark.parametrize("count", [2, 4], ids=["two", "four"])
def test_all_cases_of_several_processes(count: int, tmp_path: Path) -> None:
    """One test for all of them: starting the processes takes longer than the cases."""
    words = [sys.executable, str(PROGRAM), str(count), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    of_each = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    assert all(len(found) > 20 for found in of_each)
    failed = {name: text for found in of_each for name, text in found.items() if text}
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())
