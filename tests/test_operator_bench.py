"""The rows of the benchmark, at a size where the times mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sla_video.kernels.bench import BenchRow, bench_operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows(dtype):
    calls = []
    rows = bench_operator(
        1, 200, 2, 16, (0.5, 0.8), dtype=dtype, repeats=2, on_repeat=lambda *c: calls.append(c)
    )
    assert [(row.impl, row.sparsity) for row in rows] == [
        ("dense", 0.0),
        ("torch", 0.5),
        ("torch", 0.8),
    ]
    assert [row.num_selected for row in rows] == [4, 2, 1]
    assert all(row.num_key_blocks == 4 for row in rows)
    assert all(row.milliseconds >= row.fastest_milliseconds > 0 for row in rows)
    assert rows[0].speedup == 1
    assert rows[1].speedup == pytest.approx(rows[0].milliseconds / rows[1].milliseconds)
    assert calls == [(0, 2), (1, 2), (2, 2)]


def test_one_sparsity_and_chosen_implementations():
    rows = bench_operator(1, 65, 1, 8, 0.5, impls=["reference", "torch"], repeats=1)
    assert [row.impl for row in rows] == ["dense", "reference", "torch"]
    assert isinstance(rows[0], BenchRow)


def test_refuses_to_time_a_wrong_implementation(monkeypatch):
    from sla_video.kernels import bench

    real = bench._sla2

    def wrong(query, key, value, sparsity, impl):
        run = real(query, key, value, sparsity, impl)
        return (lambda: run() + 1) if impl == "torch" else run

    monkeypatch.setattr(bench, "_sla2", wrong)
    with pytest.raises(RuntimeError, match=r"'torch' differs from the reference by 1\.00e\+00"):
        bench_operator(1, 65, 1, 8, 0.5, repeats=1)


@pytest.mark.parametrize("name", ["batch", "length", "heads", "head_dim", "repeats"])
def test_bad_sizes(name):
    sizes = {"batch": 1, "length": 8, "heads": 1, "head_dim": 8, "repeats": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        bench_operator(sparsity=0.5, **sizes)


def test_bad_sparsity():
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\), got 1.5"):
        bench_operator(1, 8, 1, 8, 1.5)


def test_the_script_that_times_each_part_runs(tmp_path):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    script = Path(__file__).parents[1] / "benchmarks" / "operator_parts.py"
    report = tmp_path / "parts.json"
    command = [sys.executable, script, "--dry-run", "--backward", "--json", report]
    command += ["--formats", "int8_fp8"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(report.read_text())["rows"]
    assert row["sparse_dtype"] == "int8_fp8"
    assert {
        "statistics",
        "routing",
        "prepare",
        "sums",
        "sparse",
        "sparse+mix",
        "whole",
        "backward",
    } <= row.keys()


def test_the_script_that_times_each_launch_runs(tmp_path):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    script = Path(__file__).parents[1] / "benchmarks" / "operator_parts.py"
    report = tmp_path / "launches.json"
    command = [sys.executable, script, "--dry-run", "--launches", "--json", report]
    command += ["--formats", "int8"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {row["bounded"] for row in rows} == {False, True}
    assert all(0 < row["error"] < 0.02 and row.keys() >= {"sparse+mix", "whole"} for row in rows)


def test_the_script_for_the_memory_checker_runs():
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    script = Path(__file__).parents[1] / "benchmarks" / "memory_check.py"
    command = [sys.executable, script, "--dry-run", "--part", "20/36"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "torch.bfloat16 int8 128 top_p 129: done in" in done.stdout
