"""What is trained in each mode, and through which attention."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from finetune_cases import make_batch, make_student
from sla_video import SLAConfig, enable_sla, save_routers
from sla_video.calibration.soft_attention import SoftAttention
from sla_video.kernels.api import sla2_attention
from sla_video.pipelines.errors import InputError
from tiny_models import build_tiny_transformer

PROJECTIONS = {"query_proj", "key_proj"}
ALPHA = {"alpha_scale", "alpha_bias"}


@pytest.mark.parametrize("trainable", ["router", "router+alpha", "lora", "full"])
def test_gradients_reach_what_is_trained_and_nothing_else(trainable: str) -> None:
    student = make_student(trainable=trainable)
    batch = make_batch()
    if trainable == "lora":
        # The first factor has no gradient while the second one is zero.
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    student(*batch)["velocity"].backward()
    touched = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    routers = {n for n in touched if n.startswith("routers.")}
    kinds = {n.rpartition(".")[2] for n in routers}
    others = touched - routers
    assert (
        kinds
        == {
            "router": PROJECTIONS,
            "router+alpha": PROJECTIONS | ALPHA,
            "lora": ALPHA,
            "full": ALPHA,
        }[trainable]
    )
    assert len(routers) == 3 * len(kinds)
    if trainable.startswith("router"):
        assert others == set()
    elif trainable == "lora":
        assert len(others) == 3 * 4 * 2 and all("lora_" in n for n in others)
    else:
        assert others == {f"transformer.{n}" for n, _ in student.transformer.named_parameters()}
    assert touched <= set(student.trainable())


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_alpha_stays_as_it_is_when_asked(trainable: str) -> None:
    student = make_student(trainable=trainable, train_alpha=False)
    student(*make_batch())["velocity"].backward()
    assert student.trainable() and not any(n.startswith("routers.") for n in student.trainable())
    assert all(p.grad is None for p in student.routers.parameters())
    # The rest learns: of fresh LoRA, the second factors.
    learns = [n for n, p in student.trainable().items() if p.grad is not None and p.grad.any()]
    assert len(learns) == (12 if trainable == "lora" else len(student.trainable()))


def test_the_teacher_is_the_model_as_it_was() -> None:
    original = build_tiny_transformer()
    latents, noise, sigma, text = batch = make_batch()
    noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
    expected = original(noisy, sigma * 1000, text, return_dict=False)[0].detach()
    for trainable in ("lora", "full", "router+alpha"):
        student = make_student(trainable=trainable)
        with torch.no_grad():
            for parameter in student.trainable().values():
                parameter.add_(0.05)
        dense = student(*batch, mode="compare")["dense"]
        torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-5)


def test_routers_bring_the_order_of_the_tokens(tmp_path: Path) -> None:
    model = build_tiny_transformer()
    routers = tmp_path / "routers"
    with enable_sla(model, sparsity=0.34, token_order="hilbert", impl="torch") as handle:
        save_routers(routers, handle)
        latents, noise, sigma, text = batch = make_batch()
        noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
        expected = model(noisy, sigma * 1000, text, return_dict=False)[0].detach()
    for trainable in ("lora", "full"):
        student = make_student(trainable=trainable, routers=str(routers))
        found = student(*batch, mode="compare")
        torch.testing.assert_close(found["student"], expected, rtol=1e-4, atol=1e-5)
        stock = model(noisy, sigma * 1000, text, return_dict=False)[0]
        torch.testing.assert_close(found["dense"], stock, rtol=1e-4, atol=1e-5)
        assert student.handle.router_set().config.token_order == "hilbert"
        assert (found["student"] - found["dense"]).abs().max() > 1e-3


def test_routers_with_an_order_of_keys_are_refused(tmp_path: Path) -> None:
    kinds = {"transformer.blocks.0.attn1": ("identity", "hot_peel")}
    with enable_sla(build_tiny_transformer(), config=SLAConfig(key_orders=kinds)) as handle:
        save_routers(tmp_path / "routers", handle)
    with pytest.raises(InputError, match="routers come with an order of keys"):
        make_student(trainable="lora", routers=str(tmp_path / "routers"))


@pytest.mark.parametrize(
    ("low_bit", "impl"), [("bf16", "auto"), ("int8", "auto"), ("bf16", "triton")]
)
def test_soft_attention_is_the_reference_with_less_memory(low_bit: str, impl: str) -> None:
    student = make_student(trainable="router+alpha", sparse_dtype=low_bit, impl=impl)
    processor = next(iter(student.processors.values()))
    assert isinstance(processor.attention, SoftAttention)
    router = processor.router
    assert router is not None
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    twin = copy.deepcopy(router)
    # 150 tokens: the last blocks of queries and of keys are shorter.
    batch = 1 if impl == "triton" else 2
    query, key, value = (torch.randn(batch, 150, 2, 16) for _ in range(3))
    out = processor.attention(processor, query, key, value)
    expected = sla2_attention(
        query,
        key,
        value,
        twin,
        sparsity=0.34,
        selection="soft_top_k",
        sparse_dtype=low_bit,  # type: ignore[arg-type]
        impl="reference",
    )
    # The kernels multiply in TF32 or less.
    loose = {"rtol": 2e-2, "atol": 2e-3} if impl == "triton" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out, expected, **loose)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, a), b in zip(router.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None and a.grad.any(), name
        assert (a.grad - b.grad).norm() < (2e-2 if impl == "triton" else 1e-4) * b.grad.norm()


def test_validation_runs_what_inference_runs() -> None:
    student = make_student(trainable="router", sparse_dtype="int8_fp8")
    batch = make_batch()
    compared = student(*batch, mode="compare")["student"]
    twin = make_student(trainable="full", sparse_dtype="int8_fp8", loss="flow")
    torch.testing.assert_close(compared, twin(*batch, mode="compare")["student"])
    assert all(isinstance(p.attention, SoftAttention) for p in student.processors.values())


@pytest.mark.parametrize("stream_step", [0, 1, 2, 3])
def test_checkpointing_changes_no_gradient(stream_step: int) -> None:
    """SSA's losses come from inside the blocks, which checkpointing runs twice."""
    gradients = []
    for checkpointing in (False, True):
        student = make_student(loss="ssa", trainable="lora").train()
        if checkpointing:
            student.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        student.draw.step(0, stream_step, 192, 128)  # type: ignore[union-attr]
        student(*make_batch())["velocity"].backward()
        gradients.append({n: p.grad for n, p in student.trainable().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7)


def test_the_sparsity_of_a_step_holds_in_all_layers() -> None:
    student = make_student()
    batch = make_batch()
    errors = []
    for sparsity in (0.0, 0.34, 0.67):
        student.set_sparsity(sparsity)
        errors.append(student(*batch)["velocity"].item())
    assert errors[0] < 1e-9 < errors[1] < errors[2]
