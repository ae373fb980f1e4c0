"""Which denoising step a pipeline is in, as its scheduler counts them."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import nn


class PipelineSteps:
    """Asks the scheduler of a pipeline, which counts on the host: nothing waits for the device.

    Before its first step a scheduler's counter is None, since `set_timesteps` resets it. Two
    transformers of one pipeline share the counter. The pipeline is held weakly: it holds us.

    Args:
        setting: what needs the steps, for messages; `instead` is what does without.

    Raises:
        ValueError: the pipeline has no scheduler that counts all its steps.
    """

    def __init__(self, pipe: Any, setting: str, instead: str) -> None:
        if not hasattr(pipe.scheduler, "step_index"):
            raise ValueError(
                f"`{setting}` needs a scheduler that counts its steps, got "
                f"{type(pipe.scheduler).__name__}: use another scheduler, or {instead}"
            )
        if hasattr(pipe, "generate_timestep_matrix"):
            raise ValueError(
                f"`{setting}` needs one scheduler that counts the steps, but in a "
                f"{type(pipe).__name__} each frame has its own: use {instead}"
            )
        self._pipe = weakref.ref(pipe)
        self._setting = setting

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineSteps:
        # A weak reference is copied as it is: a copied pipeline would follow the first one's steps.
        twin = copy.copy(self)
        pipe = self._pipe()
        if pipe is not None and id(pipe) in memo:
            twin._pipe = weakref.ref(memo[id(pipe)])
        return twin

    def now(self, transformer: nn.Module) -> int:
        """The step, from 0, of the generation that calls `transformer`.

        Raises:
            RuntimeError: the pipeline is gone, or holds another transformer.
        """
        pipe = self._holder(transformer)
        index = pipe.scheduler.step_index
        return 0 if index is None else index - _first_index(pipe)

    def schedule(self, transformer: nn.Module) -> Any:
        """The timesteps of the generation, `[S]` from its first one on: a tensor of its own."""
        return self._holder(transformer).scheduler.timesteps

    def count(self, transformer: nn.Module) -> int:
        """How many steps the generation takes."""
        pipe = self._holder(transformer)
        return len(pipe.scheduler.timesteps) - _first_index(pipe)

    def others(self, transformer: nn.Module) -> list[nn.Module]:
        """The other transformers of the pipeline."""
        parts = _transformers(self._holder(transformer))
        return [part for part in parts if part is not None and part is not transformer]

    def _holder(self, transformer: nn.Module) -> Any:
        pipe = self._pipe()
        if pipe is None:
            raise RuntimeError(
                f"the steps of `{self._setting}` are counted by the patched pipeline, which is "
                "gone: keep the pipeline, or call `disable_sla` on the transformer"
            )
        if not any(transformer is part for part in _transformers(pipe)):
            raise RuntimeError(
                f"the steps of `{self._setting}` are counted by the patched pipeline, which "
                "does not hold this transformer: copy the pipeline as a whole, or call "
                "`disable_sla` on the copy"
            )
        return pipe


def _transformers(pipe: Any) -> list[Any]:
    parts = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    # `torch.compile(transformer)` wraps it.
    return [getattr(part, "_orig_mod", part) for part in parts]


def _first_index(pipe: Any) -> int:
    """Where a generation enters the schedule: in the middle of it, in video to video."""
    scheduler = pipe.scheduler
    if scheduler.begin_index is not None:
        return int(scheduler.begin_index)
    # Most pipelines leave it to the scheduler to find out, and it keeps that to itself. While they
    # denoise they know how many steps they take, from the first one to the end of the schedule.
    if getattr(pipe, "current_timestep", None) is None:
        return 0
    return max(0, len(scheduler.timesteps) - int(pipe.num_timesteps))
