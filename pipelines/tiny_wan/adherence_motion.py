"""The checks of adherence that concern motion: directions, bounces, and motions that are tied.

Lengths are fractions of the shorter side of the frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sla_video.pipelines.tiny_wan.scenes import DIRECTION_VECTORS, Motion, Scene
from sla_video.pipelines.tiny_wan.segmentation import Floats, Track, ndimage

# Rendered objects travel 0.36 and more, 0.2 on each leg of a bounce, 0.148 on the way to a meeting.
MIN_TRAVEL = 0.18
MIN_LEG = 0.12
MIN_APPROACH = 0.08
STILL_RADIUS = 0.05
# Half the angle between neighbouring directions
MAX_ANGLE = math.radians(22.5)
# How much of its way an object may take back
MAX_RETREAT = 0.25
# An outline turns at the edge, which the nearest frame may show up to 0.0175 early or late.
MAX_EDGE_GAP = 0.09
# Between the circles around two objects that have met; rendered ones keep 0.02.
MAX_MEETING_GAP = 0.08
# Shorter of two tied displacements over the longer
TIED_LENGTHS = 0.7
# The gaps of `Track.gaps`, by the direction that leads there
_EDGES = ("left", "up", "right", "down")


def move_as_asked(tracks: Sequence[Track | None], scene: Scene) -> bool:
    """Whether each object of a scene, in the order of its prompt, moves as asked."""
    if any(track is None for track in tracks):
        return False
    found = [track for track in tracks if track is not None]
    if scene.relation == "meeting":
        return _meet(*found)
    return all(_moves(track, motion) for track, motion in zip(found, scene.motions, strict=True))


def is_tied(tracks: Sequence[Track | None], scene: Scene) -> bool:
    """Whether two objects travel equally far, in the directions that their relation ties."""
    if any(track is None for track in tracks):
        return False
    first, second = (track for track in tracks if track is not None)
    ends = _common_ends(first, second)
    if ends is None:
        return False
    ways = ends[:, 1] - ends[:, 0]
    shorter, longer = sorted(float(np.linalg.norm(way)) for way in ways)
    if all(motion.kind == "still" for motion in scene.motions):
        return longer <= STILL_RADIUS
    if scene.relation == "meeting":
        before, after = np.linalg.norm(ends[1] - ends[0], axis=-1)
        if before - after < 2 * MIN_APPROACH:
            return False
    sign = 1 if scene.relation == "same" else -1
    return (
        shorter >= TIED_LENGTHS * longer
        and longer >= MIN_APPROACH
        and _angle_between(ways[0], sign * ways[1]) <= MAX_ANGLE
    )


def _moves(track: Track, motion: Motion) -> bool:
    frames = np.flatnonzero(track.unhidden())
    if len(frames) < 3:
        return False
    path = ndimage().median_filter(track.centre[frames], size=(3, 1), mode="nearest")
    if motion.kind == "still":
        away = np.linalg.norm(path - np.median(path, axis=0), axis=1)
        return bool(away.max() <= STILL_RADIUS)
    assert motion.direction is not None
    wanted = np.array(DIRECTION_VECTORS[motion.direction], dtype=np.float32)
    wanted /= np.linalg.norm(wanted)
    along = path @ wanted
    if motion.kind == "move":
        retreat = float((np.maximum.accumulate(along) - along).max())
        travel = float(np.linalg.norm(path[-1] - path[0]))
        return retreat <= MAX_RETREAT * travel and _leads(path[0], path[-1], wanted, MIN_TRAVEL)
    turn = int(along.argmax())
    return (
        _leads(path[0], path[turn], wanted, MIN_LEG)
        and _leads(path[turn], path[-1], -wanted, MIN_LEG)
        and float(track.gaps[frames, _EDGES.index(motion.direction)].min()) <= MAX_EDGE_GAP
    )


def _meet(first: Track, second: Track) -> bool:
    """Whether two objects come towards each other until they nearly touch."""
    ends = _common_ends(first, second)
    if ends is None:
        return False
    towards = ends[1, 0] - ends[0, 0]
    return (
        _leads(ends[0, 0], ends[0, 1], towards, MIN_APPROACH)
        and _leads(ends[1, 0], ends[1, 1], -towards, MIN_APPROACH)
        and _last_gap(first, second) <= MAX_MEETING_GAP
    )


def _leads(start: Floats, end: Floats, wanted: Floats, least: float) -> bool:
    way = end - start
    return float(np.linalg.norm(way)) >= least and _angle_between(way, wanted) <= MAX_ANGLE


def _angle_between(a: Floats, b: Floats) -> float:
    cosine = float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-9)
    return math.acos(max(-1.0, min(1.0, cosine)))


def _common_ends(first: Track, second: Track) -> Floats | None:
    """[2, 2, 2]: where each object is in the first and last frame that shows both in full."""
    frames: NDArray[np.int64] = np.flatnonzero(first.unhidden() & second.unhidden())
    if len(frames) < 3:
        return None
    return np.stack([track.centre[frames[[0, -1]]] for track in (first, second)])


def _last_gap(first: Track, second: Track) -> float:
    """Between the circles around two objects, in the last frame that has both."""
    frame = np.flatnonzero(first.present & second.present)[-1]
    unit = min(first.masks.shape[1:])
    gap = float(np.linalg.norm(first.centre[frame] - second.centre[frame]))
    for track in (first, second):
        y, x = track.masks[frame].nonzero()
        here = np.stack([x + 0.5, y + 0.5], axis=1) / unit
        gap -= float(np.linalg.norm(here - track.centre[frame], axis=1).max())
    return gap
