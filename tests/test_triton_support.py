"""Where the Triton operator runs, what it refuses, and that it neither waits nor recompiles."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import DEVICE, SMALL, inputs, needs_triton, triton

from sla_video.kernels import api, triton_support
from sla_video.kernels.api import available_implementations, sla2_attention
from sla_video.kernels.triton_attend import _attend_kernel

pytestmark = [needs_triton, pytest.mark.usefixtures("no_grad")]


REFUSALS = {
    "float64": ({}, torch.float64, "for float16, bfloat16 and float32, got torch.float64"),
    "block_q": ({"block_q": 48}, None, "for `block_q` in 16, 32, 64, 128 .* got 48"),
    "block_k": ({"block_k": 256}, None, "for `block_k` in 16, 32, 64, 128 .* got 256"),
    "block_k_8_bit": (
        {"block_k": 16, "sparse_dtype": "int8_int8"},
        None,
        "for `block_k` in 32, 64, 128 with sparse_dtype='int8_int8', got 16",
    ),
}


@pytest.mark.parametrize(("options", "dtype", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(options, dtype, message):
    qkv = inputs(8, dtype=dtype or torch.float32)
    with pytest.raises(ValueError, match=f"impl='triton' is {message}"):
        triton(qkv, **options)


def test_refuses_wide_heads():
    with pytest.raises(ValueError, match="for head dimensions up to 128, got 160; use 'torch'"):
        triton(inputs(8, head_dim=160))


def test_auto_takes_the_kernels_on_a_gpu_only(monkeypatch, caplog):
    monkeypatch.setattr(api, "_ANNOUNCED", set())
    with caplog.at_level(logging.INFO, logger="sla_video"):
        sla2_attention(*inputs(8))
    assert f"chose '{'triton' if DEVICE == 'cuda' else 'torch'}'" in caplog.text


@pytest.mark.parametrize(
    ("is_cuda", "interpreted", "reason", "chosen"),
    [
        (True, False, None, "sla2_triton"),
        (True, False, "for head dimensions up to 128", "sla2_torch"),
        (True, True, None, "sla2_torch"),
        (False, False, None, "sla2_torch"),
    ],
    ids=["gpu", "gpu_that_cannot", "interpreter", "cpu"],
)
def test_auto_takes_the_kernels_only_where_they_can(
    monkeypatch, is_cuda, interpreted, reason, chosen
):
    monkeypatch.setattr(api, "interpreted", lambda: interpreted)
    monkeypatch.setattr(api, "why_not", lambda *_: reason)
    monkeypatch.setattr(api, "why_unavailable", lambda: None)
    query = SimpleNamespace(is_cuda=is_cuda)
    assert api._choose("auto", query, SimpleNamespace(selection="top_k")).__name__ == chosen


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU can be waited for")
@pytest.mark.parametrize("selection", ["top_k", "top_p"])
def test_nothing_waits_for_the_device(selection):
    qkv = inputs(300, dtype=torch.bfloat16)
    settings = SMALL | {"selection": selection, "sparse_dtype": "int8"}
    triton(qkv, **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton(qkv, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing")
def test_lengths_share_compiled_kernels():
    def compiled():
        return sum(len(cache[0]) for cache in _attend_kernel.device_caches.values())

    # Where everything is selected there is nothing to mix: a kernel of its own.
    for length in (1, 300):
        triton(inputs(length, dtype=torch.bfloat16))
    before = compiled()
    assert before
    for length in (1, 16, 64, 301, 1000, 1024):
        triton(inputs(length, dtype=torch.bfloat16))
    assert compiled() == before


def test_reasons_are_given_in_words(monkeypatch):
    assert available_implementations()["triton"] == "available"
    monkeypatch.setattr(triton_support, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available_implementations()["triton"].startswith("not available: there is no CUDA GPU")
    with pytest.raises(ValueError, match="impl='triton' is not available: there is no CUDA GPU"):
        triton(inputs(8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    reason = "it needs compute capability 8.0 or newer, and Old GPU has 7.5; use 'torch' instead"
    assert reason in available_implementations()["triton"]
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda _: None)
    assert "package 'triton' is not installed" in available_implementations()["triton"]
