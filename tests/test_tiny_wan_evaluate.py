"""The evaluation script: what it generates, measures and writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sla_video.pipelines.tiny_wan import evaluate
from sla_video.pipelines.tiny_wan.grammar import parse
from sla_video.pipelines.tiny_wan.models import (
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    save_pipeline,
)


def test_the_held_out_prompts_are_fixed_and_held_out() -> None:
    scenes, prompts = evaluate.held_out_prompts(30)
    assert evaluate.held_out_prompts(10) == (scenes[:10], prompts[:10])
    assert all(scene.held_out for scene in scenes)
    readings = [parse(prompt) for prompt in prompts]
    assert [r.objects for r in readings if r] == [s.objects for s in scenes]
    assert len(set(prompts)) == 30


def test_evaluate_compares_settings_from_the_same_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    encoder = build_text_encoder(len(build_tokenizer()))
    save_pipeline(tmp_path / "model", build_vae(), build_transformer(), encoder)
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    arguments = ["--model", tmp_path / "model", "--prompts", 2, "--size", 32, "--steps", 1]
    arguments += ["--settings", "dense", "0.0", "0.5", "--fidelity"]
    arguments += ["--json", report, "--sheet", sheet]
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    evaluate.main()
    rows = json.loads(report.read_text())
    assert list(rows) == ["dense", "0.0", "0.5"]
    # At full selection only rounding differs; at half of the blocks the videos do.
    assert rows["0.0"]["psnr_to_first"] > 60 > rows["0.5"]["psnr_to_first"]
    assert rows["0.0"]["ssim_to_first"] > rows["0.5"]["ssim_to_first"] > 0
    assert rows["0.0"]["velocity_error"] < 1e-4 < rows["0.5"]["velocity_error"]
    assert all(0 <= rows[s][column] <= 100 for s in rows for column in ("colour", "core", "all"))
    assert Image.open(sheet).size == (2 * 5 * 114 + 12, 112 + 24)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dense", evaluate.Setting()),
        ("0.9", evaluate.Setting(sparsity=0.9)),
        ("0.9/2", evaluate.Setting(sparsity=0.9, dense_steps=2)),
        (
            "runs/a@b@0.97:int8",
            evaluate.Setting(sparsity=0.97, routers="runs/a@b", sparse_dtype="int8"),
        ),
    ],
)
def test_settings_are_read(text: str, expected: evaluate.Setting) -> None:
    assert evaluate.Setting.parse(text) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--settings", "most"], "'most' is none of dense, 0.9"),
        (["--settings", "1.5"], "`sparsity` must be in [0, 1), got 1.5"),
        (["--settings", "0.9:int3"], "`sparse_dtype` must be one of"),
        (["--prompts", "0"], "--prompts: at least 1, got 0"),
        (["--json", "no/such/folder/a.json"], "there is no folder"),
    ],
)
def test_evaluate_refuses_nonsense(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_paired_distances_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 3, 32, 32, 3), dtype=np.uint8)
    b = a.copy()
    b[1, :, :, :, 0] ^= 16
    found = evaluate.paired_distance(a, b, torch.device("cpu"))
    mse = np.square((a[1].astype(float) - b[1]) / 255).mean()
    assert found["psnr"] == pytest.approx([96.02, -10 * np.log10(mse)], abs=0.01)
    assert found["ssim"][0] == pytest.approx(1) and 0.5 < found["ssim"][1] < 1


def test_evaluate_says_what_a_checkpoint_needs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--vae"):
        evaluate.load_pipeline(str(tmp_path), None, "ema")
