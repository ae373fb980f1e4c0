"""What the tests of model families share: a case is one way to use one tiny random model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from tiny_models import TINY_CALL, build_tiny_pipeline

CALL: dict[str, Any] = {**TINY_CALL, "num_inference_steps": 2, "output_type": "latent"}


@dataclass(frozen=True)
class Case:
    """One way to use one model.

    Attributes:
        build: makes the pipeline.
        call: what it is called with.
        layers: of each transformer.
        all_dense: why all calls are dense, where they are: what the log says of it.
        segments: how often the schedule is run.
    """

    build: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    layers: int = 3
    all_dense: str | None = None
    segments: int = 1

    def run(self, pipe: Any, **changes: Any) -> torch.Tensor:
        """The latents after two denoising steps, from a fixed seed."""
        call = {**CALL, **self.call, **changes}
        call = {name: value for name, value in call.items() if value is not None}
        result = pipe(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
        # Framepack gives a list of clips.
        return torch.stack(result) if isinstance(result, list) else torch.as_tensor(result)


def picture(seed: int = 0, side: int = 64) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def clip(frames: int = 9, side: int = 64) -> list[Image.Image]:
    """Noisy frames."""
    return [picture(seed, side) for seed in range(frames)]


def assemble(kind: str, transformer: Any, **others: Any) -> Any:
    """A pipeline of class `kind` around `transformer`, with the other parts of the tiny one."""
    parts = build_tiny_pipeline().components
    shared = {name: parts[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    pipe = getattr(diffusers, kind)(**{**shared, "transformer": transformer, **others})
    pipe.set_progress_bar_config(disable=True)
    return pipe
