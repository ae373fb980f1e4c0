"""The benchmark of the operator as the command line runs it: shapes in, table or JSON out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.errors import InputError, is_out_of_memory, one_line
from sla_video.pipelines.generation_request import check_sparsity
from sla_video.pipelines.progress import NoProgress, Progress

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What to time.

    Attributes:
        lengths: tokens; one table each.
        heads, head_dim, batch: the other sizes of `[B, L, H, D]`.
        sparsities: shares of the key blocks left to the linear branch, in [0, 1).
        device: "cpu", "cuda", "cuda:N" or "mps"; `None` takes a GPU if there is one.
        dtype: "fp32", "bf16" or "fp16"; `None` takes fp32 on a CPU and bf16 elsewhere.
        repeats: timed runs of each.

    Raises:
        InputError: a size below 1 or a sparsity out of range.
    """

    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    batch: int
    sparsities: tuple[float, ...]
    device: str | None = None
    dtype: str | None = None
    repeats: int = 5

    def __post_init__(self) -> None:
        sizes = [("length", length) for length in self.lengths]
        sizes += [(name, getattr(self, name)) for name in ("heads", "head_dim", "batch", "repeats")]
        for name, size in sizes:
            if size < 1:
                raise InputError(f"`{name}` must be at least 1, got {size}")
        for sparsity in self.sparsities:
            check_sparsity(sparsity)


def bench_attention(request: BenchRequest, *, progress: Progress | None = None) -> dict[str, Any]:
    """Time dense attention and SLA2, side by side.

    Returns:
        As JSON can hold it: `device`, `device_name`, `threads`, `dtype`, `repeats`, `versions`,
        and `shapes`, each with its sizes and its `rows` (the fields of `BenchRow`).

    Raises:
        InputError: a device that is not there, or too little memory.
    """
    progress = progress or NoProgress()
    progress.stage("preparing")
    import torch

    from sla_video.kernels.bench import bench_operator
    from sla_video.pipelines.environment import device_name, versions
    from sla_video.pipelines.loading import find_device, find_dtype

    device = find_device(request.device)
    dtype = find_dtype(request.dtype, device)
    shapes = []
    for length in request.lengths:
        # One more: the first round is not timed.
        progress.stage(f"timing {length} tokens", request.repeats + 1)
        try:
            rows = bench_operator(
                request.batch,
                length,
                request.heads,
                request.head_dim,
                request.sparsities,
                device=device,
                dtype=dtype,
                repeats=request.repeats,
                on_repeat=lambda _done, _repeats: progress.advance(),
            )
        except ValueError as error:
            raise InputError(one_line(error)) from error
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise InputError(
                    f"out of memory on {device} at {length} tokens: try a smaller --length, "
                    "--heads or --batch"
                ) from error
            raise
        shape = {"batch": request.batch, "length": length}
        shape |= {"heads": request.heads, "head_dim": request.head_dim}
        shapes.append({**shape, "rows": [dataclasses.asdict(row) for row in rows]})
    return {
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": request.repeats,
        "versions": versions(),
        "shapes": shapes,
    }


def bench_tables(result: Mapping[str, Any]) -> list[Table]:
    """The result of `bench_attention` as tables that are also Markdown."""
    from rich.box import MARKDOWN
    from rich.table import Table

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
