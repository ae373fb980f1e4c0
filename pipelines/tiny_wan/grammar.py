"""The written grammar of the procedural world: how prompts word a scene.

`caption` words a scene, `parse` reads a prompt back into its scene. Nothing here needs torch: the
grammar is also what the command line prints.
"""

from __future__ import annotations

import random
import re

from sla_video.pipelines.tiny_wan.scenes import (
    CARDINALS,
    COLOURS,
    OPPOSITE,
    PATTERNS,
    SHAPES,
    SIZES,
    TONES,
    Motion,
    ObjectSpec,
    Scene,
)

# Wordings of each direction; the first is the canonical one.
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

# "{d}" is a direction; singular wordings follow one object, plural ones follow two.
MOVE = ("moves {d}", "slides {d}", "is moving {d}", "drifts {d}")
BOUNCE = ("moves {d} and bounces off the edge", "slides {d} and bounces back")
STILL = ("stays still", "does not move", "rests in place")
STILL_BOTH = ("stay still", "do not move", "rest in place")
SAME = ("move {d} together", "slide {d} side by side", "both move {d}")
OPPOSITE_WAY = ("moves the opposite way", "goes in the opposite direction")
MEETING = ("move towards each other", "meet each other", "come together")
# What holds these wordings together in a caption.
_JOINING = "a an and on over background ,"

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
    verbs = (*MOVE, *BOUNCE, *STILL, *STILL_BOTH, *SAME, *OPPOSITE_WAY, *MEETING)
    names = (*_DIRECTION_OF, *COLOURS, *SHAPES, *SIZES, *TONES, *PATTERNS)
    text = " ".join((*verbs, *names, _JOINING)).replace("{d}", "")
    return sorted(set(text.split()))
