"""The written grammar of the procedural world: what a prompt may say, and what it means.

A prompt names one or two coloured shapes, how they move, and the background. `sample_scene` draws
a meaning, `caption` words it, `parse` reads a prompt back into its meaning. Nothing here needs
torch: the grammar is also what the command line prints.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
TONES = ("white", "gray", "black")
PATTERNS = ("plain", "striped", "checked", "gradient")
RELATIONS = ("single", "independent", "same", "opposite", "meeting")

# Wordings of each direction; the first is the canonical one. y points down.
DIRECTION_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "up-left": ("up and left", "diagonally up and left"),
    "up-right": ("up and right", "diagonally up and right"),
    "down-left": ("down and left", "diagonally down and left"),
    "down-right": ("down and right", "diagonally down and right"),
}
DIRECTIONS = tuple(DIRECTION_WORDS)
CARDINALS = ("left", "right", "up", "down")
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
OPPOSITE: dict[str, str] = {
    name: next(o for o, w in DIRECTION_VECTORS.items() if w == (-v[0], -v[1]))
    for name, v in DIRECTION_VECTORS.items()
}

# "{d}" is a direction; singular wordings follow one object, plural ones follow two.
MOVE = ("moves {d}", "slides {d}", "is moving {d}", "drifts {d}")
BOUNCE = ("moves {d} and bounces off the edge", "slides {d} and bounces back")
STILL = ("stays still", "does not move", "rests in place")
STILL_BOTH = ("stay still", "do not move", "rest in place")
SAME = ("move {d} together", "slide {d} side by side", "both move {d}")
OPPOSITE_WAY = ("moves the opposite way", "goes in the opposite direction")
MEETING = ("move towards each other", "meet each other", "come together")
HELD_OUT_FRACTION = 50

GRAMMAR_TEXT = f"""\
prompt      one or two objects, their motion, then optionally a background
object      "a" [size] colour shape
size        {", ".join(SIZES)}
colour      {", ".join(COLOURS)}
shape       {", ".join(SHAPES)}
direction   {", ".join(words[0] for words in DIRECTION_WORDS.values())}
background  "on a" [tone] [pattern] "background"
tone        {", ".join(TONES)}
pattern     {", ".join(PATTERNS)}

one object  OBJECT moves DIRECTION | moves left/right/up/down and bounces off the edge | stays still
two objects OBJECT moves DIRECTION and OBJECT moves DIRECTION (either may stay still)
            OBJECT and OBJECT move DIRECTION together | stay still
            OBJECT moves DIRECTION and OBJECT moves the opposite way
            OBJECT and OBJECT move towards each other

examples    a red circle moves left on a white background
            a small yellow star moves up and bounces off the edge on a checked background
            a blue square and a pink cross move towards each other on a gray striped background"""


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


def sample_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """Draw one scene meaning, from the training set or from the held-out set."""
    while True:
        scene = _sample_any(rng)
        if scene.held_out == held_out:
            return scene


def _sample_object(rng: random.Random, other: str | None = None) -> ObjectSpec:
    colour = rng.choice([c for c in COLOURS if c != other])
    size = rng.choice((None, *SIZES))
    return ObjectSpec(colour=colour, shape=rng.choice(SHAPES), size=size)


def _sample_any(rng: random.Random) -> Scene:
    tone = rng.choice((None, *TONES, *TONES))
    pattern = rng.choice((None, *PATTERNS, "plain"))
    if pattern is None:
        tone = None
    elif pattern == "plain" and tone is None:
        tone = rng.choice(TONES)
    first = _sample_object(rng)
    draw = rng.random()
    if draw < 0.5:
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


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Word a scene; without `rng`, in its canonical wording."""

    def pick(words: tuple[str, ...]) -> str:
        return words[0] if rng is None else rng.choice(words)

    def phrase(words: tuple[str, ...], motion: Motion) -> str:
        text = pick(words)
        if motion.direction is None:
            return text
        return text.format(d=pick(DIRECTION_WORDS[motion.direction]))

    def alone(motion: Motion) -> str:
        return phrase({"move": MOVE, "bounce": BOUNCE, "still": STILL}[motion.kind], motion)

    nouns = [_noun(obj) for obj in scene.objects]
    first = scene.motions[0]
    if scene.relation == "single":
        body = f"{nouns[0]} {alone(first)}"
    elif scene.relation == "independent":
        body = f"{nouns[0]} {alone(first)} and {nouns[1]} {alone(scene.motions[1])}"
    elif scene.relation == "same":
        words = STILL_BOTH if first.kind == "still" else SAME
        body = f"{nouns[0]} and {nouns[1]} {phrase(words, first)}"
    elif scene.relation == "opposite":
        body = f"{nouns[0]} {alone(first)} and {nouns[1]} {pick(OPPOSITE_WAY)}"
    else:
        body = f"{nouns[0]} and {nouns[1]} {pick(MEETING)}"
    background = _background(scene, rng)
    if not background:
        return body
    if rng is not None and rng.random() < 0.15:
        return f"{background}, {body}"
    return f"{body} {background}"


def _noun(obj: ObjectSpec) -> str:
    words = [obj.size, obj.colour, obj.shape] if obj.size else [obj.colour, obj.shape]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *[w for w in words if w]])


def _background(scene: Scene, rng: random.Random | None) -> str:
    if scene.pattern is None:
        return ""
    plain = scene.pattern == "plain" and (rng is None or rng.random() < 0.7)
    words = [scene.tone, None if plain else scene.pattern]
    where = "on" if rng is None or rng.random() < 0.75 else "over"
    return " ".join([where, "a", *[w for w in words if w], "background"])


def _alternatives(words: tuple[str, ...], group: str) -> str:
    return f"(?P<{group}>" + "|".join(sorted(words, key=len, reverse=True)) + ")"


def _object_pattern(i: int) -> str:
    size = f"(?:(?P<size{i}>{'|'.join(SIZES)}) )?"
    return f"an? {size}{_alternatives(COLOURS, f'colour{i}')} {_alternatives(SHAPES, f'shape{i}')}"


_DIRECTION_OF = {word: name for name, words in DIRECTION_WORDS.items() for word in words}
_DIRECTION = "|".join(sorted(_DIRECTION_OF, key=len, reverse=True))


def _verb(words: tuple[str, ...], group: str) -> str:
    return (
        "(?:"
        + "|".join(w.format(d=f"(?P<{group}_{k}>{_DIRECTION})") for k, w in enumerate(words))
        + ")"
    )


def _alone_pattern(i: int) -> str:
    return (
        f"(?:(?P<bounce{i}>{_verb(BOUNCE, f'b{i}')})|(?P<move{i}>{_verb(MOVE, f'm{i}')})"
        f"|(?P<still{i}>{'|'.join(STILL)}))"
    )


_BACKGROUND = re.compile(
    rf"(?:on|over) an? (?:{_alternatives(TONES, 'tone')} )?"
    rf"(?:{_alternatives(PATTERNS, 'pattern')} )?background"
)
_TWO = f"{_object_pattern(0)} and {_object_pattern(1)} "
_SENTENCES = {
    "single": re.compile(f"{_object_pattern(0)} {_alone_pattern(0)}"),
    "independent": re.compile(
        f"{_object_pattern(0)} {_alone_pattern(0)} and {_object_pattern(1)} {_alone_pattern(1)}"
    ),
    "opposite": re.compile(
        f"{_object_pattern(0)} {_verb(MOVE, 'm0')} and {_object_pattern(1)} "
        f"(?:{'|'.join(OPPOSITE_WAY)})"
    ),
    "meeting": re.compile(_TWO + f"(?:{'|'.join(MEETING)})"),
    "same": re.compile(_TWO + f"(?:{_verb(SAME, 'm0')}|(?P<still0>{'|'.join(STILL_BOTH)}))"),
}


def parse(prompt: str) -> Scene | None:
    """Read a prompt back into its meaning; None where it is outside the grammar."""
    text = re.sub(r"\s+", " ", prompt.strip().lower().rstrip(".!")).replace(" ,", ",")
    tone = pattern = None
    found = _BACKGROUND.search(text)
    if found:
        tone, pattern = found["tone"], found["pattern"]
        if tone is None and pattern in (None, "plain"):
            return None
        pattern = pattern or "plain"
        text = (text[: found.start()] + text[found.end() :]).strip(" ,")
    for relation, sentence in _SENTENCES.items():
        match = sentence.fullmatch(text)
        if match:
            return _scene_of(relation, match, tone, pattern)
    return None


def _direction_of(groups: dict[str, str | None], prefix: str) -> str | None:
    words = (v for k, v in groups.items() if k.startswith(prefix + "_") and v)
    return next((_DIRECTION_OF[w] for w in words), None)


def _motion_of(groups: dict[str, str | None], i: int) -> Motion:
    if groups.get(f"still{i}"):
        return Motion(kind="still")
    if groups.get(f"bounce{i}"):
        return Motion(kind="bounce", direction=_direction_of(groups, f"b{i}"))
    return Motion(kind="move", direction=_direction_of(groups, f"m{i}"))


def _scene_of(
    relation: str, match: re.Match[str], tone: str | None, pattern: str | None
) -> Scene | None:
    groups = match.groupdict()
    count = 1 if relation == "single" else 2
    objects = tuple(
        ObjectSpec(colour=match[f"colour{i}"], shape=match[f"shape{i}"], size=match[f"size{i}"])
        for i in range(count)
    )
    if relation == "meeting":
        motions: tuple[Motion, ...] = (Motion(kind="meet"), Motion(kind="meet"))
    elif relation == "same":
        motions = (_motion_of(groups, 0),) * 2
    elif relation == "opposite":
        first = _motion_of(groups, 0)
        assert first.direction is not None
        motions = (first, Motion(kind="move", direction=OPPOSITE[first.direction]))
    else:
        motions = tuple(_motion_of(groups, i) for i in range(count))
    bouncing_diagonally = any(m.kind == "bounce" and m.direction not in CARDINALS for m in motions)
    bouncing_pair = count == 2 and any(m.kind == "bounce" for m in motions)
    same_colour = count == 2 and objects[0].colour == objects[1].colour
    if bouncing_diagonally or bouncing_pair or same_colour:
        return None
    return Scene(objects=objects, motions=motions, relation=relation, tone=tone, pattern=pattern)


def check_prompt(prompt: str) -> str | None:
    """A warning for a prompt outside the grammar, or None."""
    if parse(prompt) is not None:
        return None
    return (
        f"the embedded model knows only its own small world; {prompt!r} is outside its grammar, "
        f"so expect a video that ignores parts of it. The grammar:\n{GRAMMAR_TEXT}"
    )


def vocabulary() -> list[str]:
    """Every word and mark a caption can hold, in a fixed order."""
    texts = [caption(s, random.Random(i)) for i, s in enumerate(_coverage_scenes())]
    texts += [w.replace("{d}", "") for w in (*MOVE, *BOUNCE, *STILL, *STILL_BOTH, *SAME)]
    texts += [*OPPOSITE_WAY, *MEETING, *_DIRECTION_OF, *COLOURS, *SHAPES, *SIZES, *TONES, *PATTERNS]
    words = {word for text in texts for word in re.findall(r"[a-z]+|,", text)}
    return sorted(words | {"a", "an", "on", "over", "background", ","})


def _coverage_scenes() -> list[Scene]:
    rng = random.Random(0)
    return [_sample_any(rng) for _ in range(2000)]
