"""What all parts of a tuning need: the request, the model, its captured calls, what is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sla_video.calibration.calibrated_model import CalibratedModel, capture_source
from sla_video.calibration.deadline import Deadline
from sla_video.calibration.tune_request import TunePlan, TuneRequest
from sla_video.calibration.tuning_state import TuningState

if TYPE_CHECKING:
    import torch

    from sla_video.calibration.capture import Capture
    from sla_video.calibration.capture_store import CaptureSource, SpillStore
    from sla_video.calibration.tuning_timing import Inputs, Timed
    from sla_video.kernels.router import Router
    from sla_video.pipelines.router_set import RouterSet

# A multiple of the golden ratio's fraction: layers measured first are spread over the model.
_SPREAD = 0.618034


@dataclass(kw_only=True)
class TuneRun:
    """A tuning that is under way.

    Attributes:
        routers: that are measured with; None is the training-free mode.
        inputs: arguments of forwards in consecutive steps, once they are known.
        dense: component -> these with full attention, once they have been timed.
    """

    request: TuneRequest
    plan: TunePlan
    model: CalibratedModel
    routers: RouterSet | None
    state: TuningState
    deadline: Deadline
    inputs: list[Inputs] | None = None
    dense: dict[str, Timed] = field(default_factory=dict)
    _source: CaptureSource | None = None
    _spill: SpillStore | None = None

    @property
    def orders(self) -> tuple[str, ...]:
        """Static orders of the tokens to try; with routers theirs."""
        return self.plan.token_orders or (self.model.base.token_order,)

    @property
    def held_out(self) -> int:
        """How many of the last calls of each layer judge: those of the last of several prompts."""
        return self.request.capture_steps if len(self.plan.captures.prompts) > 1 else 0

    @property
    def components(self) -> tuple[str, ...]:
        """The transformers that have layers to tune."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.model.layers))

    def grid(self, component: str) -> tuple[int, int, int]:
        """(T, H, W) in tokens."""
        from sla_video.calibration.capture import token_grid

        sizes = {name: getattr(self.plan.captures, name) for name in ("frames", "height", "width")}
        return token_grid(self.model.pipe, **sizes, component=component)

    def order(self, name: str, layer: str) -> torch.Tensor:
        """`[L]` of the tokens of a layer in the order called `name`."""
        from sla_video.pipelines.token_order import make_order

        return make_order(name, self.grid(layer.partition(".")[0]))

    def router(self, layer: str) -> Router | None:
        """The router of a layer."""
        return None if self.routers is None else self.routers.routers[layer]

    def calls(self, names: Container[str]) -> Iterator[tuple[str, list[Capture]]]:
        """Some layers and their calls, in raster order; the pipeline runs where it has to.

        Raises:
            TimeIsUpError: it did not come to an end.
        """
        self.deadline.check()
        if self._source is None:
            layers = self.model.layers
            numbers = {name: i for i, name in enumerate(layers)}
            spread = sorted(layers, key=lambda name: (numbers[name] + 0.5) * _SPREAD % 1)
            model = dataclasses.replace(self.model, layers={n: layers[n] for n in spread})
            self._source, self._spill = capture_source(
                self.request.captures,
                self.plan.captures,
                model,
                self.deadline,
                token_order="raster",
            )
        return self._source.only(names)

    def end(self) -> None:
        """All is measured: remove what is kept on disk."""
        if self._spill is not None:
            self._spill.remove()
