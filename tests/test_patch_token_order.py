"""Tokens in another order: the model computes the same, and blocks are cut in that order."""

from __future__ import annotations

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from family_cases import CALL
from tiny_families_other import CASES as OTHERS
from tiny_families_wan import CASES

from sla_video import SLAConfig, disable_sla, enable_sla, load_routers, save_routers
from sla_video.kernels.token_order import inverse_order
from sla_video.pipelines.token_order import make_order
from tiny_models import (
    build_tiny_pipeline,
    build_tiny_transformer,
    build_tiny_vace_transformer,
    transformer_inputs,
)

SPARSE = SLAConfig(sparsity=0.8, block_q=16, block_k=8, impl="torch")
EVERYTHING = SPARSE.replace(sparsity=0.0)
# Text, a picture, a timestep for each token, control blocks, two transformers, a last frame apart.
MODELS = ["wan2.1 t2v", "wan2.1 i2v", "wan2.2 5b i2v", "vace", "wan2.2 i2v a14b", "chronoedit"]


def run(model, **inputs):
    with torch.no_grad():
        return model(**transformer_inputs(**inputs))[0]


def conjugated(name):
    """An attention between the projections that reorders, operates and restores."""
    grids = {192: (3, 8, 8), 128: (2, 8, 8), 256: (4, 8, 8), 48: (3, 4, 4)}

    def attention(processor, query, key, value):
        order = make_order(name, grids[query.shape[1]])
        parts = (part[:, order] for part in (query, key, value))
        return processor.sla2(*parts)[:, inverse_order(order)]

    return attention


@pytest.mark.parametrize("grid", [(3, 8, 8), (5, 3, 7), (1, 1, 1), (2, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "name", ["raster", "tile:2,3,4", "tile:9,9,9", "morton", "hilbert", "axes:hwt"]
)
def test_full_selection_and_dense_calls_give_the_stock_output(name, grid):
    model = build_tiny_transformer()
    stock = run(model, grid=grid, batch=2)
    with enable_sla(model, config=EVERYTHING, token_order=name) as handle:
        torch.testing.assert_close(run(model, grid=grid, batch=2), stock, rtol=1e-5, atol=1e-5)
        with handle.dense():
            torch.testing.assert_close(run(model, grid=grid, batch=2), stock, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(model, grid=grid, batch=2), stock)


@pytest.mark.parametrize("model", MODELS, ids=lambda name: name.replace(" ", "-"))
def test_models_compute_what_reordering_in_each_layer_gives(model):
    case = CASES[model]
    pipe = case.build()
    stock = case.run(pipe)
    handle = enable_sla(pipe, config=SPARSE, token_order="tile:2,3,4")
    ours = case.run(pipe)
    assert [layer.dense_calls for layer in handle.stats().layers] == [0] * len(handle.processors)
    disable_sla(pipe)
    assert torch.equal(case.run(pipe), stock)
    handle = enable_sla(pipe, config=SPARSE)
    raster = case.run(pipe)
    for processor in handle.processors.values():
        processor.attention = conjugated("tile:2,3,4")
    expected = case.run(pipe)
    scale = expected.abs().max()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(scale))
    assert (raster - expected).abs().max() > 100e-5 * scale, "the order makes no difference"


@pytest.mark.parametrize("frames", [3, 2])
def test_control_videos_that_are_shorter_are_filled_up_at_their_end(frames):
    model = build_tiny_vace_transformer()
    control = torch.randn(1, 6, frames, 8, 8, generator=torch.Generator().manual_seed(3))
    inputs = {**transformer_inputs(), "control_hidden_states": control}
    with torch.no_grad():
        stock = model(**inputs)[0]
        enable_sla(model, config=EVERYTHING, token_order="hilbert")
        torch.testing.assert_close(model(**inputs)[0], stock, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_stock_model():
    model, inputs = build_tiny_transformer(), transformer_inputs()
    inputs["hidden_states"].requires_grad_(True)
    wanted = {"input": inputs["hidden_states"], **dict(model.named_parameters())}

    def gradients():
        loss = model(**inputs)[0].square().sum()
        return torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)

    expected = gradients()
    enable_sla(model, config=EVERYTHING, token_order="hilbert")
    run(model)  # what is kept from inference has to do for training
    plain = gradients()
    model.enable_gradient_checkpointing()
    for found in (plain, gradients()):
        for name, one, other in zip(wanted, found, expected, strict=True):
            if other is None:
                assert one is None, name
            else:
                scale = float(other.abs().max())
                torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_compiled_as_one_graph(whole):
    model = build_tiny_transformer(num_layers=1)
    enable_sla(model, config=SPARSE, token_order="hilbert")
    sizes = ({"grid": (3, 8, 8)}, {"grid": (3, 4, 8)})
    eager = [run(model, **size) for size in sizes]
    torch._dynamo.reset()
    if whole:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        compiled = model
    for size, expected in zip(sizes, eager, strict=True):
        torch.testing.assert_close(run(compiled, **size), expected)
    torch._dynamo.reset()


def test_a_cache_of_blocks_keeps_working():
    def generate(pipe):
        call = {**CALL, "num_inference_steps": 4, "output_type": "latent"}
        return pipe(**call, generator=torch.Generator().manual_seed(0)).frames

    pipe = build_tiny_pipeline()
    whole = generate(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    stock = generate(pipe)
    assert (stock - whole).abs().max() > 1e-3, "the cache was not used"
    # A dense step fills the cache for sparse ones: both have to know the tokens in one order.
    enable_sla(pipe, config=EVERYTHING, token_order="morton", dense_steps=1)
    torch.testing.assert_close(generate(pipe), stock, rtol=1e-5, atol=1e-5)


def test_the_order_is_saved_and_used_again(tmp_path):
    model = build_tiny_transformer()
    handle = enable_sla(model, config=SPARSE, token_order="hilbert")
    ours = run(model)
    save_routers(tmp_path, handle)
    disable_sla(model)
    assert load_routers(tmp_path).config.token_order == "hilbert"
    with enable_sla(model, tmp_path):
        assert torch.equal(run(model), ours)
    with pytest.raises(ValueError, match="token_order 'hilbert' against 'raster' here"):
        enable_sla(model, tmp_path, token_order="raster")


@pytest.mark.parametrize(
    ("cases", "model", "family"),
    [
        (CASES, "animate", "Wan Animate"),
        (CASES, "skyreels t2v", "SkyReels-V2"),
        (OTHERS, "ltx t2v", "LTX-Video"),
    ],
)
def test_models_that_need_raster_order_are_refused_and_left_alone(cases, model, family):
    transformer = cases[model].build().transformer
    hooks = len(transformer._forward_pre_hooks)
    with pytest.raises(ValueError, match="token_order='hilbert' is not supported in") as error:
        enable_sla(transformer, token_order="hilbert")
    assert family in str(error.value) and "use 'raster'" in str(error.value)
    assert len(transformer._forward_pre_hooks) == hooks
    enable_sla(transformer)


def test_no_hook_stays_behind():
    model = build_tiny_vace_transformer()

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    enable_sla(model, token_order="morton")
    # The transformer, two embeddings, the rotary table and the output.
    assert hooks() == before + 5
    disable_sla(model)
    assert hooks() == before
