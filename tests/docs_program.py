"""Run a program of the documentation as one of several processes: docs_program.py FILE LINE PAGE.

CPUs stand in for GPUs, gloo for NCCL, tiny models for the real ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def on_cpus(text: str) -> str:
    """`text` with CPUs in the place of GPUs."""
    return text.replace('"cuda"', '"cpu"').replace('"nccl"', '"gloo"')


def execute(text: str, page: str, line: int, names: dict[str, Any]) -> None:
    """Run a block, so that its errors point into the page."""
    exec(compile("\n" * (line - 1) + on_cpus(text), page, "exec"), names)


def main() -> None:
    file, line, page = sys.argv[1:]
    torch.set_num_threads(1)
    # Diffusers takes the device's number modulo the count of accelerators, which is zero here.
    torch.accelerator.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    from docs_stand_ins import stand_in

    with pytest.MonkeyPatch.context() as patch:
        called = stand_in(patch)
        execute(Path(file).read_text(encoding="utf-8"), page, int(line), {"__name__": "__main__"})
        assert called, "no patched pipeline was called"


if __name__ == "__main__":
    main()
