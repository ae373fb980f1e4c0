"""What `enable_sla` and `disable_sla` refuse, and that a refusal changes nothing."""

from __future__ import annotations

import logging
import types
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import (
    ContextParallelConfig,
    FlowMatchEulerDiscreteScheduler,
    attention_backend,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from sla_video import disable_sla, enable_sla
from tiny_models import build_tiny_pipeline, build_tiny_transformer


def test_enabling_twice_raises():
    pipe = build_tiny_pipeline()
    enable_sla(pipe)
    for model in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match="already enabled in 'transformer': call"):
            enable_sla(model)
    disable_sla(pipe)
    enable_sla(pipe)


def test_removing_twice_raises():
    model = build_tiny_transformer()
    handle = enable_sla(model)
    disable_sla(model)
    with pytest.raises(ValueError, match="already been removed"):
        handle.remove()
    with pytest.raises(ValueError, match="SLA attention is not enabled in this WanTransformer3DM"):
        disable_sla(model)


def test_a_stale_handle_does_not_remove_a_newer_patch():
    model = build_tiny_transformer()
    old = enable_sla(model)
    old.remove()
    new = enable_sla(model)
    assert new.active and not old.active
    with pytest.raises(ValueError, match="already been removed"):
        old.remove()
    assert new.active


@pytest.mark.parametrize("call", [enable_sla, disable_sla])
@pytest.mark.parametrize(
    ("model", "got"),
    [
        (torch.nn.Linear(2, 2), "got Linear"),
        (FlowMatchEulerDiscreteScheduler(), "got FlowMatchEulerDiscreteScheduler without a"),
        (
            types.SimpleNamespace(transformer=torch.nn.Linear(2, 2)),
            "got SimpleNamespace with a transformer Linear",
        ),
        (None, "got NoneType"),
    ],
    ids=["module", "scheduler", "pipeline", "none"],
)
def test_wrong_models_are_told_which_are_supported(call, model, got):
    with pytest.raises(TypeError, match="supports WanTransformer3DModel, WanVACE") as error:
        call(model)
    assert got in str(error.value)


def test_wrong_kinds_of_routers():
    with pytest.raises(TypeError, match="`routers` must be a folder, a hub id"):
        enable_sla(build_tiny_transformer(), routers=3)


def test_another_projects_processor_is_not_dropped_in_silence():
    class Custom(WanAttnProcessor):
        pass

    model = build_tiny_transformer()
    model.blocks[1].attn1.set_processor(Custom())
    with pytest.raises(ValueError, match=r"transformer.blocks.1.attn1 has the processor Custom"):
        enable_sla(model)
    assert type(model.blocks[0].attn1.processor) is WanAttnProcessor


def test_a_processor_that_was_exchanged_afterwards_stays(caplog):
    model = build_tiny_transformer()
    enable_sla(model)
    theirs = WanAttnProcessor()
    model.blocks[1].attn1.set_processor(theirs)
    with caplog.at_level(logging.WARNING, logger="sla_video"):
        disable_sla(model)
    assert model.blocks[1].attn1.processor is theirs
    assert "blocks.1.attn1 has been given another processor" in caplog.text
    assert all(type(p) is WanAttnProcessor for p in model.attn_processors.values())


def test_context_parallelism_is_refused_when_the_model_is_patched():
    """Diffusers' `enable_parallelism` sets this attribute, and only where it exists."""
    model = build_tiny_transformer()
    enable_sla(model)
    for block in model.blocks:
        assert hasattr(block.attn1.processor, "_parallel_config")
        with pytest.raises(ValueError, match=r"context parallelism.*`disable_sla`"):
            block.attn1.processor._parallel_config = object()
        block.attn1.processor._parallel_config = None


def test_diffusers_own_call_for_context_parallelism_is_refused(monkeypatch):
    model = build_tiny_transformer()
    enable_sla(model)
    # A unit test has no second process: only the talk with it is taken out.
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    config = ContextParallelConfig(ulysses_degree=2, mesh=MagicMock())
    with attention_backend("_native_cudnn"), pytest.raises(ValueError, match="context parallel"):
        model.enable_parallelism(config=config)


@pytest.mark.parametrize("where", ["model", "processor"])
def test_a_model_that_runs_in_parallel_is_refused(where):
    model = build_tiny_transformer()
    if where == "model":
        model._parallel_config = object()
    else:
        model.blocks[2].attn1.processor._parallel_config = object()
    with pytest.raises(ValueError, match=r"parallel"):
        enable_sla(model)
    assert type(model.blocks[0].attn1.processor) is WanAttnProcessor
