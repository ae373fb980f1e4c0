"""How well a clip shows what its prompt asks for, measured by plain image processing.

`measure` finds the coloured objects of a clip, follows them, and checks each property that the
prompt names. It needs no learned judge, since the world of the prompts is procedural.
"""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from numpy.typing import NDArray

from sla_video.pipelines.tiny_wan import render
from sla_video.pipelines.tiny_wan.adherence_looks import (
    LARGE_RADIUS,
    background_change,
    shape_and_radius,
    tone_and_pattern,
)
from sla_video.pipelines.tiny_wan.adherence_motion import is_tied, move_as_asked
from sla_video.pipelines.tiny_wan.scenes import Scene
from sla_video.pipelines.tiny_wan.segmentation import Segmentation, Track, segment

# Parts of the frames in which each colour asked for, and the right number of objects, are seen.
PRESENT_FRAMES = 0.8
COUNTED_FRAMES = 0.9
# Mean change of the background over time, in gray levels of 255.
STEADY_LEVELS = 4.0


@dataclass(frozen=True, kw_only=True)
class Adherence:
    """One clip against one prompt; None where the prompt does not ask for the property.

    colour      the colours asked for, and only these, are there as objects
    shape       each object has its shape
    size        each object whose size is named has that size
    direction   each object moves as asked: one of 8 directions, still, bouncing, or meeting
    count       the number of objects is right in nearly all frames
    tied        two objects asked to move the same way, opposite ways or towards each other travel
                equally far, in the same or in opposite directions
    background  tone and pattern are those named
    steady      the background stays the same over time

    A clip in which no object is found fails all that apply.
    """

    colour: bool
    shape: bool
    size: bool | None
    direction: bool
    count: bool
    tied: bool | None
    background: bool | None
    steady: bool

    @property
    def core(self) -> bool:
        """Whether colour, shape and direction are all right."""
        return self.colour and self.shape and self.direction

    @property
    def all(self) -> bool:
        """Whether every check that applies is passed."""
        return all(getattr(self, f.name) is not False for f in fields(self))


COLUMNS = (*(f.name for f in fields(Adherence)), "core", "all")


def measure(video: NDArray[Any] | torch.Tensor, scene: Scene) -> Adherence:
    """Check a clip against the meaning of its prompt.

    Args:
        video: `[T, H, W, 3]`, uint8 or floats in [0, 1]; any size from about 64 pixels.
        scene: what the prompt asks for, as from `grammar.parse(prompt)`.

    Raises:
        TypeError, ValueError: `video` is not such a clip.
        ImportError: SciPy is not installed.
    """
    return check(segment(video), scene)


def check(found: Segmentation, scene: Scene) -> Adherence:
    """`measure` for a clip that is segmented already."""
    tracks = _assign(found.tracks, scene)
    looks = [None if t is None else shape_and_radius(found, t) for t in tracks]
    asked = list(zip(scene.objects, looks, strict=True))
    wanted = {o.colour for o in scene.objects}
    lasting = {t.colour for t in found.tracks if t.present.mean() >= PRESENT_FRAMES}
    shape = all(look is not None and look[0] == o.shape for o, look in asked)
    size = all(
        look is not None and (look[1] > LARGE_RADIUS) == (o.size == "large")
        for o, look in asked
        if o.size
    )
    tied = scene.relation in ("same", "opposite", "meeting")
    return Adherence(
        colour={t.colour for t in found.tracks} == wanted and wanted <= lasting,
        shape=shape,
        size=size if any(o.size for o in scene.objects) else None,
        direction=move_as_asked(tracks, scene),
        count=float((found.counts == len(scene.objects)).mean()) >= COUNTED_FRAMES,
        tied=is_tied(tracks, scene) if tied else None,
        background=_background_fits(found, scene) if scene.pattern else None,
        steady=bool(found.tracks) and background_change(found) <= STEADY_LEVELS,
    )


def measure_many(
    videos: Iterable[NDArray[Any] | torch.Tensor], scenes: Iterable[Scene]
) -> list[Adherence]:
    """`measure` clips against prompts in pairs; ValueError where their numbers differ."""
    return [measure(video, scene) for video, scene in zip(videos, scenes, strict=True)]


def summary(results: Sequence[Adherence]) -> dict[str, float]:
    """Percent passed of each of `COLUMNS`; "NAME_n" is the number of clips that it applies to."""
    table: dict[str, float] = {}
    for name in COLUMNS:
        values = [v for v in (getattr(r, name) for r in results) if v is not None]
        table[name] = 100 * sum(values) / len(values) if values else math.nan
        table[f"{name}_n"] = len(values)
    return table


def _assign(found: tuple[Track, ...], scene: Scene) -> list[Track | None]:
    """The track of each object: that of its colour, or else one left over, of the nearest hue.

    So an object of a wrong colour can still have the right shape and motion.
    """
    by_colour = {t.colour: t for t in found}
    tracks = [by_colour.get(o.colour) for o in scene.objects]
    missing = [i for i, t in enumerate(tracks) if t is None]
    spare: list[Track | None] = [t for t in found if t not in tracks]
    spare += [None] * (len(missing) - len(spare))

    def misfit(choice: Iterable[Track | None]) -> float:
        pairs = zip((scene.objects[i].colour for i in missing), choice, strict=True)
        return sum(_hue_gap(colour, track.colour) if track else 1.0 for colour, track in pairs)

    best = min(itertools.permutations(spare, len(missing)), key=misfit)
    for i, track in zip(missing, best, strict=True):
        tracks[i] = track
    return tracks


def _hue_gap(a: str, b: str) -> float:
    first, second = (colorsys.rgb_to_hsv(*(v / 255 for v in render.PALETTE[c]))[0] for c in (a, b))
    return min(abs(first - second), 1 - abs(first - second))


def _background_fits(found: Segmentation, scene: Scene) -> bool:
    if not found.tracks:
        return False
    tone, pattern = tone_and_pattern(found)
    return pattern == scene.pattern and scene.tone in (None, tone)
