"""The benchmark for GPUs, run through the interpreter at sizes where the times mean nothing."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from operator_inputs import fixed_alpha_router
from triton_cases import DEVICE, needs_triton, reference, relative

from sla_video.kernels import gpu_bench, peers
from sla_video.kernels.gpu_bench import (
    SPARSE_ALONE,
    Shape,
    check_error,
    forward_memory,
    gaussian_inputs,
    sparse_alone,
    time_backward,
    time_forward,
    time_growth,
)
from sla_video.kernels.gpu_timing import CUDNN, FLASH, time_runs

pytestmark = needs_triton
CPU = torch.device("cpu")
SHAPE = Shape(length=300, heads=1, head_dim=32)


@pytest.fixture
def qkv():
    return gaussian_inputs(SHAPE, torch.device(DEVICE), torch.bfloat16)


@pytest.fixture
def no_peers(monkeypatch):
    """Whatever is installed here."""
    monkeypatch.setattr(peers.Peer, "installed", lambda self: None)


def test_medians_ratios_and_operations(monkeypatch):
    from sla_video.kernels import gpu_timing

    # The first round only says how long one takes.
    times = {"dense": iter([9, 4, 6, 5]), "ours": iter([9, 2, 1, 3])}
    monkeypatch.setattr(gpu_timing, "_host_milliseconds", lambda run: float(next(run())))
    runs = {(CUDNN, None): lambda: times["dense"], ("SLA2", 0.5): lambda: times["ours"]}
    rows = time_runs(runs, "forward", CPU, operations={("SLA2", 0.5): 8e9}, repeats=3)
    dense, ours = rows
    assert (dense.milliseconds, dense.fastest_milliseconds, dense.ratio) == (5, 4, 1)
    assert (ours.milliseconds, ours.fastest_milliseconds, ours.ratio) == (2, 1, 2.5)
    assert ours.tflops == pytest.approx(4) and dense.tflops is None
    assert (ours.attention, ours.sparsity, ours.repeats, ours.note) == ("SLA2", 0.5, 3, "")


def test_what_fails_gets_a_reason_and_the_others_run():
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    def refuse():
        raise RuntimeError("No available kernel.\nAborting execution.")

    runs = {(CUDNN, None): refuse, (FLASH, None): int, ("SLA2", 0.5): int, ("Other", None): fail}
    cudnn, flash, ours, other = time_runs(runs, "forward", CPU, repeats=2)
    assert cudnn.note == "RuntimeError: No available kernel." and cudnn.milliseconds is None
    assert other.note == "out of memory" and other.ratio is None
    # Without cuDNN the other dense one is the baseline.
    assert flash.ratio == 1
    assert ours.ratio == pytest.approx(flash.milliseconds / ours.milliseconds)


def test_number_of_rounds_follows_from_the_time_they_take():
    (row,) = time_runs({("SLA2", 0.5): int}, "forward", CPU)
    assert row.repeats == 50
    (row,) = time_runs({("SLA2", 0.5): int}, "forward", CPU, seconds=0)
    assert row.repeats == 5


@pytest.mark.usefixtures("no_peers")
def test_forward_rows(qkv):
    rows = time_forward(qkv, (0.5, 0.8), "int8_fp8", repeats=1)
    assert [(row.attention, row.sparsity) for row in rows] == [
        (CUDNN, None),
        (FLASH, None),
        ("SLA2", 0.5),
        ("SLA2", 0.8),
        (SPARSE_ALONE, 0.5),
        (SPARSE_ALONE, 0.8),
    ]
    by_name = {(row.attention, row.sparsity): row for row in rows}
    flash, sparse = by_name[FLASH, None], by_name[SPARSE_ALONE, 0.8]
    assert flash.tflops * flash.milliseconds == pytest.approx(4 * 300 * 300 * 32 / 1e9)
    # One of five key blocks.
    assert sparse.tflops * sparse.milliseconds == pytest.approx(4 * 300 * 64 * 32 / 1e9)


def test_backward_rows(qkv):
    rows = time_backward(qkv, 0.5, "int8", repeats=1)
    assert [row.attention for row in rows] == [CUDNN, FLASH, "SLA2"]
    assert {row.direction for row in rows} == {"forward + backward"}
    assert rows[-1].milliseconds > 0


def test_the_sparse_kernel_alone_is_the_sparse_branch(qkv):
    out = sparse_alone(qkv, 0.6, "bf16")()
    router = fixed_alpha_router(torch.inf, 1, 32, torch.float32).to(DEVICE)
    assert relative(out, reference(qkv, router, sparsity=0.6)[0]) < 5e-3


def test_nothing_wrong_is_timed(qkv, monkeypatch):
    error = check_error(qkv, 0.5, "bf16")
    assert 0 < error < 0.01
    right = gpu_bench.forward
    monkeypatch.setattr(gpu_bench, "forward", lambda *a: lambda: 1.02 * right(*a)())
    with pytest.raises(RuntimeError, match=r"'bf16' differs from the float64 reference by 0\.02"):
        check_error(qkv, 0.5, "bf16")


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU knows its memory")
def test_memory_is_not_known_without_a_gpu(qkv):
    assert forward_memory(qkv, 0.5, "bf16") is None


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU knows its memory")
def test_memory(qkv):
    found = forward_memory(qkv, 0.5, "bf16")
    assert found["qkv_bytes"] == 3 * qkv[0].nbytes
    assert found["extra_with_output"] - found["extra"] == pytest.approx(1 / 3)
    assert found["extra"] > 0


class TestGrowth:
    @staticmethod
    def rows(monkeypatch, milliseconds, lengths, *, fails_at=None):
        """Rows if each attention took `milliseconds(name, length)`."""

        def timed(runs, *_, **__):
            (length,) = {len_of(run) for run in runs.values()}
            if length == fails_at:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return [
                gpu_bench.GpuRow(
                    attention=name,
                    direction="forward",
                    sparsity=None,
                    milliseconds=milliseconds(name, length),
                )
                for name, _ in runs
            ]

        def len_of(run):
            return run

        monkeypatch.setattr(gpu_bench, "gaussian_inputs", lambda shape, *_: shape.length)
        monkeypatch.setattr(gpu_bench, "dense_runs", lambda n: {(CUDNN, None): n, (FLASH, None): n})
        monkeypatch.setattr(gpu_bench, "forward", lambda n, *_: n)
        monkeypatch.setattr(gpu_bench, "time_runs", timed)
        monkeypatch.setattr(gpu_bench, "check_error", lambda *_: 0.01)
        sizes = {"heads": 12, "head_dim": 128, "device": CPU, "dtype": torch.bfloat16}
        return list(time_growth(lengths, 0.97, "int8", longest_dense=5000, **sizes))

    def test_dense_attention_is_left_out_where_it_would_take_too_long(self, monkeypatch):
        def milliseconds(name, length):
            return {CUDNN: 1000, FLASH: 2000, "SLA2": 10}[name] * (length / 100) ** 2

        rows = self.rows(monkeypatch, milliseconds, [100, 200, 400, 800])
        assert [set(row["milliseconds"]) for row in rows] == [
            {CUDNN, FLASH, "SLA2"},
            {CUDNN, "SLA2"},
            {"SLA2"},
            {"SLA2"},
        ]
        assert rows[1]["notes"] == {FLASH: "left out: about 8 s a call"}
        assert rows[3]["notes"][CUDNN] == "left out: about 64 s a call"
        assert rows[3]["notes"][FLASH] == "left out: about 128 s a call"

    def test_too_little_memory_is_a_row_that_says_so(self, monkeypatch):
        rows = self.rows(monkeypatch, lambda *_: 1.0, [100, 200, 400], fails_at=200)
        assert [row["length"] for row in rows] == [100, 200, 400]
        assert rows[1]["milliseconds"] == {} and rows[1]["notes"] == {"SLA2": "out of memory"}
        assert len(rows[2]["milliseconds"]) == 3

    def test_for_real(self):
        sizes = {"heads": 1, "head_dim": 32, "device": torch.device(DEVICE)}
        rows = list(time_growth([70, 90], 0.5, "bf16", dtype=torch.bfloat16, repeats=1, **sizes))
        assert all(row["milliseconds"]["SLA2"] > 0 and row["error"] < 0.01 for row in rows)

    def test_nothing_wrong_is_timed(self, monkeypatch):
        right = gpu_bench.forward
        monkeypatch.setattr(gpu_bench, "forward", lambda *a: lambda: 1.02 * right(*a)())
        sizes = {"heads": 1, "head_dim": 32, "device": torch.device(DEVICE)}
        (row,) = time_growth([70], 0.5, "bf16", dtype=torch.bfloat16, **sizes)
        assert row["milliseconds"] == {} and "differs from the float64" in row["notes"]["SLA2"]


class TestPeers:
    def test_those_that_are_installed_are_timed(self, qkv, monkeypatch):
        calls = []

        def sparse(query, key, value, kv_sizes, q_sizes, kept, block_size):
            calls.append((query.shape, kv_sizes.tolist(), kept, block_size))

        monkeypatch.setattr(peers.Peer, "installed", lambda self: "1.0")
        for module, names in {
            "sageattention": {"sageattn": lambda *_, tensor_layout, is_causal: tensor_layout},
            "flash_attn": {"flash_attn_func": lambda *_: None},
            "fastvideo_kernel": {"video_sparse_attn": sparse},
        }.items():
            monkeypatch.setitem(sys.modules, module, SimpleNamespace(**names))
        monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
        rows = {row.attention: row for row in time_forward(qkv, (0.6,), "bf16", repeats=1)}
        assert rows["SageAttention"].milliseconds is not None
        assert rows["flash_attn"].sparsity is None
        assert rows["FastVideo VSA"].sparsity == 0.6
        # Its whole blocks, its own number of valid tokens in the last, two of five kept.
        assert calls[0] == ((1, 1, 320, 32), [64, 64, 64, 64, 44], 2, (4, 4, 4))
        assert rows["flash_attn_interface"].note.startswith("ModuleNotFoundError")

    def test_versions(self, monkeypatch):
        monkeypatch.setattr(peers, "version", lambda name: {"flash-attn": "2.8"}[name])
        monkeypatch.setattr(peers, "PackageNotFoundError", KeyError)
        described = peers.describe_peers()
        assert described["flash-attn"] == "2.8"
        assert described["sageattention"] == "not installed"
