"""Clips of the procedural world, as placed and rendered from their scenes."""

from __future__ import annotations

import random

import pytest
import torch

from sla_video.pipelines.tiny_wan import grammar, render
from sla_video.pipelines.tiny_wan.grammar import Scene
from sla_video.pipelines.tiny_wan.render import ClipParams


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


@pytest.mark.parametrize(
    ("pattern", "fewest", "most"),
    [
        ("plain", 1, 1),
        ("striped", 3, 600),
        ("checked", 3, 600),
        ("gradient", 100, 4096),
    ],
)
@pytest.mark.parametrize("tone", grammar.TONES)
def test_each_background_has_its_shades(tone, pattern, fewest, most):
    scene = read(f"a small red circle stays still on a {tone} {pattern} background")
    video = render.render(render.place([scene], random.Random(4)), 64)
    levels = (video[0, 0, 0][~is_coloured(video)[0, 0]] + 1) / 2
    low, high = sorted(render.TONE_SHADES[tone])
    assert levels.min() >= low - 1e-5 and levels.max() <= high + 1e-5
    assert fewest <= len(levels.unique()) <= most


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
    torch.testing.assert_close(
        video[:, full], blue[:, 0].expand(-1, int(full.sum())), rtol=0, atol=0.003
    )


def test_small_clips_look_like_large_ones_averaged():
    params = render.place(scenes_of(4), random.Random(6))
    small, large = render.render(params, 64), render.render(params, 256)
    pooled = torch.nn.functional.avg_pool3d(large, (1, 4, 4))
    assert (small - pooled).abs().mean() < 0.005


def test_a_window_is_a_piece_of_the_whole_frame():
    params = render.place(scenes_of(4), random.Random(6))
    whole = render.render(params, 64)
    window = render.render(params, 32, origin=(0.5, 0.25), extent=0.5)
    torch.testing.assert_close(window, whole[..., 16:48, 32:64], rtol=0, atol=1e-4)


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
    shapes = rng.choices(grammar.SHAPES, k=30)
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
