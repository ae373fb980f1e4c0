"""`sla-video calibrate`: what it writes, and every way to ask for nonsense."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import assert_refused, call, files_below
from tiny_families_other import ltx

from sla_video import disable_sla, enable_sla, load_routers
from sla_video.calibration.calibration_request import world_prompts
from sla_video.pipelines import loading, router_files
from sla_video.pipelines.tiny_wan.evaluate import held_out_prompts
from sla_video.pipelines.tiny_wan.grammar import check_prompt
from tiny_models import TINY_CALL, build_tiny_pipeline

PROMPTS = ("a red circle moves left", "a blue square")
# 17 frames of 64 x 64 are 320 tokens: 3 query blocks and 5 key blocks.
SMALL = ("--frames", "17", "--height", "64", "--width", "64", "--device", "cpu")
QUICK = ("--steps", "3", "--capture-steps", "2", "--denoising-steps", "3", "--guidance-scale", "3")


def calibrate(model: Path, *arguments: object, prompts: tuple[str, ...] = PROMPTS) -> Any:
    return call("calibrate", *prompts, "--model", model, *SMALL, *QUICK, *arguments)


def test_one_folder_for_each_sparsity(tiny_pipeline_dir: Path, here: Path) -> None:
    outcome = calibrate(
        tiny_pipeline_dir, "--sparsity", "0.4", "--sparsity", "0.8", "--spill", "spill"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == ["routers/0.4", "routers/0.8"]
    names = ["routers.json", "routers.safetensors"]
    wanted = [f"routers/{s}/{name}" for s in ("0.4", "0.8") for name in names]
    assert files_below(here) == sorted(["routers", "routers/0.4", "routers/0.8", *wanted])
    assert "transformer.blocks.2.attn1" in outcome.err and "recall" in outcome.err
    for sparsity in (0.4, 0.8):
        found = load_routers(here / "routers" / f"{sparsity}")
        assert found.config.sparsity == sparsity
        assert found.resolution == (17, 64, 64)
        layers = found.metrics["layers"]
        assert layers.keys() == found.routers.keys() and len(layers) == 3
        for layer in layers.values():
            assert layer["after"]["error"] <= layer["before"]["error"]
            assert 0 < layer["after"]["recall"] <= 1
            assert layer["chosen"] in ("training-free", "alpha", "router+alpha")
        settings = found.metrics["settings"]
        assert settings["prompts"] == list(PROMPTS) and settings["steps"] == 3


def test_the_routers_are_for_enable_sla(
    tiny_pipeline_dir: Path, here: Path, tiny_pipeline: Any
) -> None:
    options = ("--alpha", "per_block", "--router-per-head", "--phi-k", "raw", "--dense-layer", "-1")
    options += ("--token-order", "tile:2,4,4")
    outcome = calibrate(tiny_pipeline_dir, *options, "--sparsity", "0.6", "--out", "mine")
    assert outcome.code == 0, outcome.err
    routers = load_routers(here / "mine")
    config = routers.config
    assert (config.alpha, config.num_query_blocks, config.phi_k) == ("per_block", 3, "raw")
    assert config.token_order == "tile:2,4,4"
    assert config.router_per_head and config.dense_layers == (-1,)
    layers = routers.metrics["layers"].values()
    assert {layer["chosen"] for layer in layers} <= {"untrained", "alpha", "router+alpha"}
    assert len(routers.routers) == 2
    handle = enable_sla(tiny_pipeline, here / "mine")
    try:
        frames = tiny_pipeline(**TINY_CALL, output_type="latent").frames
    finally:
        disable_sla(tiny_pipeline)
    assert frames.isfinite().all() and handle.stats().sparsity > 0.3


def test_sixteen_bits(tiny_pipeline_dir: Path, here: Path) -> None:
    assert calibrate(tiny_pipeline_dir, "--sparsity", "0.6", "--dtype", "bf16").code == 0
    routers = load_routers(here / "routers")
    assert {p.dtype for r in routers.routers.values() for p in r.parameters()} == {torch.float32}
    assert 0 < routers.metrics["mean"]["after"]["rel_l1"] < 1


def test_a_mean_sparsity_is_met(tiny_pipeline_dir: Path, here: Path) -> None:
    outcome = calibrate(tiny_pipeline_dir, "--mean-sparsity", "0.7", "--out", "mean")
    assert outcome.code == 0, outcome.err
    config = load_routers(here / "mean").config
    plan = [config.layer_sparsity[i] for i in range(3)]
    assert config.layer_plan(3) == plan
    assert sum(plan) / 3 >= 0.7 - 1e-9


def test_a_target_recall_is_met_before_the_fit(tiny_pipeline_dir: Path, here: Path) -> None:
    outcome = calibrate(tiny_pipeline_dir, "--target-recall", "0.4", "--out", "recall")
    assert outcome.code == 0, outcome.err
    assert load_routers(here / "recall").metrics["mean"]["before"]["recall"] >= 0.4 - 1e-9


def test_two_transformers(here: Path) -> None:
    pipe = build_tiny_pipeline(two_transformers=True)
    pipe.save_pretrained(here / "model")
    options = ("--denoising-steps", "8", "--out", "two")
    outcome = calibrate(here / "model", *options, prompts=PROMPTS[:1])
    assert outcome.code == 0, outcome.err
    routers = load_routers(here / "two")
    assert set(routers.models) == {"transformer", "transformer_2"} and len(routers.routers) == 6
    enable_sla(pipe, routers)


def test_the_embedded_models_prompts_are_scenes_it_was_trained_on() -> None:
    prompts = world_prompts(50, 0)
    assert len(set(prompts)) == 50 and prompts == world_prompts(50, 0)
    assert [prompt for prompt in prompts if check_prompt(prompt)] == []
    assert not set(prompts) & set(held_out_prompts(200)[1])


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "1"], ["`sparsity` must be in [0, 1), got 1"]),
        (["--sparsity", "nan"], ["`sparsity` must be in [0, 1), got nan"]),
        (["--sparsity", "0.9", "--sparsity", "0.9"], ["`sparsity` is given twice"]),
        (["--mean-sparsity", "1"], ["`mean_sparsity` must be in (0, 1), got 1"]),
        (["--target-recall", "-1"], ["`target_recall` must be in (0, 1), got -1"]),
        (["--sparsity", "0.9", "--mean-sparsity", "0.9"], ["exclude each other"]),
        (["--mean-sparsity", "0.9", "--target-recall", "0.9"], ["exclude each other"]),
        (["--dense-layer", "7"], ["names layer 7", "has 3 layers"]),
        (["--dense-layer", "0", "--dense-layer", "-3"], ["names layer 0 twice"]),
        ([x for i in range(3) for x in ("--dense-layer", i)], ["names all layers"]),
        (["--alpha", "fixed"], ["`alpha` must be one of adaptive, per_block, got 'fixed'"]),
        (["--phi-k", "rough"], ["`phi_k` must be one of smoothed, raw, got 'rough'"]),
        (["--token-order", "spiral"], ["`token_order` must be raster, ", "got 'spiral'"]),
        (["--trainable", "all"], ["`trainable` must be one of router+alpha, router, alpha"]),
        (["--steps", "-1"], ["`steps` must be at least 0, got -1"]),
        (["--capture-steps", "0"], ["`capture_steps` must be at least 1, got 0"]),
        (["--memory", "0"], ["`memory` must be a positive number, got 0"]),
        (["--learning-rate", "nan"], ["`learning_rate` must be a positive number"]),
        (["--guidance-scale", "-1"], ["`guidance_scale`", "got -1"]),
        (["--frames", "6"], ["`frames` must be 4k+1", "got 6"]),
        (["--prompts", "missing.txt"], ["not both"]),
        (["--out", "taken"], ["taken exists and is not empty", "--overwrite"]),
        (["--out", "taken/file"], ["must be a folder", "taken/file"]),
        (["another", ""], ["`prompt` is empty"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_settings(
    arguments: list[object], words: list[str], tiny_pipeline_dir: Path, here: Path
) -> None:
    (here / "taken").mkdir()
    (here / "taken" / "file").write_text("")
    assert_refused(calibrate(tiny_pipeline_dir, *arguments), *words)
    assert files_below(here) == ["taken", "taken/file"]


@pytest.mark.usefixtures("nothing_is_loaded")
def test_no_prompts(tiny_pipeline_dir: Path, here: Path) -> None:
    assert_refused(calibrate(tiny_pipeline_dir, prompts=()), "no prompts given", "for instance")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--capture-steps", "9", "--spill", "new"],
            ["`capture_steps` is 9", "3 of the 3 denoising steps"],
        ),
        (["--memory", "0.00001"], ["captured calls of one layer", "--spill"]),
        (["--mean-sparsity", "0.995"], ["`mean_sparsity` must be from 0.5 to 0.99"]),
        (["--target-recall", "0.999"], ["`target_recall` is 0.999", "ask for less"]),
        (["--spill", "full"], ["full is not empty and holds no captures"]),
        (["--device", "cpu", "--offload"], ["`offload`", "needs a GPU"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_what_only_the_model_can_refuse(
    arguments: list[str], words: list[str], tiny_pipeline_dir: Path, here: Path
) -> None:
    (here / "full").mkdir()
    (here / "full" / "file").write_text("")
    assert_refused(calibrate(tiny_pipeline_dir, *arguments), *words)
    assert files_below(here) == ["full", "full/file"]


def test_a_model_with_another_transformer(
    tiny_pipeline_dir: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build_tiny_pipeline()
    pipe.transformer = torch.nn.Linear(2, 2)
    monkeypatch.setattr(loading, "load_pipeline", lambda *_, **__: pipe)
    outcome = calibrate(tiny_pipeline_dir)
    assert_refused(outcome, "supports WanTransformer3DModel", "Linear")
    assert files_below(here) == []


def test_a_model_of_another_family(
    tiny_pipeline_dir: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_pipeline", lambda *_, **__: ltx("LTXPipeline"))
    assert_refused(calibrate(tiny_pipeline_dir), "Wan's models", "LTX")
    assert files_below(here) == []


def test_values_that_are_not_numbers(here: Path, broken: Path) -> None:
    pipe = build_tiny_pipeline()
    with torch.no_grad():
        pipe.transformer.blocks[2].attn1.to_v.bias.fill_(float("inf"))
    pipe.transformer.save_pretrained(broken / "transformer")
    assert_refused(calibrate(broken), "the values of transformer.blocks.2.attn1", "not numbers")
    assert files_below(here) == []


def fill_up_the_disk(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    writes = []
    real = router_files._write_atomically

    def write(path: Path, content: bytes) -> None:
        writes.append(path)
        if len(writes) > after:
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(router_files, "_write_atomically", write)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_disk_that_fills_up_leaves_nothing(
    after: int, tiny_pipeline_dir: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_up_the_disk(monkeypatch, after=after)
    outcome = calibrate(tiny_pipeline_dir, "--sparsity", "0.4", "--sparsity", "0.8", "--steps", "0")
    assert_refused(outcome, "cannot write routers", "No space left on device")
    assert files_below(here) == []


def test_routers_are_replaced_when_asked_and_whole(
    tiny_pipeline_dir: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--out", "mine", "--steps", "0")
    assert calibrate(tiny_pipeline_dir, *options, "--sparsity", "0.4").code == 0
    (here / "mine" / "notes.txt").write_text("kept")
    with monkeypatch.context() as patch:
        fill_up_the_disk(patch, after=1)
        outcome = calibrate(tiny_pipeline_dir, *options, "--sparsity", "0.8", "--overwrite")
        assert_refused(outcome, "No space left on device")
    assert load_routers(here / "mine").config.sparsity == 0.4
    assert calibrate(tiny_pipeline_dir, *options, "--sparsity", "0.8", "--overwrite").code == 0
    assert load_routers(here / "mine").config.sparsity == 0.8
    assert sorted(os.listdir(here / "mine")) == ["notes.txt", "routers.json", "routers.safetensors"]
    assert (
        json.loads((here / "mine" / "routers.json").read_text())["metrics"]["stage"] == "calibrate"
    )
