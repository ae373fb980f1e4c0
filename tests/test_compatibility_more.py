"""Rows of the compatibility table that need tests of their own: compilers, training, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import TorchAoConfig, WanPipeline, WanTransformer3DModel, attention_backend
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.models import attention_dispatch
from torch._dynamo.testing import CompileCounter
from triton_cases import needs_triton

from sla_video import SLAConfig, disable_sla, enable_sla
from tiny_models import (
    TINY_CALL,
    build_tiny_pipeline,
    build_tiny_transformer,
    transformer_inputs,
)

SMALL_BLOCKS = SLAConfig(sparsity=0.8, block_q=16, block_k=8)


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def generate(pipe, **changes):
    call = {**TINY_CALL, "num_inference_steps": 3, "output_type": "latent", **changes}
    call.setdefault("generator", torch.Generator().manual_seed(0))
    return pipe(**call).frames


def perturb(handle):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for router in handle.routers.values():
            for parameter in router.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled_blocks_are_one_graph_each_and_compute_the_same(order, fresh_compiler):
    model, eager = (build_tiny_transformer() for _ in range(2))
    inputs = transformer_inputs()
    stock = run(model, inputs)
    settings = {"config": SMALL_BLOCKS, "impl": "torch", "dense_layers": [0]}
    enable_sla(eager, **settings)
    if order == "before":
        model.compile_repeated_blocks(fullgraph=True, backend=fresh_compiler)
        torch.testing.assert_close(run(model, inputs), stock)
    enable_sla(model, **settings)
    if order == "after":
        model.compile_repeated_blocks(fullgraph=True, backend=fresh_compiler)
    torch.testing.assert_close(run(model, inputs), run(eager, inputs))
    # One graph for the dense layer and one for the two others; one of the stock block.
    assert fresh_compiler.frame_count == (3 if order == "before" else 2)
    disable_sla(model)
    torch.testing.assert_close(run(model, inputs), stock)


@needs_triton
def test_compiled_blocks_with_triton_take_any_length_in_one_graph(fresh_compiler):
    model, eager = (build_tiny_transformer(num_layers=1) for _ in range(2))
    settings = {"config": SMALL_BLOCKS.replace(block_k=16), "impl": "triton"}
    enable_sla(eager, **settings)
    enable_sla(model, **settings)
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=fresh_compiler)
    # No two sizes are the same: the compiler takes those for one, also without SLA.
    for grid in ((1, 5, 9), (1, 7, 11)):
        inputs = transformer_inputs(grid=grid)
        torch.testing.assert_close(run(model, inputs), run(eager, inputs))
        assert fresh_compiler.frame_count == 1


@pytest.mark.parametrize("how", ["before", "after", "wrapped"])
def test_a_compiled_transformer_is_one_graph(how, fresh_compiler):
    """`transformer.compile()` in place, or `torch.compile(transformer)` around it."""
    pipe, eager = build_tiny_pipeline(num_layers=1), build_tiny_pipeline(num_layers=1)
    stock = generate(eager)
    enable_sla(eager, config=SMALL_BLOCKS, impl="torch")
    if how == "before":
        pipe.transformer.compile(fullgraph=True, backend=fresh_compiler)
    if how == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=fresh_compiler)
    enable_sla(pipe, config=SMALL_BLOCKS, impl="torch")
    if how == "after":
        pipe.transformer.compile(fullgraph=True, backend=fresh_compiler)
    torch.testing.assert_close(generate(pipe), generate(eager))
    assert fresh_compiler.frame_count == 1
    disable_sla(pipe)
    torch.testing.assert_close(generate(pipe), stock)


def gradients(model):
    inputs = transformer_inputs()
    inputs["hidden_states"].requires_grad_()
    model(**inputs)[0].square().mean().backward()
    weights = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"input": inputs["hidden_states"].grad, **weights}


@pytest.mark.parametrize("order", ["before", "after"])
def test_checkpointed_gradients_are_those_of_diffusers_and_of_plain_training(order):
    def build(*, sparsity, checkpointing):
        model = build_tiny_transformer().train()
        if checkpointing and order == "before":
            model.enable_gradient_checkpointing()
        handle = None
        if sparsity is not None:
            handle = enable_sla(model, config=SMALL_BLOCKS, sparsity=sparsity)
            perturb(handle)
        if checkpointing and order == "after":
            model.enable_gradient_checkpointing()
        found = gradients(model)
        for name, router in handle.routers.items() if handle else ():
            found[name] = router.alpha_bias.grad
        return found

    for sparsity, other in ((0.0, None), (0.8, 0.8)):
        ours = build(sparsity=sparsity, checkpointing=True)
        theirs = build(sparsity=other, checkpointing=other is None)
        assert len(theirs) > 40
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_patched_pipeline_saves_a_stock_pipeline(tmp_path):
    pipe = build_tiny_pipeline()
    stock = generate(pipe)
    perturb(enable_sla(pipe, config=SMALL_BLOCKS))
    pipe.save_pretrained(tmp_path)
    loaded = WanPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(loaded), stock)
    assert not any("sla" in path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="not enabled"):
        disable_sla(loaded)


def test_a_copied_pipeline_is_patched_on_its_own_and_counts_its_own_steps():
    pipe = build_tiny_pipeline()
    stock = generate(pipe)
    handle = enable_sla(pipe, config=SMALL_BLOCKS, dense_steps=1)
    perturb(handle)
    sparse = generate(pipe)
    calls = [layer.calls for layer in handle.stats().layers]

    twin = copy.deepcopy(pipe)
    # The first pipeline's scheduler stands in the middle of a video; the copy must not look there.
    pipe.scheduler._step_index = 2
    assert torch.equal(generate(twin), sparse)
    assert [layer.calls for layer in handle.stats().layers] == calls
    disable_sla(twin)
    assert torch.equal(generate(twin), stock)
    assert torch.equal(generate(pipe), sparse)


def test_a_copied_transformer_does_not_count_the_steps_of_another_pipeline():
    pipe = build_tiny_pipeline()
    enable_sla(pipe, config=SMALL_BLOCKS, dense_steps=1)
    twin = copy.deepcopy(pipe.transformer)
    with pytest.raises(RuntimeError, match="does not hold this transformer"):
        run(twin, transformer_inputs())
    disable_sla(twin)
    assert run(twin, transformer_inputs()).isfinite().all()


def test_attention_backends_are_for_cross_attention_and_dense_layers(monkeypatch):
    """Of the three layers one is dense: it and three cross-attentions ask Diffusers' dispatcher."""
    registry = attention_dispatch._AttentionBackendRegistry
    used = []

    def spy(name):
        function = registry._backends[name]

        def call(*args, **kwargs):
            used.append(name.value)
            return function(*args, **kwargs)

        monkeypatch.setitem(registry._backends, name, call)

    for name in ("native", "_native_math"):
        spy(attention_dispatch.AttentionBackendName(name))
    model, inputs = build_tiny_transformer(), transformer_inputs()
    enable_sla(model, config=SMALL_BLOCKS, dense_layers=[1])
    with attention_backend("native"):
        outside = run(model, inputs)
        assert used == ["native"] * 4
        used.clear()
        with attention_backend("_native_math"):
            inside = run(model, inputs)
        assert used == ["_native_math"] * 4
    torch.testing.assert_close(inside, outside)


def test_videos_of_a_batch_do_not_see_each_other():
    pipe = build_tiny_pipeline()
    perturb(enable_sla(pipe, config=SMALL_BLOCKS))
    prompts = ["a red circle moves left", "the blue square on the right"]

    def seeds(*numbers):
        return [torch.Generator().manual_seed(number) for number in numbers]

    together = generate(pipe, prompt=prompts, generator=seeds(1, 2))
    for index, prompt in enumerate(prompts):
        alone = generate(pipe, prompt=[prompt], generator=seeds(index + 1))
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_weights_that_diffusers_quantizes_on_loading(tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    build_tiny_transformer().save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(
        tmp_path,
        quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()),
        torch_dtype=torch.float32,
    )
    inputs = transformer_inputs()
    stock = run(model, inputs)
    assert not torch.equal(stock, run(build_tiny_transformer(), inputs))
    with enable_sla(model, config=SMALL_BLOCKS, sparsity=0.0):
        torch.testing.assert_close(run(model, inputs), stock, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(model, inputs), stock)
    enable_sla(model, config=SMALL_BLOCKS)
    assert not torch.allclose(run(model, inputs), stock, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("patched", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["skip_attention", "skip_attention_scores"])
def test_skipped_attention_is_refused_by_diffusers_for_wan(kind, patched):
    model = build_tiny_transformer()
    if patched:
        enable_sla(model, config=SMALL_BLOCKS)
    skip = {"skip_attention": False, "skip_ff": False, kind: True}
    with pytest.raises(ValueError, match="AttnProcessor'> not registered"):
        apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="blocks", **skip))


def test_skipped_scores_are_refused_where_diffusers_allows_them():
    """As in other families: what replaces scores would replace those of the selected blocks."""
    model = build_tiny_transformer()
    registry = HookRegistry.check_if_exists_or_initialize(model.blocks[1].attn1)
    registry.register_hook(AttentionProcessorSkipHook(None, skip_attention_scores=True), "skip")
    with pytest.raises(ValueError, match=r"transformer.blocks.1.attn1 skips its attention scores"):
        enable_sla(model, config=SMALL_BLOCKS)
    registry.remove_hook("skip")
    enable_sla(model, config=SMALL_BLOCKS)
