"""Place scenes of the procedural world: draw what their prompts leave open.

Coordinates are fractions of the frame, x to the right and y down. B scenes, K tries, T frames;
every clip has room for two objects, the second of which may be absent.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from sla_video.pipelines.tiny_wan.render import NUM_FRAMES, reach
from sla_video.pipelines.tiny_wan.scenes import (
    COLOURS,
    DIRECTION_VECTORS,
    PATTERNS,
    SHAPES,
    SIZES,
    TONES,
    Scene,
)

RADIUS = {"small": (0.085, 0.105), "large": (0.14, 0.165)}
# To the edge of the frame, and between two objects
MARGIN = 0.012
GAP = 0.02
# Placements tried in each round; a round has only the scenes whose objects still overlap.
TRIES = (4, 16, 64, 256)

# Numbers in [0, 1) of the shape that its arguments give
Uniform = Callable[..., Tensor]
Value = TypeVar("Value")


@dataclass
class ClipParams:
    """Everything a clip shows, as tensors with B in front: what `render` draws."""

    # [B, 2]: index into COLOURS and SHAPES
    colour: Tensor
    shape: Tensor
    # [B, 2]; 0 where there is no second object
    radius: Tensor
    # [B, 2, T, 2]: centre of each object in each frame
    path: Tensor
    # [B]: index into TONES and PATTERNS
    tone: Tensor
    pattern: Tensor
    # [B]: radians, fraction of the frame, fraction of a period
    angle: Tensor
    period: Tensor
    phase: Tensor

    def to(self, device: torch.device | str) -> ClipParams:
        return ClipParams(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def __len__(self) -> int:
        return int(self.colour.shape[0])


@dataclass
class _Bodies:
    """What paths depend on, with B in front; a missing second object has radius 0."""

    # [B, 2]
    radius: Tensor
    # [B, 2, 2]: from the centre to the left and top of the outline, and to its right and bottom
    low: Tensor
    high: Tensor
    # [B, 2, 2]: direction of motion
    vectors: Tensor
    # [B, 2]
    bounce: Tensor
    # [B]
    meet: Tensor
    tied: Tensor

    def __getitem__(self, index: Tensor) -> _Bodies:
        return _Bodies(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.radius)


def place(scenes: Sequence[Scene], rng: random.Random, num_frames: int = NUM_FRAMES) -> ClipParams:
    """Draw what the prompts leave open: sizes, positions, speeds and the phase of the background.

    Objects stay in the frame, and two of them hardly ever cover each other.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(62))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    count = len(scenes)
    colour = torch.tensor([_pair([COLOURS.index(o.colour) for o in s.objects]) for s in scenes])
    shape = torch.tensor([_pair([SHAPES.index(o.shape) for o in s.objects]) for s in scenes])
    sizes = [_pair([o.size or rng.choice(SIZES) for o in s.objects]) for s in scenes]
    bounds = torch.tensor([[RADIUS[a], RADIUS[b]] for a, b in sizes])
    radius = bounds[..., 0] + uniform(count, 2) * (bounds[..., 1] - bounds[..., 0])
    radius[:, 1] *= torch.tensor([float(len(s.objects) == 2) for s in scenes])
    tone = [TONES.index(s.tone or rng.choice(TONES)) for s in scenes]
    pattern = [PATTERNS.index(s.pattern or rng.choice(PATTERNS)) for s in scenes]
    quarter = torch.randint(0, 8, (count,), generator=generator)
    return ClipParams(
        colour=colour,
        shape=shape,
        radius=radius,
        path=_paths(_bodies(scenes, shape, radius), uniform, num_frames),
        tone=torch.tensor(tone),
        pattern=torch.tensor(pattern),
        angle=quarter * (math.pi / 4),
        period=0.2 + 0.1 * uniform(count),
        phase=uniform(count),
    )


def _pair(values: Sequence[Value]) -> list[Value]:
    return [values[0], values[-1]]


def _bodies(scenes: Sequence[Scene], shape: Tensor, radius: Tensor) -> _Bodies:
    motions = [_pair(s.motions) for s in scenes]
    vectors = [[DIRECTION_VECTORS.get(m.direction or "", (0, 0)) for m in p] for p in motions]
    # [B, 2, 4]: left, right, up, down
    edges = torch.tensor([reach(s) for s in SHAPES])[shape] * radius[..., None]
    return _Bodies(
        radius=radius,
        low=edges[..., 0::2],
        high=edges[..., 1::2],
        vectors=torch.tensor(vectors).float(),
        bounce=torch.tensor([[m.kind == "bounce" for m in p] for p in motions]),
        meet=torch.tensor([s.relation == "meeting" for s in scenes]),
        tied=torch.tensor([s.relation in ("same", "opposite") for s in scenes]),
    )


def _paths(bodies: _Bodies, uniform: Uniform, num_frames: int) -> Tensor:
    """[B, 2, T, 2]: for each scene the first path without an overlap, or else the best of all."""
    count = len(bodies)
    path = torch.empty(count, 2, num_frames, 2)
    gap = torch.full((count,), -math.inf)
    left = torch.arange(count)
    for tries in TRIES:
        # [N, K, 2, T, 2] and [N, K] for the N scenes that are left
        paths = _random_paths(bodies[left], uniform, tries, num_frames)
        gaps = _smallest_gaps(bodies[left], paths).clamp(max=GAP)
        best_gap, best = gaps.max(1)
        better = best_gap > gap[left]
        path[left[better]] = paths[better, best[better]]
        gap[left[better]] = best_gap[better]
        left = left[gap[left] < GAP]
        if len(left) == 0:
            break
    return path


def _smallest_gaps(bodies: _Bodies, paths: Tensor) -> Tensor:
    """[B, K]: between the circles around two objects, over time; GAP where it needs no look."""
    distance = (paths[:, :, 0] - paths[:, :, 1]).norm(dim=-1).amin(-1)
    gap = distance - bodies.radius.sum(-1)[:, None]
    # Those that meet keep GAP anyway.
    apart = bodies.meet | (bodies.radius[:, 1] == 0)
    return torch.where(apart[:, None], GAP, gap)


def _random_paths(bodies: _Bodies, uniform: Uniform, tries: int, num_frames: int) -> Tensor:
    """[B, K, 2, T, 2]: random paths that fit the motions that are asked for."""
    # [T]
    time = torch.linspace(0, 1, num_frames)
    bounce = bodies.bounce[:, None, :, None, None]
    meet = bodies.meet[:, None, None, None, None]
    paths = _straight(bodies, uniform, tries, time)
    paths = torch.where(bounce, _bouncing(bodies, uniform, tries, time), paths)
    return torch.where(meet, _meeting(bodies, uniform, tries, time), paths)


def _straight(bodies: _Bodies, uniform: Uniform, tries: int, time: Tensor) -> Tensor:
    """[B, K, 2, T, 2]: along the directions at constant speeds, which are equal if tied."""
    count = len(bodies)
    vectors = bodies.vectors[:, None]
    tied = bodies.tied[:, None, None, None]
    diagonal = vectors.abs().sum(-1, keepdim=True) == 2
    low = bodies.low[:, None] + MARGIN
    room = 1 - low - bodies.high[:, None] - MARGIN
    # [B, K, 2, 1]: on each axis
    draw = uniform(count, tries, 2, 1)
    draw = torch.where(tied, draw[:, :, :1], draw)
    travel = torch.where(diagonal, 0.30 + 0.16 * draw, 0.36 + 0.24 * draw)
    travel = torch.minimum(travel, room.amin(-1, keepdim=True) * 0.95)
    travel = torch.where(tied, travel.amin(2, keepdim=True), travel)
    # [B, K, 2, 2]
    way = vectors * travel
    start = low + (-way).clamp(min=0) + (room - way.abs()) * uniform(count, tries, 2, 2)
    return start[:, :, :, None] + way[:, :, :, None] * time[:, None]


def _bouncing(bodies: _Bodies, uniform: Uniform, tries: int, time: Tensor) -> Tensor:
    """[B, K, 2, T, 2]: until the outline touches an edge of the frame, and back."""
    count = len(bodies)
    low, high = bodies.low[:, None], bodies.high[:, None]
    # [B, K, 2, 1]
    forth = 0.22 + 0.2 * uniform(count, tries, 2, 1)
    back = 0.22 + 0.2 * uniform(count, tries, 2, 1)
    # [B, K, 2, T, 1]: distance of the centre from its turning point
    away = ((forth + back)[..., None] * time[:, None] - forth[..., None]).abs()
    direction = bodies.vectors[:, None, :, None]
    turn = torch.where(bodies.vectors[:, None] > 0, 1 - high, low)[:, :, :, None]
    room = 1 - low - high - 2 * MARGIN
    still = (low + MARGIN + room * uniform(count, tries, 2, 2))[:, :, :, None]
    return torch.where(direction == 0, still, turn - direction * away)


def _meeting(bodies: _Bodies, uniform: Uniform, tries: int, time: Tensor) -> Tensor:
    """[B, K, 2, T, 2]: from opposite sides until the outlines nearly touch, then at rest."""
    count = len(bodies)
    vertical = uniform(count, tries) < 0.5
    flip = uniform(count, tries) < 0.5
    # [B, K, 2]: along the way and across it; flipped, the first comes from the right or bottom
    low, high = bodies.low[:, None] + MARGIN, bodies.high[:, None] + MARGIN
    low_along = torch.where(vertical[..., None], low[..., 1], low[..., 0])
    high_along = torch.where(vertical[..., None], high[..., 1], high[..., 0])
    low_across = torch.where(vertical[..., None], low[..., 0], low[..., 1]).amax(-1)
    high_across = torch.where(vertical[..., None], high[..., 0], high[..., 1]).amax(-1)
    # [B, K]
    first = torch.where(flip, high_along[..., 0], low_along[..., 0])
    second = torch.where(flip, low_along[..., 1], high_along[..., 1])
    room = 1 - first - second
    radii = bodies.radius.sum(-1)[:, None]
    closed = radii + GAP
    apart = closed + 0.34 + (0.6 - 2 * radii).clamp(min=0.02) * uniform(count, tries)
    apart = torch.minimum(apart, room)
    begin = first + (room - apart) * uniform(count, tries)
    across = low_across + (1 - low_across - high_across) * uniform(count, tries)
    end = 0.75 + 0.2 * uniform(count, tries)
    # [B, K, 1, T]
    way = ((apart - closed) / 2)[..., None] * (time / end[..., None]).clamp(max=1)
    along = torch.stack([begin[..., None] + way, (begin + apart)[..., None] - way], dim=2)
    along = torch.where(flip[..., None, None], 1 - along, along)
    level = across[..., None, None].expand_as(along)
    swap = vertical[..., None, None, None]
    return torch.where(swap, torch.stack([level, along], -1), torch.stack([along, level], -1))
