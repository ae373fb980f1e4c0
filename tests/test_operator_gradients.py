"""Gradients of Q, K, V and of every learned tensor, in float64."""

from __future__ import annotations

import pytest
import torch
from operator_inputs import random_qkv, random_router
from torch.autograd import gradcheck

from sla_video.kernels.api import sla2_attention

SELECTIONS = [("reference", "top_k"), ("reference", "top_p"), ("reference", "soft_top_k")]
SELECTIONS += [("torch", "top_k"), ("torch", "top_p")]
ROUTERS = {
    "shared": {"per_head": False},
    "per_head": {"per_head": True},
    "table": {"alpha": "per_block", "num_query_blocks": 3},
    "table_interpolated": {"alpha": "per_block", "num_query_blocks": 5},
}
each_selection = pytest.mark.parametrize(
    ("impl", "selection"), SELECTIONS, ids=["-".join(pair) for pair in SELECTIONS]
)
each_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
# L = 11 in 3 query blocks and 4 key blocks, both with tails.
TINY = {"sparsity": 0.5, "block_q": 4, "block_k": 3, "top_p": 0.7}


def leaves(length, router, *, heads=2, head_dim=3, seed=3):
    """Q, K, V and the named parameters of `router`, all to be differentiated."""
    inputs = [
        x.requires_grad_() for x in random_qkv(length, heads=heads, head_dim=head_dim, seed=seed)
    ]
    return inputs, dict(router.named_parameters())


@each_router
@each_selection
def test_gradcheck(impl, selection, router):
    router = random_router(2, 3, **router)
    inputs, parameters = leaves(11, router)

    def run(query, key, value, *_):
        out, lse = sla2_attention(
            query, key, value, router, impl=impl, selection=selection, return_lse=True, **TINY
        )
        return out, lse

    # The parameters reach the operator through the router; gradcheck perturbs them in place.
    assert gradcheck(run, (*inputs, *parameters.values()), atol=1e-6, fast_mode=False)


@each_router
@each_selection
def test_every_tensor_that_can_learn_does(impl, selection, router):
    router = random_router(2, 3, **router)
    inputs, parameters = leaves(11, router)
    out = sla2_attention(*inputs, router, impl=impl, selection=selection, **TINY)
    out.square().sum().backward()
    # With a hard selection, only the mass in the adaptive alpha depends on the projections.
    frozen = {"query_proj", "key_proj"} if "alpha_table" in parameters else set()
    if selection == "soft_top_k":
        frozen = set()
    for name, parameter in parameters.items():
        if name in frozen:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in inputs)


@pytest.mark.parametrize("selection", ["top_k", "top_p"])
@pytest.mark.parametrize("length", [63, 96, 111])
@pytest.mark.parametrize("sparse_dtype", ["bf16", "int8_fp8"])
def test_torch_gradients_are_those_of_the_reference(length, selection, sparse_dtype):
    router = random_router(2, 8, per_head=True)
    inputs, parameters = leaves(length, router, head_dim=8)
    weight = random_qkv(length, head_dim=8, seed=9)[0]
    gradients = []
    for impl in ("torch", "reference"):
        out, lse = sla2_attention(
            *inputs,
            router,
            impl=impl,
            sparsity=0.6,
            block_q=16,
            block_k=8,
            selection=selection,
            sparse_dtype=sparse_dtype,
            return_lse=True,
        )
        loss = (out * weight).sum() + lse.square().sum()
        gradients.append(torch.autograd.grad(loss, [*inputs, *parameters.values()]))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("sparse_dtype", ["int8", "int8_fp8", "int8_int8"])
def test_low_bit_forward_has_the_gradient_of_the_unquantized_branch(impl, sparse_dtype):
    # A mix weight that does not depend on Q and K: its own gradient uses the value as computed.
    router = random_router(2, 8, alpha="per_block", num_query_blocks=4)
    inputs, _ = leaves(50, router, head_dim=8)
    weight = random_qkv(50, head_dim=8, seed=9)[0]
    outputs, gradients = [], []
    for dtype in ("bf16", sparse_dtype):
        out = sla2_attention(
            *inputs, router, impl=impl, sparsity=0.6, block_q=16, block_k=8, sparse_dtype=dtype
        )
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad((out * weight).sum(), inputs))
    assert not torch.equal(*outputs)
    for exact, low in zip(*gradients, strict=True):
        torch.testing.assert_close(low, exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.0},
        {"selection": "top_p", "min_selected": 100},
        {"selection": "top_p", "top_p": 1.0, "sparsity": 0.0},
    ],
    ids=["top_k_all", "top_p_floor", "top_p_mass"],
)
def test_gradients_stay_finite_when_nothing_is_dropped(impl, settings):
    router = random_router(2, 3)
    inputs, parameters = leaves(11, router)
    out = sla2_attention(*inputs, router, impl=impl, block_q=4, block_k=3, **settings)
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters.values())


def test_soft_selection_of_everything_is_full_attention():
    query, key, value = random_qkv(20)
    soft = sla2_attention(
        query, key, value, selection="soft_top_k", sparsity=0, block_q=4, block_k=4
    )
    hard = sla2_attention(query, key, value, sparsity=0, block_q=4, block_k=4, impl="reference")
    torch.testing.assert_close(soft, hard, atol=1e-12, rtol=0)


def test_soft_selection_approaches_the_hard_one_as_tau_falls():
    query, key, value = random_qkv(64)
    settings = {"sparsity": 0.75, "block_q": 16, "block_k": 8, "impl": "reference"}
    hard = sla2_attention(query, key, value, **settings)
    errors = [
        (sla2_attention(query, key, value, selection="soft_top_k", tau=tau, **settings) - hard)
        .abs()
        .max()
        .item()
        for tau in (0.1, 0.01, 1e-4)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6
