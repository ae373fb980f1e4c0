"""What a calibration gained, layer by layer, as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sla_video.calibration.calibrated_routers import CalibratedRouters, metrics_of

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("rel_l1", "rel_l2", "recall")


def report_table(routers: CalibratedRouters) -> Table:
    """Each layer before (training-free) and after, on calls that the fit never saw."""
    from rich.table import Table

    sparsities = sorted({fit.sparsity for fit in routers.layers.values()})
    span = " to ".join(f"{value:g}" for value in dict.fromkeys((sparsities[0], sparsities[-1])))
    table = Table(
        title=f"Sparsity {span}: attention against full attention, training-free > fitted",
        title_justify="left",
    )
    for name in ("layer", "sparsity", *(column.replace("_", "-") for column in _COLUMNS)):
        table.add_column(name, justify="left" if name == "layer" else "right")
    table.add_column("chosen")
    for name, fit in routers.layers.items():
        before, after = fit.before, fit.after
        pairs = [_pair(getattr(before, c), getattr(after, c)) for c in _COLUMNS]
        table.add_row(name, f"{fit.sparsity:g}", *pairs, fit.chosen)
    mean = metrics_of(routers.layers, {})["mean"]
    share = sum(fit.sparsity for fit in routers.layers.values()) / len(routers.layers)
    pairs = [_pair(mean["before"][c], mean["after"][c]) for c in _COLUMNS]
    table.add_row("mean", f"{share:.3g}", *pairs, "", style="bold")
    return table


def _pair(before: float, after: float) -> str:
    return f"{before:.3f} > {after:.3f}"
