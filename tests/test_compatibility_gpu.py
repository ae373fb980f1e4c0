"""Rows of the compatibility table that only a GPU can show; and SLA2's kernels for those it can.

Alone, where the package is not installed: `PYTHONPATH=. pytest tests/test_compatibility_gpu.py`.
"""

from __future__ import annotations

import compatibility_features as do
import pytest
import torch
from diffusers import BitsAndBytesConfig, WanTransformer3DModel, attention_backend

from sla_video import SLAConfig, disable_sla, enable_sla
from sla_video.pipelines.lora import add_lora, lora_parameters
from tiny_models import (
    TINY_CALL,
    build_tiny_pipeline,
    build_tiny_transformer,
    transformer_inputs,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="offloading and kernels of a GPU need one"
)

BLOCKS = SLAConfig(sparsity=0.8, block_q=16, block_k=16, impl="triton")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def own_attention_backend():
    with attention_backend("native"):
        yield


def build(**changes):
    return build_tiny_pipeline(**changes).to(BF16)


def generate(pipe):
    call = {**TINY_CALL, "num_inference_steps": 3, "output_type": "latent"}
    return pipe(**call, generator=torch.Generator().manual_seed(0)).frames.float().cpu()


def error(output, truth):
    return float((output - truth).norm() / truth.norm())


def trained_routers(*, lora=False):
    pipe = build_tiny_pipeline()
    handle = enable_sla(pipe, config=BLOCKS, impl="torch")
    if lora:
        add_lora(pipe.transformer, rank=2)
    parameters = [p for router in handle.routers.values() for p in router.parameters()]
    parameters += lora_parameters(pipe.transformer).values()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return handle.router_set()


def group_offload(kind, **options):
    def apply(pipe):
        pipe.to("cuda")
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            **options,
        )

    return apply


OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "blocks": group_offload("block_level", num_blocks_per_group=1),
    "leaves": group_offload("leaf_level"),
    "leaves with a stream": group_offload("leaf_level", use_stream=True),
    "blocks with a stream": group_offload("block_level", num_blocks_per_group=1, use_stream=True),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("lora", [False, True], ids=["routers", "routers with LoRA"])
@pytest.mark.parametrize("kind", OFFLOADS)
def test_offloading_from_a_gpu(kind, lora, order):
    if kind == "sequential" and lora:
        pytest.skip("refused, which test_compatibility_lora.py shows")
    routers = trained_routers(lora=lora)
    whole = build().to("cuda")
    stock = generate(whole)
    enable_sla(whole, routers, impl="triton")
    sparse = generate(whole)
    assert error(sparse, stock) > 2e-3

    pipe = build()
    if order == "before":
        OFFLOADS[kind](pipe)
    enable_sla(pipe, routers, impl="triton")
    if order == "after":
        OFFLOADS[kind](pipe)
    assert error(generate(pipe), sparse) < 1e-2
    disable_sla(pipe)
    assert error(generate(pipe), stock) < 1e-2


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled_blocks_compute_the_same(order, dynamic):
    """By Inductor, with the Triton kernels."""
    torch._dynamo.reset()
    routers = trained_routers()
    model, eager = (build_tiny_transformer().to("cuda", BF16) for _ in range(2))
    enable_sla(eager, routers, impl="triton")
    if order == "before":
        model.compile_repeated_blocks(fullgraph=True, dynamic=dynamic)
    enable_sla(model, routers, impl="triton")
    if order == "after":
        model.compile_repeated_blocks(fullgraph=True, dynamic=dynamic)
    for grid in ((3, 5, 9), (2, 7, 11), (4, 6, 10)):
        inputs = on_gpu(transformer_inputs(grid=grid, dtype=BF16))
        with torch.no_grad():
            assert error(model(**inputs)[0].float(), eager(**inputs)[0].float()) < 1e-2
    torch._dynamo.reset()


def on_gpu(inputs):
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def full_selection_and_removal(model, inputs):
    """Against the same model as Diffusers runs it; then the very same bits again."""
    with torch.no_grad():
        stock = model(**inputs)[0]
        with enable_sla(model, config=BLOCKS, sparsity=0.0) as handle:
            full = model(**inputs)[0]
            assert all(layer.dense_calls == 0 for layer in handle.stats().layers)
        assert error(full.float(), stock.float()) < 1e-2
        with enable_sla(model, config=BLOCKS):
            assert error(model(**inputs)[0].float(), stock.float()) > 2e-3
        assert torch.equal(model(**inputs)[0], stock)


@pytest.mark.parametrize(
    "config",
    [
        "Int8WeightOnlyConfig",
        "Int8DynamicActivationInt8WeightConfig",
        "Float8WeightOnlyConfig",
        "Float8DynamicActivationFloat8WeightConfig",
    ],
)
def test_quantized_products(config):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    if config.startswith("Float8Dynamic") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("products in FP8 need compute capability 8.9")
    # Sizes that products in FP8 take: multiples of 16; torchao 0.18 takes one scale for a weight of
    # 128 x 128 for a scale of a block.
    model = build_tiny_transformer(attention_head_dim=128, ffn_dim=512).to("cuda", BF16)
    torchao.quantize_(model.blocks, getattr(torchao, config)())
    full_selection_and_removal(model, on_gpu(transformer_inputs(dtype=BF16)))


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_weights(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    build_tiny_transformer(attention_head_dim=64, ffn_dim=256).save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
        torch_dtype=BF16,
    ).to("cuda")
    full_selection_and_removal(model, on_gpu(transformer_inputs(dtype=BF16)))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "change",
    [
        do.first_block_cache,
        do.pyramid_attention_broadcast,
        do.load_lora,
        do.fuse_qkv,
        do.bf16_layerwise_casting,
    ],
    ids=lambda change: change.__name__,
)
def test_with_the_triton_kernels(change, order):
    stock_pipe = build().to("cuda")
    change(stock_pipe)
    stock = generate(stock_pipe)
    pipe = build().to("cuda")
    if order == "before":
        change(pipe)
    enable_sla(pipe, trained_routers(), impl="triton", sparsity=0.0)
    if order == "after":
        change(pipe)
    assert error(generate(pipe), stock) < 2e-2
    disable_sla(pipe)
    assert error(generate(pipe), stock) < 1e-2
