"""Sparsities of layers under a budget: the best choice there is, by trying all of them."""

from __future__ import annotations

import itertools
import random

import pytest

from sla_video.calibration.budget import GRID, choose_for_mean, choose_for_recall
from sla_video.pipelines.errors import InputError

SPARSITIES = (0.5, 0.8, 0.9, 0.97)


def random_curves(layers: int, seed: int, *, rising: bool) -> list[dict[float, float]]:
    """Errors that rise with the sparsity, or recalls that fall, in each layer at its own pace."""
    rng = random.Random(seed)
    curves = []
    for _ in range(layers):
        values = sorted((rng.random() for _ in SPARSITIES), reverse=not rising)
        curves.append(dict(zip(SPARSITIES, values, strict=True)))
    return curves


def total(curves: list[dict[float, float]], chosen: tuple[float, ...]) -> float:
    return sum(curve[s] for curve, s in zip(curves, chosen, strict=True))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [0.5, 0.61, 0.8, 0.93, 0.97])
def test_mean_sparsity_is_met_with_the_least_error(budget: float, seed: int) -> None:
    curves = random_curves(4, seed, rising=True)
    chosen = choose_for_mean(curves, budget)
    assert sum(chosen) / 4 >= budget - 1e-9
    every = itertools.product(SPARSITIES, repeat=4)
    best = min(total(curves, c) for c in every if sum(c) / 4 >= budget - 1e-9)
    assert total(curves, chosen) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("target", [0.2, 0.5, 0.7])
def test_target_recall_is_met_at_the_highest_sparsity(target: float, seed: int) -> None:
    curves = random_curves(4, seed, rising=False)
    every = list(itertools.product(SPARSITIES, repeat=4))
    enough = [c for c in every if total(curves, c) / 4 >= target]
    if not enough:
        with pytest.raises(InputError, match="ask for less"):
            choose_for_recall(curves, target)
        return
    chosen = choose_for_recall(curves, target)
    assert total(curves, chosen) / 4 >= target - 1e-9
    assert sum(chosen) == pytest.approx(max(sum(c) for c in enough))


def test_a_layer_that_suffers_stays_denser() -> None:
    fragile = {s: 10 * s**4 for s in GRID}
    robust = {s: 0.1 * s**4 for s in GRID}
    first, second = choose_for_mean([fragile, robust], 0.9)
    assert first < 0.9 < second


@pytest.mark.parametrize("budget", [0.4, 0.995])
def test_a_mean_out_of_reach_is_refused(budget: float) -> None:
    curves = [dict.fromkeys(GRID, 1.0)] * 3
    with pytest.raises(InputError, match=r"`mean_sparsity` must be from 0\.5 to 0\.99, .* got 0\."):
        choose_for_mean(curves, budget)


def test_a_recall_out_of_reach_is_refused() -> None:
    with pytest.raises(InputError, match=r"`target_recall` is 0\.95.* mean recall is 0\.600"):
        choose_for_recall([{0.5: 0.7, 0.9: 0.3}, {0.5: 0.5, 0.9: 0.2}], 0.95)


@pytest.mark.parametrize("target", [0, 1.5, float("nan")])
def test_a_recall_out_of_range_is_refused(target: float) -> None:
    with pytest.raises(InputError, match=r"`target_recall` must be in \(0, 1\]"):
        choose_for_recall([{0.5: 0.7}], target)
