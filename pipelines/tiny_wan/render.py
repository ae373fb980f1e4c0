"""Render placed clips of the procedural world, anti-aliased and batched, on any device.

Coordinates are fractions of the frame, x to the right and y down. B scenes, T frames, S the frame
size in pixels. An outline is a function of coordinates in units of the object's radius, negative
inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sla_video.pipelines.tiny_wan.scenes import COLOURS, SHAPES, TONES

if TYPE_CHECKING:
    # Placing depends on the outlines drawn here.
    from sla_video.pipelines.tiny_wan.placement import ClipParams

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
_STAR_INNER = 0.45


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
    palette = torch.tensor([PALETTE[c] for c in COLOURS], device=device).float() / 255
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
    shades = torch.tensor([TONE_SHADES[t] for t in TONES], device=x.device)[params.tone]

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
    distance = OUTLINES[SHAPES[0]](x, y)
    for number, name in enumerate(SHAPES[1:], start=1):
        distance = torch.where(shape == number, OUTLINES[name](x, y), distance)
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


OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}


@cache
def reach(shape: str) -> tuple[float, float, float, float]:
    """How far a shape of radius 1 extends to the left, right, up and down of its centre."""
    # Rays a twentieth of a degree apart, which meet the tips of the star
    angle = torch.arange(7200, dtype=torch.float64) * (2 * math.pi / 7200)
    x, y = angle.sin(), -angle.cos()
    inner, outer = torch.zeros_like(angle), torch.full_like(angle, 2)
    for _ in range(32):
        middle = (inner + outer) / 2
        inside = OUTLINES[shape](x * middle, y * middle) < 0
        inner, outer = torch.where(inside, middle, inner), torch.where(inside, outer, middle)
    x, y = x * outer, y * outer
    return -float(x.min()), float(x.max()), -float(y.min()), float(y.max())
