"""Every row of the compatibility table: SLA attention with what people do to a pipeline besides."""

from __future__ import annotations

import functools

import pytest
import torch
from compatibility_rows import FEATURES, Feature
from diffusers import attention_backend
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import sla_video.pipelines.processor as processor_module
from sla_video import SLAConfig, disable_sla, enable_sla
from sla_video.pipelines.router_set import RouterSet
from tiny_models import TINY_CALL, build_tiny_pipeline

SMALL_BLOCKS = SLAConfig(sparsity=0.8, block_q=16, block_k=8)
# What 5 of 24 key blocks leave out.
SPARSITY = 19 / 24


@pytest.fixture(autouse=True)
def own_attention_backend():
    """`set_attention_backend` also sets the one of all other models."""
    with attention_backend("native"):
        yield


features = pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)


def generate(pipe, feature: Feature | None = None) -> torch.Tensor:
    call = {**TINY_CALL, "num_inference_steps": 4, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    return pipe(**{**call, **(feature.call if feature else {})}, generator=generator).frames


def error(output, truth) -> float:
    if output.shape != truth.shape:
        # A batch against its first video alone.
        truth = truth.expand_as(output)
    return float((output.float() - truth.float()).norm() / truth.float().norm())


@functools.cache
def trained_routers() -> RouterSet:
    """Routers that choose other blocks than untrained ones."""
    handle = enable_sla(build_tiny_pipeline(), config=SMALL_BLOCKS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for router in handle.routers.values():
            for parameter in router.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return handle.router_set()


@functools.cache
def without_feature(sparse: bool) -> torch.Tensor:
    pipe = build_tiny_pipeline()
    if sparse:
        enable_sla(pipe, trained_routers())
    return generate(pipe)


@functools.cache
def stock_with(feature_name: str) -> tuple[torch.Tensor, int]:
    """What Diffusers makes with the feature, and how often it ran self-attention for that."""
    feature = next(f for f in FEATURES if f.name == feature_name)
    pipe = build_tiny_pipeline()
    pipe = feature.apply(pipe) or pipe
    calls = 0
    original = WanAttnProcessor.__call__

    def count(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        nonlocal calls
        calls += encoder_hidden_states is None
        return original(self, attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanAttnProcessor, "__call__", count)
        return generate(pipe, feature), calls


def prepare(feature, order, **settings):
    """(pipeline with SLA attention and the feature, handle)"""
    pipe = build_tiny_pipeline()
    if order == "before":
        pipe = feature.apply(pipe) or pipe
    handle = enable_sla(pipe, trained_routers(), **settings)
    if order == "after":
        pipe = feature.apply(pipe) or pipe
    return pipe, handle


def calls_of(handle):
    return sum(layer.calls for layer in handle.stats().layers)


@features
def test_the_feature_itself_does_what_the_table_says(feature):
    """Otherwise the tests below would show nothing."""
    if feature.needs:
        pytest.importorskip(feature.needs, reason=f"needs {feature.needs}")
    stock, calls = stock_with(feature.name)
    assert calls > 0
    if feature.effect == "none":
        assert error(stock, without_feature(sparse=False)) < feature.error
    else:
        assert error(stock, without_feature(sparse=False)) > 1e-3


@pytest.mark.parametrize("order", ["before", "after"])
@features
def test_full_selection_is_diffusers_with_the_feature(feature, order):
    if feature.needs:
        pytest.importorskip(feature.needs, reason=f"needs {feature.needs}")
    stock, calls = stock_with(feature.name)
    pipe, handle = prepare(feature, order, sparsity=0.0)
    assert error(generate(pipe, feature), stock) < feature.error
    assert calls_of(handle) == calls
    assert all(layer.dense_calls == 0 for layer in handle.stats().layers)

    disable_sla(pipe)
    assert torch.equal(generate(pipe, feature), stock)


@pytest.mark.parametrize("order", ["before", "after"])
@features
def test_sparse_attention_runs_with_the_feature(feature, order, monkeypatch):
    if feature.needs:
        pytest.importorskip(feature.needs, reason=f"needs {feature.needs}")
    calls = 0

    def counting(operator):
        def count(*args, **kwargs):
            nonlocal calls
            calls += 1
            return operator(*args, **kwargs)

        return count

    pipe, handle = prepare(feature, order)
    for name in ("sla2_attention", "attention_over_query"):
        monkeypatch.setattr(processor_module, name, counting(getattr(processor_module, name)))
    output = generate(pipe, feature)
    monkeypatch.undo()
    assert calls_of(handle) == calls > 0
    assert output.isfinite().all()
    assert error(output, stock_with(feature.name)[0]) > 2e-3
    if feature.effect == "none":
        assert error(output, without_feature(sparse=True)) < feature.error
    else:
        assert error(output, without_feature(sparse=True)) > 1e-3
    assert handle.stats().sparsity == pytest.approx(SPARSITY)
    for router in handle.routers.values():
        assert {parameter.dtype for parameter in router.parameters()} == {torch.float32}
