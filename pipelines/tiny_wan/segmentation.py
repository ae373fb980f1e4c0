"""Find the coloured objects of a clip by plain image processing, and follow them over its frames.

A pixel's chroma is its RGB colour less its gray part, a vector of two numbers. Where an object
covers part of a pixel of the gray background, the chroma is that part of the object's own: its
angle names the colour and its length says how much of the pixel is covered. That is why blurred
edges, noise and a colour that is a little off do little harm here.

T frames, h and w the working size in pixels. Lengths are fractions of the shorter side of the
frame, x to the right and y down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sla_video.pipelines.tiny_wan.render import PALETTE

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

WORKING_SIZE = 128
# The smallest object of the world, a small star, covers 0.0105 of the frame.
SMALLEST_AREA = 0.0045
# A pixel belongs to an object that covers this much of it; the background keeps clear of less.
COVERED = 0.5
TINTED = 0.2
# Colours seen in a smaller part of the frames are flicker, not objects.
PRESENT_FRAMES = 0.2

_CHROMA_AXES: Floats = np.array([[1, -1, 0], [0.5, 0.5, -1]], dtype=np.float32)
_CHROMA_AXES /= np.linalg.norm(_CHROMA_AXES, axis=1, keepdims=True)
_COLOURS = tuple(PALETTE)
# [7, 2]: the chroma of each colour, of gray levels in [0, 1]
_CHROMA = (np.array([PALETTE[c] for c in _COLOURS], dtype=np.float32) / 255) @ _CHROMA_AXES.T
_STRENGTH = np.linalg.norm(_CHROMA, axis=1)


@dataclass(frozen=True, eq=False)
class Track:
    """One object over time; a frame without it has `present` False and zeros elsewhere."""

    colour: str
    # [T]
    present: Mask
    # [T]: close to another object, which may hide a part of it
    touching: Mask
    # [T, h, w]
    masks: Mask
    # [T, 2] centroid, [T] covered area in squares of the unit length
    centre: Floats
    area: Floats
    # [T, 4]: gap to the left, top, right and bottom edge of the frame
    gaps: Floats

    def unhidden(self) -> Mask:
        """[T]: frames whose centroid can be trusted."""
        if not self.present.any():
            return self.present
        typical = np.percentile(self.area[self.present], 75)
        return self.present & ~(self.touching & (self.area < 0.9 * typical))


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What `segment` found in a clip."""

    # [T, h, w] gray levels in [0, 1]; [T, h, w, 2] chroma
    gray: Floats
    chroma: Floats
    # [T, h, w]: pixels without a trace of an object
    background: Mask
    # [T]: number of objects
    counts: NDArray[np.int64]
    # The largest object of each colour, largest first
    tracks: tuple[Track, ...]
    # pixels of one unit length
    unit: int

    def cover(self, track: Track, frame: int) -> Floats:
        """[h, w] in [0, 1]: how much of each pixel of a frame this object covers."""
        direction = _CHROMA[_COLOURS.index(track.colour)]
        strength = self.chroma[frame] @ (direction / np.linalg.norm(direction))
        mask = track.masks[frame]
        near = ndimage().binary_dilation(mask, np.ones((3, 3), bool), iterations=2)
        full = np.percentile(strength[mask], 75)
        cover: Floats = np.where(near, np.clip(strength / full, 0, 1), 0).astype(np.float32)
        return cover


def ndimage() -> Any:
    """`scipy.ndimage`; SciPy is an extra of this package."""
    try:
        from scipy import ndimage as module
    except ImportError as error:
        raise ImportError(
            "measuring adherence needs SciPy, which is not installed: "
            'pip install "sla-video[train]"'
        ) from error
    return module


def as_frames(video: NDArray[Any] | torch.Tensor) -> Floats:
    """Bring a clip to `[T, h, w, 3]` float32 in [0, 1], its shorter side about 128 pixels or less.

    Raises:
        TypeError: the clip is neither a NumPy array nor a tensor.
        ValueError: it is not `[T, H, W, 3]`, or floats lie outside [0, 1].
    """
    if isinstance(video, torch.Tensor):
        video = video.detach().cpu()
        video = video.float().numpy() if video.is_floating_point() else video.numpy()
    if not isinstance(video, np.ndarray):
        raise TypeError(f"`video` must be a NumPy array or a tensor, got {type(video).__name__}")
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"`video` must be [T, H, W, 3], got shape {tuple(video.shape)}")
    floating = np.issubdtype(video.dtype, np.floating)
    if not floating and video.dtype != np.uint8:
        raise ValueError(f"`video` must be uint8 or floats in [0, 1], got dtype {video.dtype}")
    factor = max(1, round(min(video.shape[1:3]) / WORKING_SIZE))
    height, width = video.shape[1] // factor, video.shape[2] // factor
    total = np.zeros((len(video), height, width, 3), dtype=np.float32)
    for row in range(factor):
        for column in range(factor):
            part = video[:, row : height * factor : factor, column : width * factor : factor]
            total += part
    total /= factor**2 * (1 if floating else 255)
    if not np.isfinite(total).all() or total.min() < -0.01 or total.max() > 1.01:
        raise ValueError(
            "`video` floats must lie in [0, 1], got values in "
            f"[{float(video.min()):.3g}, {float(video.max()):.3g}]; bring it there first"
        )
    return total


def segment(video: NDArray[Any] | torch.Tensor) -> Segmentation:
    """Find the objects of a clip `[T, H, W, 3]` (uint8, or floats in [0, 1])."""
    frames = as_frames(video)
    unit = min(frames.shape[1:3])
    chroma: Floats = frames @ _CHROMA_AXES.T
    # [T, h, w]: length of the chroma, index of the nearest colour, covered part
    length = np.sqrt(chroma[..., 0] ** 2 + chroma[..., 1] ** 2)
    tinted = length > TINTED * _STRENGTH.min()
    nearest = np.full(length.shape, -1, dtype=np.int8)
    cosine = chroma[tinted] @ (_CHROMA / _STRENGTH[:, None]).T
    nearest[tinted] = cosine.argmax(-1)
    covered = np.zeros_like(tinted)
    covered[tinted] = length[tinted] > COVERED * _STRENGTH[nearest[tinted]]
    counts = np.zeros(len(frames), dtype=np.int64)
    tracks = []
    for index, colour in enumerate(_COLOURS):
        mask = covered & (nearest == index)
        if mask.sum() >= SMALLEST_AREA * unit**2:
            track = _follow(mask, colour, unit, counts)
            if track.present.mean() >= PRESENT_FRAMES:
                tracks.append(track)
    tracks.sort(key=lambda track: -float(track.area.sum()))
    _mark_touching(tracks, unit)
    margin = max(1, round(0.03 * unit))
    plane = np.ones((1, 3, 3), dtype=bool)
    background = ~ndimage().binary_dilation(tinted, plane, iterations=margin)
    return Segmentation(
        gray=frames.mean(-1),
        chroma=chroma,
        background=background,
        counts=counts,
        tracks=tuple(tracks),
        unit=unit,
    )


def _follow(mask: Mask, colour: str, unit: int, counts: NDArray[np.int64]) -> Track:
    """The largest piece of one colour in each frame; adds all sizeable pieces to `counts`."""
    image = ndimage()
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = True
    # Neighbours count within a frame only, so one call labels every frame.
    labels, number = image.label(mask, in_plane)
    sizes = np.bincount(labels.ravel(), minlength=number + 1)
    # The fringe between two touching objects can have a third colour, but it is thin.
    cores = image.binary_erosion(mask, np.ones((1, 3, 3), bool))
    solid = np.bincount(labels[cores], minlength=number + 1) > 0
    sizeable = [i for i in range(1, number + 1) if solid[i] and sizes[i] >= SMALLEST_AREA * unit**2]
    boxes = image.find_objects(labels)
    length, height, width = mask.shape
    largest: dict[int, int] = {}
    for i in sizeable:
        frame = boxes[i - 1][0].start
        counts[frame] += 1
        if frame not in largest or sizes[i] > sizes[largest[frame]]:
            largest[frame] = i
    present, touching = np.zeros(length, bool), np.zeros(length, bool)
    masks = np.zeros_like(mask)
    centre, area = np.zeros((length, 2), np.float32), np.zeros(length, np.float32)
    gaps = np.zeros((length, 4), np.float32)
    for frame, i in largest.items():
        _, rows, columns = boxes[i - 1]
        piece = labels[frame, rows, columns] == i
        masks[frame, rows, columns] = piece
        y, x = piece.nonzero()
        present[frame] = True
        centre[frame] = (x.mean() + columns.start + 0.5, y.mean() + rows.start + 0.5)
        area[frame] = sizes[i]
        gaps[frame] = (columns.start, rows.start, width - columns.stop, height - rows.stop)
    return Track(
        colour=colour,
        present=present,
        touching=touching,
        masks=masks,
        centre=centre / np.float32(unit),
        area=area / np.float32(unit**2),
        gaps=gaps / np.float32(unit),
    )


def _mark_touching(tracks: list[Track], unit: int) -> None:
    plane = np.ones((1, 3, 3), dtype=bool)
    reach = max(1, round(0.02 * unit))
    for i, first in enumerate(tracks):
        for second in tracks[i + 1 :]:
            near = ndimage().binary_dilation(first.masks, plane, iterations=reach)
            touching = (near & second.masks).any(axis=(1, 2))
            first.touching[touching] = True
            second.touching[touching] = True
