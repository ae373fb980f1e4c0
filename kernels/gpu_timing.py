"""Time several calls on a GPU, side by side.

Contestants take turns, each after a write that empties the L2 cache, timed by events of the device.
So all of them see the same clocks, and a ratio within one run means more than a time. Each is first
run once untimed; what fails there gets a row that says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDNN, FLASH = "dense cuDNN", "dense FlashAttention-2"
_BACKENDS = {CUDNN: SDPBackend.CUDNN_ATTENTION, FLASH: SDPBackend.FLASH_ATTENTION}
_FEWEST_REPEATS, _MOST_REPEATS = 5, 50
# More than any L2 cache holds.
_FLUSH_BYTES = 256 * 2**20

Run = Callable[[], Any]
# What is timed, and its sparsity; None for dense attention.
Name = tuple[str, float | None]


@dataclass(frozen=True, kw_only=True)
class GpuRow:
    """One line of a table.

    Attributes:
        attention: what was timed.
        direction: "forward" or "forward + backward".
        sparsity: None for dense attention.
        milliseconds, fastest_milliseconds: median and minimum; None if it did not run.
        ratio: median of the baseline (cuDNN, or the other dense one without it) over this one.
        tflops: 10^12 operations a second, where the caller counted them.
        note: why it did not run.
    """

    attention: str
    direction: str
    sparsity: float | None
    milliseconds: float | None = None
    fastest_milliseconds: float | None = None
    repeats: int = 0
    ratio: float | None = None
    tflops: float | None = None
    note: str = ""


def dense_runs(qkv: Sequence[Tensor]) -> dict[Name, Run]:
    """`scaled_dot_product_attention` by cuDNN and by FlashAttention-2."""

    def attend(backend: SDPBackend) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in qkv)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    return {(name, None): partial(attend, backend) for name, backend in _BACKENDS.items()}


def lazily(make: Callable[..., Run], *arguments: Any) -> Run:
    """A call that is made when it is first called, untimed, so that what fails there gets a row."""
    made: list[Run] = []

    def run() -> Any:
        if not made:
            made.append(make(*arguments))
        return made[0]()

    return run


def time_runs(
    runs: Mapping[Name, Run],
    direction: str,
    device: torch.device,
    *,
    operations: Mapping[Name, float] | None = None,
    repeats: int | None = None,
    seconds: float = 2.5,
) -> list[GpuRow]:
    """Medians over `repeats` rounds, or over as many as take about `seconds`."""
    notes: dict[Name, str] = {}
    for name, run in runs.items():
        try:
            run()
            _synchronize(device)
        except Exception as error:  # other packages raise what they like
            notes[name] = why_it_failed(error)
    good = {name: run for name, run in runs.items() if name not in notes}
    first = _round(good, device)
    if repeats is None:
        total = sum(sum(times) for times in first.values()) / 1000
        repeats = min(_MOST_REPEATS, max(_FEWEST_REPEATS, int(seconds / max(total, 1e-6))))
    times: dict[Name, list[float]] = {name: [] for name in good}
    for _ in range(repeats):
        for name, found in _round(good, device).items():
            times[name] += found
    return _as_rows(runs, direction, times, notes, operations or {})


def why_it_failed(error: BaseException) -> str:
    """One line about an error."""
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:100].rstrip()


def _as_rows(
    runs: Mapping[Name, Run],
    direction: str,
    times: Mapping[Name, list[float]],
    notes: Mapping[Name, str],
    operations: Mapping[Name, float],
) -> list[GpuRow]:
    baselines = [median(times[name, None]) for name in _BACKENDS if (name, None) in times]
    rows = []
    for name in runs:
        attention, sparsity = name
        if name in notes:
            row = GpuRow(attention=attention, direction=direction, sparsity=sparsity)
            rows.append(GpuRow(**(vars(row) | {"note": notes[name]})))
            continue
        found = median(times[name])
        counted = operations.get(name)
        rows.append(
            GpuRow(
                attention=attention,
                direction=direction,
                sparsity=sparsity,
                milliseconds=found,
                fastest_milliseconds=min(times[name]),
                repeats=len(times[name]),
                ratio=baselines[0] / found if baselines else None,
                tflops=None if counted is None else counted / found / 1e9,
            )
        )
    return rows


def _round(runs: Mapping[Name, Run], device: torch.device) -> dict[Name, list[float]]:
    """Milliseconds of each run, once. The host waits only at the end."""
    if device.type != "cuda":
        return {name: [_host_milliseconds(run)] for name, run in runs.items()}
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    events = {}
    for name, run in runs.items():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        events[name] = start, end
    _synchronize(device)
    return {name: [start.elapsed_time(end)] for name, (start, end) in events.items()}


def _host_milliseconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
