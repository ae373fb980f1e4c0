"""Render scenes of the procedural world as anti-aliased clips, batched, on any device.

Coordinates are fractions of the frame, x to the right and y down. B scenes, T frames, S the frame
size in pixels; every clip has room for two objects, the second of which may be absent.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sla_video.pipelines.tiny_wan import grammar
from sla_video.pipelines.tiny_wan.grammar import Scene

NUM_FRAMES = 25
FRAME_SIZE = 256
FPS = 12

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (245, 134, 22),
    "yellow": (242, 218, 44),
    "green": (40, 160, 62),
    "blue": (42, 88, 216),
    "purple": (132, 46, 178),
    "pink": (246, 122, 192),
}
# Two gray levels a tone: the ground and, in patterns, its second shade.
TONE_SHADES: dict[str, tuple[float, float]] = {
    "white": (0.96, 0.80),
    "gray": (0.44, 0.60),
    "black": (0.05, 0.22),
}
RADIUS = {"small": (0.085, 0.105), "large": (0.14, 0.165)}
MARGIN = 0.012
GAP = 0.02
PLACEMENT_TRIES = 24
_STAR_INNER = 0.45


@dataclass
class ClipParams:
    """Everything a clip shows, as tensors with B in front: what `render` draws."""

    # [B, 2]: index into grammar.COLOURS and grammar.SHAPES
    colour: Tensor
    shape: Tensor
    # [B, 2]; 0 where there is no second object
    radius: Tensor
    # [B, 2, T, 2]: centre of each object in each frame
    path: Tensor
    # [B]: index into grammar.TONES and grammar.PATTERNS
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


def place(scenes: Sequence[Scene], rng: random.Random, num_frames: int = NUM_FRAMES) -> ClipParams:
    """Draw what the prompts leave open: sizes, positions, speeds and the phase of the background.

    Of a number of random placements each scene gets the one whose objects keep the largest
    distance, so that they seldom cover each other.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(62))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    count = len(scenes)
    colour = torch.tensor(
        [_pair([grammar.COLOURS.index(o.colour) for o in s.objects]) for s in scenes]
    )
    shape = torch.tensor(
        [_pair([grammar.SHAPES.index(o.shape) for o in s.objects]) for s in scenes]
    )
    sizes = [_pair([o.size or rng.choice(grammar.SIZES) for o in s.objects]) for s in scenes]
    bounds = torch.tensor([[RADIUS[a], RADIUS[b]] for a, b in sizes])
    radius = bounds[..., 0] + uniform(count, 2) * (bounds[..., 1] - bounds[..., 0])
    radius[:, 1] *= torch.tensor([float(len(s.objects) == 2) for s in scenes])
    tone = [grammar.TONES.index(s.tone or rng.choice(grammar.TONES)) for s in scenes]
    pattern = [grammar.PATTERNS.index(s.pattern or rng.choice(grammar.PATTERNS)) for s in scenes]
    quarter = torch.randint(0, 8, (count,), generator=generator)
    return ClipParams(
        colour=colour,
        shape=shape,
        radius=radius,
        path=_paths(scenes, radius, uniform, num_frames),
        tone=torch.tensor(tone),
        pattern=torch.tensor(pattern),
        angle=quarter * (math.pi / 4),
        period=0.2 + 0.1 * uniform(count),
        phase=uniform(count),
    )


def _pair(values: list) -> list:  # type: ignore[type-arg]
    return [values[0], values[-1]]


def _paths(scenes, radius, uniform, num_frames):  # type: ignore[no-untyped-def]
    """[B, 2, T, 2]: the best of `PLACEMENT_TRIES` random placements of each scene."""
    count, tries = len(scenes), PLACEMENT_TRIES
    # [T]
    time = torch.linspace(0, 1, num_frames)
    # [B, 2, 2]
    vectors = torch.tensor(
        [
            [
                grammar.DIRECTION_VECTORS.get(m.direction or "", (0, 0))
                for m in _pair(list(s.motions))
            ]
            for s in scenes
        ]
    ).float()
    kinds = [[m.kind for m in _pair(list(s.motions))] for s in scenes]
    bounce = torch.tensor([[k == "bounce" for k in pair] for pair in kinds])
    meet = torch.tensor([pair[0] == "meet" for pair in kinds])
    tied = torch.tensor([s.relation in ("same", "opposite") for s in scenes])
    # [B, K, 2, 1]: reach of the centres
    low = (radius + MARGIN)[:, None, :, None]
    room = 1 - 2 * low
    diagonal = (vectors.abs().sum(-1) == 2)[:, None, :, None]
    travel = torch.where(
        diagonal,
        0.30 + 0.16 * uniform(count, tries, 2, 1),
        0.36 + 0.24 * uniform(count, tries, 2, 1),
    )
    travel = torch.where(tied[:, None, None, None], travel[:, :, :1], travel)
    travel = torch.minimum(travel, room * 0.95)
    travel = torch.where(tied[:, None, None, None], travel.amin(2, keepdim=True), travel)
    # [B, K, 2, 2]
    displacement = vectors[:, None] * travel
    start = (
        low
        + (-displacement).clamp(min=0)
        + (room - displacement.abs()) * uniform(count, tries, 2, 2)
    )
    # [B, K, 2, T, 2]
    path = start[:, :, :, None] + displacement[:, :, :, None] * time[:, None]
    path = torch.where(
        bounce[:, None, :, None, None], _bouncing(vectors, radius, uniform, tries, time), path
    )
    path = torch.where(
        meet[:, None, None, None, None], _meeting(radius, uniform, tries, time), path
    )
    # [B, K]: smallest gap between the two outlines over time
    gap = (path[:, :, 0] - path[:, :, 1]).norm(dim=-1).amin(-1) - radius.sum(-1)[:, None] * 1.02
    alone = radius[:, 1] == 0
    score = torch.where(alone[:, None], uniform(count, tries), gap.clamp(max=GAP))
    best = score.argmax(1)
    return path[torch.arange(count), best]


def _bouncing(vectors, radius, uniform, tries, time):  # type: ignore[no-untyped-def]
    """[B, K, 2, T, 2]: towards an edge of the frame, touching it, and back."""
    count = len(vectors)
    low = radius[:, None, :, None]
    # [B, K, 2, 1]
    forth = 0.22 + 0.2 * uniform(count, tries, 2, 1)
    back = 0.22 + 0.2 * uniform(count, tries, 2, 1)
    along = (forth + back)[..., None] * time[:, None]
    # [B, K, 2, T, 1]: distance of the centre from its turning point
    away = (along - forth[..., None]).abs()
    direction = vectors[:, None, :, None]
    wall = torch.where(direction > 0, 1 - low[..., None], low[..., None])
    free = (low + MARGIN + (1 - 2 * (low + MARGIN)) * uniform(count, tries, 2, 2))[:, :, :, None]
    return torch.where(
        direction == 0, free.expand(-1, -1, -1, len(time), -1), wall - direction * away
    )


def _meeting(radius, uniform, tries, time):  # type: ignore[no-untyped-def]
    """[B, K, 2, T, 2]: from opposite sides until the outlines nearly touch, then at rest."""
    count = len(radius)
    # [B, K, 1, 1, 1]
    end = (0.75 + 0.2 * uniform(count, tries))[:, :, None, None, None]
    progress = (time[:, None] / end).clamp(max=1)
    closed = (radius.sum(-1) + GAP)[:, None, None]
    apart = (
        closed
        + 0.34
        + (0.96 - 2 * radius.sum(-1)[:, None, None] - 0.36).clamp(min=0.02)
        * uniform(count, tries, 1)
    )
    low = (radius + MARGIN)[:, None]
    first, second = low[..., :1], low[..., 1:]
    apart = torch.minimum(apart, 1 - first - second)
    # [B, K, 1]: the first object's place along the axis, and both across it
    begin = first + (1 - first - second - apart) * uniform(count, tries, 1)
    middle_shift = (apart - closed) / 2
    cross = low.amax(-1, keepdim=True) + (1 - 2 * low.amax(-1, keepdim=True)) * uniform(
        count, tries, 1
    )
    along_first = begin[..., None, None] + middle_shift[..., None, None] * progress
    along_second = (begin + apart)[..., None, None] - middle_shift[..., None, None] * progress
    along = torch.cat([along_first, along_second], dim=2)
    across = cross[..., None, None].expand_as(along)
    flip = (uniform(count, tries) < 0.5)[:, :, None, None, None]
    along = torch.where(flip, 1 - along, along)
    vertical = (uniform(count, tries) < 0.5)[:, :, None, None, None]
    return torch.where(vertical, torch.cat([across, along], -1), torch.cat([along, across], -1))


def render(
    params: ClipParams,
    size: int = FRAME_SIZE,
    *,
    origin: tuple[float, float] = (0.0, 0.0),
    extent: float = 1.0,
) -> Tensor:
    """Draw clips.

    Args:
        size: S, pixels.
        origin: left and top of the window that is drawn, in fractions of the frame.
        extent: width of that window; 1 is the whole frame.

    Returns:
        `[B, 3, T, S, S]` in [-1, 1], on the device of `params`.
    """
    device = params.radius.device
    pixels = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size * extent
    x, y = origin[0] + pixels, origin[1] + pixels
    pixels_per_frame = size / extent
    palette = torch.tensor([PALETTE[c] for c in grammar.COLOURS], device=device).float() / 255
    # [B, 1, 1, S, S]
    image = _background(params, x, y, pixels_per_frame)[:, None, None]
    # [B, 3, T, S, S]
    video = image.expand(-1, 3, params.path.shape[2], -1, -1)
    for i in (1, 0):
        cover = _coverage(params, i, x, y, pixels_per_frame)[:, None]
        colour = palette[params.colour[:, i]][:, :, None, None, None]
        video = video + (colour - video) * cover
    return video * 2 - 1


def _background(params: ClipParams, x: Tensor, y: Tensor, pixels_per_frame: float) -> Tensor:
    """[B, S, S] gray levels, the same in every frame."""
    shades = torch.tensor([TONE_SHADES[t] for t in grammar.TONES], device=x.device)[params.tone]

    def column(x: Tensor) -> Tensor:
        return x[:, None, None]

    x, y = x[None, None, :] - 0.5, y[None, :, None] - 0.5
    cos, sin = column(params.angle.cos()), column(params.angle.sin())
    period, phase = column(params.period), column(params.phase)
    along = x * cos + y * sin

    def wave(u: Tensor) -> Tensor:
        # Signed distance to the nearest edge of a square wave of this period, in frame fractions.
        return ((u / period + phase) % 1 - 0.5).abs() * period - period / 4

    def soft(d: Tensor) -> Tensor:
        return (d * pixels_per_frame + 0.5).clamp(0, 1)

    stripes = soft(wave(along))
    cells_x, cells_y = soft(wave(x)), soft(wave(y + period * phase))
    checks = cells_x + cells_y - 2 * cells_x * cells_y
    gradient = ((along / 1.2) + 0.5).clamp(0, 1)
    mixes = torch.stack([torch.zeros_like(stripes), stripes, checks, gradient])
    # [B, S, S]
    mix = mixes[params.pattern, torch.arange(len(params), device=x.device)]
    return column(shades[:, 0]) + (column(shades[:, 1]) - column(shades[:, 0])) * mix


def _coverage(params: ClipParams, i: int, x: Tensor, y: Tensor, pixels_per_frame: float) -> Tensor:
    """[B, T, S, S] in [0, 1]: how much of each pixel object `i` covers."""
    radius = params.radius[:, i, None, None, None]
    centre = params.path[:, i]
    safe = radius.clamp(min=1e-3)
    x = (x - centre[..., 0, None, None]) / safe
    y = (y[:, None] - centre[..., 1, None, None]) / safe
    shape = params.shape[:, i, None, None, None]
    distance = torch.where(shape == 0, _circle(x, y), _square(x, y))
    distance = torch.where(shape == 2, _triangle(x, y), distance)
    distance = torch.where(shape == 3, _star(x, y), distance)
    distance = torch.where(shape == 4, _cross(x, y), distance)
    return (0.5 - distance * safe * pixels_per_frame).clamp(0, 1) * (radius > 0)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - 0.95


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.84


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y - 0.22
    return torch.maximum(y, 0.8660254 * x.abs() - 0.5 * y) - 0.56


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Fold the plane into one half of one of the five points, whose outline is a straight edge.
    sector = 2 * math.pi / 5
    theta = torch.atan2(x, -y)
    folded = (theta - sector * (theta / sector).round()).abs()
    r = (x * x + y * y).sqrt()
    px, py = r * folded.sin(), r * folded.cos()
    half = math.pi / 5
    # From the tip (0, 1.05) to the inner corner at angle pi/5
    tip, inner = 1.05, _STAR_INNER * 1.05
    ex, ey = inner * math.sin(half), inner * math.cos(half) - tip
    return (px * -ey + (py - tip) * ex) / math.hypot(ex, ey)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    a, b = x.abs(), y.abs()
    return torch.minimum(torch.maximum(a - 0.95, b - 0.34), torch.maximum(b - 0.95, a - 0.34))
