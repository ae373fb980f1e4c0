"""What `sla-video bench --tune` found: the launches of each kernel, as JSON or as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.errors import InputError, is_out_of_memory, one_line
from sla_video.pipelines.progress import Progress

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from sla_video.kernels.gpu_bench import Shape
    from sla_video.kernels.options import SparseDtype


def tune_at(
    shape: Shape,
    sparsity: float,
    sparse_dtype: SparseDtype,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, Any]:
    """Tune the kernels at one shape, forward and, where the shape says so, backward.

    Returns:
        as JSON can hold it: `sparsity`, `length`, `heads`, `head_dim`, and `kernels`: of each its
        `name`, the `chosen` launch and all `launches` with `milliseconds` of the whole operator, or
        a `note` that says why it was left out. The first launch is what runs without tuning.

    Raises:
        InputError: options that the kernels are not made for, or too little memory.
    """
    from sla_video.kernels.launch_tuning import Problem, tune_operator

    problem = Problem(
        length=shape.length,
        heads=shape.heads,
        head_dim=shape.head_dim,
        dtype=dtype,
        sparse_dtype=sparse_dtype,
        sparsity=sparsity,
        backward=shape.backward,
    )

    def on_case(done: int, cases: int) -> None:
        if done == 0:
            progress.stage("tuning kernels", cases)
        else:
            progress.advance()

    try:
        tuned = tune_operator(problem, device, on_case=on_case)
    except ValueError as error:
        raise InputError(one_line(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory on {device} while tuning at {shape.length} tokens: try a smaller "
            "--length or --heads"
        ) from error
    kernels = []
    for launch in tuned:
        configs = [*launch.milliseconds, *launch.notes] or [launch.first]
        launches = [
            {
                **config._asdict(),
                "milliseconds": launch.milliseconds.get(config),
                "note": launch.notes.get(config, ""),
            }
            for config in configs
        ]
        chosen = launch.chosen._asdict()
        kernels.append({"name": launch.case, "chosen": chosen, "launches": launches})
    sizes = {"length": shape.length, "heads": shape.heads, "head_dim": shape.head_dim}
    return {"sparsity": sparsity, **sizes, "kernels": kernels}


def tuning_table(result: Mapping[str, Any]) -> Table:
    """One row for each launch that was tried; a star marks the one that is used from now on."""
    from rich.box import MARKDOWN
    from rich.table import Table

    tuned = result["tuned"]
    sizes = f"{tuned['length']} x {tuned['heads']} x {tuned['head_dim']}"
    title = (
        f"Launches at {sizes}, sparsity {tuned['sparsity']:g}, {result['sparse_dtype']}, "
        f"{result['device_name']}: ms of the whole operator"
    )
    table = Table(title=title, title_justify="left", title_style="", box=MARKDOWN)
    for column, side in (("kernel", "left"), ("launch", "left"), ("ms", "right"), ("", "left")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for kernel in tuned["kernels"]:
        name = kernel["name"]
        for launch in kernel["launches"]:
            fields = {key: launch[key] for key in kernel["chosen"]}
            best = "*" if fields == kernel["chosen"] else launch["note"]
            ms = launch["milliseconds"]
            table.add_row(name, _words(fields), "" if ms is None else f"{ms:.3f}", best)
            name = ""
    return table


def _words(fields: Mapping[str, Any]) -> str:
    """Such as "4 warps, 3 stages, 128 registers, 32x64"."""
    words = f"{fields['num_warps']} warps, {fields['num_stages']} stages"
    if fields["max_registers"] is not None:
        words += f", {fields['max_registers']} registers"
    return f"{words}, {fields['tile_q']}x{fields['tile_k']}"
