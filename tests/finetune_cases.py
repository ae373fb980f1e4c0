"""What the tests of fine-tuning share: a tiny model, tiny videos, and runs of a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch

from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.calibration.student import Student
from tiny_models import TEXT_DIM, build_tiny_transformer

LATENTS = (4, 3, 8, 8)
# Of a run on the tiny pipeline: 3 x 8 x 8 = 192 tokens, 2 x 3 blocks.
SMALL_SIZE = {"frames": 9, "height": 64, "width": 64}


def make_student(**settings: Any) -> Student:
    """A student with a random tiny transformer of 192 tokens: 2 x 3 blocks."""
    soft = str(settings.get("trainable")).startswith("router")
    impl = "auto" if soft else "torch"
    settings = {"sparsity": (0.34,), "max_steps": 1, "impl": impl, **settings}
    config = FinetuneConfig(**settings)
    torch.manual_seed(0)
    return Student(build_tiny_transformer(), config, torch.device("cpu"))


def make_batch(count: int = 2, seed: int = 3) -> tuple[torch.Tensor, ...]:
    """Latents, noise, sigma and text, as `Student.forward` takes them."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, *LATENTS, generator=generator)
    noise = torch.randn(count, *LATENTS, generator=generator)
    sigma = torch.rand(count, generator=generator)
    return latents, noise, sigma, torch.randn(count, 7, TEXT_DIM, generator=generator)


def write_videos(folder: Path, count: int, *, frames: int = 9) -> None:
    """Noisy videos of 48 x 40 pixels with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        pictures = rng.integers(0, 255, (frames, 40, 48, 3), dtype=np.uint8)
        path = folder / f"clip{index}.mp4"
        imageio.mimwrite(path, list(pictures), fps=8, macro_block_size=2)
        path.with_suffix(".txt").write_text("a red circle moves left\n")


def command(out: Path, model: Path, data: Path, **settings: Any) -> list[str]:
    """The command line of a run, without the interpreter."""
    values = {"model": model, "data": data, "out": out, **SMALL_SIZE, "sparsity": 0.34}
    values |= {"validation_clips": 2, "log_every": 1, "trainable": "lora", "lora_rank": 2}
    words = ["-m", "sla_video.calibration.finetune"]
    for name, value in (values | settings).items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return words


def losses_of(out: Path) -> list[float]:
    """The losses in the newest checkpoint of a run."""
    newest = max((out / "checkpoints").glob("step-????????"))
    history = json.loads((newest / "state.json").read_text())["history"]
    return [record["loss"] for record in history if "loss" in record]


def run_program(words: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run Python on `words` to its end."""
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, **settings
    )
