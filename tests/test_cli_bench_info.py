"""`sla-video bench` and `sla-video info`, and what the embedded model says about prompts."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from cli_tools import SMALL, assert_refused, call, files_below

import sla_video
from sla_video.pipelines import attention_bench, environment, json_file, model_source
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
    arguments = ("bench", "--length", 100, "--length", 200, "--sparsity", 0.5, *BENCH)
    result = json.loads(call(*arguments, "--json", "-").out)
    assert result["device"] == "cpu"
    assert result["dtype"] == "float32"
    assert result["repeats"] == 2
    assert result["threads"] == torch.get_num_threads()
    assert result["versions"]["sla-video"] == sla_video.__version__
    assert result["command"].startswith("sla-video bench --length 100 --length 200 --sparsity 0.5")
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(result["date"])).days) < 1
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


def test_bench_writes_json_beside_the_table(here: Path) -> None:
    (here / "times.json").write_text("old")
    outcome = call("bench", "--length", 100, *BENCH, "--json", "times.json")
    assert "| SLA2 torch" in outcome.out
    assert json.loads((here / "times.json").read_text())["shapes"][0]["length"] == 100
    assert files_below(here) == ["times.json"]


@pytest.mark.parametrize(
    ("file", "words"),
    [("none/x.json", "no folder none"), (".", "is a folder"), ("full.json", "No space left")],
)
def test_bench_json_that_cannot_be_written(
    file: str, words: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (here / "full.json").write_text("old")
    monkeypatch.setattr(json_file.os, "replace", full)
    if file != "full.json":
        # Refused before anything is timed.
        monkeypatch.setattr(attention_bench, "bench_attention", None)
    assert_refused(call("bench", "--length", 100, *BENCH, "--json", file), "cannot write", words)
    assert files_below(here) == ["full.json"]
    assert (here / "full.json").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--growth"], "`growth` needs a GPU"),
        (["--tune"], "`tune` needs a GPU"),
        (["--sparse-dtype", "int8"], "only simulates"),
        (["--sparse-dtype", "int4"], "`sparse_dtype` must be one of bf16, int8, int8_fp8"),
    ],
)
def test_bench_of_what_a_cpu_does_not_have(arguments: list[str], words: str) -> None:
    assert_refused(call("bench", *BENCH, *arguments), words)


class TestBenchOnAGpu:
    """The report for GPUs, by interpreted kernels on a CPU."""

    @pytest.fixture(autouse=True)
    def kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton", reason="Triton has no build for this platform")
        from sla_video.kernels import gpu_bench, peers

        monkeypatch.setattr(attention_bench, "has_kernels", lambda *_: True)
        monkeypatch.setattr(peers.Peer, "installed", lambda self: None)
        monkeypatch.setattr(gpu_bench, "GROWTH_LENGTHS", (70, 90))
        small = gpu_bench.Shape(name="small", length=100, heads=1, head_dim=32)
        monkeypatch.setattr(gpu_bench, "WAN_SHAPES", (small,))

    ARGUMENTS = ("bench", "--device", "cpu", "--dtype", "bf16", "--repeats", "1")

    def test_without_a_shape_it_is_the_whole_report(self, here: Path) -> None:
        outcome = call(*self.ARGUMENTS, "--sparsity", 0.5, "--json", "times.json")
        assert outcome.code == 0, outcome.err
        for words in (
            "small: [1, 100, 1, 32], int8_fp8",
            "relative L2 error to the float64 reference: ",
            "% at 0.5",
            "dense cuDNN did not run: RuntimeError",
            "| ratio to FlashAttention-2 |",
            "SLA2 sparse kernel alone",
            "Milliseconds by length, 1 heads of 32, SLA2 at sparsity 0.5",
        ):
            assert words in " ".join(outcome.out.split()), outcome.out
        result = json.loads((here / "times.json").read_text())
        assert {"triton", "cuda", "driver", "cudnn"} <= result["gpu"].keys()
        assert result["peers"]["sageattention"] == "not installed"
        assert [row["length"] for row in result["growth"]["rows"]] == [70, 90]
        (shape,) = result["shapes"]
        assert shape["name"] == "small" and 0 < shape["errors"]["0.5"] < 0.04
        assert {row["direction"] for row in shape["rows"]} == {"forward"}

    def test_a_shape_of_ones_own(self) -> None:
        sizes = ("--length", 80, "--heads", 1, "--head-dim", 32, "--sparsity", 0.5)
        outcome = call(*self.ARGUMENTS, *sizes, "--sparse-dtype", "bf16", "--json", "-")
        result = json.loads(outcome.out)
        assert result["sparse_dtype"] == "bf16" and result["growth"] is None
        (shape,) = result["shapes"]
        assert (shape["length"], shape["heads"], shape["head_dim"]) == (80, 1, 32)
        assert "forward + backward" in {row["direction"] for row in shape["rows"]}

    def test_tuning_comes_first(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from sla_video.kernels import launch_tuning
        from sla_video.kernels.launch_lists import LaunchConfig

        first, fast, bad = LaunchConfig(4, 5), LaunchConfig(8, 3, 128), LaunchConfig(4, 4)

        def tune(problem: launch_tuning.Problem, *_: object, on_case: launch_tuning.OnCase) -> list:
            assert (problem.length, problem.sparsity) == (100, 0.7)
            on_case(0, 2)
            on_case(1, 2)
            found = {"milliseconds": {first: 2.0, fast: 1.0}, "notes": {bad: "no room"}}
            return [
                launch_tuning.TunedLaunch(case="attend int8", chosen=fast, first=first, **found),
                launch_tuning.TunedLaunch(
                    case="other", chosen=first, first=first, milliseconds={}, notes={}
                ),
            ]

        monkeypatch.setattr(launch_tuning, "tune_operator", tune)
        shares = ("--sparsity", 0.5, "--sparsity", 0.7)
        outcome = call(*self.ARGUMENTS, *shares, "--no-growth", "--tune", "--json", "t.json")
        assert outcome.code == 0, outcome.err
        rows = [row.split("|")[1:-1] for row in outcome.out.splitlines() if " warps" in row]
        assert [[cell.strip() for cell in row] for row in rows] == [
            ["attend int8", "4 warps, 5 stages, 128x128", "2.000", ""],
            ["", "8 warps, 3 stages, 128 registers, 128x128", "1.000", "*"],
            ["", "4 warps, 4 stages, 128x128", "", "no room"],
            ["other", "4 warps, 5 stages, 128x128", "", "*"],
        ]
        tuned = json.loads((here / "t.json").read_text())["tuned"]
        assert tuned["sparsity"] == 0.7 and tuned["kernels"][0]["chosen"]["num_warps"] == 8

    def test_too_little_memory_while_tuning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sla_video.kernels import launch_tuning

        def full(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

        monkeypatch.setattr(launch_tuning, "tune_operator", full)
        assert_refused(call(*self.ARGUMENTS, "--tune"), "out of memory", "while tuning at 100")

    def test_too_little_memory_is_said_in_the_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sla_video.kernels import gpu_bench

        def full(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

        monkeypatch.setattr(gpu_bench, "time_forward", full)
        outcome = call(*self.ARGUMENTS, "--sparsity", 0.5, "--no-growth")
        assert outcome.code == 0
        assert "out of memory" in outcome.out

    def test_head_dims_beyond_the_kernels_are_refused(self) -> None:
        outcome = call(*self.ARGUMENTS, "--length", 80, "--heads", 1, "--head-dim", 256)
        assert_refused(outcome, "head dimensions up to 128, got 256")


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
