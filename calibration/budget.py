"""Which sparsity each layer gets, when only their mean or the recall wanted is given.

Layers differ: some concentrate their softmax on a few blocks, others spread it. From each layer's
measured error and recall on a grid of sparsities, a knapsack finds the best choice there is. It is
exact, because kept shares are whole numbers of thousandths and layers are few.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sla_video.pipelines.errors import InputError

# Sparsities that a layer may get, in steps in which its error is worth measuring.
GRID = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.99)
# Kept shares are counted in these, so that sums are exact.
_UNIT = 1000


def choose_for_mean(
    errors: Sequence[Mapping[float, float]], mean_sparsity: float
) -> tuple[float, ...]:
    """The sparsity of each layer with the least total error and a mean of at least `mean_sparsity`.

    Args:
        errors: for each layer, sparsity -> error. Errors add up.

    Raises:
        InputError: a mean that no choice reaches, or below what every choice has.
    """
    lowest, highest = _mean(min(e) for e in errors), _mean(max(e) for e in errors)
    if not lowest <= mean_sparsity <= highest:
        raise InputError(
            f"`mean_sparsity` must be from {lowest:g} to {highest:g}, the sparsities that layers "
            f"are tried at, got {mean_sparsity:g}"
        )
    budget = math.floor(len(errors) * (1 - mean_sparsity) * _UNIT + 1e-6)
    options = [{s: -error for s, error in layer.items()} for layer in errors]
    values, choices = _best_by_cost(options)
    return _trace(options, choices, int(np.argmax(values[: budget + 1])))


def choose_for_recall(
    recalls: Sequence[Mapping[float, float]], target_recall: float
) -> tuple[float, ...]:
    """The sparsity of each layer with the highest mean for a mean recall of `target_recall`.

    Args:
        recalls: for each layer, sparsity -> recall.

    Raises:
        InputError: a recall that no choice reaches.
    """
    if not 0 < target_recall <= 1:
        raise InputError(f"`target_recall` must be in (0, 1], got {target_recall:g}")
    values, choices = _best_by_cost(recalls)
    enough = np.flatnonzero(values >= target_recall * len(recalls) - 1e-9)
    if not len(enough):
        densest = _mean(min(layer) for layer in recalls)
        raise InputError(
            f"`target_recall` is {target_recall:g}, but at the lowest sparsity that is tried, "
            f"{densest:g}, the mean recall is {values.max() / len(recalls):.3f}: ask for less"
        )
    return _trace(recalls, choices, int(enough[0]))


def _best_by_cost(options: Sequence[Mapping[float, float]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The best sum of values for each exact sum of kept shares, and the choices that lead there.

    Returns:
        values `[C]`, -inf where no choice has that cost; and for each layer the sparsity chosen
        last, `[C]`, as an index into its sorted sparsities.
    """
    size = sum(max(_cost(s) for s in layer) for layer in options) + 1
    values = np.full(size, -np.inf)
    values[0] = 0
    choices = []
    for layer in options:
        best, chosen = np.full(size, -np.inf), np.zeros(size, dtype=np.int64)
        for index, sparsity in enumerate(sorted(layer)):
            cost = _cost(sparsity)
            candidate = np.full(size, -np.inf)
            candidate[cost:] = values[: size - cost] + layer[sparsity]
            better = candidate > best
            best[better], chosen[better] = candidate[better], index
        values = best
        choices.append(chosen)
    return values, choices


def _trace(
    options: Sequence[Mapping[float, float]], choices: Sequence[np.ndarray], cost: int
) -> tuple[float, ...]:
    """Walk back from a total cost to the sparsity of each layer."""
    picked = []
    for layer, chosen in zip(reversed(options), reversed(choices), strict=True):
        sparsity = sorted(layer)[chosen[cost]]
        picked.append(sparsity)
        cost -= _cost(sparsity)
    return tuple(reversed(picked))


def _cost(sparsity: float) -> int:
    return round((1 - sparsity) * _UNIT)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return round(sum(listed) / len(listed), 9)
