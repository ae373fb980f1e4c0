"""Further choices, made one after the other once token order and sparsities are chosen.

Each is a function that gives back the settings of each transformer with its own choice in them. It
keeps what it measures in the state, under a topic of its own, so that a run that was interrupted
goes on, and reports steps to the deadline, which may end it. What it chose is then judged by whole
steps (`tune.py`), and left out where it does not pay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from sla_video.calibration.tuning_key_orders import key_orders
from sla_video.calibration.tuning_run import TuneRun
from sla_video.config import SLAConfig


class Refinement(Protocol):
    """A further choice. Its name is the topic."""

    @property
    def __name__(self) -> str:
        """What it is called in reports."""
        ...

    def __call__(self, run: TuneRun, configs: Mapping[str, SLAConfig]) -> dict[str, SLAConfig]:
        """The settings of each transformer, with the choice in them.

        Raises:
            TimeIsUpError: the choice is not made.
        """
        ...


REFINEMENTS: tuple[Refinement, ...] = (key_orders,)
