"""The procedural world: its grammar, and the clips rendered from it."""

from __future__ import annotations

import random
import re

import pytest
import torch

from sla_video.pipelines.tiny_wan import grammar, render
from sla_video.pipelines.tiny_wan.grammar import Motion, ObjectSpec, Scene
from sla_video.pipelines.tiny_wan.render import ClipParams

README_PROMPT = "a red circle moves left on a white background"


def scenes_of(number: int, seed: int = 0, *, held_out: bool = False) -> list[Scene]:
    rng = random.Random(seed)
    return [grammar.sample_scene(rng, held_out=held_out) for _ in range(number)]


def read(prompt: str) -> Scene:
    scene = grammar.parse(prompt)
    assert scene is not None, prompt
    return scene


def spans(params: ClipParams) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 2, 2]: way of each object; [B, T]: gap between the circles around the two objects."""
    ways = params.path[:, :, -1] - params.path[:, :, 0]
    gaps = (params.path[:, 0] - params.path[:, 1]).norm(dim=-1) - params.radius.sum(1)[:, None]
    return ways, gaps


def is_coloured(video: torch.Tensor) -> torch.Tensor:
    """`[B, T, S, S]` of clips `[B, 3, T, S, S]`: pixels with any colour, so covered by objects."""
    return (video.amax(1) - video.amin(1)) > 1e-4


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
    assert len(grammar.COLOURS) >= 7 and len(grammar.SHAPES) >= 5 and len(grammar.DIRECTIONS) == 8
    drawn = scenes_of(3000)
    motions = {(m.kind, m.direction) for s in drawn for m in s.motions}
    assert {d for kind, d in motions if kind == "move"} == set(grammar.DIRECTIONS)
    assert {d for kind, d in motions if kind == "bounce"} == set(grammar.CARDINALS)
    assert {kind for kind, _ in motions} == {"move", "bounce", "still", "meet"}
    assert {s.relation for s in drawn} == set(grammar.RELATIONS)
    assert {s.pattern for s in drawn} == {None, *grammar.PATTERNS}
    assert {s.tone for s in drawn} == {None, *grammar.TONES}
    assert {o.size for s in drawn for o in s.objects} == {None, *grammar.SIZES}
    assert {(o.colour, o.shape) for s in drawn for o in s.objects} == {
        (colour, shape) for colour in grammar.COLOURS for shape in grammar.SHAPES
    }


def test_what_a_prompt_means():
    assert read("A small red star  drifts diagonally up and left over a gray checked background.") == Scene(
        objects=(ObjectSpec(colour="red", shape="star", size="small"),),
        motions=(Motion(kind="move", direction="up-left"),),
        relation="single", tone="gray", pattern="checked",
    )
    assert read("on a striped background, an orange cross and a blue square meet each other") == Scene(
        objects=(
            ObjectSpec(colour="orange", shape="cross"), ObjectSpec(colour="blue", shape="square"),
        ),
        motions=(Motion(kind="meet"), Motion(kind="meet")),
        relation="meeting", pattern="striped",
    )
    both = read("a pink circle moves down and right and a green circle moves the opposite way")
    assert [m.direction for m in both.motions] == ["down-right", "up-left"]


def test_opposite_directions_are_opposite_vectors():
    for name, other in grammar.OPPOSITE.items():
        x, y = grammar.DIRECTION_VECTORS[name]
        assert grammar.DIRECTION_VECTORS[other] == (-x, -y)
        assert grammar.OPPOSITE[other] == name


@pytest.mark.parametrize("prompt", [
    "",
    "a cat surfing",
    "a red circle",
    "a brown circle moves left",
    "a red circle moves sideways",
    "a red circle moves left on a background",
    "a red circle moves up and left and bounces off the edge",
    "a red circle and a red square move left together",
    "a red circle moves left and a blue star moves up and a pink cross moves down",
])
def test_a_prompt_outside_the_grammar_gets_a_warning_that_shows_it(prompt):
    warning = grammar.check_prompt(prompt)
    assert warning is not None
    assert repr(prompt) in warning
    assert grammar.GRAMMAR_TEXT in warning


@pytest.mark.parametrize("prompt", [
    README_PROMPT,
    *re.findall(r"(?:examples)? {4,}(an? .+ background)$", grammar.GRAMMAR_TEXT, re.MULTILINE),
])
def test_a_prompt_inside_the_grammar_gets_none(prompt):
    assert grammar.check_prompt(prompt) is None


def test_the_grammar_as_shown_names_every_word_and_examples():
    for words in (grammar.COLOURS, grammar.SHAPES, grammar.SIZES, grammar.TONES, grammar.PATTERNS):
        assert all(word in grammar.GRAMMAR_TEXT for word in words)
    examples = grammar.GRAMMAR_TEXT.split("examples")[1].strip().splitlines()
    assert len(examples) == 3
    assert all(grammar.parse(example) is not None for example in examples)


def test_one_meaning_in_fifty_is_kept_out_of_training():
    train, kept = scenes_of(3000), scenes_of(300, held_out=True)
    assert not set(train) & set(kept)
    assert not any(s.held_out for s in train) and all(s.held_out for s in kept)
    rng = random.Random(2)
    share = sum(grammar._sample_any(rng).held_out for _ in range(20_000)) / 20_000
    assert 0.016 < share < 0.024


def test_whether_a_meaning_is_held_out_does_not_depend_on_its_wording():
    rng = random.Random(3)
    for scene in scenes_of(200, held_out=True):
        assert read(grammar.caption(scene, rng)).held_out


def test_the_held_out_set_is_the_same_in_every_process():
    first = scenes_of(4, seed=7, held_out=True)
    assert [grammar.caption(scene) for scene in first] == HELD_OUT_AT_SEED_7


def test_the_vocabulary_covers_every_caption():
    known = set(grammar.vocabulary())
    assert grammar.vocabulary() == sorted(known)
    rng = random.Random(4)
    for held_out in (False, True):
        for scene in scenes_of(1500, seed=5, held_out=held_out):
            words = re.findall(r"[a-z]+|[^a-z ]", grammar.caption(scene, rng))
            assert set(words) <= known


def test_a_seed_decides_scenes_and_clips():
    drawn = scenes_of(6, seed=8)
    assert drawn == scenes_of(6, seed=8) != scenes_of(6, seed=9)
    clips = [render.render(render.place(drawn, random.Random(seed)), 32) for seed in (1, 1, 2)]
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])


def test_clips_have_the_stated_shape_and_range():
    params = render.place(scenes_of(8), random.Random(0))
    video = render.render(params, 48)
    assert video.shape == (8, 3, render.NUM_FRAMES, 48, 48)
    assert video.dtype == torch.float32
    assert video.min() >= -1 and video.max() <= 1
    short = render.render(render.place(scenes_of(2), random.Random(0), num_frames=5), 16)
    assert short.shape == (2, 3, 5, 16, 16)
    assert render.render(params, 16, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_batch_renders_each_clip_as_alone():
    params = render.place(scenes_of(5), random.Random(1))
    together = render.render(params, 32)
    for i in range(5):
        alone = ClipParams(**{name: value[i : i + 1] for name, value in vars(params).items()})
        torch.testing.assert_close(render.render(alone, 32)[0], together[i], rtol=0, atol=1e-6)


def test_objects_stay_in_the_frame():
    params = render.place(scenes_of(3000), random.Random(2))
    centre, radius = params.path, params.radius[:, :, None, None]
    inside = (centre >= radius - 1e-6) & (centre <= 1 - radius + 1e-6)
    assert inside[params.radius > 0].all()


def test_the_background_is_gray_and_the_same_in_every_frame():
    params = render.place(scenes_of(40), random.Random(3))
    video = render.render(params, 64)
    clear = ~is_coloured(video).any(1)
    assert clear.float().mean() > 0.4
    change = (video.amax(2) - video.amin(2)).amax(1)
    assert change[clear].max() == 0
    assert not is_coloured(video).all(-1).all(-1).any()


@pytest.mark.parametrize(("pattern", "fewest", "most"), [
    ("plain", 1, 1), ("striped", 3, 200), ("checked", 3, 200), ("gradient", 200, 4096),
])
@pytest.mark.parametrize("tone", grammar.TONES)
def test_each_background_has_its_shades(tone, pattern, fewest, most):
    scene = read(f"a small red circle stays still on a {tone} {pattern} background")
    video = render.render(render.place([scene], random.Random(4)), 64)
    levels = (video[0, 0, 0][~is_coloured(video)[0, 0]] + 1) / 2
    low, high = sorted(render.TONE_SHADES[tone])
    assert levels.min() >= low - 1e-5 and levels.max() <= high + 1e-5
    assert fewest <= len(levels.unique()) <= most


def test_a_background_named_by_its_tone_only_is_plain():
    assert read("a red circle moves left on a black background").pattern == "plain"


@pytest.mark.parametrize("shape", grammar.SHAPES)
def test_edges_are_anti_aliased_and_the_inside_is_the_palette_colour(shape):
    scene = read(f"a large blue {shape} stays still on a black background")
    video = render.render(render.place([scene], random.Random(5)), 64)[0, :, 0]
    ground = 2 * render.TONE_SHADES["black"][0] - 1
    blue = torch.tensor(render.PALETTE["blue"])[:, None, None] / 127.5 - 1
    cover = (video[2] - ground) / (blue[2] - ground)
    part = (cover > 0.02) & (cover < 0.98)
    assert part.sum() >= 12
    assert len(cover[part].unique()) >= 4
    full = cover > 0.999
    assert full.sum() > part.sum()
    torch.testing.assert_close(video[:, full], blue[:, 0].expand(-1, int(full.sum())))


def test_small_clips_look_like_large_ones_averaged():
    params = render.place(scenes_of(12), random.Random(6))
    small, large = render.render(params, 64), render.render(params, 256)
    pooled = torch.nn.functional.avg_pool3d(large, (1, 4, 4))
    assert (small - pooled).abs().mean() < 0.005


def test_named_sizes_and_colours_are_drawn():
    scenes = scenes_of(2000)
    params = render.place(scenes, random.Random(7))
    for scene, colours, radii in zip(scenes, params.colour, params.radius, strict=True):
        for i, wanted in enumerate(scene.objects):
            assert grammar.COLOURS[int(colours[i])] == wanted.colour
            low, high = render.RADIUS[wanted.size] if wanted.size else (0.085, 0.165)
            assert low <= radii[i] <= high
    alone = torch.tensor([len(s.objects) == 1 for s in scenes])
    assert (params.radius[alone, 1] == 0).all() and (params.radius[~alone, 1] > 0).all()


def test_moves_go_the_named_way_and_far_enough():
    drawn = [s for s in scenes_of(3000) if all(m.kind == "move" for m in s.motions)]
    ways, _ = spans(render.place(drawn, random.Random(8)))
    for scene, pair in zip(drawn, ways, strict=True):
        for motion, way in zip(scene.motions, pair, strict=False):
            wanted = torch.tensor(grammar.DIRECTION_VECTORS[motion.direction]).float()
            assert way @ wanted / (way.norm() * wanted.norm()) > 0.9999
            assert way.norm() > 0.35


def test_what_stays_still_does_not_move():
    drawn = [s for s in scenes_of(3000) if all(m.kind == "still" for m in s.motions)]
    path = render.place(drawn, random.Random(9)).path
    assert (path.amax(2) - path.amin(2)).max() == 0


def test_tied_objects_travel_equally_far():
    drawn = [s for s in scenes_of(2000) if s.relation in ("same", "opposite", "meeting")]
    ways, _ = spans(render.place(drawn, random.Random(10)))
    sign = torch.tensor([1.0 if s.relation == "same" else -1.0 for s in drawn])[:, None]
    torch.testing.assert_close(ways[:, 0], sign * ways[:, 1], rtol=0, atol=1e-5)


def test_those_that_meet_close_their_gap_and_stay():
    drawn = [s for s in scenes_of(3000) if s.relation == "meeting"]
    _, gaps = spans(render.place(drawn, random.Random(11)))
    assert (gaps[:, 0] > 0.3).all()
    assert (gaps[:, 1:] - gaps[:, :-1]).max() < 1e-5
    torch.testing.assert_close(gaps[:, -1], torch.full_like(gaps[:, -1], render.GAP))
    torch.testing.assert_close(gaps[:, -2], gaps[:, -1])


@pytest.mark.parametrize("direction", grammar.CARDINALS)
def test_what_bounces_touches_the_named_edge_and_comes_back(direction):
    rng = random.Random(12)
    shapes = rng.choices(grammar.SHAPES, k=60)
    scenes = [read(f"a red {s} moves {direction} and bounces off the edge") for s in shapes]
    params = render.place(scenes, rng)
    axis, sign = (0 if direction in ("left", "right") else 1), grammar.DIRECTION_VECTORS[direction]
    along = params.path[:, 0, :, axis] * sign[axis]
    across = params.path[:, 0, :, 1 - axis]
    assert (across.amax(1) == across.amin(1)).all()
    turn = along.argmax(1)
    assert ((turn > 3) & (turn < render.NUM_FRAMES - 4)).all()
    far = along.amax(1)
    assert (far - along[:, 0] > 0.19).all() and (far - along[:, -1] > 0.19).all()
    # The circle around the object reaches the edge, up to the time between two frames.
    wall = (1 if sign[axis] > 0 else 0) - sign[axis] * params.radius[:, 0]
    assert ((wall * sign[axis] - far).abs() < 0.02).all()
    # So does the object itself, but for the corners that a shape lacks.
    coloured = is_coloured(render.render(params, 64)).any(1)
    rows = coloured.any(1 if axis == 0 else 2)
    first = rows.float().argmax(1) if sign[axis] < 0 else rows.flip(1).float().argmax(1)
    assert (first <= 4).all()


def test_two_objects_seldom_cover_each_other():
    drawn = [s for s in scenes_of(4000) if len(s.objects) == 2]
    _, gaps = spans(render.place(drawn, random.Random(13)))
    covered = (gaps < 0).float()
    assert covered.amax(1).mean() < 0.1
    assert covered.mean() < 0.04
