"""The best token order of a transformer and the best sparsity of each of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sla_video.calibration.budget import choose_for_mean, choose_for_recall

# Layer -> what `measure_layer` gave.
Curves = Mapping[str, Mapping[str, Any]]
# Share by which an order may keep more than the sparsest: the linear branch can make good for more.
_HARDLY = 0.05
# What a layer that keeps full attention loses.
_DENSE = {"recall": 1.0, "error": 0.0, "rel_l1": 0.0, "rel_l2": 0.0}


@dataclass(frozen=True, kw_only=True)
class OrderChoice:
    """The best sparsities in one order.

    Attributes:
        sparsities: of each layer; 0 keeps full attention.
        mean_sparsity, recall, error: means over the layers, on the calls that were fitted.
    """

    order: str
    sparsities: Mapping[str, float]
    mean_sparsity: float
    recall: float
    error: float


def choose_sparsities(order: str, curves: Curves, goal: str, value: float) -> OrderChoice:
    """The best sparsity of each layer.

    Args:
        goal: "target_recall" or "mean_sparsity".

    Raises:
        InputError: nothing reaches it.
    """
    # Full attention is a choice, too, but not where the mean is to buy time: the time of sparse
    # attention grows with what it keeps, and that of full attention is another.
    options = {
        name: {**({0.0: _DENSE} if goal == "target_recall" else {}), **fit_of(curve)}
        for name, curve in curves.items()
    }
    if goal == "target_recall":
        recalls = [{s: q["recall"] for s, q in layer.items()} for layer in options.values()]
        chosen = choose_for_recall(recalls, value)
    else:
        errors = [{s: q["error"] for s, q in layer.items()} for layer in options.values()]
        chosen = choose_for_mean(errors, value)
    found = dict(zip(options, chosen, strict=True))
    parts = [options[name][sparsity] for name, sparsity in found.items()]
    return OrderChoice(
        order=order,
        sparsities=found,
        mean_sparsity=sum(chosen) / len(chosen),
        recall=sum(part["recall"] for part in parts) / len(parts),
        error=sum(part["error"] for part in parts) / len(parts),
    )


def best_order(choices: list[OrderChoice], goal: str) -> OrderChoice:
    """The order with the least error among those that reach the goal about as well as any.

    At a recall that is those that keep hardly more than the sparsest; at a mean sparsity all of
    them. Of equals it is the first.
    """
    kept = [1 - choice.mean_sparsity for choice in choices]
    most = min(kept) * (1 + _HARDLY) + 1e-9 if goal == "target_recall" else max(kept)
    near = [choice for choice, share in zip(choices, kept, strict=True) if share <= most]
    return min(near, key=lambda choice: round(choice.error, 6))


def fit_of(curve: Mapping[str, Any]) -> dict[float, Mapping[str, float]]:
    """Sparsity -> quality, on the calls that choices are made by."""
    return {float(sparsity): quality for sparsity, quality in curve["fit"].items()}


def quality_at(curve: Mapping[str, Any], part: str, sparsity: float) -> Mapping[str, float] | None:
    """The quality of a layer at its sparsity; None where that part was not measured."""
    if curve[part] is None:
        return None
    if sparsity == 0:
        return _DENSE
    found: Mapping[str, float] = curve[part][f"{sparsity:g}"]
    return found
