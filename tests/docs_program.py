"""Run programs of the documentation as one of several processes.

    docs_program.py FILE LINE PAGE PORT [FILE LINE PAGE PORT ...]

CPUs stand in for GPUs, gloo for NCCL, tiny models for the real ones.
"""

from __future__ import annotations

import os
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
    torch.set_num_threads(1)
    # Diffusers takes the device's number modulo the count of accelerators, which is zero here.
    torch.accelerator.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    words = iter(sys.argv[1:])
    for file, line, page, port in zip(words, words, words, words, strict=True):
        os.environ["MASTER_PORT"] = port
        with pytest.MonkeyPatch.context() as patch:
            handles = stand_in(patch)
            text = Path(file).read_text(encoding="utf-8")
            execute(text, page, int(line), {"__name__": "__main__"})
        assert any(sparse_calls(handle) for handle in handles), "attention was never sparse"


if __name__ == "__main__":
    # Not above, where `docs_program` is only asked for `execute`.
    from docs_stand_ins import sparse_calls, stand_in

    main()
