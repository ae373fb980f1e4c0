"""Where a network first produced a number that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sla_video.calibration.student import Student, eager


def find_nonfinite(student: Student, batch: Sequence[Tensor]) -> str | None:
    """Which layer first produces NaN or infinity, in one phrase; None where none does.

    Args:
        batch: of the forward pass that went wrong. It is run once more, and backward too.
    """
    for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
        if not torch.isfinite(tensor).all():
            return f"the weights {name} are not finite"
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_watch(name, found))
        for name, module in student.named_modules()
        if name
    ]
    try:
        with eager():
            loss = student(*batch)["velocity"]
            if not found and torch.isfinite(loss):
                loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"{found[0]} produced it first"
    bad = [
        name
        for name, parameter in student.named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    student.zero_grad(set_to_none=True)
    if bad:
        # Gradients flow from the last layer to the first.
        return f"the gradient of {bad[-1]} was the first that is not finite"
    return None


def _watch(name: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and any(not torch.isfinite(x).all() for x in _tensors(output)):
            found.append(f"{name} ({type(module).__name__})")

    return hook


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
