"""Routers that bring LoRA of their own, beside what people do with theirs."""

from __future__ import annotations

import functools
import re
import types

import pytest
import torch
from compatibility_features import group_offload_leaves, layerwise_casting, load_lora, lora_weights
from compatibility_rows import ROUTER_LORA_ROWS

from sla_video import SLAConfig, disable_sla, enable_sla
from sla_video.pipelines.lora import add_lora, lora_parameters
from sla_video.pipelines.router_set import RouterSet
from tiny_models import TINY_CALL, build_tiny_pipeline

NO_HOOKS = types.SimpleNamespace(hooks={})
SMALL_BLOCKS = SLAConfig(sparsity=0.8, block_q=16, block_k=8)


def generate(pipe):
    call = {**TINY_CALL, "num_inference_steps": 2, "output_type": "latent"}
    return pipe(**call, generator=torch.Generator().manual_seed(0)).frames


def error(output, truth):
    return float((output.float() - truth.float()).norm() / truth.float().norm())


@functools.cache
def routers() -> RouterSet:
    pipe = build_tiny_pipeline()
    handle = enable_sla(pipe, config=SMALL_BLOCKS)
    add_lora(pipe.transformer, rank=2, alpha=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in lora_parameters(pipe.transformer).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return handle.router_set()


def with_weights_of(*users):
    """A pipeline with the user's LoRA (seed, weight) multiplied out by hand."""
    pipe = build_tiny_pipeline()
    state = pipe.transformer.state_dict()
    for seed, weight in users:
        tensors = lora_weights(seed)
        for name, down in tensors.items():
            if "lora_A" in name:
                up = tensors[name.replace("lora_A", "lora_B")]
                target = name.removeprefix("transformer.").replace("lora_A.", "")
                state[target] += weight * up @ down
    return pipe


@functools.cache
def truth(users, sla):
    pipe = with_weights_of(*users)
    if sla:
        enable_sla(pipe, routers())
    return generate(pipe)


def prepare(row, order):
    pipe = build_tiny_pipeline()
    if order == "before":
        row.apply(pipe)
    handle = enable_sla(pipe, routers())
    if order == "after":
        row.apply(pipe)
    return pipe, handle


def cells(works):
    return [
        pytest.param(row, order, id=f"{row.name}-{order}")
        for row in ROUTER_LORA_ROWS
        for order in ("before", "after")
        if (getattr(row, order) is None) == works
    ]


@pytest.mark.parametrize(("row", "order"), cells(works=True))
def test_both_corrections_have_their_effect(row, order):
    pipe, handle = prepare(row, order)
    flags = {name: p.requires_grad for name, p in pipe.transformer.named_parameters()}
    assert error(generate(pipe), truth(row.users, sla=True)) < 2e-6
    # What is not ours is neither frozen nor thawed by putting ours right.
    assert {name: p.requires_grad for name, p in pipe.transformer.named_parameters()} == flags
    with handle.dense():
        assert error(generate(pipe), truth(row.users, sla=False)) < 2e-6
    disable_sla(pipe)
    assert error(generate(pipe), truth(row.users, sla=False)) < 2e-6
    assert "sla" not in getattr(pipe.transformer, "peft_config", {})


@pytest.mark.parametrize(("row", "order"), cells(works=False))
def test_what_would_leave_ours_out_is_refused(row, order):
    def use():
        generate(prepare(row, order)[0])

    with pytest.raises((ValueError, KeyError), match=re.escape(getattr(row, order))) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_the_model_comes_back_after_each_refusal():
    """Also when it was ours that was fused into the weights."""
    for change in (
        lambda pipe: pipe.fuse_lora(components=["transformer"]),
        lambda pipe: pipe.unload_lora_weights(),
        lambda pipe: pipe.disable_lora(),
    ):
        pipe = build_tiny_pipeline()
        enable_sla(pipe, routers())
        change(pipe)
        with pytest.raises(ValueError, match="LoRA that came with these routers"):
            generate(pipe)
        disable_sla(pipe)
        assert error(generate(pipe), truth((), sla=False)) < 2e-6
        enable_sla(pipe, routers())
        assert error(generate(pipe), truth((), sla=True)) < 2e-6


def test_the_users_fused_lora_stays_fused_when_ours_is_taken_out_of_the_weights():
    pipe = build_tiny_pipeline()
    enable_sla(pipe, routers())
    load_lora(pipe)
    pipe.set_adapters(["style", "sla"])
    pipe.fuse_lora(components=["transformer"])
    disable_sla(pipe)
    assert pipe.transformer.blocks[0].attn1.to_q.merged_adapters == ["style"]
    assert error(generate(pipe), truth(((5, 1.0),), sla=False)) < 2e-6


def test_weights_stored_in_fp8_do_not_round_the_corrections():
    pipe = build_tiny_pipeline()
    layerwise_casting(pipe)
    enable_sla(pipe, routers())
    ours = lora_parameters(pipe.transformer)
    assert {parameter.dtype for parameter in ours.values()} == {torch.float32}
    for name, tensor in routers().lora["transformer"].tensors.items():
        assert torch.equal(ours[name], tensor)
    assert error(generate(pipe), truth((), sla=True)) < 2e-2


def test_group_offloading_takes_the_corrections_along():
    """On a GPU they would be left on the other device; here their hooks have to be enough."""
    pipe = build_tiny_pipeline()
    group_offload_leaves(pipe)

    def hooked():
        return {
            name
            for name, module in pipe.transformer.named_modules()
            if "group_offloading" in getattr(module, "_diffusers_hook", NO_HOOKS).hooks
        }

    before = hooked()
    enable_sla(pipe, routers())
    assert {f"blocks.{i}.attn1.to_q.lora_{ab}.sla" for i in range(3) for ab in "AB"} <= hooked()
    disable_sla(pipe)
    assert hooked() == before
