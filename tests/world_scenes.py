"""Scenes for the tests of the procedural world."""

from __future__ import annotations

import random

from sla_video.pipelines.tiny_wan import grammar
from sla_video.pipelines.tiny_wan.scenes import Scene, sample_scene


def scenes_of(number: int, seed: int = 0, *, held_out: bool = False) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, held_out=held_out) for _ in range(number)]


def read(prompt: str) -> Scene:
    scene = grammar.parse(prompt)
    assert scene is not None, prompt
    return scene
