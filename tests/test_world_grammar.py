"""The grammar of the procedural world: prompts, their meanings, and the held-out split."""

from __future__ import annotations

import random
import re

import pytest

from sla_video.pipelines.tiny_wan import grammar
from sla_video.pipelines.tiny_wan.scenes import (
    CARDINALS,
    COLOURS,
    DIRECTION_VECTORS,
    DIRECTIONS,
    OPPOSITE,
    PATTERNS,
    RELATIONS,
    SHAPES,
    SIZES,
    TONES,
    Motion,
    ObjectSpec,
    Scene,
    _sample_any,
)
from world_scenes import read, scenes_of

README_PROMPT = "a red circle moves left on a white background"
# Changing what is held out would let later training see what earlier models are judged on.
HELD_OUT_AT_SEED_7 = [
    "a small yellow circle and a small blue star stay still",
    "a small orange star moves down and left and a small yellow star stays still "
    "on a gray background",
    "a small orange square stays still on a gray background",
    "a blue star and a large pink cross move towards each other on a black striped background",
]
# Token ids count along this list: trained text encoders depend on it.
VOCABULARY = (
    ", a an and back background black blue both bounces by checked circle come cross diagonally "
    "direction do does down downwards drifts each edge goes gradient gray green in is large left "
    "meet move moves moving not off on opposite orange other over pink place plain purple red "
    "rest rests right side slide slides small square star stay stays still striped the to "
    "together towards triangle up upwards way white yellow"
)


@pytest.mark.parametrize("worded", ["canonical", "varied"])
def test_a_caption_is_read_back_as_its_scene(worded):
    rng = random.Random(1) if worded == "varied" else None
    for scene in scenes_of(3000):
        assert grammar.parse(grammar.caption(scene, rng)) == scene


def test_captions_vary_in_wording_and_scenes_in_meaning():
    scene = read("a red circle moves left on a white background")
    rng = random.Random(0)
    assert len({grammar.caption(scene, rng) for _ in range(200)}) > 20
    assert len(set(scenes_of(500))) > 490


def test_the_world_is_as_rich_as_promised():
    assert len(COLOURS) >= 7 and len(SHAPES) >= 5 and len(DIRECTIONS) == 8
    drawn = scenes_of(3000)
    motions = {(m.kind, m.direction) for s in drawn for m in s.motions}
    assert {d for kind, d in motions if kind == "move"} == set(DIRECTIONS)
    assert {d for kind, d in motions if kind == "bounce"} == set(CARDINALS)
    assert {kind for kind, _ in motions} == {"move", "bounce", "still", "meet"}
    assert {s.relation for s in drawn} == set(RELATIONS)
    assert {s.pattern for s in drawn} == {None, *PATTERNS}
    assert {s.tone for s in drawn} == {None, *TONES}
    assert {o.size for s in drawn for o in s.objects} == {None, *SIZES}
    assert {(o.colour, o.shape) for s in drawn for o in s.objects} == {
        (colour, shape) for colour in COLOURS for shape in SHAPES
    }


def test_what_a_prompt_means():
    prompt = "A small red star  drifts diagonally up and left over a gray checked background."
    assert read(prompt) == Scene(
        objects=(ObjectSpec(colour="red", shape="star", size="small"),),
        motions=(Motion(kind="move", direction="up-left"),),
        relation="single",
        tone="gray",
        pattern="checked",
    )
    prompt = "on a striped background, an orange cross and a blue square meet each other"
    assert read(prompt) == Scene(
        objects=(
            ObjectSpec(colour="orange", shape="cross"),
            ObjectSpec(colour="blue", shape="square"),
        ),
        motions=(Motion(kind="meet"), Motion(kind="meet")),
        relation="meeting",
        pattern="striped",
    )
    both = read("a pink circle moves down and right and a green circle moves the opposite way")
    assert [m.direction for m in both.motions] == ["down-right", "up-left"]


def test_opposite_directions_are_opposite_vectors():
    for name, other in OPPOSITE.items():
        x, y = DIRECTION_VECTORS[name]
        assert DIRECTION_VECTORS[other] == (-x, -y)
        assert OPPOSITE[other] == name


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat surfing",
        "a red circle",
        "a brown circle moves left",
        "a red circle moves sideways",
        "a red circle moves left on a background",
        "a red circle moves up and left and bounces off the edge",
        "a red circle and a red square move left together",
        "a red circle moves left and a blue star moves up and a pink cross moves down",
    ],
)
def test_a_prompt_outside_the_grammar_gets_a_warning_that_shows_it(prompt):
    warning = grammar.check_prompt(prompt)
    assert warning is not None
    assert repr(prompt) in warning
    assert grammar.GRAMMAR_TEXT in warning


@pytest.mark.parametrize(
    "prompt",
    [
        README_PROMPT,
        *re.findall(r"(?:examples)? {4,}(an? .+ background)$", grammar.GRAMMAR_TEXT, re.MULTILINE),
    ],
)
def test_a_prompt_inside_the_grammar_gets_none(prompt):
    assert grammar.check_prompt(prompt) is None


def test_the_grammar_as_shown_names_every_word_and_examples():
    for words in (COLOURS, SHAPES, SIZES, TONES, PATTERNS):
        assert all(word in grammar.GRAMMAR_TEXT for word in words)
    examples = grammar.GRAMMAR_TEXT.split("examples")[1].strip().splitlines()
    assert len(examples) == 3
    assert all(grammar.parse(example) is not None for example in examples)


def test_one_meaning_in_fifty_is_kept_out_of_training():
    train, kept = scenes_of(3000), scenes_of(300, held_out=True)
    assert not set(train) & set(kept)
    assert not any(s.held_out for s in train) and all(s.held_out for s in kept)
    rng = random.Random(2)
    share = sum(_sample_any(rng).held_out for _ in range(20_000)) / 20_000
    assert 0.016 < share < 0.024


def test_whether_a_meaning_is_held_out_does_not_depend_on_its_wording():
    rng = random.Random(3)
    for scene in scenes_of(200, held_out=True):
        assert read(grammar.caption(scene, rng)).held_out


def test_the_held_out_set_is_the_same_in_every_process():
    first = scenes_of(4, seed=7, held_out=True)
    assert [grammar.caption(scene) for scene in first] == HELD_OUT_AT_SEED_7


def test_the_vocabulary_covers_every_caption():
    rng = random.Random(4)
    drawn = [*scenes_of(3000, seed=5), *scenes_of(1500, seed=5, held_out=True)]
    captions = " ".join(grammar.caption(scene, rng) for scene in drawn)
    assert set(re.findall(r"[a-z]+|[^a-z ]", captions)) == set(grammar.vocabulary())


def test_the_vocabulary_keeps_its_order():
    assert " ".join(grammar.vocabulary()) == VOCABULARY


def test_a_background_named_by_its_tone_only_is_plain():
    assert read("a red circle moves left on a black background").pattern == "plain"
