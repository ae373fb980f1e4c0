"""The checks of adherence that concern single frames: shapes, sizes and the background."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from sla_video.pipelines.tiny_wan.placement import RADIUS
from sla_video.pipelines.tiny_wan.render import OUTLINES, TONE_SHADES
from sla_video.pipelines.tiny_wan.segmentation import Floats, Mask, Segmentation, Track, ndimage

LARGE_RADIUS = (RADIUS["small"][1] + RADIUS["large"][0]) / 2
# Frames that vote on a shape, and the least overlap with its outline that counts.
SHAPE_FRAMES = 7
MIN_OVERLAP = 0.6
# A background that varies less than this (standard deviation of gray levels in [0, 1]) is plain.
PLAIN_SPREAD = 0.02


def shape_and_radius(found: Segmentation, track: Track) -> tuple[str | None, float]:
    """The shape that most of an object's clear frames show, None where it is none of them.

    With it comes the radius of that shape, as a fraction of the frame.
    """
    inside = track.gaps.min(1) * found.unit >= 1
    frames: NDArray[np.int64] = np.flatnonzero(track.present)
    for clear in (track.present & ~track.touching & inside, track.unhidden() & inside):
        if clear.any():
            frames = np.flatnonzero(clear)
            break
    picks = np.linspace(0, len(frames) - 1, min(SHAPE_FRAMES, len(frames))).round().astype(int)
    votes = [_classify(found, track, int(frame)) for frame in frames[picks]]
    shape = Counter(shape for shape, _ in votes).most_common(1)[0][0]
    return shape, float(np.median([r for s, r in votes if s == shape]))


@cache
def _area_and_centroid(shape: str) -> tuple[float, float]:
    """Of a shape of radius 1: its area, and how far its centroid lies below its centre."""
    axis = (torch.arange(512) + 0.5) / 512 * 2.4 - 1.2
    inside = (OUTLINES[shape](axis, axis[:, None]) < 0).double()
    area = float(inside.mean()) * 2.4**2
    return area, float((inside * axis[:, None]).sum() / inside.sum())


def _classify(found: Segmentation, track: Track, frame: int) -> tuple[str | None, float]:
    """The shape that, drawn with the same area and centroid, overlaps an object best."""
    cover = found.cover(track, frame)
    rows, columns = (np.flatnonzero(cover.any(axis)) for axis in (1, 0))
    pad = 3 + round(0.02 * found.unit)
    top, left = max(rows[0] - pad, 0), max(columns[0] - pad, 0)
    cover = cover[top : rows[-1] + pad + 1, left : columns[-1] + pad + 1]
    total = float(cover.sum())
    x = np.arange(cover.shape[1], dtype=np.float32)
    y = np.arange(cover.shape[0], dtype=np.float32)
    middle_x, middle_y = float(cover.sum(0) @ x) / total, float(cover.sum(1) @ y) / total
    best: tuple[float, str | None, float] = (MIN_OVERLAP, None, math.sqrt(total / math.pi))
    for shape, outline in OUTLINES.items():
        area, below = _area_and_centroid(shape)
        radius = math.sqrt(total / area)
        u = torch.from_numpy((x - middle_x) / radius)
        v = torch.from_numpy((y - middle_y) / radius + below)[:, None]
        drawn = (0.5 - outline(u, v) * radius).clamp(0, 1).numpy()
        overlap = float(np.minimum(cover, drawn).sum() / np.maximum(cover, drawn).sum())
        if overlap > best[0]:
            best = (overlap, shape, radius)
    return best[1], best[2] / found.unit


def background_change(found: Segmentation) -> float:
    """Mean distance of the background from its mean over time, in gray levels of 255."""
    if not found.background.any():
        return math.inf
    mean, _ = _still_background(found)
    return 255 * float(np.abs(found.gray - mean)[found.background].mean())


def _still_background(found: Segmentation) -> tuple[Floats, Mask]:
    """[h, w]: mean of the background over time, and where it was ever seen."""
    seen = found.background.sum(0)
    mean = (found.gray * found.background).sum(0) / np.maximum(seen, 1)
    return mean.astype(np.float32), seen > 0


def tone_and_pattern(found: Segmentation) -> tuple[str, str]:
    """The tone and pattern nearest to a clip's background; empty where hardly any is seen."""
    image = ndimage()
    level, seen = _still_background(found)
    if seen.mean() < 0.05:
        return "", ""
    mean = float(level[seen].mean())
    tone = min(TONE_SHADES, key=lambda t: abs(sum(TONE_SHADES[t]) / 2 - mean))
    # Smoothed within the part that is seen.
    sigma = 0.012 * found.unit
    weight = np.maximum(image.gaussian_filter(seen.astype(np.float32), sigma), 1e-6)
    smooth = image.gaussian_filter(np.where(seen, level, 0), sigma) / weight
    values = smooth[seen].astype(np.float64)
    if values.std() < PLAIN_SPREAD:
        return tone, "plain"
    y, x = seen.nonzero()
    basis = np.stack([x, y, np.ones_like(x)], axis=1).astype(np.float64)
    fitted = basis @ np.linalg.lstsq(basis, values, rcond=None)[0]
    if (values - fitted).var() < 0.3 * values.var():
        return tone, "gradient"
    # Edges of stripes all run one way, those of checks two ways at right angles.
    inner = image.binary_erosion(seen, iterations=max(1, round(2 * sigma)))
    dy, dx = (slope[inner] for slope in np.gradient(smooth))
    one_way = np.hypot((dx**2 - dy**2).sum(), 2 * (dx * dy).sum())
    return tone, "striped" if one_way > 0.5 * (dx**2 + dy**2).sum() else "checked"
