"""Clips of the procedural world, as placed and rendered from their scenes."""

from __future__ import annotations

import random
import time

import pytest
import torch

from sla_video.pipelines.tiny_wan import placement, render
from sla_video.pipelines.tiny_wan.placement import ClipParams
from sla_video.pipelines.tiny_wan.scenes import (
    CARDINALS,
    COLOURS,
    DIRECTION_VECTORS,
    SHAPES,
    TONES,
)
from world_scenes import read, scenes_of


def spans(params: ClipParams) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 2, 2]: way of each object; [B, T]: gap between the circles around the two objects."""
    ways = params.path[:, :, -1] - params.path[:, :, 0]
    gaps = (params.path[:, 0] - params.path[:, 1]).norm(dim=-1) - params.radius.sum(1)[:, None]
    return ways, gaps


def edges(params: ClipParams) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 2, T, 2] twice: left and top, and right and bottom, of each outline in each frame."""
    reach = torch.tensor([render.reach(s) for s in SHAPES])[params.shape] * params.radius[..., None]
    return params.path - reach[:, :, None, 0::2], params.path + reach[:, :, None, 1::2]


def is_coloured(video: torch.Tensor) -> torch.Tensor:
    """`[B, T, S, S]` of clips `[B, 3, T, S, S]`: pixels with any colour, so covered by objects."""
    return (video.amax(1) - video.amin(1)) > 1e-4


def test_a_seed_decides_scenes_and_clips():
    drawn = scenes_of(6, seed=8)
    assert drawn == scenes_of(6, seed=8) != scenes_of(6, seed=9)
    clips = [render.render(placement.place(drawn, random.Random(seed)), 32) for seed in (1, 1, 2)]
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])


def test_clips_have_the_stated_shape_and_range():
    params = placement.place(scenes_of(8), random.Random(0))
    video = render.render(params, 48)
    assert video.shape == (8, 3, render.NUM_FRAMES, 48, 48)
    assert video.dtype == torch.float32
    assert video.min() >= -1 and video.max() <= 1
    short = render.render(placement.place(scenes_of(2), random.Random(0), num_frames=5), 16)
    assert short.shape == (2, 3, 5, 16, 16)


def test_a_batch_renders_each_clip_as_alone():
    params = placement.place(scenes_of(5), random.Random(1))
    together = render.render(params, 32)
    for i in range(5):
        alone = ClipParams(**{name: value[i : i + 1] for name, value in vars(params).items()})
        torch.testing.assert_close(render.render(alone, 32)[0], together[i], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reach_of_a_shape_is_that_of_its_drawing(shape):
    scene = read(f"a large blue {shape} stays still on a black background")
    params = placement.place([scene], random.Random(14), num_frames=1)
    blue = is_coloured(render.render(params, 1000))[0, 0]
    columns, rows = blue.any(0).nonzero() / 1000, blue.any(1).nonzero() / 1000
    x, y = params.path[0, 0, 0]
    drawn = torch.cat([x - columns[0], columns[-1] - x, y - rows[0], rows[-1] - y])
    reach = torch.tensor(render.reach(shape)) * params.radius[0, 0]
    torch.testing.assert_close(drawn, reach, rtol=0, atol=0.002)


def test_the_reach_of_simple_shapes_is_exact():
    assert render.reach("circle") == pytest.approx((0.95,) * 4, abs=1e-6)
    assert render.reach("square") == pytest.approx((0.84,) * 4, abs=1e-3)
    # The base of the triangle is 0.78 below its centre; the tip of the star is at 1.05.
    assert render.reach("triangle")[2:] == pytest.approx((0.9, 0.78), abs=1e-3)
    assert render.reach("star")[2] == pytest.approx(1.05, abs=1e-6)


def test_outlines_stay_in_the_frame():
    params = placement.place(scenes_of(3000), random.Random(2))
    low, high = edges(params)
    present = params.radius > 0
    assert low[present].min() > -1e-5 and high[present].max() < 1 + 1e-5
    bounces = torch.tensor([s.motions[0].kind == "bounce" for s in scenes_of(3000)])
    assert low[~bounces][present[~bounces]].min() > placement.MARGIN - 1e-5
    assert high[~bounces][present[~bounces]].max() < 1 - placement.MARGIN + 1e-5


def test_nothing_is_drawn_outside_the_frame():
    params = placement.place(scenes_of(100), random.Random(2), num_frames=5)
    # A tenth of the frame more on each side; the anti-aliased edge is less than two pixels wide.
    video = render.render(params, 144, origin=(-0.1, -0.1), extent=1.2)
    coloured = is_coloured(video).any(1).any(0)
    coloured[10:-10, 10:-10] = False
    assert not coloured.any()


def test_the_background_is_gray_and_the_same_in_every_frame():
    params = placement.place(scenes_of(40), random.Random(3))
    video = render.render(params, 64)
    clear = ~is_coloured(video).any(1)
    assert clear.float().mean() > 0.4
    change = (video.amax(2) - video.amin(2)).amax(1)
    # Colour too faint to count may be there: the tail of an anti-aliased edge.
    assert change[clear].max() < 1e-3
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
@pytest.mark.parametrize("tone", TONES)
def test_each_background_has_its_shades(tone, pattern, fewest, most):
    scene = read(f"a small red circle stays still on a {tone} {pattern} background")
    video = render.render(placement.place([scene], random.Random(4)), 64)
    levels = (video[0, 0, 0][~is_coloured(video)[0, 0]] + 1) / 2
    low, high = sorted(render.TONE_SHADES[tone])
    assert levels.min() >= low - 1e-5 and levels.max() <= high + 1e-5
    assert fewest <= len(levels.unique()) <= most


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_anti_aliased_and_the_inside_is_the_palette_colour(shape):
    scene = read(f"a large blue {shape} stays still on a black background")
    video = render.render(placement.place([scene], random.Random(5)), 64)[0, :, 0]
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
    params = placement.place(scenes_of(4), random.Random(6))
    small, large = render.render(params, 64), render.render(params, 256)
    pooled = torch.nn.functional.avg_pool3d(large, (1, 4, 4))
    assert (small - pooled).abs().mean() < 0.005


def test_a_window_is_a_piece_of_the_whole_frame():
    params = placement.place(scenes_of(4), random.Random(6))
    whole = render.render(params, 64)
    window = render.render(params, 32, origin=(0.5, 0.25), extent=0.5)
    torch.testing.assert_close(window, whole[..., 16:48, 32:64], rtol=0, atol=1e-4)


def test_named_sizes_and_colours_are_drawn():
    scenes = scenes_of(2000)
    params = placement.place(scenes, random.Random(7))
    for scene, colours, radii in zip(scenes, params.colour, params.radius, strict=True):
        for i, wanted in enumerate(scene.objects):
            assert COLOURS[int(colours[i])] == wanted.colour
            low, high = placement.RADIUS[wanted.size] if wanted.size else (0.085, 0.165)
            assert low <= radii[i] <= high
    alone = torch.tensor([len(s.objects) == 1 for s in scenes])
    assert (params.radius[alone, 1] == 0).all() and (params.radius[~alone, 1] > 0).all()


def test_moves_go_the_named_way_and_far_enough():
    drawn = [s for s in scenes_of(3000) if all(m.kind == "move" for m in s.motions)]
    ways, _ = spans(placement.place(drawn, random.Random(8)))
    for scene, pair in zip(drawn, ways, strict=True):
        for motion, way in zip(scene.motions, pair, strict=False):
            wanted = torch.tensor(DIRECTION_VECTORS[motion.direction]).float()
            assert way @ wanted / (way.norm() * wanted.norm()) > 0.9999
            assert way.norm() > 0.35


def test_what_stays_still_does_not_move():
    drawn = [s for s in scenes_of(3000) if all(m.kind == "still" for m in s.motions)]
    path = placement.place(drawn, random.Random(9)).path
    assert (path.amax(2) - path.amin(2)).max() == 0


def test_tied_objects_travel_equally_far():
    drawn = [s for s in scenes_of(2000) if s.relation in ("same", "opposite", "meeting")]
    ways, _ = spans(placement.place(drawn, random.Random(10)))
    sign = torch.tensor([1.0 if s.relation == "same" else -1.0 for s in drawn])[:, None]
    torch.testing.assert_close(ways[:, 0], sign * ways[:, 1], rtol=0, atol=1e-5)


def test_those_that_meet_close_their_gap_and_stay():
    drawn = [s for s in scenes_of(3000) if s.relation == "meeting"]
    _, gaps = spans(placement.place(drawn, random.Random(11)))
    assert (gaps[:, 0] > 0.3).all()
    assert (gaps[:, 1:] - gaps[:, :-1]).max() < 1e-5
    torch.testing.assert_close(gaps[:, -1], torch.full_like(gaps[:, -1], placement.GAP))
    torch.testing.assert_close(gaps[:, -2], gaps[:, -1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", CARDINALS)
def test_what_bounces_touches_the_named_edge_and_comes_back(direction, shape):
    scene = read(f"a red {shape} moves {direction} and bounces off the edge")
    params = placement.place([scene] * 40, random.Random(12))
    axis, sign = (0 if direction in ("left", "right") else 1), DIRECTION_VECTORS[direction]
    along = params.path[:, 0, :, axis] * sign[axis]
    across = params.path[:, 0, :, 1 - axis]
    assert (across.amax(1) == across.amin(1)).all()
    turn = along.argmax(1)
    assert ((turn > 3) & (turn < render.NUM_FRAMES - 4)).all()
    far = along.amax(1)
    assert (far - along[:, 0] > 0.19).all() and (far - along[:, -1] > 0.19).all()
    # The outline turns at the edge, which may fall between two frames.
    low, high = edges(params)
    gap = low[:, 0, :, axis].amin(1) if sign[axis] < 0 else 1 - high[:, 0, :, axis].amax(1)
    half_a_step = along.diff(dim=1).abs().amax(1) / 2
    assert (gap >= -1e-5).all() and (gap <= half_a_step + 1e-5).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", CARDINALS)
def test_what_bounces_is_drawn_up_to_the_edge(direction, shape):
    scene = read(f"a large red {shape} moves {direction} and bounces off the edge")
    # With so many frames, one of them is close to the turn.
    params = placement.place([scene], random.Random(13), num_frames=200)
    coloured = is_coloured(render.render(params, 128))[0].any(0)
    lines = coloured.any(0 if direction in ("left", "right") else 1)
    first = lines if direction in ("left", "up") else lines.flip(0)
    assert first[:2].any()


def test_two_objects_hardly_ever_cover_each_other():
    drawn = [s for s in scenes_of(6000) if len(s.objects) == 2]
    _, gaps = spans(placement.place(drawn, random.Random(13)))
    covered = (gaps < 0).any(1)
    for relation in ("independent", "same", "opposite", "meeting"):
        assert covered[torch.tensor([s.relation == relation for s in drawn])].float().mean() < 0.02
    assert covered.float().mean() < 0.01


def test_the_drawn_shapes_hardly_ever_cover_each_other():
    drawn = [s for s in scenes_of(1200) if s.relation != "single"]
    params = placement.place(drawn, random.Random(15))
    alone = [ClipParams(**vars(params)) for _ in range(2)]
    for i, clips in enumerate(alone):
        clips.radius = params.radius.clone()
        clips.radius[:, 1 - i] = 0
    hits = 0
    for i in range(0, len(drawn), 40):
        parts = [ClipParams(**{k: v[i : i + 40] for k, v in vars(p).items()}) for p in alone]
        first, second = (is_coloured(render.render(p, 48)) for p in parts)
        # More than the anti-aliased rims.
        hits += int(((first & second).flatten(2).sum(-1).amax(1) > 6).sum())
    assert hits / len(drawn) < 0.02


def test_crowded_scenes_are_placed_apart_too():
    prompt = "a large red star moves {} and a large blue cross moves the opposite way"
    drawn = [read(prompt.format(d)) for d in ("up", "left", "up and left", "down and left")] * 200
    _, gaps = spans(placement.place(drawn, random.Random(16)))
    assert (gaps < 0).any(1).float().mean() < 0.02


def test_placing_is_fast_enough_to_feed_training():
    drawn = scenes_of(512)
    seconds = []
    for seed in range(5):
        start = time.process_time()
        placement.place(drawn, random.Random(seed))
        seconds.append(time.process_time() - start)
    # A fifth of what an idle core has to reach: this catches a blow-up, not a busy machine.
    assert len(drawn) / min(seconds) > 400
