"""What `sla-video tune` chooses of token compression."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_tools import Outcome, call, files_below

from sla_video import SLAConfig, TokenCompression, enable_sla, load_recipe, save_routers
from sla_video.calibration import tuning_compression, tuning_refinements
from sla_video.calibration.tuning_timing import WINDOW, middle_inputs, time_steps
from tiny_models import TINY_CALL, build_tiny_pipeline

PROMPTS = ("a red circle moves left", "a blue square")
# 17 frames of 64 x 64 are 5 x 8 x 8 = 320 tokens.
SIZE = {"num_frames": 17, "height": 64, "width": 64}
SMALL = ("--frames", "17", "--height", "64", "--width", "64", "--device", "cpu")
QUICK = ("--capture-steps", "1", "--denoising-steps", "2", "--guidance-scale", "3")
NAMES = [f"blocks.{number}.attn1" for number in range(3)]


def tune(model: Path, *arguments: object) -> Outcome:
    options = (*SMALL, *QUICK, "--token-order", "raster", "--no-key-orders", *arguments)
    return call("tune", *PROMPTS, "--model", model, *options)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[TokenCompression | None]:
    """Seconds of layers as made up: the first gains nothing, the others half of their time.

    The list says what was timed.
    """
    seen: list[TokenCompression | None] = []
    measure = tuning_compression._seconds

    def seconds(run: Any, recipe: Any, component: str, names: list[str], settings: Any) -> Any:
        found = measure(run, recipe, component, names, settings)
        assert list(found) == names == NAMES and all(value > 0 for value in found.values())
        seen.append(settings)
        return {name: 1.0 if settings is None or name == NAMES[0] else 0.5 for name in names}

    def drifts(run: Any, component: str, names: list[str]) -> dict[str, float]:
        found = measure_drifts(run, component, names)
        assert list(found) == names and all(value > 0 for value in found.values())
        return dict(zip(names, (0.1, 0.2, 0.3), strict=True))

    measure_drifts = tuning_compression._drifts
    monkeypatch.setattr(tuning_compression, "_seconds", seconds)
    monkeypatch.setattr(tuning_compression, "_drifts", drifts)
    monkeypatch.setattr(TokenCompression, "quantile", 0.67)
    return seen


def judge(monkeypatch: pytest.MonkeyPatch, pays: Any) -> None:
    (last,) = [r for r in tuning_refinements.REFINEMENTS if r.name == "compression"]
    monkeypatch.setattr(tuning_refinements, "REFINEMENTS", (last._replace(pays=pays),))


def test_it_is_kept_where_it_pays(
    tiny_pipeline_dir: Path,
    here: Path,
    timed: list[TokenCompression | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the two quiet layers the one that gains; and the recipe is what it says by hand."""
    steps: list[tuple[Any, Any]] = []

    def pays(before: Any, after: Any) -> bool:
        steps.append((before["transformer"], after["transformer"]))
        return True

    judge(monkeypatch, pays)
    outcome = tune(tiny_pipeline_dir, "--mean-sparsity", "0.6")
    assert outcome.code == 0, outcome.err
    assert "with compression" in outcome.err
    assert timed == [TokenCompression(pairs=0.5, layers=(0, 1, 2)), None]
    ((before, after),) = steps
    assert 0 < before["velocity_error"] != after["velocity_error"] > 0
    recipe = load_recipe("recipe.json")
    config = recipe.configs["transformer"]
    assert config.compression == TokenCompression(pairs=0.5, layers=(1,))
    assert recipe.measured["refinements"]["compression"] == {
        "kept": True,
        "without": {"transformer": before},
        "with": {"transformer": after},
    }

    def video(**settings: Any) -> torch.Tensor:
        pipe = build_tiny_pipeline()
        with enable_sla(pipe, **settings):
            generator = torch.Generator().manual_seed(0)
            arguments = {**TINY_CALL, **SIZE, "num_inference_steps": 4, "output_type": "latent"}
            frames: torch.Tensor = pipe(**arguments, generator=generator).frames
        return frames

    assert torch.equal(video(recipe="recipe.json"), video(config=config))
    assert not torch.equal(video(config=config), video(config=config.replace(compression=None)))


def test_it_is_left_out_where_it_does_not_pay(
    tiny_pipeline_dir: Path,
    here: Path,
    timed: list[TokenCompression | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge(monkeypatch, lambda before, after: False)
    outcome = tune(tiny_pipeline_dir, "--mean-sparsity", "0.6")
    assert outcome.code == 0, outcome.err
    recipe = load_recipe("recipe.json")
    assert recipe.configs["transformer"].compression is None
    assert recipe.measured["refinements"]["compression"]["kept"] is False
    assert "transformer: compression left out: with it a step takes " in outcome.err
    # Where no layer gains, steps are not timed for it.
    monkeypatch.setattr(tuning_compression, "_FASTER", 0.1)
    outcome = tune(tiny_pipeline_dir, "--mean-sparsity", "0.6", "--overwrite")
    assert outcome.code == 0 and load_recipe("recipe.json").measured["refinements"] == {}
    count = len(timed)
    outcome = tune(tiny_pipeline_dir, "--mean-sparsity", "0.6", "--overwrite", "--no-compression")
    assert outcome.code == 0 and len(timed) == count


def test_a_run_that_was_interrupted_goes_on_from_what_was_timed(
    tiny_pipeline_dir: Path,
    here: Path,
    timed: list[TokenCompression | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pressed(before: Any, after: Any) -> bool:
        raise KeyboardInterrupt

    judge(monkeypatch, pressed)
    outcome = tune(tiny_pipeline_dir, "--mean-sparsity", "0.6")
    assert outcome.code == 130 and files_below(here) == ["recipe.tuning.json"]
    judge(monkeypatch, lambda before, after: True)
    outcome = tune(tiny_pipeline_dir, "--mean-sparsity", "0.6")
    assert outcome.code == 0 and len(timed) == 2, outcome.err
    config = load_recipe("recipe.json").configs["transformer"]
    assert config.compression == TokenCompression(pairs=0.5, layers=(1,))
    assert files_below(here) == ["recipe.json"]


def test_what_it_does_not_go_with_is_no_error(tiny_pipeline_dir: Path, here: Path) -> None:
    """A table of mix weights for each query block has no place where queries come in runs."""
    with enable_sla(
        build_tiny_pipeline(), config=SLAConfig(alpha="per_block", num_query_blocks=3)
    ) as handle:
        save_routers("routers", handle)
    outcome = call(
        *("--verbose", "tune", *PROMPTS, "--model", tiny_pipeline_dir, *SMALL, *QUICK),
        *("--routers", "routers", "--mean-sparsity", "0.6", "--no-key-orders"),
    )
    assert outcome.code == 0, outcome.err
    assert "transformer is not compressed: " in outcome.err and "per_block" in outcome.err
    recipe = load_recipe("recipe.json")
    assert recipe.configs["transformer"].compression is None
    assert recipe.measured["refinements"] == {}


def test_steps_are_those_of_a_video() -> None:
    """Those in the middle, forwards with the prompt; and compression is full in the first."""
    pipe = build_tiny_pipeline()
    plan: Any = SimpleNamespace(
        prompts=PROMPTS, guidance_scale=3.0, frames=9, height=64, width=64, max_sequence_length=16
    )
    inputs = middle_inputs(pipe, plan, 0)
    assert len(inputs) == WINDOW
    found = time_steps(pipe.transformer, inputs, pipe.scheduler)
    outputs: list[torch.Tensor] = []
    pipe.transformer.register_forward_hook(lambda _m, _a, output: outputs.append(output[0]))
    generator = torch.Generator().manual_seed(0)
    arguments = {**TINY_CALL, "prompt": PROMPTS[-1], "num_inference_steps": WINDOW + 4}
    pipe(**arguments, output_type="latent", generator=generator)
    expected = outputs[: 2 * (WINDOW + 4) : 2][2 : 2 + WINDOW]
    for mine, theirs in zip(found.velocities, expected, strict=True):
        assert torch.equal(mine, theirs)
    settings = TokenCompression(pairs=0.5, layers=(1,), full_steps=1)
    config = SLAConfig(dense_layers=(0, 1, 2), compression=settings, dense_steps=0)
    with enable_sla(pipe, config=config):
        short = time_steps(pipe.transformer, inputs, pipe.scheduler)
    torch.testing.assert_close(short.velocities[0], found.velocities[0])
    for mine, theirs in zip(short.velocities[1:], found.velocities[1:], strict=True):
        assert 1e-4 < (mine - theirs).norm() / theirs.norm() < 0.5
