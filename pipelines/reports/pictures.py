"""The pictures of a report, as PNG files in memory.

Colours: a run has the same in all pictures. Letters: S denoising steps, layers from the top down.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.reports.runs import Run

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_DPI = 130
# Numbers are written into the cells of maps up to this size.
_MOST_CELLS = 240


def short_names(names: Sequence[str]) -> list[str]:
    """Layer names without the parts, between dots, that all of them begin and end with."""
    parts = [name.split(".") for name in names]
    least = min(len(p) for p in parts)
    start = 0
    while start < least - 1 and len({p[start] for p in parts}) == 1:
        start += 1
    end = 0
    while end < least - start - 1 and len({p[-1 - end] for p in parts}) == 1:
        end += 1
    return [".".join(p[start : len(p) - end]) for p in parts]


def recall_by_step(run: Run) -> bytes:
    """Map of the recall, layer by denoising step, of a run with a recording."""
    import torch

    assert run.recording is not None
    # [layers, S]
    table = torch.stack([_over_heads(layer.recall) for layer in run.recording.layers])
    ran = torch.stack([~layer.sparsity.isnan() for layer in run.recording.layers])
    steps = [str(step + 1) for step in range(table.shape[1])]
    return _map(
        table.numpy(),
        (table.isnan() & ran).numpy(),
        columns=steps,
        rows=short_names([layer.name for layer in run.recording.layers]),
        labels=("denoising step", "layer"),
        title=f"{run.label}: recall (mean over heads, grey: dense)",
    )


def recall_by_head(run: Run) -> bytes:
    """Map of the recall, layer by head, mean over the steps that were not dense."""
    import torch

    assert run.recording is not None
    heads = max(layer.recall.shape[1] for layer in run.recording.layers)
    table = torch.full((len(run.recording.layers), max(heads, 1)), torch.nan)
    for row, layer in zip(table, run.recording.layers, strict=True):
        row[: layer.recall.shape[1]] = layer.recall.nanmean(0)
    return _map(
        table.numpy(),
        table.isnan().numpy(),
        columns=[str(head) for head in range(table.shape[1])],
        rows=short_names([layer.name for layer in run.recording.layers]),
        labels=("head", "layer"),
        title=f"{run.label}: recall (mean over steps, grey: dense)",
    )


def _over_heads(table: Tensor) -> Tensor:
    """`[S]` from `[S, H]`; NaN where there are no heads, because all calls were dense."""
    return table.mean(1) if table.shape[1] else table.new_full((len(table),), float("nan"))


def sparsity_by_layer(runs: Sequence[Run]) -> bytes:
    """Bars: which share of the key blocks each layer left to the linear branch."""
    figure, axes = _new(9, 3.2)
    width = 0.8 / len(runs)
    for index, run in enumerate(runs):
        values = [layer["sparsity"] or 0.0 for layer in run.layers]
        places = [i + (index - (len(runs) - 1) / 2) * width for i in range(len(values))]
        axes.bar(places, values, width, color=_colour(run), label=run.label)
    longest = max(runs, key=lambda run: len(run.layers))
    _name_layers(axes, longest)
    axes.set_ylabel("sparsity")
    axes.set_ylim(0, 1)
    axes.set_title("Sparsity reached, mean over all calls, dense ones counted as 0", fontsize=10)
    _legend(axes)
    return _png(figure)


def error_by_step(runs: Sequence[Run]) -> bytes:
    """Lines: relative L1 error of the attention over the denoising steps, and its range."""
    import numpy as np
    import torch

    figure, axes = _new(9, 3.4)
    for run in runs:
        assert run.recording is not None
        # [layers, S]
        table = torch.stack([layer.relative_l1_by_step for layer in run.recording.layers]).numpy()
        some = ~np.isnan(table).all(0)
        steps = np.arange(1, table.shape[1] + 1)[some]
        if not len(steps):
            continue
        axes.plot(
            steps, np.nanmean(table[:, some], 0), "o-", ms=4, color=_colour(run), label=run.label
        )
        axes.fill_between(
            steps,
            np.nanmin(table[:, some], 0),
            np.nanmax(table[:, some], 0),
            color=_colour(run),
            alpha=0.15,
            lw=0,
        )
    most = max(len(run.recording.timesteps) for run in runs if run.recording is not None)
    axes.set_xlim(0.5, most + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("denoising step")
    axes.set_ylabel("relative L1")
    axes.set_title("|SLA2 - full| / |full|: mean over layers, band from least to most", fontsize=10)
    axes.grid(alpha=0.3)
    _legend(axes)
    return _png(figure)


def density_by_layer(runs: Sequence[Run]) -> bytes:
    """Lines: key blocks kept in sparse calls, and those needed for the coverage recorded."""
    import torch

    figure, axes = _new(9, 3.6)
    for run in runs:
        assert run.recording is not None
        layers = run.recording.layers
        kept, best, by_router = ([] for _ in range(3))
        for layer in layers:
            sparse = layer.sparsity[layer.sparsity > 0]
            kept.append(float(1 - sparse.mean()) if len(sparse) else torch.nan)
            best.append(float(layer.oracle_density.nanmean()))
            by_router.append(float(layer.router_density.nanmean()))
        places = range(len(layers))
        colour = _colour(run)
        for values, style in ((kept, "o-"), (by_router, "s--"), (best, "^:")):
            axes.plot(places, values, style, ms=4, color=colour)
        axes.plot([], [], color=colour, label=run.label)
    for name, style in (
        ("kept", "o-"),
        ("needed, in the router's order", "s--"),
        ("needed, in the best order", "^:"),
    ):
        axes.plot([], [], style, ms=4, color="black", label=name)
    _name_layers(axes, max(runs, key=lambda run: len(run.layers)))
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of the key blocks")
    coverages = {run.recording.coverage for run in runs if run.recording is not None}
    shares = ", ".join(f"{value:.0%}" for value in sorted(coverages))
    axes.set_title(f"Density: kept, and needed for {shares} of the softmax mass", fontsize=10)
    axes.grid(alpha=0.3)
    _legend(axes)
    return _png(figure)


def frames_side_by_side(runs: Sequence[Run], count: int) -> bytes:
    """`count` frames of each run, evenly spread over its video; a row is a run."""
    from matplotlib.figure import Figure

    ratio = max(run.video.height / run.video.width for run in runs)
    width = min(2.2, 11 / count)
    figure = Figure(figsize=(width * count + 0.5, (width * ratio + 0.25) * len(runs)))
    grid = figure.subplots(len(runs), count, squeeze=False)
    for run, row in zip(runs, grid, strict=True):
        numbers = _spread(run.video.frames, count)
        pictures = {n: f for n, f in enumerate(run.video.read()) if n in numbers}
        for axes, number in zip(row, numbers, strict=True):
            axes.imshow(pictures[number])
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"frame {number}", fontsize=7, pad=2)
        row[0].set_ylabel(run.label, fontsize=12, rotation=0, labelpad=10, va="center")
    figure.tight_layout(pad=0.4)
    return _png(figure)


def _spread(total: int, count: int) -> list[int]:
    """`count` frame numbers from the first to the last of `total`."""
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _map(
    table: np.ndarray[Any, Any],
    dense: np.ndarray[Any, Any],
    *,
    columns: list[str],
    rows: list[str],
    labels: tuple[str, str],
    title: str,
) -> bytes:
    """A heat map with a scale from 0 to 1; cells in `dense` are grey, other gaps white."""
    import numpy as np

    size = max(4.5, min(11, 1.8 + 0.42 * len(columns))), max(2.4, min(12, 1.2 + 0.3 * len(rows)))
    figure, axes = _new(*size)
    image = axes.imshow(table, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.imshow(
        np.where(dense, 1.0, np.nan), aspect="auto", vmin=0, vmax=2, cmap="Greys", alpha=0.5
    )
    _ticks(axes.xaxis, columns)
    _ticks(axes.yaxis, rows)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title, fontsize=10, loc="left")
    if table.size <= _MOST_CELLS:
        for (row, column), value in np.ndenumerate(table):
            if not np.isnan(value):
                axes.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="black" if value > 0.6 else "white",
                )
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    return _png(figure)


def _name_layers(axes: Any, run: Run) -> None:
    _ticks(axes.xaxis, short_names([layer["name"] for layer in run.layers]))
    axes.set_xlabel("layer")


def _ticks(axis: Any, names: list[str]) -> None:
    """Name every position, or every n-th where they are many."""
    step = -(-len(names) // 30)
    axis.set_ticks(range(0, len(names), step), names[::step], fontsize=8)


def _colour(run: Run) -> str:
    index = sum((ord(letter) - 64) * 26**i for i, letter in enumerate(reversed(run.label))) - 1
    return f"C{index % 10}"


def _new(width: float, height: float) -> tuple[Any, Any]:
    # Not pyplot, which keeps figures and may look for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, bbox_inches="tight")
    return file.getvalue()
