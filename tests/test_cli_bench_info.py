"""`sla-video bench` and `sla-video info`, and what the embedded model says about prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_tools import SMALL, call

import sla_video
from sla_video.pipelines import environment, model_source
from sla_video.pipelines.tiny_wan.grammar import GRAMMAR_TEXT

BENCH = ("--heads", "2", "--head-dim", "16", "--repeats", "2", "--device", "cpu")
SENTENCE = "a red circle moves left on a white background"


def test_bench_prints_a_table() -> None:
    outcome = call("bench", "--length", 300, "--sparsity", 0.5, "--sparsity", 0.8, *BENCH)
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    title, _, header, _, dense, *sparse = (line for line in outcome.out.splitlines())
    assert title.startswith("[B, L, H, D] = [1, 300, 2, 16], float32, ")
    columns = ("attention", "sparsity", "key blocks kept", "median ms", "fastest ms", "speed-up")
    assert [cell.strip() for cell in header.strip("| ").split("|")] == list(columns)
    assert "dense (SDPA)" in dense
    assert "5 of 5" in dense
    assert "1.00x" in dense
    rows = [line for line in sparse if line.strip()]
    assert [("0.5" in row, "0.8" in row) for row in rows] == [(True, False), (False, True)]
    assert all("SLA2 torch" in row for row in rows)


def test_bench_json() -> None:
    outcome = call("bench", "--length", 100, "--length", 200, "--sparsity", 0.5, *BENCH, "--json")
    result = json.loads(outcome.out)
    assert result["device"] == "cpu"
    assert result["dtype"] == "float32"
    assert result["repeats"] == 2
    assert result["threads"] == torch.get_num_threads()
    assert result["versions"]["sla-video"] == sla_video.__version__
    assert [shape["length"] for shape in result["shapes"]] == [100, 200]
    for shape in result["shapes"]:
        assert (shape["batch"], shape["heads"], shape["head_dim"]) == (1, 2, 16)
        dense, *rows = shape["rows"]
        assert dense["impl"] == "dense"
        assert dense["speedup"] == 1
        assert rows
        for row in rows:
            ratio = dense["milliseconds"] / row["milliseconds"]
            assert row["speedup"] == pytest.approx(ratio)


def test_info_names_what_is_here() -> None:
    outcome = call("info")
    assert outcome.code == 0
    assert outcome.err == ""
    wanted = [f"sla-video {sla_video.__version__}", f"torch {torch.__version__}", "  cpu: "]
    wanted += ["  reference: available", "  torch: available", "  triton: ", "models:", "routers:"]
    for words in wanted:
        assert words in outcome.out


def test_info_lists_models_and_routers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "assets" / "tiny-wan"
    (model / "vae").mkdir(parents=True)
    (model / "vae" / "weights.safetensors").write_bytes(bytes(2_000_000))
    (model / "routers").mkdir()
    (model / "routers" / "routers.json").write_text("{}")
    monkeypatch.setattr(model_source, "embedded_folder", lambda: model)
    found = json.loads(call("info", "--json").out)
    assert found["models"]["tiny-wan"]["files"]["vae/weights.safetensors"] == 2_000_000
    assert found["routers"]["tiny-wan/routers"]["files"] == {"routers.json": 2}
    text = call("info").out
    assert f"  tiny-wan: 2.0 MB in {model}" in text
    assert "  tiny-wan/routers: 0.0 MB" in text


def test_info_without_an_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "embedded_folder", lambda: tmp_path / "none" / "tiny-wan")
    assert "none come with this installation" in call("info").out


def test_info_prints_the_grammar() -> None:
    assert call("info", "--grammar").out == GRAMMAR_TEXT + "\n"


def test_processor_has_a_name() -> None:
    assert environment.device_name(torch.device("cpu")).strip()


@pytest.fixture
def embedded(tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny random pipeline under the name of the embedded model."""
    monkeypatch.setattr(model_source, "embedded_folder", lambda: tiny_pipeline_dir)


@pytest.mark.usefixtures("embedded")
def test_prompts_outside_the_grammar_are_warned_about(tmp_path: Path) -> None:
    prompts = ("a cat surfing", SENTENCE, "a dog")
    outcome = call("generate", *prompts, *SMALL, "--out", tmp_path)
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 3
    assert outcome.err.startswith("sla-video: warning: ")
    assert outcome.err.count("warning") == 2
    assert "'a cat surfing' is outside its grammar" in outcome.err
    assert "'a dog' is outside the grammar too" in outcome.err
    assert outcome.err.count(GRAMMAR_TEXT) == 1


@pytest.mark.usefixtures("embedded")
def test_prompts_of_the_grammar_are_not(tmp_path: Path) -> None:
    outcome = call("generate", SENTENCE, *SMALL, "--out", tmp_path)
    assert "warning" not in outcome.err


def test_other_models_have_no_grammar(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    arguments = ("--model", tiny_pipeline_dir, *SMALL, "--out", tmp_path)
    assert "warning" not in call("generate", "a cat surfing", *arguments).err


def test_verbose_says_which_implementation_runs(
    tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sla_video.kernels import api

    monkeypatch.setattr(api, "_ANNOUNCED", set())
    arguments = ("generate", "a cat", "--model", tiny_pipeline_dir, *SMALL, "--out", tmp_path)
    assert "chose 'torch'" in call("--verbose", *arguments).err
    monkeypatch.setattr(api, "_ANNOUNCED", set())
    assert "chose" not in call(*arguments).err
