"""The distance of a patched model to itself with dense attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sla_video import enable_sla
from sla_video.kernels.api import exact_recall, sla2_attention
from sla_video.pipelines.tiny_wan.evaluate import load_pipeline
from sla_video.pipelines.tiny_wan.fidelity import NOISE_LEVELS, make_probe, measure_fidelity


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("tiny-wan", None, "ema")


@pytest.fixture(scope="module")
def probe(pipe):
    return make_probe(pipe, clips=1, size=64)


def test_the_probe_is_always_the_same(pipe, probe):
    again = make_probe(pipe, clips=1, size=64)
    assert torch.equal(again.noisy, probe.noisy)
    assert probe.timestep.tolist() == pytest.approx([1000 * level for level in NOISE_LEVELS])


def test_nothing_is_lost_where_everything_is_selected(pipe, probe):
    with enable_sla(pipe, sparsity=0.0) as handle:
        found = measure_fidelity(pipe, handle, probe)
    assert found["velocity_error"] < 1e-5 and found["attention_rel_l1"] < 1e-5
    assert found["recall"] == pytest.approx(1, abs=1e-5)


def test_values_are_those_of_the_definition(pipe, probe):
    with enable_sla(pipe, sparsity=0.7) as handle:
        found = measure_fidelity(pipe, handle, probe)
        # Independently: the first layer, whose inputs the patch does not change.
        seen = []
        name = "transformer.blocks.0.attn1"
        layer = handle.processors[name]
        layer._operator = lambda q, k, v, **_: seen.append((q, k, v)) or v
        with torch.no_grad():
            pipe.transformer(probe.noisy, probe.timestep, probe.text)
            velocity_there = pipe.transformer(probe.noisy, probe.timestep, probe.text)[0]
        del layer._operator
        with torch.no_grad():
            velocity = pipe.transformer(probe.noisy, probe.timestep, probe.text)[0]
    q, k, v = seen[0]
    out, lse = sla2_attention(q, k, v, sparsity=0.7, return_lse=True)
    full = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    expected = (out - full).abs().sum() / full.abs().sum()
    assert found["attention_rel_l1_by_layer"][name] == pytest.approx(float(expected), rel=1e-4)
    error = (velocity - probe.velocity).norm() / probe.velocity.norm()
    assert found["velocity_error"] == pytest.approx(float(error), rel=1e-4)
    assert not torch.equal(velocity, velocity_there)
    assert float(exact_recall(q, k, lse).mean()) < 1 and 0 < found["recall"] < 1
