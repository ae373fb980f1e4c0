"""What `enable_sla` and `disable_sla` refuse, and that a refusal changes nothing."""

from __future__ import annotations

import logging
import types

import pytest
import torch
from diffusers import (
    ContextParallelConfig,
    FlowMatchEulerDiscreteScheduler,
    ParallelConfig,
    TensorParallelConfig,
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


def test_tensor_parallelism_is_refused():
    model = build_tiny_transformer()
    model._parallel_config = ParallelConfig(
        tensor_parallel_config=TensorParallelConfig(tp_degree=2)
    )
    with pytest.raises(ValueError, match=r"tensor parallelism.*ulysses_degree=N"):
        enable_sla(model)
    assert type(model.blocks[0].attn1.processor) is WanAttnProcessor


def test_a_parallel_configuration_that_is_not_set_up_is_refused():
    """Diffusers' `enable_parallelism` sets this attribute, and only where it exists."""
    model = build_tiny_transformer()
    enable_sla(model)
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    for block in model.blocks:
        assert hasattr(block.attn1.processor, "_parallel_config")
        with pytest.raises(ValueError, match=r"no process group yet.*enable_parallelism"):
            block.attn1.processor._parallel_config = config
        block.attn1.processor._parallel_config = None


def test_a_stock_processor_that_knows_no_context_parallelism_is_refused():
    model = build_tiny_transformer()
    handle = enable_sla(model)
    processor = handle.processors["transformer.blocks.0.attn1"]
    processor.original = object()
    with pytest.raises(ValueError, match="object does not support context parallelism"):
        processor._parallel_config = ParallelConfig()
