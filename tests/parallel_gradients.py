"""Cases of `parallel_cases`: gradients of several processes against those of one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel_tools import BLOCKS, case, patched, refusal
from sla_video import SLAConfig
from sla_video.calibration.soft_attention import SoftAttention
from sla_video.kernels.api import sla2_attention
from sla_video.kernels.router import Router, router_heads
from sla_video.pipelines.handle import SLAHandle
from sla_video.pipelines.parallel import Ulysses, sum_gradients
from tiny_models import build_tiny_transformer, transformer_inputs


def gradients(model: Any, handle: SLAHandle) -> dict[str, Tensor]:
    """Of all weights and routers, for a loss on the whole output, summed over the processes."""
    output = model(**transformer_inputs())[0]
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * weight).sum().backward()
    named = {f"model.{name}": p for name, p in model.named_parameters()}
    for layer, router in handle.routers.items():
        named |= {f"{layer}.{name}": p for name, p in router.named_parameters()}
    if model._parallel_config is not None:
        sum_gradients(named.values(), model)
    return {name: p.grad for name, p in named.items() if p.grad is not None}


def assert_same_gradients(config: SLAConfig, learned: set[str], *, soft: bool) -> None:
    found = []
    for order in ("", "after"):
        model, handle = patched(config, parallel=order)
        model.train()
        model.enable_gradient_checkpointing()
        for processor in handle.processors.values():
            processor.attention = SoftAttention(0.1) if soft and processor.router else None
        found.append(gradients(model, handle))
    expected, got = found
    for name in learned:
        assert expected[f"transformer.blocks.0.attn1.{name}"].any(), name
    for name, gradient in got.items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        error = (gradient - wanted).norm()
        assert error <= 1e-4 * wanted.norm() + 1e-6, f"{name}: {error} of {wanted.norm()}"


@case
def gradients_of_weights_and_mix() -> None:
    config = SLAConfig(sparsity=0.9, dense_layers=(1,), **BLOCKS)
    assert_same_gradients(config, {"alpha_scale", "alpha_bias"}, soft=False)


@case
def gradients_of_routers_and_mix_of_each_block() -> None:
    blocks = {**BLOCKS, "impl": "reference"}
    config = SLAConfig(
        sparsity=0.9, router_per_head=True, alpha="per_block", num_query_blocks=12, **blocks
    )
    assert_same_gradients(config, {"query_proj", "key_proj", "alpha_table"}, soft=True)


@case
def gradients_of_queries_keys_and_values() -> None:
    """The exchange alone, in float64, against the operator on the whole sequence."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(4)
    for length, heads, uneven in ((40, 4, False), (41, 5, True)):
        x = torch.randn(4, 2, length, heads, 8, dtype=torch.float64, generator=generator)
        whole = [part.clone().requires_grad_() for part in x[:3]]
        operator = partial(sla2_attention, sparsity=0.5, block_q=8, block_k=4, impl="reference")
        router = Router(heads, 8)
        expected = operator(*whole, router)
        (expected * x[3]).sum().backward()

        ulysses = Ulysses(group=dist.group.WORLD.group_name, rank=rank, size=ranks, uneven=uneven)
        own = router_heads(router, *ulysses.own_heads(heads))
        mine = [part.detach().tensor_split(ranks, 1)[rank].requires_grad_() for part in whole]
        output = ulysses.attend(partial(operator, router=own), *mine)
        torch.testing.assert_close(output, expected.tensor_split(ranks, 1)[rank])
        (output * x[3].tensor_split(ranks, 1)[rank]).sum().backward()
        for piece, full in zip(mine, whole, strict=True):
            assert full.grad is not None
            torch.testing.assert_close(piece.grad, full.grad.tensor_split(ranks, 1)[rank])


@case
def gradients_of_one_process_are_whole() -> None:
    message = refusal(lambda: sum_gradients([], build_tiny_transformer()))
    assert "does not run in context parallelism" in message
