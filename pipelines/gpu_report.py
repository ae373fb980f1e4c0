"""The benchmark on a GPU as the command line runs it: one report, as JSON or as tables."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.errors import InputError, is_out_of_memory, one_line
from sla_video.pipelines.progress import Progress
from sla_video.pipelines.tuning_report import tune_at, tuning_table

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from sla_video.kernels.gpu_bench import Shape
    from sla_video.kernels.options import SparseDtype


def report_on_gpu(
    shapes: Sequence[Shape],
    sparsities: Sequence[float],
    sparse_dtype: SparseDtype,
    growth_lengths: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int | None,
    progress: Progress,
    tune: bool = False,
) -> dict[str, Any]:
    """Correctness first, then times, memory and growth.

    Args:
        tune: before that, find the fastest launches of the kernels, at the first shape and the
            highest sparsity.

    Returns:
        as JSON can hold it: `sparse_dtype`, `tuned` (of `tune_at`), `peers`, `shapes` (sizes,
        `errors` by sparsity, `rows`, `memory`), `growth` (sizes, `sparsity` and `rows`), `gpu`
        (driver and library versions).

    Raises:
        InputError: options that the kernels are not made for.
        RuntimeError: the operator disagrees with the reference.
    """
    from sla_video.kernels.peers import describe_peers

    report: dict[str, Any] = {"sparse_dtype": sparse_dtype, "gpu": _describe_gpu(device)}
    report["tuned"] = None
    if tune:
        sparsity = max(sparsities)
        report["tuned"] = tune_at(shapes[0], sparsity, sparse_dtype, device, dtype, progress)
    report |= {"peers": describe_peers(), "shapes": [], "growth": None}
    for shape in shapes:
        found = _report_shape(shape, sparsities, sparse_dtype, device, dtype, repeats, progress)
        report["shapes"].append(found)
    if growth_lengths:
        report["growth"] = _report_growth(
            growth_lengths, max(sparsities), sparse_dtype, shapes[0], device, dtype, progress
        )
    return report


def _report_shape(
    shape: Shape,
    sparsities: Sequence[float],
    sparse_dtype: SparseDtype,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int | None,
    progress: Progress,
) -> dict[str, Any]:
    from sla_video.kernels import gpu_bench

    label = shape.name or f"{shape.length} tokens"
    found: dict[str, Any] = {**vars(shape), "errors": {}, "rows": [], "memory": None, "note": ""}
    try:
        qkv = gpu_bench.gaussian_inputs(shape, device, dtype)
        progress.stage(f"{label}: comparing with the reference", len(sparsities))
        for sparsity in sparsities:
            error = gpu_bench.check_error(qkv, sparsity, sparse_dtype)
            found["errors"][f"{sparsity:g}"] = error
            progress.advance()
        progress.stage(f"{label}: timing")
        rows = gpu_bench.time_forward(qkv, sparsities, sparse_dtype, repeats=repeats)
        found["memory"] = gpu_bench.forward_memory(qkv, max(sparsities), sparse_dtype)
        if shape.backward:
            progress.stage(f"{label}: timing forward and backward")
            top = max(sparsities)
            rows += gpu_bench.time_backward(qkv, top, sparse_dtype, repeats=repeats)
        found["rows"] = [dict(vars(row)) for row in rows]
    except ValueError as error:
        raise InputError(one_line(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found["note"] = "out of memory"
    return found


def _report_growth(
    lengths: Sequence[int],
    sparsity: float,
    sparse_dtype: SparseDtype,
    like: Shape,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, Any]:
    from sla_video.kernels.gpu_bench import time_growth

    sizes = {"heads": like.heads, "head_dim": like.head_dim}
    progress.stage("timing growth with the length", len(lengths))
    rows = []
    for row in time_growth(lengths, sparsity, sparse_dtype, **sizes, device=device, dtype=dtype):
        rows.append(row)
        progress.advance()
    return {**sizes, "sparsity": sparsity, "rows": rows}


def _describe_gpu(device: torch.device) -> dict[str, Any]:
    """What besides our own code decides the times."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    about: dict[str, Any] = {"triton": triton, "cuda": torch.version.cuda, "driver": _driver()}
    about["cudnn"] = torch.backends.cudnn.version()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["capability"] = f"{properties.major}.{properties.minor}"
        about["memory_bytes"] = properties.total_memory
    return about


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is not None:
        query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def gpu_tables(result: Mapping[str, Any]) -> list[Table]:
    """The report as tables that are also Markdown."""
    tables = [] if result["tuned"] is None else [tuning_table(result)]
    tables += [_shape_table(result, shape) for shape in result["shapes"]]
    if result["growth"] is not None:
        tables.append(_growth_table(result))
    return tables


def _shape_table(result: Mapping[str, Any], shape: Mapping[str, Any]) -> Table:
    from sla_video.kernels.gpu_timing import CUDNN

    sizes = ", ".join(str(shape[name]) for name in ("batch", "length", "heads", "head_dim"))
    name = f"{shape['name']}: " if shape["name"] else ""
    lines = [f"{name}[{sizes}], {result['sparse_dtype']}, {result['device_name']}"]
    if shape["errors"]:
        errors = ", ".join(f"{100 * e:.2f}% at {s}" for s, e in shape["errors"].items())
        lines.append(f"relative L2 error to the float64 reference: {errors}")
    if shape["memory"] is not None:
        memory = shape["memory"]
        lines.append(
            f"extra memory of the forward: {memory['extra']:.2f}x the bytes of Q, K and V, "
            f"{memory['extra_with_output']:.2f}x with the output"
        )
    if shape["note"]:
        lines.append(shape["note"])
    failed = {row["attention"]: row["note"] for row in shape["rows"] if row["note"]}
    lines += [f"{name} did not run: {note}" for name, note in failed.items()]
    baseline = "cuDNN" if CUDNN not in failed else "FlashAttention-2"
    columns = ("attention", "sparsity", "median ms", f"ratio to {baseline}", "TFLOP/s")
    table = _table("\n".join(lines), *columns)
    for row in shape["rows"]:
        backward = "" if row["direction"] == "forward" else ", forward + backward"
        if row["milliseconds"] is None:
            numbers = ["", "", ""]
        else:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
            tflops = "" if row["tflops"] is None else f"{row['tflops']:.0f}"
            numbers = [f"{row['milliseconds']:.3f}", ratio, tflops]
        sparsity = "" if row["sparsity"] is None else f"{row['sparsity']:g}"
        table.add_row(row["attention"] + backward, sparsity, *numbers)
    return table


def _growth_table(result: Mapping[str, Any]) -> Table:
    from sla_video.kernels.gpu_timing import CUDNN, FLASH

    growth = result["growth"]
    columns = (CUDNN, FLASH, "SLA2")
    title = (
        f"Milliseconds by length, {growth['heads']} heads of {growth['head_dim']}, SLA2 at "
        f"sparsity {growth['sparsity']:g}, {result['sparse_dtype']}, {result['device_name']}"
    )
    table = _table(title, "tokens", *columns)
    for row in growth["rows"]:
        cells = [
            f"{row['milliseconds'][name]:.2f}"
            if name in row["milliseconds"]
            else row["notes"].get(name, "").partition(":")[0]
            for name in columns
        ]
        table.add_row(str(row["length"]), *cells)
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.box import MARKDOWN
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="", box=MARKDOWN)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table
