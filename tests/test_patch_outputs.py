"""The patched transformer against Diffusers itself: what comes out, and what is put back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
)

from sla_video import SLAConfig, disable_sla, enable_sla
from sla_video.kernels.router import Router
from sla_video.pipelines.families.rotary import rotate
from sla_video.pipelines.families.wan import WAN
from sla_video.pipelines.processor import DenseSwitch, SLAAttnProcessor
from tiny_models import (
    TEXT_DIM,
    TINY_CALL,
    build_tiny_i2v_transformer,
    build_tiny_pipeline,
    build_tiny_transformer,
    build_tiny_vace_transformer,
    transformer_inputs,
)

SMALL_BLOCKS = SLAConfig(sparsity=0.8, block_q=16, block_k=8)
EVERYTHING = SMALL_BLOCKS.replace(sparsity=0.0)


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def full_selection_processor(heads=2, head_dim=16, **changes):
    return SLAAttnProcessor(
        WAN,
        WanAttnProcessor(),
        Router(heads, head_dim),
        EVERYTHING.replace(**changes),
        sparsity=0.0,
        switch=DenseSwitch(),
    )


def make_attention(heads=2, head_dim=16, *, fused=False):
    """A self-attention with norms that are not one, in float64."""
    torch.manual_seed(0)
    attn = WanAttention(heads * head_dim, heads=heads, dim_head=head_dim)
    with torch.no_grad():
        for norm in (attn.norm_q, attn.norm_k):
            norm.weight.copy_(1 + 0.5 * torch.randn_like(norm.weight))
    if fused:
        attn.fuse_projections()
    attn.set_processor(WanAttnProcessor())
    return attn.double().requires_grad_(False)


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("grid", [(3, 8, 8), (1, 5, 7), (1, 1, 1)], ids=["192", "35", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_full_selection_is_as_close_to_the_truth_as_the_stock_processor(dtype, grid, fused):
    attn = make_attention(fused=fused)
    rotary = WanRotaryPosEmbed(16, (1, 1, 1), 32)(torch.zeros(1, 1, *grid))
    hidden = torch.randn(2, np.prod(grid), 32, dtype=torch.float64)
    truth = attn(hidden, rotary_emb=rotary)

    attn, hidden = attn.to(dtype), hidden.to(dtype)
    stock = attn(hidden, rotary_emb=rotary)
    attn.set_processor(full_selection_processor())
    ours = attn(hidden, rotary_emb=rotary)

    assert ours.dtype == stock.dtype and ours.shape == stock.shape
    budget = 1.5 * (stock - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= budget


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    "build", [build_tiny_transformer, build_tiny_i2v_transformer, build_tiny_vace_transformer]
)
def test_full_selection_equals_the_stock_transformer(build, impl, fused):
    model = build()
    inputs = transformer_inputs(batch=2)
    if build is build_tiny_i2v_transformer:
        # Diffusers takes the last 512 tokens for text.
        inputs["encoder_hidden_states"] = torch.randn(2, 512, TEXT_DIM)
        inputs["encoder_hidden_states_image"] = torch.randn(2, 5, 24)
    if build is build_tiny_vace_transformer:
        inputs["control_hidden_states"] = torch.randn(2, 6, 3, 8, 8)
    if fused:
        model.fuse_qkv_projections()
    stock = run(model, inputs)

    with enable_sla(model, config=EVERYTHING, impl=impl) as handle:
        assert len(handle.processors) == (5 if build is build_tiny_vace_transformer else 3)
        torch.testing.assert_close(run(model, inputs), stock, rtol=1e-4, atol=1e-5)
        assert all(layer.calls == 1 for layer in handle.stats().layers)
    assert torch.equal(run(model, inputs), stock)


def test_full_selection_equals_the_stock_transformer_in_bf16():
    model = build_tiny_transformer()
    inputs = transformer_inputs()
    truth = run(model, inputs)
    model, inputs = model.to(torch.bfloat16), transformer_inputs(dtype=torch.bfloat16)
    stock = run(model, inputs)

    enable_sla(model, config=EVERYTHING)
    ours = run(model, inputs)

    assert ours.dtype == torch.bfloat16
    assert (ours - truth).abs().mean() <= 1.2 * (stock - truth).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rotary_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary_embedding_equals_the_stock_formula(dtype, rotary_dtype):
    rope = WanRotaryPosEmbed(16, (1, 1, 1), 32)
    cos, sin = (t.to(rotary_dtype) for t in rope(torch.zeros(1, 1, 3, 5, 7)))
    # A view with strides, as fused projections give.
    query, key = torch.randn(2, 105, 2, 3, 16).to(dtype).unbind(3)[:2]

    def turn(states):
        x1, x2 = states.double().unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos.double()[..., 0::2], sin.double()[..., 1::2]
        return torch.stack((x1 * c - x2 * s, x1 * s + x2 * c), -1).flatten(-2)

    for states, rotated in zip((query, key), rotate(query, key, cos, sin), strict=True):
        assert rotated.dtype == dtype
        error = (rotated.double() - turn(states)).abs()
        # A rotation keeps the length of a pair, and so rounds relative to it.
        length = states.double().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
        assert (error <= 2 * torch.finfo(dtype).eps * length).all()


def test_compiled_rotary_embedding_equals_the_eager_one():
    cos, sin = WanRotaryPosEmbed(16, (1, 1, 1), 32)(torch.zeros(1, 1, 2, 3, 3))
    query, key = torch.randn(2, 1, 18, 2, 16)
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, cos, sin), rotate(query, key, cos, sin))


def test_sparse_output_is_not_the_stock_one():
    model, inputs = build_tiny_transformer(), transformer_inputs()
    stock = run(model, inputs)
    enable_sla(model, config=SMALL_BLOCKS)
    assert not torch.allclose(run(model, inputs), stock, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["disable_sla", "remove", "with", "error in with"])
def test_removal_puts_back_the_same_processors_and_the_same_bits(how):
    model, inputs = build_tiny_transformer(), transformer_inputs()
    stock, processors = run(model, inputs), model.attn_processors
    modules = [name for name, _ in model.named_modules()]

    handle = enable_sla(model, config=SMALL_BLOCKS)
    run(model, inputs)
    assert handle.active
    if how == "disable_sla":
        disable_sla(model)
    elif how == "remove":
        handle.remove()
    elif how == "with":
        with handle:
            pass
    else:
        with pytest.raises(KeyError), handle:
            raise KeyError

    assert not handle.active
    assert model.attn_processors.keys() == processors.keys()
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(run(model, inputs), stock)


def test_only_self_attention_of_the_given_instance_is_replaced():
    model, other = build_tiny_transformer(), build_tiny_transformer()
    enable_sla(model, config=SMALL_BLOCKS)
    for block in model.blocks:
        assert type(block.attn1.processor) is SLAAttnProcessor
        assert type(block.attn2.processor) is WanAttnProcessor
    assert all(type(p) is WanAttnProcessor for p in other.attn_processors.values())
    assert len({id(block.attn1.processor) for block in model.blocks}) == len(model.blocks)


def generate(pipe, **changes):
    return pipe(**{**TINY_CALL, **changes}, generator=torch.Generator().manual_seed(0)).frames[0]


def test_pipeline_at_full_selection_and_after_removal(tiny_pipeline):
    stock = generate(tiny_pipeline)
    with enable_sla(tiny_pipeline, config=EVERYTHING):
        np.testing.assert_allclose(generate(tiny_pipeline), stock, atol=1e-4)
    np.testing.assert_array_equal(generate(tiny_pipeline), stock)
    assert isinstance(tiny_pipeline.vae, AutoencoderKLWan)


def test_two_transformers_are_both_patched_and_restored():
    pipe = build_tiny_pipeline(two_transformers=True)
    stock = generate(pipe)
    handle = enable_sla(pipe, config=SMALL_BLOCKS)
    assert {name.split(".")[0] for name in handle.processors} == {"transformer", "transformer_2"}
    sparse = generate(pipe)
    assert not np.allclose(sparse, stock, atol=1e-4)
    assert all(layer.calls > 0 for layer in handle.stats().layers)

    disable_sla(pipe.transformer_2)
    assert handle.active and not np.allclose(generate(pipe), stock, atol=1e-4)
    handle.remove()
    np.testing.assert_array_equal(generate(pipe), stock)


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 3, 5), (2, 9, 7)], ids=["1", "15", "126"])
def test_any_length_works_with_the_default_blocks(grid):
    model, inputs = build_tiny_transformer(), transformer_inputs(grid=grid)
    stock = run(model, inputs)
    enable_sla(model, sparsity=0.97)
    output = run(model, inputs)
    assert output.isfinite().all()
    if np.prod(grid) <= 64:  # one key block, which is always kept
        torch.testing.assert_close(output, stock, rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_patched_model_is_patched_on_its_own():
    model, inputs = build_tiny_transformer(), transformer_inputs()
    stock = run(model, inputs)
    enable_sla(model, config=SMALL_BLOCKS)
    sparse = run(model, inputs)

    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, inputs), sparse)
    disable_sla(twin)
    assert torch.equal(run(twin, inputs), stock)
    assert torch.equal(run(model, inputs), sparse)
