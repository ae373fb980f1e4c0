"""The meanings of the procedural world: what a clip can show, and which of it trains a model.

A scene is one or two coloured shapes, how they move, and the background. `sample_scene` draws one.
Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
TONES = ("white", "gray", "black")
PATTERNS = ("plain", "striped", "checked", "gradient")
RELATIONS = ("single", "independent", "same", "opposite", "meeting")

# y points down.
DIRECTION_VECTORS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-left": (-1, -1),
    "up-right": (1, -1),
    "down-left": (-1, 1),
    "down-right": (1, 1),
}
DIRECTIONS = tuple(DIRECTION_VECTORS)
CARDINALS = ("left", "right", "up", "down")
OPPOSITE: dict[str, str] = {
    name: next(o for o, w in DIRECTION_VECTORS.items() if w == (-v[0], -v[1]))
    for name, v in DIRECTION_VECTORS.items()
}
HELD_OUT_FRACTION = 50


@dataclass(frozen=True, kw_only=True)
class ObjectSpec:
    """One coloured shape. `size` None leaves the size open."""

    colour: str
    shape: str
    size: str | None = None


@dataclass(frozen=True, kw_only=True)
class Motion:
    """What one object does: `kind` is "move", "bounce", "still" or "meet"."""

    kind: str
    direction: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The meaning of a prompt. A `tone` or `pattern` of None is left open."""

    objects: tuple[ObjectSpec, ...]
    motions: tuple[Motion, ...]
    relation: str
    tone: str | None = None
    pattern: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether this meaning is kept out of training: a fixed 1 in 50 of all meanings.

        What a clip shows decides, not the wording: objects count in either order, and "the
        opposite way" as the two directions that it stands for.
        """
        shown = sorted(repr(pair) for pair in zip(self.objects, self.motions, strict=True))
        content = repr((shown, self.tone, self.pattern))
        digest = hashlib.blake2b(content.encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") % HELD_OUT_FRACTION == 0


def sample_scene(rng: random.Random, *, held_out: bool = False, pairs: float = 0.5) -> Scene:
    """Draw one scene meaning, from the training set or from the held-out set.

    Args:
        pairs: share of scenes with two objects, which are the harder ones to learn.
    """
    while True:
        scene = _sample_any(rng, pairs)
        if scene.held_out == held_out:
            return scene


def _sample_object(rng: random.Random, other: str | None = None) -> ObjectSpec:
    colour = rng.choice([c for c in COLOURS if c != other])
    size = rng.choice((None, *SIZES))
    return ObjectSpec(colour=colour, shape=rng.choice(SHAPES), size=size)


def _sample_any(rng: random.Random, pairs: float = 0.5) -> Scene:
    tone = rng.choice((None, *TONES, *TONES))
    pattern = rng.choice((None, *PATTERNS, "plain"))
    if pattern is None:
        tone = None
    elif pattern == "plain" and tone is None:
        tone = rng.choice(TONES)
    first = _sample_object(rng)
    draw = rng.random()
    if draw < 1 - pairs:
        kind = rng.choices(("move", "bounce", "still"), (0.7, 0.18, 0.12))[0]
        directions = CARDINALS if kind == "bounce" else DIRECTIONS
        direction = None if kind == "still" else rng.choice(directions)
        motions: tuple[Motion, ...] = (Motion(kind=kind, direction=direction),)
        return Scene(
            objects=(first,), motions=motions, relation="single", tone=tone, pattern=pattern
        )
    objects = (first, _sample_object(rng, first.colour))
    relation = rng.choice(RELATIONS[1:])
    move = Motion(kind="move", direction=rng.choice(DIRECTIONS))
    still = Motion(kind="still")
    if relation == "independent":
        second = Motion(kind="move", direction=rng.choice(DIRECTIONS))
        motions = (
            still if rng.random() < 0.15 else move,
            still if rng.random() < 0.15 else second,
        )
    elif relation == "same":
        motions = (still, still) if rng.random() < 0.15 else (move, move)
    elif relation == "opposite":
        assert move.direction is not None
        motions = (move, Motion(kind="move", direction=OPPOSITE[move.direction]))
    else:
        motions = (Motion(kind="meet"), Motion(kind="meet"))
    return Scene(objects=objects, motions=motions, relation=relation, tone=tone, pattern=pattern)
