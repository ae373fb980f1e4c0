"""Where the time of one transformer block goes, by kind of kernel.

A kernel belongs to what the operator that launched it is for, and else to what its name says: the
matrix products of SLA2 and those of linear layers are the same kernels.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

ATTENTION = "self-attention"
CROSS = "cross-attention"
LINEAR = "linear layers"
ROTARY = "QK norm and RoPE"
ELEMENTWISE = "norms, modulation, activations"
COPIES = "copies"
PARTS = (ATTENTION, CROSS, LINEAR, ROTARY, ELEMENTWISE, COPIES)

# Kernels in a printed breakdown; the file has all of them.
_SHOWN = 24
_SDPA = "aten::_scaled_dot_product"
# First that matches wins.
_BY_NAME = (
    (ROTARY, r"_norm_rotate"),
    (
        ATTENTION,
        r"_block_statistics|_all_blocks|_prepare_keys|_attend_kernel|_select|flash_fwd|sdpa|fmha",
    ),
    (LINEAR, r"gemm|nvjet|cutlass|cublas|scaled_mm|splitK|_mm_"),
    (COPIES, r"[Mm]emcpy|[Mm]emset|copy_kernel|CatArray"),
    # What the compiler makes of the stack of rotated pairs, and of complex products.
    (ROTARY, r"triton_.*(stack|rms_norm)|complex"),
)
_OURS = re.compile(r"^sla_video::(?!norm_rotate)")


def profile(
    run: Callable[[], Any], calls: int = 3
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Milliseconds of one call by part, and its kernels, longest first.

    Kernels are `{"name", "part", "milliseconds", "calls"}`, all per call.
    """
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    parts = dict.fromkeys(PARTS, 0.0)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, part, milliseconds in launched(profiler.events()):
        parts[part] += milliseconds / calls
        times[name, part].append(milliseconds)
    kernels = [
        {
            "name": name[:120],
            "part": part,
            "milliseconds": sum(found) / calls,
            "calls": len(found) / calls,
        }
        for (name, part), found in times.items()
    ]
    kernels.sort(key=lambda kernel: -kernel["milliseconds"])
    return parts, kernels


def launched(events: Any) -> Iterator[tuple[str, str, float]]:
    """Name, part and milliseconds of each kernel among the events of a profiler."""
    cuda = torch.autograd.DeviceType.CUDA
    left: dict[str, list[float]] = defaultdict(list)
    for event in events:
        # Ranges that the host marked are shown on the device, too, around its kernels.
        if event.device_type == cuda and not getattr(event, "is_user_annotation", False):
            left[event.name].append(event.time_range.elapsed_us())
    for event in events:
        for kernel in () if event.device_type == cuda else event.kernels:
            found = left[kernel.name]
            if found:
                # The same kernel as an event of the device: counted once.
                found.remove(min(found, key=lambda us, one=kernel: abs(us - one.duration)))
                yield kernel.name, part_of(kernel.name, event), kernel.duration / 1000
    # Launched from where the profiler saw no operator.
    for name, durations in left.items():
        for microseconds in durations:
            yield name, part_of(name, None), microseconds / 1000


def part_of(kernel: str, event: Any) -> str:
    """The part of a kernel by the operators around its launch, else by its name."""
    while event is not None:
        if event.name.startswith(_SDPA):
            query, key = event.input_shapes[:2]
            return ATTENTION if query[-2:] == key[-2:] else CROSS
        if _OURS.match(event.name):
            return ATTENTION
        event = event.cpu_parent
    for part, pattern in _BY_NAME:
        if re.search(pattern, kernel):
            return part
    return ELEMENTWISE


def breakdown(row: dict[str, Any]) -> str:
    """What a profile says, in lines: parts of one block and of all blocks, longest kernels."""
    total = sum(row["parts"].values())
    lines = [f"  one block {total:.3f} ms, all {row['layers']} {total * row['layers']:,.1f} ms"]
    for part, milliseconds in row["parts"].items():
        lines.append(f"  {milliseconds:9.3f} ms {milliseconds / max(total, 1e-9):6.1%}  {part}")
    for kernel in row["kernels"][:_SHOWN]:
        lines.append(
            f"  {kernel['milliseconds']:9.3f} ms x{kernel['calls']:<4.0f} {kernel['part'][:14]:14}"
            f"  {kernel['name'][:80]}"
        )
    return "\n".join(lines)
