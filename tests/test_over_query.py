"""The output in the memory of the query: the same numbers, and only where nobody can see it.

Letters: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

from dataclasses import fields
from inspect import signature

import pytest
import torch
import torch.nn.functional as F
from operator_inputs import options

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import DEVICE, SMALL, inputs, needs_triton

from sla_video.config import SLAConfig
from sla_video.kernels import triton_forward, triton_in_place, triton_rotary
from sla_video.kernels.api import sla2_attention
from sla_video.kernels.options import Options
from sla_video.kernels.over_query import attention_over_query
from sla_video.kernels.router import Router
from sla_video.kernels.triton_impl import sla2_triton
from sla_video.pipelines import processor
from sla_video.pipelines.patching import enable_sla
from tiny_models import build_tiny_transformer

pytestmark = needs_triton
CONFIG = SLAConfig(sparsity=0.5, block_q=16, block_k=16, impl="triton", sparse_dtype="int8")


# Tails, padded columns, a tile in two halves, several sequences, one block in all.
CASES = {
    "bf16": (torch.float32, {"length": 71}, {}),
    "int8": (torch.bfloat16, {"length": 71}, {"sparse_dtype": "int8"}),
    "padded": (torch.float16, {"length": 63, "head_dim": 24}, {"sparse_dtype": "int8_fp8"}),
    "halves": (torch.bfloat16, {"length": 140, "heads": 1},
               {"sparse_dtype": "int8", "block_q": 128}),
    "top_p": (torch.float32, {"length": 37, "batch": 2}, {"selection": "top_p", "top_p": 0.3}),
    "all selected": (torch.float32, {"length": 37}, {"sparsity": 0.0}),
    "one token": (torch.bfloat16, {"length": 1}, {"sparse_dtype": "int8"}),
}  # fmt: skip


@pytest.mark.usefixtures("poisoned", "no_grad")
@pytest.mark.parametrize(("dtype", "shape", "settings"), CASES.values(), ids=CASES)
def test_equals_the_operator_bit_for_bit(dtype, shape, settings, monkeypatch):
    # Each head on its own: what one leaves behind is not read for the next.
    monkeypatch.setattr(triton_forward, "_STATE_BYTES", 1)
    query, key, value = inputs(dtype=dtype, **shape)
    settings = {**SMALL, **settings, "impl": "triton"}
    kept = [x.clone() for x in (query, key, value)]
    wanted = sla2_attention(query, key, value, **settings)
    assert all(map(torch.equal, (query, key, value), kept)), "the public operator only reads"
    got = attention_over_query(query, key, value, **settings)
    assert got.data_ptr() == query.data_ptr() and got.shape == query.shape
    assert torch.equal(got, wanted)
    assert torch.equal(key, kept[1]) and torch.equal(value, kept[2])


@pytest.mark.usefixtures("no_grad")
def test_log_sum_exp_is_that_of_the_query_as_it_was():
    query, key, value = inputs(40)
    chosen = options(sparse_dtype="int8", sparsity=0.5, block_q=32, block_k=32)
    wanted = sla2_triton(query, key, value, None, chosen, need_lse=True)
    over = options(**vars(chosen) | {"overwrite_query": True})
    got = sla2_triton(query, key, value, None, over, need_lse=True)
    assert got[0].data_ptr() == query.data_ptr()
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def with_gradients(query):
    return query.requires_grad_()


def in_another_layout(query):
    return query.transpose(1, 2).contiguous().transpose(1, 2)


def one_token_for_all(query):
    return query[:, :1].expand(query.shape)


def overlapping(query):
    return query.flatten().as_strided(query.shape, (0, 64, 64, 1))


@pytest.mark.parametrize(
    "change", [with_gradients, in_another_layout, one_token_for_all, overlapping]
)
def test_other_queries_stay_as_they_are(change):
    query, key, value = inputs(40)
    query = change(query)
    before = query.detach().clone()
    got = attention_over_query(query, key, value, impl="triton", **SMALL)
    assert torch.equal(got, sla2_attention(query, key, value, impl="triton", **SMALL))
    assert torch.equal(query, before)
    if change is with_gradients:
        found = torch.autograd.grad(got.square().sum(), query)
        other = sla2_attention(query, key, value, impl="triton", **SMALL)
        assert torch.equal(found[0], torch.autograd.grad(other.square().sum(), query)[0])


def test_the_query_stays_while_a_router_learns():
    query, key, value = inputs(40)
    before = query.clone()
    router = Router(2, 64).to(DEVICE)
    got = attention_over_query(query, key, value, router, impl="triton", **SMALL)
    assert got.requires_grad and torch.equal(query, before)


@pytest.mark.parametrize(
    "settings",
    [{"impl": "torch"}, {"impl": "reference"}, {"impl": "triton", "selection": "soft_top_k"}],
    ids=lambda settings: settings.get("selection", settings["impl"]),
)
def test_other_ways_to_compute_it_leave_the_query_alone(settings):
    query, key, value = inputs(40)
    before = query.clone()
    got = attention_over_query(query, key, value, **SMALL, **settings)
    assert torch.equal(got, sla2_attention(query, key, value, **SMALL, **settings))
    assert torch.equal(query, before)


def model_and_call():
    model = build_tiny_transformer(num_layers=1).to(DEVICE).requires_grad_(False)
    call = torch.randn(1, 4, 1, 5, 7), torch.tensor([500]), torch.randn(1, 16, 16)
    return model, [x.to(DEVICE) for x in call]


@pytest.fixture
def memory(monkeypatch):
    """Where queries are when they are rotated and when attention overwrites them."""
    found = {"rotated": [], "attended": []}

    def spy(module, name, kind, which):
        real = getattr(module, name)

        def record(*arguments, **settings):
            found[kind].append(arguments[which].data_ptr())
            return real(*arguments, **settings)

        monkeypatch.setattr(module, name, record)

    spy(triton_rotary, "_launch", "rotated", 6)
    spy(triton_in_place, "attend_all", "attended", 0)
    return found


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused_projections"])
def test_a_patched_transformer_computes_the_same(memory, monkeypatch, fused):
    model, call = model_and_call()
    if fused:
        model.fuse_qkv_projections()
    with enable_sla(model, config=CONFIG):
        got = model(*call).sample
        assert len(memory["attended"]) == 1 and memory["attended"] == memory["rotated"]
        monkeypatch.setattr(processor, "attention_over_query", sla2_attention)
        # Code for the strides of fused projections may add in another order on a GPU.
        bound = 1e-5 if fused and DEVICE != "cpu" else 0.0
        torch.testing.assert_close(got, model(*call).sample, rtol=bound, atol=bound)
    assert len(memory["attended"]) == 1


@pytest.mark.usefixtures("no_grad")
def test_a_recording_sees_the_query_as_it_was(memory):
    model, call = model_and_call()
    # All is selected, so the recall is one; that of another query would not be.
    with enable_sla(model, config=CONFIG.replace(sparsity=0.0, sparse_dtype="bf16")) as handle:
        with handle.recording(exact_recall=True):
            model(*call)
        assert handle.stats().layers[0].recall == pytest.approx(1, abs=1e-5)
    assert not memory["attended"]


@pytest.mark.usefixtures("no_grad")
def test_hooks_keep_what_projections_returned():
    model, call = model_and_call()
    enable_sla(model, config=CONFIG)
    attn, seen = model.blocks[0].attn1, []
    attn.to_k.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    model(*call)
    assert torch.equal(seen[1], F.linear(seen[0], attn.to_k.weight, attn.to_k.bias))


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused_projections"])
def test_compilers_make_no_copy_of_the_query(memory, fused):
    """Rotation and attention write where the projection did, in one graph."""
    model, _ = model_and_call()
    if fused:
        model.fuse_qkv_projections()
    enable_sla(model, config=CONFIG)
    attn = model.blocks[0].attn1
    hidden = torch.randn(1, 35, 32, device=DEVICE)
    tables = model.rope(torch.randn(1, 4, 1, 5, 7, device=DEVICE))
    eager = attn(hidden, None, None, tables)
    memory["rotated"].clear(), memory["attended"].clear()
    torch._dynamo.reset()
    compiled = torch.compile(attn, fullgraph=True)
    torch.testing.assert_close(compiled(hidden, None, None, tables), eager)
    assert memory["attended"] and memory["attended"] == memory["rotated"]
    torch._dynamo.reset()


def test_options_have_the_defaults_of_the_operator():
    of_operator = signature(sla2_attention).parameters
    for field in fields(Options):
        if field.name != "overwrite_query":
            assert field.default == of_operator[field.name].default
