"""Dense attention in the first denoising steps, as the scheduler of the pipeline counts them."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import nn

from sla_video.pipelines.lora import switch_lora
from sla_video.pipelines.processor import DenseSwitch


class FirstStepsDense:
    """Forward pre-hook of a transformer: dense attention in the first denoising steps.

    Asks the scheduler of the pipeline, which counts on the host, so nothing waits for the device.
    Before its first step a scheduler's counter is None, since `set_timesteps` resets it. Two
    transformers of one pipeline share the counter. The pipeline is held weakly: it holds us.
    """

    def __init__(self, pipe: Any, steps: int, switch: DenseSwitch) -> None:
        if not hasattr(pipe.scheduler, "step_index"):
            raise ValueError(
                "`dense_steps` needs a scheduler that counts its steps, got "
                f"{type(pipe.scheduler).__name__}: use another scheduler, or dense_steps=0"
            )
        if hasattr(pipe, "generate_timestep_matrix"):
            raise ValueError(
                "`dense_steps` needs one scheduler that counts the steps, but in a "
                f"{type(pipe).__name__} each frame has its own: use dense_steps=0"
            )
        self._pipe = weakref.ref(pipe)
        self._steps = steps
        self._switch = switch

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstStepsDense:
        # A weak reference is copied as it is: a copied pipeline would follow the first one's steps.
        twin = copy.copy(self)
        twin._switch = copy.deepcopy(self._switch, memo)
        pipe = self._pipe()
        if pipe is not None and id(pipe) in memo:
            twin._pipe = weakref.ref(memo[id(pipe)])
        return twin

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def __call__(self, module: nn.Module, args: Any) -> None:
        pipe = self._pipe()
        if pipe is None:
            raise RuntimeError(
                "`dense_steps` are counted by the scheduler of the patched pipeline, which is "
                "gone: keep the pipeline, or call `disable_sla` on the transformer"
            )
        if not any(module is part for part in _transformers(pipe)):
            raise RuntimeError(
                "`dense_steps` are counted by the scheduler of the patched pipeline, which does "
                "not hold this transformer: copy the pipeline as a whole, or call `disable_sla` on "
                "the copy"
            )
        index = pipe.scheduler.step_index
        step = 0 if index is None else index - _first_index(pipe)
        dense = step < self._steps
        if dense != self._switch.first_steps:
            self._switch.first_steps = dense
            switch_lora(module, on=not self._switch.dense)


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
