"""The numbers of `handle.stats()` against numbers computed another way."""

from __future__ import annotations

import json

import pytest
import torch

import sla_video.pipelines.processor as processor_module
from sla_video import SLAConfig, enable_sla
from sla_video.kernels.router import Router
from sla_video.pipelines.stats import router_estimate
from tiny_models import build_tiny_transformer, transformer_inputs

SMALL_BLOCKS = SLAConfig(sparsity=0.8, block_q=16, block_k=8)
OPTIONS = {
    "block_q": 16,
    "block_k": 8,
    "sparse_dtype": "bf16",
    "phi_k": "smoothed",
    "selection": "top_k",
    "top_p": 0.9,
    "min_selected": 1,
    "max_selected": None,
}


def run(model, inputs, times=1):
    with torch.no_grad():
        for _ in range(times):
            model(**inputs)


def test_counts_sparsity_and_time():
    model, inputs = build_tiny_transformer(), transformer_inputs()
    handle = enable_sla(model, config=SMALL_BLOCKS, dense_layers=[1])
    assert handle.stats().sparsity is None and handle.stats().seconds == 0
    run(model, inputs, times=2)
    with handle.dense():
        run(model, inputs)

    stats = handle.stats()
    # 5 of 24 key blocks are kept in two of three calls; the dense layer counts as 0.
    kept = 19 / 24 * 2 / 3
    assert [layer.name for layer in stats.layers] == [
        f"transformer.blocks.{i}.attn1" for i in range(3)
    ]
    assert [layer.calls for layer in stats.layers] == [3, 3, 3]
    assert [layer.dense_calls for layer in stats.layers] == [1, 3, 1]
    assert [layer.sparsity for layer in stats.layers] == pytest.approx([kept, 0.0, kept])
    assert stats.sparsity == pytest.approx(kept * 2 / 3)
    assert all(0 < layer.seconds < 60 for layer in stats.layers)
    assert stats.seconds == pytest.approx(sum(layer.seconds for layer in stats.layers))
    assert stats.recall is None and stats.router_recall is None

    handle.reset_stats()
    assert handle.stats().sparsity is None and handle.stats().layers[0].calls == 0


def test_exact_recall_is_the_mass_of_the_selected_tokens(monkeypatch):
    seen = []
    operator = processor_module.sla2_attention

    def spy(query, key, value, router, **options):
        seen.append((query, key, router))
        return operator(query, key, value, router, **options)

    monkeypatch.setattr(processor_module, "sla2_attention", spy)
    model, inputs = build_tiny_transformer(), transformer_inputs()
    handle = enable_sla(model, config=SMALL_BLOCKS)
    with handle.recording(exact_recall=True):
        run(model, inputs)
    run(model, inputs)  # not recorded any more

    for (query, key, router), layer in zip(seen, handle.stats().layers, strict=False):
        # Everything anew, from the definitions, in float64.
        router = router.double().requires_grad_(False)
        q, k = (t.double().transpose(1, 2) for t in (query, key))
        q_mean, k_mean = q.unflatten(2, (-1, 16)).mean(3), k - k.mean(2, keepdim=True)
        k_mean = k_mean.unflatten(2, (-1, 8)).mean(3)
        scores = (q_mean @ router.query_proj) @ (k_mean @ router.key_proj).mT
        scores = scores / 4
        chosen = torch.zeros_like(scores).scatter(-1, scores.topk(5, -1).indices, 1)
        tokens = chosen.repeat_interleave(16, 2).repeat_interleave(8, 3)
        mass = (torch.softmax(q @ k.mT / 4, -1) * tokens).sum(-1).mean()
        estimate = (torch.softmax(scores, -1) * chosen).sum(-1).mean()
        assert layer.recall == pytest.approx(float(mass), abs=1e-4)
        assert layer.router_recall == pytest.approx(float(estimate), abs=1e-4)
        assert layer.sparsity == pytest.approx(19 / 24)
    assert 0 < handle.stats().recall < 1


def test_recording_does_not_change_the_output():
    model, inputs = build_tiny_transformer(), transformer_inputs()
    handle = enable_sla(model, config=SMALL_BLOCKS)
    with torch.no_grad():
        plain = model(**inputs)[0]
        with handle.recording(exact_recall=True):
            assert torch.equal(model(**inputs)[0], plain)


def test_top_p_reports_the_sparsity_that_it_chose():
    model, inputs = build_tiny_transformer(), transformer_inputs()
    config = SMALL_BLOCKS.replace(selection="top_p", top_p=0.5, sparsity=0.0)
    handle = enable_sla(model, config=config)
    with handle.recording():
        run(model, inputs)
    for layer in handle.stats().layers:
        assert 0 < layer.sparsity < 1
        assert 0.5 <= layer.router_recall < 1


def test_full_selection_recalls_everything():
    model, inputs = build_tiny_transformer(), transformer_inputs()
    handle = enable_sla(model, config=SMALL_BLOCKS, sparsity=0.0)
    with handle.recording(exact_recall=True):
        run(model, inputs)
    for layer in handle.stats().layers:
        assert (layer.sparsity, layer.router_recall) == (0.0, 1.0)
        assert layer.recall == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("length", [100, 96, 7])
@pytest.mark.parametrize("selection", [{"sparsity": 0.7}, {"sparsity": 0.0}], ids=repr)
def test_router_estimate_of_any_length(length, selection):
    query, key = torch.randn(2, 1, length, 3, 16)
    options = {**OPTIONS, **selection}
    dropped, mass = router_estimate(query, key, Router(3, 16), **options)
    assert 0 <= dropped < 1
    assert (mass > 0).all() and (mass <= 1).all()


def test_stats_fit_into_json():
    model, inputs = build_tiny_transformer(), transformer_inputs()
    handle = enable_sla(model, config=SMALL_BLOCKS)
    run(model, inputs)
    values = json.loads(json.dumps(handle.stats().to_dict()))
    assert values["sparsity"] == pytest.approx(19 / 24)
    assert values["layers"][2]["name"] == "transformer.blocks.2.attn1"


def test_numbers_stay_on_the_device_until_they_are_read(monkeypatch):
    """A `.item()` in the forward would make the host wait for the device."""
    model, inputs = build_tiny_transformer(), transformer_inputs()
    handle = enable_sla(model, config=SMALL_BLOCKS, impl="torch")
    for name in ("item", "__float__", "__bool__", "tolist", "numpy"):

        def refuse(self, *_, name=name):
            raise AssertionError(f"the forward called Tensor.{name}")

        monkeypatch.setattr(torch.Tensor, name, refuse)
    with handle.recording():
        run(model, inputs)
    monkeypatch.undo()
    assert handle.stats().router_recall is not None
