"""The optimizer of stage 2."""

from __future__ import annotations

from typing import Any

import torch

from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.calibration.student import Student


def make_optimizer(student: Student, config: FinetuneConfig, *, fused: bool) -> Any:
    """AdamW over what is trained, in the order of `student.trainable()`.

    Each group has a "rate", its peak learning rate: one for LoRA or weights, another for routers
    and alpha, which have no weight decay.

    Args:
        fused: one kernel for all, which leaves out a step that is not finite by itself.
    """
    trainable = student.trainable()
    own = [p for name, p in trainable.items() if name.startswith("transformer.")]
    routers = [p for name, p in trainable.items() if name.startswith("routers.")]
    groups = [
        {"params": own, "rate": config.rate, "weight_decay": config.weight_decay},
        {"params": routers, "rate": config.router_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": config.rate, "betas": (0.9, 0.99)}
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=fused, **settings)
