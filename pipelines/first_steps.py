"""Dense attention in the first denoising steps, as the scheduler of the pipeline counts them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sla_video.pipelines.lora import switch_lora
from sla_video.pipelines.pipeline_steps import PipelineSteps
from sla_video.pipelines.processor import DenseSwitch


class FirstStepsDense:
    """Forward pre-hook of a transformer: dense attention in the first denoising steps."""

    def __init__(self, pipe: Any, steps: int, switch: DenseSwitch) -> None:
        self._clock = PipelineSteps.needed_by("dense_steps", pipe, "dense_steps=0")
        self._steps = steps
        self._switch = switch

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def __call__(self, module: nn.Module, args: Any) -> None:
        dense = self._clock.now(module) < self._steps
        if dense != self._switch.first_steps:
            self._switch.first_steps = dense
            switch_lora(module, on=not self._switch.dense)
