"""What users do to a patched model besides running it."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from sla_video import SLAConfig, disable_sla, enable_sla
from tiny_models import build_tiny_transformer, transformer_inputs

SMALL_BLOCKS = SLAConfig(sparsity=0.8, block_q=16, block_k=8)


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def perturbed(handle):
    """Routers that the trivial ones cannot be mistaken for, with digits that bf16 does not hold."""
    torch.manual_seed(3)
    with torch.no_grad():
        for router in handle.routers.values():
            for parameter in router.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return {
        (name, key): value.clone()
        for name, router in handle.routers.items()
        for key, value in router.state_dict().items()
    }


def assert_untouched(handle, before):
    after = {
        (name, key): value
        for name, router in handle.routers.items()
        for key, value in router.named_parameters()
    }
    assert after.keys() == before.keys()
    for key, value in after.items():
        assert value.dtype == torch.float32 and value.requires_grad and value.is_leaf
        assert torch.equal(value, before[key])


def lora(model):
    peft = pytest.importorskip("peft", reason="Diffusers adds adapters with peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))


@pytest.mark.parametrize(
    "treat",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to(dtype=torch.float16, device="cpu"),
        lambda model: model.half().float(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model.to(torch.float8_e4m3fn),
        lambda model: model.fuse_qkv_projections(),
        lambda model: model.requires_grad_(False),
        lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16),
        lambda model: model.enable_layerwise_casting(
            torch.bfloat16, torch.float32, skip_modules_pattern=()
        ),
        lora,
        lambda model: model.load_state_dict(build_tiny_transformer().state_dict(), strict=True),
    ],
    ids=[
        "to-bf16",
        "to-fp16",
        "half-float",
        "bfloat16",
        "double",
        "to-fp8",
        "fuse",
        "freeze",
        "layerwise-fp8",
        "layerwise-all",
        "add_adapter",
        "load_state_dict",
    ],
)
def test_routers_stay_fp32_trainable_and_exact(treat):
    model = build_tiny_transformer()
    handle = enable_sla(model, config=SMALL_BLOCKS)
    before = perturbed(handle)
    treat(model)
    assert_untouched(handle, before)


def test_routers_follow_to_another_device():
    """The one other device that every machine has is "meta"."""
    model = build_tiny_transformer()
    handle = enable_sla(model, config=SMALL_BLOCKS)
    model.to("meta", torch.bfloat16)
    for router in handle.routers.values():
        assert {(p.device.type, p.dtype) for p in router.parameters()} == {("meta", torch.float32)}


def test_a_router_that_was_left_behind_is_fetched():
    """Offloading hooks move weights one by one, past `nn.Module.to`."""
    model = build_tiny_transformer()
    handle = enable_sla(model, config=SMALL_BLOCKS)
    processor = next(iter(handle.processors.values()))
    processor._follow(torch.device("meta"))
    assert processor.router.query_proj.device.type == "meta"
    model.to_empty(device="cpu")
    assert processor.router.query_proj.device.type == "cpu"


@pytest.mark.parametrize("pieces", ["sequential", "model"])
def test_accelerate_offload_hooks(pieces):
    from accelerate import cpu_offload, cpu_offload_with_hook

    model, inputs = build_tiny_transformer(), transformer_inputs()
    enable_sla(model, config=SMALL_BLOCKS)
    sparse = run(model, inputs)
    if pieces == "sequential":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    assert torch.equal(run(model, inputs), sparse)


@pytest.mark.parametrize("patch_first", [True, False], ids=["patch-first", "cast-first"])
def test_layerwise_casting_runs_and_is_close(patch_first):
    model, inputs = build_tiny_transformer(), transformer_inputs()
    if patch_first:
        enable_sla(model, config=SMALL_BLOCKS)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    if not patch_first:
        enable_sla(model, config=SMALL_BLOCKS)
    output = run(model, inputs)
    disable_sla(model)
    reference = build_tiny_transformer()
    enable_sla(reference, config=SMALL_BLOCKS)
    reference = run(reference, inputs)
    assert (output - reference).norm() < 0.1 * reference.norm()
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_models_run_with_fp32_routers(dtype):
    model = build_tiny_transformer().to(dtype)
    handle = enable_sla(model, config=SMALL_BLOCKS)
    output = run(model, transformer_inputs(dtype=dtype))
    assert output.dtype == dtype and output.isfinite().all()
    assert all(router.query_proj.dtype == torch.float32 for router in handle.routers.values())


def test_gradients_reach_every_router_and_the_adapter():
    model = build_tiny_transformer()
    handle = enable_sla(model, config=SMALL_BLOCKS)
    lora(model)
    model(**transformer_inputs())[0].square().mean().backward()
    for name, router in handle.routers.items():
        for kind in ("alpha_scale", "alpha_bias"):
            gradient = getattr(router, kind).grad
            assert gradient is not None and gradient.abs().max() > 0, (name, kind)
    assert all(
        parameter.grad is not None
        for name, parameter in model.named_parameters()
        if "lora_B" in name and "attn1" in name
    )


def test_a_patched_model_saves_a_stock_checkpoint(tmp_path, caplog):
    model, inputs = build_tiny_transformer(), transformer_inputs()
    stock = run(model, inputs)
    perturbed(enable_sla(model, config=SMALL_BLOCKS))
    model.save_pretrained(tmp_path)

    loaded, info = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(run(loaded, inputs), stock)
    assert all(type(p) is WanAttnProcessor for p in loaded.attn_processors.values())


def test_the_optimizer_of_the_model_does_not_see_the_routers():
    model = build_tiny_transformer()
    names = [name for name, _ in model.named_parameters()]
    handle = enable_sla(model, config=SMALL_BLOCKS)
    assert [name for name, _ in model.named_parameters()] == names
    held = {id(p) for router in handle.routers.values() for p in router.parameters()}
    assert not held & {id(p) for p in model.parameters()}


def test_a_masked_call_runs_dense_and_says_so_once(caplog):
    model, stock = build_tiny_transformer(), build_tiny_transformer()
    handle = enable_sla(model, config=SMALL_BLOCKS)
    hidden = torch.randn(1, 192, 32)
    causal = torch.ones(192, 192, dtype=torch.bool).tril()
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="sla_video"):
        for block in (1, 0):
            ours = model.blocks[block].attn1(hidden, attention_mask=causal)
    assert torch.equal(ours, stock.blocks[0].attn1(hidden, attention_mask=causal))
    assert caplog.text.count("such calls run dense") == 1
    assert handle.stats().layers[0].dense_calls == 1


def test_the_attention_backend_reaches_dense_calls_and_outlives_the_patch():
    model = build_tiny_transformer()
    enable_sla(model, dense_layers=[0])
    model.set_attention_backend("_native_math")
    assert model.blocks[0].attn1.processor.original._attention_backend == "_native_math"
    disable_sla(model)
    assert model.blocks[0].attn1.processor._attention_backend == "_native_math"
    model.reset_attention_backend()


def test_a_patched_model_can_be_pickled():
    model, inputs = build_tiny_transformer(), transformer_inputs()
    enable_sla(model, config=SMALL_BLOCKS)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), inputs), run(model, inputs))
