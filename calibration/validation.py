"""How far the student is from the dense model, on clips that are never trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from sla_video.calibration.clip_source import ClipSource, add_noise, noise_level
from sla_video.calibration.student import Student

_SEED = "validation"


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    student: Student,
    wrapped: nn.Module,
    source: ClipSource,
    *,
    sparsities: Sequence[float],
    batch_size: int,
    shift: float,
) -> dict[str, float]:
    """Paired errors at hard selection, with the attention of inference.

    Clips, noise and noise levels are the same in every run, so that figures can be compared.

    Returns:
        For each sparsity s: "velocity_error@s", the squared error of the velocity to the dense
        model's over the mean square of the latter; and "flow_loss@s". Also "flow_loss@dense".
    """
    count, processes = source.num_held_out(), accelerator.num_processes
    # Every process takes as many passes as the others: a collective call waits for all.
    passes = -(-count // (batch_size * processes))
    sums = torch.zeros(len(sparsities), 4, dtype=torch.float64, device=accelerator.device)
    mode, trained_at = student.training, student.config.sparsity[0]
    student.eval()
    try:
        for row, sparsity in zip(sums, sparsities, strict=True):
            student.set_sparsity(sparsity)
            for part in range(passes):
                first = (part * processes + accelerator.process_index) * batch_size
                places = range(first, first + batch_size)
                draws = [random.Random(f"{_SEED}/{place}") for place in places]
                levels = [noise_level(draw.gauss(0, 1), shift) for draw in draws]
                seeds = [draw.getrandbits(62) for draw in draws]
                clips = source.held_out([place % count for place in places])
                batch = add_noise(clips, levels, seeds)
                out = wrapped(*batch.tensors(), mode="compare")
                counted = [place < count for place in places]
                weight = torch.tensor(counted, dtype=torch.float64).to(accelerator.device)
                pairs = (
                    (out["student"] - out["dense"], out["dense"]),
                    (out["student"] - out["target"], out["dense"] - out["target"]),
                )
                squares = [x.double().square().mean((1, 2, 3, 4)) for pair in pairs for x in pair]
                row += (torch.stack(squares) * weight).sum(1)
    finally:
        student.train(mode)
        student.set_sparsity(trained_at)
    if processes > 1:
        sums = accelerator.reduce(sums, "sum")
    metrics: dict[str, Any] = {}
    for sparsity, (error, power, flow, dense) in zip(sparsities, sums.tolist(), strict=True):
        metrics[f"velocity_error@{sparsity:g}"] = error / power
        metrics[f"flow_loss@{sparsity:g}"] = flow / count
        metrics["flow_loss@dense"] = dense / count
    return metrics
