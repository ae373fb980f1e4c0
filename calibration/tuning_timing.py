"""Seconds of a denoising step, and how far its velocity is from that of full attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sla_video.calibration.calibration_request import CalibrationPlan
from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.patching import enable_sla

# Timed for about so long, after a first run that does not count.
_SECONDS = 1.0
_MOST_REPEATS = 5
# Steps that `SLAConfig.key_order_refresh` spreads the making of an order over, by default.
_STEPS = 4
# Uniform sparsities whose time says what a kept share costs.
TIMED = (0.5, 0.8, 0.9, 0.97)


class _Enough(Exception):
    """The inputs that were wanted have been seen."""


class Timed(NamedTuple):
    """Seconds of one forward of a transformer, and its velocity."""

    seconds: float
    velocity: Tensor


def middle_inputs(pipe: Any, plan: CalibrationPlan, seed: int) -> tuple[Any, Any]:
    """Arguments of a forward halfway between noise and video, for all transformers of `pipe`."""
    seen = 0
    # With guidance a step has two forwards.
    wanted = 3 if plan.guidance_scale > 1 else 2
    inputs: list[tuple[Any, Any]] = []

    def look(_module: Any, args: Any, kwargs: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == wanted:
            inputs.append((args, kwargs))
            raise _Enough

    with ExitStack() as stack:
        for name in ("transformer", "transformer_2"):
            if (part := getattr(pipe, name, None)) is not None:
                hook = part.register_forward_pre_hook(look, with_kwargs=True)
                stack.callback(hook.remove)
        try:
            with torch.no_grad():
                pipe(
                    prompt=plan.prompts[-1],
                    num_frames=plan.frames,
                    height=plan.height,
                    width=plan.width,
                    num_inference_steps=2,
                    guidance_scale=plan.guidance_scale,
                    max_sequence_length=plan.max_sequence_length,
                    generator=torch.Generator("cpu").manual_seed(seed),
                    output_type="latent",
                )
        except _Enough:
            pass
    return inputs[0]


@torch.no_grad()
def time_forward(transformer: Any, inputs: tuple[Any, Any], scheduler: Any = None) -> Timed:
    """The median of a few runs; with a scheduler the mean over as many steps of it."""
    args, kwargs = inputs
    at_step = None if scheduler is None else scheduler.step_index

    def forward(step: int) -> Tensor:
        if scheduler is not None:
            scheduler._step_index = step
        output = transformer(*args, **{**kwargs, "return_dict": False})[0]
        if output.device.type == "cuda":
            torch.cuda.synchronize(output.device)
        found: Tensor = output
        return found

    seconds: list[float] = []
    try:
        velocity = forward(0)
        while len(seconds) < (_STEPS if scheduler is not None else _MOST_REPEATS):
            start = time.perf_counter()
            forward(len(seconds) + 1)
            seconds.append(time.perf_counter() - start)
            if scheduler is None and sum(seconds) >= _SECONDS:
                break
    finally:
        if scheduler is not None:
            scheduler._step_index = at_step
    # What is made anew every few steps is in the mean of these.
    middle = np.median if scheduler is None else np.mean
    return Timed(float(middle(seconds)), velocity)


def time_kept_shares(
    pipe: Any, inputs: tuple[Any, Any], config: SLAConfig, on_step: Callable[[], None]
) -> dict[float, float]:
    """Sparsity -> seconds of a forward of the first transformer with all layers alike."""
    found = {}
    for sparsity in TIMED:
        settings = config.replace(sparsity=sparsity, layer_sparsity={}, dense_steps=0)
        with enable_sla(pipe.transformer, config=settings):
            found[sparsity] = time_forward(pipe.transformer, inputs).seconds
        on_step()
    return found


def sparsity_for(seconds: float, timed: dict[float, float], forwards: int) -> float:
    """The lowest mean sparsity at which a step takes at most `seconds`.

    Args:
        timed: of `time_kept_shares`; between its points time is taken to be linear.
        forwards: in a step.

    Raises:
        InputError: no sparsity is fast enough.
    """
    sparsities = sorted(timed)
    # A busy machine may have been slower where less was kept.
    steps = np.minimum.accumulate([forwards * timed[sparsity] for sparsity in sparsities])
    if steps[-1] > seconds:
        raise InputError(
            f"a step is to take {seconds:.3g} s, but takes {steps[-1]:.3g} s at the highest "
            f"sparsity that is timed, {sparsities[-1]:g}: allow more, or fewer or smaller frames"
        )
    if steps[0] <= seconds:
        return sparsities[0]
    # `interp` wants rising times.
    return float(np.interp(seconds, steps[::-1], sparsities[::-1]))
