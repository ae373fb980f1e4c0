"""Further choices, made one after the other once token order and sparsities are chosen.

Each is a function that takes what is known and gives back the settings of each transformer with
its own choice in them. It keeps what it measures in the state, under a topic of its own, so that a
run that was interrupted goes on, and it reports steps to the deadline, which may end it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from sla_video.calibration.calibrated_model import CalibratedModel
from sla_video.calibration.deadline import Deadline
from sla_video.calibration.tune_request import TunePlan, TuneRequest
from sla_video.calibration.tuning_state import TuningState
from sla_video.config import SLAConfig

if TYPE_CHECKING:
    from sla_video.pipelines.router_set import RouterSet


class Refinement(Protocol):
    """A further choice."""

    def __call__(
        self,
        request: TuneRequest,
        plan: TunePlan,
        model: CalibratedModel,
        routers: RouterSet | None,
        configs: Mapping[str, SLAConfig],
        state: TuningState,
        deadline: Deadline,
    ) -> dict[str, SLAConfig]:
        """The settings of each transformer, with the choice in them.

        Raises:
            TimeIsUpError: the choice is not made.
        """
        ...


REFINEMENTS: tuple[Refinement, ...] = ()
