"""`sla_video.warmup` runs what the real calls will run."""

from __future__ import annotations

import logging

import pytest
import torch

import sla_video
from sla_video.kernels import warmup as module

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import DEVICE, needs_triton

SMALL = {"heads": 2, "length": 100, "block_q": 32, "block_k": 32, "device": DEVICE}


@needs_triton
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"sparse_dtype": "int8_fp8", "selection": "top_p"}, {"return_lse": True}],
    ids=["default", "low_bit_top_p", "lse"],
)
def test_it_runs_the_operator_once_with_the_settings_given(settings, backward, monkeypatch):
    calls, gradients = [], []
    real = module.sla2_attention

    def record(query, key, value, **options):
        calls.append((query, options))
        query.requires_grad and query.register_hook(gradients.append)
        return real(query, key, value, **options)

    monkeypatch.setattr(module, "sla2_attention", record)
    state = torch.get_rng_state()
    seconds = sla_video.warmup(64, dtype=torch.float16, backward=backward, **SMALL, **settings)
    assert seconds > 0
    assert torch.equal(torch.get_rng_state(), state)
    ((query, options),) = calls
    assert query.shape == (1, 100, 2, 64) and query.dtype == torch.float16
    assert query.requires_grad == backward and len(gradients) == backward
    assert options["impl"] == "triton" and options["block_k"] == 32
    assert {name: options[name] for name in settings} == settings


@needs_triton
def test_some_blocks_are_selected_and_some_are_not(monkeypatch):
    """A problem that selects everything would leave the linear branch uncompiled."""
    from sla_video.kernels import triton_impl

    plans = []
    real = triton_impl.plan_blocks

    def record(*arguments):
        plans.append(real(*arguments))
        return plans[-1]

    monkeypatch.setattr(triton_impl, "plan_blocks", record)
    sla_video.warmup(32, **SMALL)
    (plan,) = plans
    assert plan.alpha is not None and (plan.alpha < 1).all()


def test_nothing_to_compile_on_a_cpu(monkeypatch, caplog):
    monkeypatch.setattr(module, "interpreted", lambda: False)
    monkeypatch.setattr(module, "sla2_attention", None)
    with caplog.at_level(logging.INFO, "sla_video"):
        assert sla_video.warmup(device="cpu") == 0.0
    assert "nothing to compile for cpu" in caplog.text


@needs_triton
def test_what_the_kernels_cannot_do_is_refused():
    with pytest.raises(ValueError, match="head dimensions up to 128, got 256"):
        sla_video.warmup(256, **SMALL)
