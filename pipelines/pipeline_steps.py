"""Which denoising step a pipeline is in, as its scheduler counts them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# More calls of a transformer in one step than any guidance makes: another video has begun.
_MOST_BRANCHES = 8


class PipelineSteps:
    """Asks the scheduler of a pipeline, which counts on the host: nothing waits for the device.

    Before its first step a scheduler's counter is None, since `set_timesteps` resets it. Two
    transformers of one pipeline share the counter. The pipeline is held weakly: it holds us.

    As a forward pre-hook of a transformer it also counts that one's calls. Where no scheduler tells
    steps apart, each call is a video of its own, so that who keeps something for the next step
    keeps nothing.

    Attributes:
        video, step, branch: counted by the hook, from 0; the last is the call of the transformer
            in its step.
    """

    def __init__(self, pipe: Any = None) -> None:
        self.video = self.step = self.branch = 0
        self._index = math.inf
        self._timesteps: Any = None
        self._pipe: Callable[[], Any] = _no_pipeline if pipe is None else weakref.ref(pipe)
        self._setting = ""

    @classmethod
    def needed_by(cls, setting: str, pipe: Any, instead: str) -> PipelineSteps:
        """Those of a setting that does not go without.

        Args:
            setting: what needs the steps, for messages; `instead` is what does without.

        Raises:
            ValueError: the pipeline has no scheduler that counts all its steps.
        """
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
        steps = cls(pipe)
        steps._setting = setting
        return steps

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineSteps:
        # A weak reference is copied as it is: a copied pipeline would follow the first one's steps.
        pipe = self._pipe()
        twin = PipelineSteps(memo.get(id(pipe), pipe))
        twin._setting = self._setting
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # No file holds a weak reference: what is read from one has no pipeline.
        return {**vars(self), "_pipe": _no_pipeline, "_timesteps": None}

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def __call__(self, transformer: nn.Module, _args: Any) -> None:
        """Before a forward: count it."""
        pipe = self._pipe()
        # A copy of the transformer alone is in none of the pipeline's steps.
        held = any(part is not None and part is transformer for part in _transformers(pipe))
        scheduler: Any = getattr(pipe, "scheduler", None) if held else None
        if not hasattr(scheduler, "step_index"):
            self._begin_video(-1)
            return
        # None until the first step is done.
        index = -1 if scheduler.step_index is None else int(scheduler.step_index)
        # Each video has timesteps of its own, also one that follows a video that ended or failed in
        # its first step: the index is the same then.
        timesteps, self._timesteps = self._timesteps, getattr(scheduler, "timesteps", None)
        if timesteps is not self._timesteps:
            self._begin_video(index)
        elif index == self._index and self.branch + 1 < _MOST_BRANCHES:
            self.branch += 1
        elif index > self._index:
            self._index, self.step, self.branch = index, self.step + 1, 0
        else:
            self._begin_video(index)

    def _begin_video(self, index: int) -> None:
        self.video += 1
        self._index, self.step, self.branch = index, 0, 0

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


def _no_pipeline() -> None:
    """Stands for the weak reference where there is no pipeline."""


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
