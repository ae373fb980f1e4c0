"""Encoded clips to train on, and which of them a step takes.

Everything random is a function of the seed and of a clip's place in the global batch. So the number
of processes does not matter, and a run that goes on draws what it would have drawn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class ClipSource(Protocol):
    """Clips with their captions, encoded."""

    @property
    def validation_prompts(self) -> Sequence[str]:
        """Captions of the held-out clips."""
        ...

    def __len__(self) -> int:
        """How many clips there are to train on."""
        ...

    def load(self, clips: Sequence[int], captioned: Sequence[bool], seed: str) -> ClipBatch:
        """These clips on the training device, those that are not `captioned` with no caption.

        What else is random in them follows from the clip and from `seed`, which is of the step.
        """
        ...

    def held_out(self, clips: Sequence[int]) -> ClipBatch:
        """Clips that are never trained on, with their captions."""
        ...

    def num_held_out(self) -> int:
        """How many there are of those."""
        ...


@dataclass(frozen=True)
class ClipBatch:
    """Latents `[B, C, T, h, w]` float32 and text embeddings `[B, S, C_text]`."""

    latents: Tensor
    text: Tensor


@dataclass(frozen=True)
class NoisyBatch:
    """What a forward pass takes; see `Student.forward`."""

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    text: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of `Student.forward`."""
        return self.latents, self.noise, self.sigma, self.text


class Sampler:
    """Which clips and which noise each forward pass of each process takes.

    Args:
        source: the clips.
        seed: of the run.
        batch_size: clips a forward pass of one process.
        processes, process: how many there are, and which one this is.
        accumulate: forward passes of a step.
        shift: of the noise levels.
        levels: "logit-normal" (Esser et al. 2024), or "uniform" in a sampler's time.
        caption_dropout: share of clips without caption.
        paired: a forward pass takes half as many clips, each twice with one noise: first all with
            their captions, then all without. `caption_dropout` has no meaning then.
    """

    def __init__(
        self,
        source: ClipSource,
        *,
        seed: int,
        batch_size: int,
        processes: int,
        process: int,
        accumulate: int,
        shift: float,
        caption_dropout: float,
        levels: str = "logit-normal",
        paired: bool = False,
    ) -> None:
        self.source = source
        self.seed = seed
        self.batch_size = batch_size
        self.processes = processes
        self.process = process
        self.accumulate = accumulate
        self.shift = shift
        self.caption_dropout = caption_dropout
        self.levels = levels
        self.paired = paired
        self._order: tuple[int, list[int]] = (-1, [])

    def clip_at(self, position: int) -> int:
        """The clip at a place of the endless sequence: each pass over the data is shuffled anew."""
        epoch, index = divmod(position, len(self.source))
        if epoch != self._order[0]:
            order = list(range(len(self.source)))
            random.Random(f"order/{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][index]

    def places(self, step: int, part: int) -> range:
        """Places in the sequence that forward pass `part` of `step` takes in this process."""
        passes = (step * self.accumulate + part) * self.processes + self.process
        count = self.batch_size // 2 if self.paired else self.batch_size
        return range(passes * count, (passes + 1) * count)

    def batch(self, step: int, part: int) -> NoisyBatch:
        """The clips of a forward pass with their noise."""
        places = self.places(step, part)
        draws = [random.Random(f"clip/{self.seed}/{place}") for place in places]
        captioned = [draw.random() >= self.caption_dropout for draw in draws]
        uniform = self.levels == "uniform"
        levels = [
            uniform_level(draw.random(), self.shift)
            if uniform
            else noise_level(draw.gauss(0, 1), self.shift)
            for draw in draws
        ]
        seeds = [draw.getrandbits(62) for draw in draws]
        numbers = [self.clip_at(place) for place in places]
        if self.paired:
            captioned = [True] * len(numbers) + [False] * len(numbers)
            numbers, levels, seeds = 2 * numbers, 2 * levels, 2 * seeds
        # Of the step alone: how it is cut into processes and forward passes must not matter.
        return add_noise(self.source.load(numbers, captioned, f"{self.seed}/{step}"), levels, seeds)


def noise_level(normal: float, shift: float) -> float:
    """A level in (0, 1) from a normal number: its logistic function, shifted towards noise."""
    odds = shift * torch.tensor(normal, dtype=torch.float64).exp().item()
    return odds / (1 + odds)


def uniform_level(time: float, shift: float) -> float:
    """The level that a sampler with this shift has at `time` in [0, 1)."""
    return shift * time / (1 + (shift - 1) * time)


def add_noise(clips: ClipBatch, levels: Sequence[float], seeds: Sequence[int]) -> NoisyBatch:
    """Clips with noise of their own seeds, so that no clip's depends on its neighbours."""
    device = clips.latents.device
    noise = torch.empty_like(clips.latents)
    generator = torch.Generator(device)
    for row, seed in zip(noise, seeds, strict=True):
        generator.manual_seed(seed)
        row.normal_(generator=generator)
    sigma = torch.tensor(levels, dtype=torch.float32).to(device, non_blocking=True)
    return NoisyBatch(clips.latents, noise, sigma, clips.text)
