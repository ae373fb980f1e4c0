"""The script of the quality table: its baseline, and that all of its rows can be run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import sla_video
from sla_video.calibration.calibration_request import CalibrationRequest
from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.config import SLAConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import quality_table
from quality_rows import ROWS, TRAINING
from quality_table import line, print_table
from sla_attention import install_sla

from tiny_models import build_tiny_transformer


def test_sla_adds_a_projection_of_linear_attention_to_all_keys() -> None:
    model = build_tiny_transformer()
    handle = sla_video.enable_sla(
        model, config=SLAConfig(block_q=16, block_k=8, sparsity=0.5, impl="reference")
    )
    processor = handle.processors["transformer.blocks.1.attn1"]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 40, 2, 16, generator=generator, dtype=torch.float64)
    for router in handle.routers.values():
        torch.nn.init.zeros_(router.alpha_scale)
        torch.nn.init.constant_(router.alpha_bias, 40.0)
    sparse = processor.sla2(q, k, v)
    names = list(handle.processors)
    weights = {name: torch.randn(16, 16, generator=generator) for name in names}
    install_sla(handle, weights)
    expected = sparse.clone()
    for h in range(2):
        scores = q[0, :, h].softmax(-1) @ k[0, :, h].softmax(-1).mT
        linear = (scores / scores.sum(-1, keepdim=True)) @ v[0, :, h]
        expected[0, :, h] += linear @ weights[names[1]].double()
    torch.testing.assert_close(processor.sla2(q, k, v), expected, rtol=1e-4, atol=1e-5)
    handle.remove()
    handle = sla_video.enable_sla(model, config=SLAConfig(block_q=16, block_k=8, sparsity=0.5))
    install_sla(handle)
    assert all(not router.linear_proj.any() for router in handle.routers.values())


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_settings_that_exist(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    if row.like is not None:
        assert ROWS[row.like].training is not None
    if row.calibration is not None:
        CalibrationRequest(out=tmp_path, **row.calibration)
    if row.training is not None:
        FinetuneConfig(max_steps=1, batch_size=2, **{**TRAINING, **row.training})


def test_the_table_is_in_the_order_of_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality_table.write(tmp_path / "dense.json", {"row": "dense", "all": 80.0})
    for name in ("SLA2 stage 1", "sparse only"):
        report = {"row": name, "sparsity": 0.9, "seed": 0, "all": 50.0, "seconds_per_video": 0.5}
        quality_table.write(tmp_path / name / "report.json", report)
    print_table(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [text.split("|")[1].strip() for text in lines[2:]] == [
        "dense",
        "sparse only",
        "SLA2 stage 1",
    ]
    assert lines[3].endswith("| 50 | 500 |") and lines[3] == line(
        json.loads((tmp_path / "sparse only" / "report.json").read_text())
    )
