"""Seconds of a denoising step, and how far its velocity is from that of full attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
# Steps that are timed together: what is made anew every few steps is made once in them, by default
# (`SLAConfig.key_order_refresh`, `TokenCompression.refresh_every`).
WINDOW = 4
# Steps of the video before them, and after.
_BEFORE = 2
# Uniform sparsities whose time says what a kept share costs.
TIMED = (0.5, 0.8, 0.9, 0.97)


class _Enough(Exception):
    """The inputs that were wanted have been seen."""


class Timed(NamedTuple):
    """Mean seconds of one forward of a transformer, and its velocities, one for each input."""

    seconds: float
    velocities: list[Tensor]


# Arguments of a forward.
Inputs = tuple[Any, Any]


def middle_inputs(pipe: Any, plan: CalibrationPlan, seed: int) -> list[Inputs]:
    """Forwards of consecutive steps halfway between noise and video, for all transformers.

    With guidance those with the prompt. The scheduler of `pipe` keeps the timesteps of that run.
    """
    branches = 2 if plan.guidance_scale > 1 else 1
    first, last = _BEFORE * branches, (_BEFORE + WINDOW - 1) * branches
    seen = 0
    inputs: list[Inputs] = []

    def look(_module: Any, args: Any, kwargs: Any) -> None:
        nonlocal seen
        if seen >= first and (seen - first) % branches == 0:
            inputs.append((args, kwargs))
        if seen == last:
            raise _Enough
        seen += 1

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
                    num_inference_steps=2 * _BEFORE + WINDOW,
                    guidance_scale=plan.guidance_scale,
                    max_sequence_length=plan.max_sequence_length,
                    generator=torch.Generator("cpu").manual_seed(seed),
                    output_type="latent",
                )
        except _Enough:
            pass
    return inputs


@torch.no_grad()
def time_forward(transformer: Any, inputs: Inputs) -> float:
    """The median seconds of a few runs."""
    seconds: list[float] = []
    forward(transformer, inputs)
    while len(seconds) < _MOST_REPEATS and sum(seconds) < _SECONDS:
        start = time.perf_counter()
        forward(transformer, inputs)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


@torch.no_grad()
def time_steps(transformer: Any, inputs: Sequence[Inputs], scheduler: Any) -> Timed:
    """Consecutive steps of a video, as the scheduler counts them.

    What is kept from step to step is made and used as in a video.
    """
    counts = hasattr(scheduler, "step_index")
    at_step = scheduler.step_index if counts else None

    def run(step: int) -> tuple[float, Tensor]:
        if counts:
            scheduler._step_index = step
        start = time.perf_counter()
        velocity = forward(transformer, inputs[step])
        return time.perf_counter() - start, velocity.float()

    try:
        # The first step of a video and one after it, which do not count.
        for step in range(2):
            run(step)
        seconds, velocities = zip(*map(run, range(len(inputs))), strict=True)
    finally:
        if counts:
            scheduler._step_index = at_step
    return Timed(float(np.mean(seconds)), list(velocities))


def distance(timed: Timed, dense: Timed) -> float:
    """Relative L2 distance of the velocities of all steps."""
    found, wanted = torch.stack(timed.velocities), torch.stack(dense.velocities)
    return float((found - wanted).norm() / wanted.norm())


def forward(transformer: Any, inputs: Inputs) -> Tensor:
    """The velocity, once the device has it."""
    args, kwargs = inputs
    output: Tensor = transformer(*args, **{**kwargs, "return_dict": False})[0]
    wait_for(output.device)
    return output


def wait_for(device: torch.device) -> None:
    """Until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_kept_shares(
    pipe: Any, inputs: Inputs, config: SLAConfig, on_step: Callable[[], None]
) -> dict[float, float]:
    """Sparsity -> seconds of a forward of the first transformer with all layers alike."""
    found = {}
    for sparsity in TIMED:
        settings = config.replace(sparsity=sparsity, layer_sparsity={}, dense_steps=0)
        with enable_sla(pipe.transformer, config=settings):
            found[sparsity] = time_forward(pipe.transformer, inputs)
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
