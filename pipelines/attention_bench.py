"""The benchmark of the operator as the command line runs it: shapes in, table or JSON out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, cast

from sla_video.pipelines.errors import InputError, is_out_of_memory, one_line
from sla_video.pipelines.generation_request import check_sparsity
from sla_video.pipelines.progress import NoProgress, Progress
from sla_video.pipelines.sparse_format import check_format, fastest_format, has_kernels

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from sla_video.kernels.gpu_bench import Shape
    from sla_video.kernels.options import SparseDtype

# Without a GPU: the self-attention of the embedded model.
_LENGTHS, _HEADS, _HEAD_DIM = (7168,), 4, 64
_GPU_LENGTHS, _GPU_HEADS, _GPU_HEAD_DIM = (32760,), 12, 128
_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What to time. `None` stands for a default that depends on the device.

    Attributes:
        lengths: tokens; one table each. Without lengths, heads and head_dim, a GPU gets the shapes
            of Wan at 480p and 720p, a CPU 7,168 tokens and 4 heads of 64.
        heads, head_dim, batch: the other sizes of `[B, L, H, D]`.
        sparsities: shares of the key blocks left to the linear branch, in [0, 1).
        sparse_dtype: format of the sparse branch; on a GPU the fastest there. A CPU has
            "bf16" only, since it simulates the others.
        growth: also time lengths from 8,192 to 524,288, on a GPU; by default with its own shapes.
        device: "cpu", "cuda", "cuda:N" or "mps"; `None` takes a GPU if there is one.
        dtype: "fp32", "bf16" or "fp16"; `None` takes fp32 on a CPU and bf16 elsewhere.
        repeats: timed runs of each; on a GPU as many as take a few seconds.
        tune: first find the fastest launches of the kernels, which later processes use too.

    Raises:
        InputError: a size below 1, a sparsity out of range, or a format that is not known.
    """

    sparsities: tuple[float, ...]
    lengths: tuple[int, ...] | None = None
    heads: int | None = None
    head_dim: int | None = None
    batch: int = 1
    sparse_dtype: str | None = None
    growth: bool | None = None
    device: str | None = None
    dtype: str | None = None
    repeats: int | None = None
    tune: bool = False

    def __post_init__(self) -> None:
        sizes = [("length", length) for length in self.lengths or ()]
        sizes += [(name, getattr(self, name)) for name in ("heads", "head_dim", "batch", "repeats")]
        for name, size in sizes:
            if size is not None and size < 1:
                raise InputError(f"`{name}` must be at least 1, got {size}")
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        if self.sparse_dtype is not None:
            check_format(self.sparse_dtype)


def bench_attention(
    request: BenchRequest, *, progress: Progress | None = None, command: str = ""
) -> dict[str, Any]:
    """Time dense attention and SLA2, side by side.

    Args:
        command: the command line, to be written down.

    Returns:
        As JSON can hold it: `device`, `device_name`, `threads`, `dtype`, `repeats`, `versions`,
        `command`, `date`, and `shapes`, each with its sizes and its `rows` (the fields of
        `BenchRow`). On a GPU with Triton also what `report_on_gpu` returns.

    Raises:
        InputError: a device that is not there, options that do not fit it, or too little memory.
    """
    progress = progress or NoProgress()
    progress.stage("preparing")
    import torch

    from sla_video.pipelines.environment import device_name, versions
    from sla_video.pipelines.loading import find_device, find_dtype

    device = find_device(request.device)
    dtype = find_dtype(request.dtype, device)
    about = {
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": request.repeats,
        "versions": versions(),
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if has_kernels(device, dtype):
        return about | _bench_on_gpu(request, device, dtype, progress)
    if request.tune:
        raise InputError("`tune` needs a GPU that runs the Triton kernels in 16 bits")
    if request.growth:
        raise InputError("`growth` needs a GPU that runs the Triton kernels in 16 bits")
    if request.sparse_dtype not in (None, "bf16"):
        raise InputError(
            f"`sparse_dtype` is {request.sparse_dtype!r}, which {device} in {dtype} only "
            "simulates: there is nothing to time"
        )
    repeats = request.repeats or _REPEATS
    shapes = []
    for length in request.lengths or _LENGTHS:
        shape = {"batch": request.batch, "length": length}
        shape |= {"heads": request.heads or _HEADS, "head_dim": request.head_dim or _HEAD_DIM}
        rows = _bench_anywhere(shape, request.sparsities, device, dtype, repeats, progress)
        shapes.append({**shape, "rows": rows})
    return {**about, "repeats": repeats, "shapes": shapes}


def _bench_anywhere(
    shape: Mapping[str, int],
    sparsities: tuple[float, ...],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    from sla_video.kernels.bench import bench_operator

    # One more: the first round is not timed.
    progress.stage(f"timing {shape['length']} tokens", repeats + 1)
    try:
        rows = bench_operator(
            shape["batch"],
            shape["length"],
            shape["heads"],
            shape["head_dim"],
            sparsities,
            device=device,
            dtype=dtype,
            repeats=repeats,
            on_repeat=lambda _done, _repeats: progress.advance(),
        )
    except ValueError as error:
        raise InputError(one_line(error)) from error
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise InputError(
                f"out of memory on {device} at {shape['length']} tokens: try a smaller --length, "
                "--heads or --batch"
            ) from error
        raise
    return [dataclasses.asdict(row) for row in rows]


def _bench_on_gpu(
    request: BenchRequest, device: torch.device, dtype: torch.dtype, progress: Progress
) -> dict[str, Any]:
    from sla_video.kernels.gpu_bench import GROWTH_LENGTHS
    from sla_video.pipelines.gpu_report import report_on_gpu

    sparse_dtype = cast("SparseDtype", request.sparse_dtype or fastest_format(device))
    shapes, chosen = _gpu_shapes(request)
    growth = request.growth if request.growth is not None else not chosen
    return report_on_gpu(
        shapes,
        request.sparsities,
        sparse_dtype,
        GROWTH_LENGTHS if growth else (),
        device=device,
        dtype=dtype,
        repeats=request.repeats,
        progress=progress,
        tune=request.tune,
    )


def _gpu_shapes(request: BenchRequest) -> tuple[tuple[Shape, ...], bool]:
    """What to time, and whether the caller chose it."""
    from sla_video.kernels.gpu_bench import WAN_SHAPES, Shape

    if (request.lengths, request.heads, request.head_dim, request.batch) == (None, None, None, 1):
        return WAN_SHAPES, False
    shapes = (
        Shape(
            length=length,
            heads=request.heads or _GPU_HEADS,
            head_dim=request.head_dim or _GPU_HEAD_DIM,
            batch=request.batch,
            backward=True,
        )
        for length in request.lengths or _GPU_LENGTHS
    )
    return tuple(shapes), True


def bench_tables(result: Mapping[str, Any]) -> list[Table]:
    """The result of `bench_attention` as tables that are also Markdown."""
    from rich.box import MARKDOWN
    from rich.table import Table

    if "growth" in result:
        from sla_video.pipelines.gpu_report import gpu_tables

        return gpu_tables(result)
    threads = f", {result['threads']} threads" if result["device"] == "cpu" else ""
    tables = []
    for shape in result["shapes"]:
        table = Table(
            title=f"[B, L, H, D] = [{shape['batch']}, {shape['length']}, {shape['heads']}, "
            f"{shape['head_dim']}], {result['dtype']}, {result['device_name']}{threads}",
            title_justify="left",
            title_style="",
            box=MARKDOWN,
        )
        table.add_column("attention")
        for column in ("sparsity", "key blocks kept", "median ms", "fastest ms", "speed-up"):
            table.add_column(column, justify="right")
        for row in shape["rows"]:
            dense = row["impl"] == "dense"
            table.add_row(
                "dense (SDPA)" if dense else f"SLA2 {row['impl']}",
                "" if dense else f"{row['sparsity']:g}",
                f"{row['num_selected']} of {row['num_key_blocks']}",
                f"{row['milliseconds']:.2f}",
                f"{row['fastest_milliseconds']:.2f}",
                f"{row['speedup']:.2f}x",
            )
        tables.append(table)
    return tables
