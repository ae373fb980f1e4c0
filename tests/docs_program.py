"""Run programs of the documentation in several processes, one program after the other.

    docs_program.py PROCESSES FILE LINE PAGE [FILE LINE PAGE ...]

CPUs stand in for GPUs, gloo for NCCL, tiny models for the real ones.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

# Seconds; far more than they take, and less than the test waits.
LONGEST = 200
# (file, line, page, port)
Program = tuple[str, int, str, int]


def on_cpus(text: str) -> str:
    """`text` with CPUs in the place of GPUs."""
    return text.replace('"cuda"', '"cpu"').replace('"nccl"', '"gloo"')


def execute(text: str, page: str, line: int, names: dict[str, Any]) -> None:
    """Run a block, so that its errors point into the page."""
    exec(compile("\n" * (line - 1) + on_cpus(text), page, "exec"), names)


def work(rank: int, programs: list[Program]) -> None:
    """Run `programs` as the process `rank`."""
    from docs_stand_ins import sparse_calls, stand_in

    torch.set_num_threads(1)
    # Diffusers takes the device's number modulo the count of accelerators, which is zero here.
    torch.accelerator.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    for file, line, page, port in programs:
        os.environ["MASTER_PORT"] = str(port)
        with pytest.MonkeyPatch.context() as patch:
            handles = stand_in(patch)
            text = Path(file).read_text(encoding="utf-8")
            execute(text, page, line, {"__name__": "__main__"})
        assert any(sparse_calls(handle) for handle in handles), "attention was never sparse"


def main() -> int:

    count, *words = sys.argv[1:]
    os.environ |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    each = iter(words)
    programs = [
        (file, int(line), page, free_port())
        for file, line, page in zip(each, each, each, strict=True)
    ]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank, programs)) for rank in range(int(count))]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + LONGEST
    # One that fails leaves the others waiting.
    while any(worker.exitcode is None for worker in workers):
        failed = any(worker.exitcode for worker in workers)
        if failed or time.monotonic() > deadline:
            for worker in workers:
                worker.kill()
        time.sleep(0.05)
    return int(any(worker.exitcode for worker in workers))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())
