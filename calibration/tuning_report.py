"""What a tuning chose, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.recipe import Recipe

if TYPE_CHECKING:
    from rich.table import Table


def recipe_tables(recipe: Recipe) -> Iterator[Table]:
    """Token orders and layers of each transformer; figures on the left led to the choice."""
    for component, found in recipe.measured["transformers"].items():
        if len(found["orders"]) > 1:
            yield _orders(component, found)
        yield _layers(component, found)


def summary(recipe: Recipe) -> list[str]:
    """A line for each transformer: sparsity, recall, error and seconds of a step."""
    lines = []
    for component, found in recipe.measured["transformers"].items():
        judged = found["held_out"] or found["fit"]
        line = f"{component}: {found['token_order']}, mean sparsity {found['mean_sparsity']:.3f}"
        if judged is not None:
            on = "held-out calls" if found["held_out"] else "the calls it was chosen on"
            line += f"; on {on} recall {judged['recall']:.3f}, relative L1 {judged['rel_l1']:.3f}"
        if step := recipe.measured.get("steps", {}).get(component):
            line += (
                f"; a step takes {step['seconds']:.2f} s, dense {step['dense_seconds']:.2f} s; "
                f"velocity error {step['velocity_error']:.3f}"
            )
        if kept := [n for n, r in recipe.measured["refinements"].items() if r["kept"]]:
            line += f"; with {', '.join(kept).replace('_', ' ')}"
        lines.append(line)
        lines += [
            f"{component}: {name.replace('_', ' ')} left out: {_changes(tried, component)}"
            for name, tried in recipe.measured["refinements"].items()
            if not tried["kept"]
        ]
        if found["mean_sparsity"] == 0:
            lines.append(
                f"{component}: all layers need full attention for that recall, so nothing is "
                "gained: ask for less, or for a mean sparsity"
            )
    return lines


def _changes(tried: Mapping[str, Any], component: str) -> str:
    before, after = tried["without"][component], tried["with"][component]
    return (
        f"with it a step takes {after['seconds']:.2f} s instead of {before['seconds']:.2f}, "
        f"velocity error {after['velocity_error']:.3f} instead of {before['velocity_error']:.3f}"
    )


def _orders(component: str, found: Mapping[str, Any]) -> Table:
    table = _table(f"{component}: token orders", "order", "mean sparsity", "recall", "error")
    for order, means in found["orders"].items():
        table.add_row(
            order,
            f"{means['mean_sparsity']:.3f}",
            f"{means['recall']:.3f}",
            f"{means['error']:.4f}",
            style="bold" if order == found["token_order"] else None,
        )
    return table


def _layers(component: str, found: Mapping[str, Any]) -> Table:
    title = f"{component}, token order {found['token_order']}: chosen by > held out"
    table = _table(title, "layer", "sparsity", "recall", "relative L1", "density at 95%")
    for name, layer in found["layers"].items():
        sparsity = f"{layer['sparsity']:g}" if layer["sparsity"] else "dense"
        if layer["measured"]:
            pairs = [_pair(layer, field) for field in ("recall", "rel_l1")]
            table.add_row(name, sparsity, *pairs, f"{layer['density']:.3f}")
        else:
            table.add_row(name, sparsity, "not measured", "", "")
    means = [_pair(found, field) for field in ("recall", "rel_l1")]
    table.add_row("mean", f"{found['mean_sparsity']:.3g}", *means, "", style="bold")
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


def _pair(parts: Mapping[str, Any], field: str) -> str:
    found = [parts[part][field] for part in ("fit", "held_out") if parts[part] is not None]
    return " > ".join(f"{value:.3f}" for value in found)
