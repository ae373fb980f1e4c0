"""The adherence metric against clips whose content is known."""

from __future__ import annotations

import importlib.util
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sla_video.pipelines.tiny_wan import adherence, grammar, placement, render, segmentation
from sla_video.pipelines.tiny_wan.scenes import COLOURS, SHAPES, Motion, ObjectSpec, Scene

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "validate_adherence.py"
CHECKS = ("colour", "shape", "size", "direction", "count", "tied", "background", "steady")


@pytest.fixture(scope="module")
def validate():
    """`benchmarks/validate_adherence.py` as a module."""
    spec = importlib.util.spec_from_file_location("validate_adherence", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def clip_of(prompt: str, size: int = 128, seed: int = 0) -> np.ndarray:
    scene = grammar.parse(prompt)
    assert scene is not None
    levels = (render.render(placement.place([scene], random.Random(seed)), size)[0] + 1) * 127.5
    return levels.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()


def judge(clip: np.ndarray, prompt: str) -> adherence.Adherence:
    scene = grammar.parse(prompt)
    assert scene is not None
    return adherence.measure(clip, scene)


def draw_disc(clip: np.ndarray, frame: int, centre, radius: float, colour: str) -> None:
    """Paint over one frame; lengths in fractions of the frame."""
    axis = (np.arange(clip.shape[1]) + 0.5) / clip.shape[1]
    inside = np.hypot(axis - centre[0], axis[:, None] - centre[1]) < radius
    clip[frame, inside] = render.PALETTE[colour]


@pytest.mark.parametrize(
    ("size", "scenes", "each", "joint"),
    [
        pytest.param(256, 50, 98, 98, id="256px"),
        pytest.param(128, 60, 98, 98, id="128px"),
        pytest.param(64, 60, 95, 90, id="64px"),
    ],
)
def test_rendered_clips_pass_every_check(validate, size, scenes, each, joint):
    tables, seconds = validate.agreement(scenes, size, seed=1)
    table = tables["as rendered"]
    assert {name for name in CHECKS if table[name] < each} == set()
    assert table["all"] >= joint
    # Five times the budget of a quiet core: this catches a blow-up, not a busy machine.
    assert seconds < 1.5


def test_blurred_noisy_compressed_clips_pass_too(validate):
    noise = np.random.default_rng(0)
    kinds = {"degraded": lambda clip: validate.degrade(clip, noise)}
    table = validate.agreement(20, 256, 2, kinds)[0]["degraded"]
    assert {name for name in CHECKS if table[name] < 95} == set()
    assert table["all"] >= 95


def test_what_is_wrong_fails_its_own_check(validate):
    rates = validate.control_rates(50, 128, seed=3)
    by_check: dict[str, list[bool]] = {}
    for (column, _), failed in rates.items():
        by_check.setdefault(column, []).extend(failed)
    assert set(by_check) == set(CHECKS)
    share = {column: np.mean(failed) for column, failed in by_check.items()}
    assert {column: s for column, s in share.items() if s < 0.97} == {}


@pytest.mark.parametrize("blank", ["white", "black", "gray", "noise"])
def test_a_clip_without_objects_fails_all_that_applies(blank):
    shape = (25, 64, 64, 3)
    noise = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    level = {"white": 245, "black": 12, "gray": 112}.get(blank)
    clip = noise if level is None else np.full(shape, level, dtype=np.uint8)
    prompt = f"a small red circle and a blue star move left together on a {blank} background"
    result = judge(clip, prompt if level else prompt.replace("noise", "white"))
    assert [name for name in CHECKS if getattr(result, name) is not False] == []
    assert not result.core and not result.all


def test_checks_that_the_prompt_leaves_open_are_none():
    prompt = "a red circle moves left"
    result = judge(clip_of(prompt), prompt)
    assert (result.size, result.tied, result.background) == (None, None, None)
    assert result.core and result.all


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_told_from_the_others(shape):
    clip = clip_of(f"a small green {shape} moves right on a gray checked background", size=64)
    verdicts = {s: judge(clip, f"a green {s} moves right").shape for s in SHAPES}
    assert verdicts == {s: s == shape for s in SHAPES}


@pytest.mark.parametrize("colour", COLOURS)
def test_each_colour_is_told_from_the_others(colour):
    clip = clip_of(f"a small {colour} star moves right on a white background", size=64)
    verdicts = {c: judge(clip, f"a {c} star moves right") for c in COLOURS}
    assert {c: v.colour for c, v in verdicts.items()} == {c: c == colour for c in COLOURS}
    # A wrong colour is not also a wrong shape, direction or number.
    assert all(v.shape and v.direction and v.count for v in verdicts.values())


@pytest.mark.parametrize("degrees", [0, 15, -15, 30, -30, 90, 180])
def test_directions_are_told_apart_at_half_the_angle_between_them(degrees):
    clip = np.full((25, 64, 64, 3), 245, dtype=np.uint8)
    way = np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
    for frame in range(25):
        draw_disc(clip, frame, 0.5 + (frame / 24 - 0.5) * 0.4 * way, 0.12, "blue")
    assert judge(clip, "a blue circle moves right").direction == (abs(degrees) < 22.5)


@pytest.mark.parametrize(
    ("travel", "moves", "still"),
    [
        pytest.param(0.0, False, True, id="none"),
        pytest.param(0.02, False, True, id="hardly"),
        pytest.param(0.13, False, False, id="neither"),
        pytest.param(0.3, True, False, id="enough"),
    ],
)
def test_a_move_needs_some_travel_and_stillness_its_absence(travel, moves, still):
    clip = np.full((25, 64, 64, 3), 245, dtype=np.uint8)
    for frame in range(25):
        draw_disc(clip, frame, (0.4 + travel * frame / 24, 0.5), 0.12, "blue")
    assert judge(clip, "a blue circle moves right").direction == moves
    assert judge(clip, "a blue circle stays still").direction == still


def test_turning_back_far_from_the_edge_is_no_bounce():
    clip = np.full((25, 64, 64, 3), 245, dtype=np.uint8)
    for frame in range(25):
        draw_disc(clip, frame, (0.65 - 0.3 * abs(frame / 12 - 1), 0.5), 0.12, "blue")
    assert not judge(clip, "a blue circle moves right and bounces off the edge").direction
    assert not judge(clip, "a blue circle moves right").direction


def test_objects_that_stop_far_apart_do_not_meet():
    clip = np.full((25, 128, 128, 3), 245, dtype=np.uint8)
    for frame in range(25):
        draw_disc(clip, frame, (0.15 + 0.15 * frame / 24, 0.5), 0.1, "blue")
        draw_disc(clip, frame, (0.85 - 0.15 * frame / 24, 0.5), 0.1, "red")
    result = judge(clip, "a blue circle and a red circle move towards each other")
    assert not result.direction
    assert result.tied


def test_a_tied_motion_needs_equal_lengths():
    clip = np.full((25, 128, 128, 3), 245, dtype=np.uint8)
    for frame in range(25):
        draw_disc(clip, frame, (0.2 + 0.6 * frame / 24, 0.25), 0.1, "blue")
        draw_disc(clip, frame, (0.2 + 0.25 * frame / 24, 0.75), 0.1, "red")
    result = judge(clip, "a blue circle and a red circle move right together")
    assert result.direction
    assert not result.tied


def test_a_second_object_of_the_same_colour_is_counted():
    clip = np.full((25, 64, 64, 3), 245, dtype=np.uint8)
    for frame in range(25):
        draw_disc(clip, frame, (0.3, 0.3), 0.15, "red")
        draw_disc(clip, frame, (0.7, 0.7), 0.1, "red")
    result = judge(clip, "a red circle stays still on a white background")
    assert result.colour and result.shape and result.direction
    assert not result.count


def test_an_object_that_vanishes_fails_colour_and_count():
    prompt = "a red circle stays still on a white background"
    clip = clip_of(prompt)
    clip[15:] = 245
    result = judge(clip, prompt)
    assert not result.colour and not result.count


def test_exchanged_colours_fail_the_shapes_only():
    clip = clip_of("a large blue star and a large red circle move up together")
    result = judge(clip, "a large red star and a large blue circle move up together")
    assert result.colour and result.direction and result.size and result.tied and result.count
    assert not result.shape


def test_an_unrecognisable_shape_is_none_of_the_five():
    clip = np.full((25, 128, 128, 3), 245, dtype=np.uint8)
    clip[:, 20:100, 60:68] = render.PALETTE["red"]
    verdicts = [judge(clip, f"a red {shape} stays still").shape for shape in SHAPES]
    assert not any(verdicts)


def test_every_form_of_clip_gives_the_same_answer():
    prompt = "a small yellow triangle moves up and left on a black striped background"
    clip = clip_of(prompt)
    scene = grammar.parse(prompt)
    expected = adherence.measure(clip, scene)
    forms = [
        clip / 255,
        (clip / 255).astype(np.float32),
        torch.from_numpy(clip),
        torch.from_numpy(clip).float() / 255,
        (torch.from_numpy(clip) / 255).bfloat16(),
    ]
    assert expected.all
    assert all(adherence.measure(form, scene) == expected for form in forms)
    assert adherence.measure_many([clip, clip], [scene, scene]) == [expected, expected]


@pytest.mark.parametrize(
    ("clip", "error", "text"),
    [
        pytest.param(np.zeros((25, 64, 64), np.uint8), ValueError, "shape", id="no-channels"),
        pytest.param(np.zeros((25, 3, 64, 64), np.uint8), ValueError, "shape", id="channels-first"),
        pytest.param(np.zeros((0, 64, 64, 3), np.uint8), ValueError, "shape", id="empty"),
        pytest.param(np.zeros((2, 64, 64, 3), np.int64), ValueError, "int64", id="int64"),
        pytest.param(np.full((2, 64, 64, 3), -1.0), ValueError, "[0, 1]", id="out-of-range"),
        pytest.param(np.full((2, 64, 64, 3), np.nan), ValueError, "[0, 1]", id="nan"),
        pytest.param([[0.0]], TypeError, "list", id="list"),
    ],
)
def test_what_is_not_a_clip_is_refused(clip, error, text):
    with pytest.raises(error) as caught:
        judge(clip, "a red circle moves left")
    assert text in str(caught.value)


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"sla-video\[train\]"):
        segmentation.ndimage()


def test_summary_counts_only_what_applies():
    scene = Scene(
        objects=(ObjectSpec(colour="red", shape="circle"),),
        motions=(Motion(kind="still"),),
        relation="single",
    )
    good = adherence.measure(clip_of("a red circle stays still", size=64), scene)
    bad = replace(good, colour=False, size=False)
    table = adherence.summary([good, bad])
    assert (table["colour"], table["colour_n"]) == (50, 2)
    assert (table["size"], table["size_n"]) == (0, 1)
    assert (table["core"], table["all"]) == (50, 50)
    assert np.isnan(table["tied"]) and table["tied_n"] == 0
