"""Further choices, made one after the other once token order and sparsities are chosen.

Each gives back the settings of each transformer with its own choice in them. It keeps what it
measures in the state, under topics of its own, so that a run that was interrupted goes on, and
reports steps to the deadline, which may end it. What it chose is then judged by whole steps
(`tune.py`), and left out where it does not pay.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sla_video.calibration.tuning_compression import compression
from sla_video.calibration.tuning_key_orders import key_orders
from sla_video.calibration.tuning_run import TuneRun
from sla_video.config import SLAConfig
from sla_video.pipelines.recipe import Recipe

# Of `measure_steps`: transformer -> seconds of a step and error of its velocity.
Steps = Mapping[str, Mapping[str, float]]
# What makes steps closer to full attention has to make the error this much smaller, and may cost
# this time; what makes them faster has to take this much less, and may cost this error.
_CLOSER, _SLOWER = 0.99, 1.1
_FASTER, _FARTHER = 0.97, 1.1


def is_closer(before: Steps, after: Steps) -> bool:
    """Whether steps came closer to full attention and are hardly slower."""
    error, seconds = _changes(before, after)
    return error < _CLOSER and seconds < _SLOWER


def is_faster(before: Steps, after: Steps) -> bool:
    """Whether steps became faster and are hardly farther from full attention."""
    error, seconds = _changes(before, after)
    return seconds < _FASTER and error < _FARTHER


def _changes(before: Steps, after: Steps) -> tuple[float, float]:
    """By which factors error and seconds changed, mean over the transformers."""

    def factor(field: str) -> float:
        new = statistics.fmean(step[field] for step in after.values())
        old = statistics.fmean(step[field] for step in before.values())
        # Full attention has no error: what has some is infinitely farther.
        return new / old if old else float("inf" if new else 1)

    return factor("velocity_error"), factor("seconds")


class Refinement(NamedTuple):
    """A further choice.

    Attributes:
        name: what it is called in recipes.
        choose: the settings of each transformer, with the choice in them. May raise
            `TimeIsUpError`: then the choice is not made.
        pays: whether it is kept, by the steps before and after.
    """

    name: str
    choose: Callable[[TuneRun, Recipe], dict[str, SLAConfig]]
    pays: Callable[[Any, Any], bool]


REFINEMENTS = (
    Refinement("key_orders", key_orders, is_closer),
    Refinement("compression", compression, is_faster),
)
