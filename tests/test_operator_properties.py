"""Exact facts about SLA2 that hold for every implementation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_inputs import (
    dense_attention,
    fixed_alpha_router,
    options,
    random_qkv,
    random_router,
    rms,
    softmax_scores,
    stable,
    token_mask,
)

from sla_video.kernels.api import exact_recall, num_selected, sla2_attention
from sla_video.kernels.routing import route

IMPLS = ["reference", "torch"]
each_impl = pytest.mark.parametrize("impl", IMPLS)


@each_impl
@stable
@given(
    length=st.integers(1, 1000),
    block_q=st.sampled_from([16, 128]),
    block_k=st.sampled_from([16, 64]),
    alpha_logit=st.sampled_from([-math.inf, -1.0, 2.0]),
)
def test_everything_selected_is_full_attention_whatever_alpha(
    impl, length, block_q, block_k, alpha_logit
):
    query, key, value = random_qkv(length, head_dim=8)
    router = fixed_alpha_router(alpha_logit, 2, 8)
    out, lse = sla2_attention(
        query,
        key,
        value,
        router,
        sparsity=0,
        block_q=block_q,
        block_k=block_k,
        impl=impl,
        return_lse=True,
    )
    torch.testing.assert_close(out, dense_attention(query, key, value), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        exact_recall(query, key, lse), torch.ones_like(lse), atol=1e-12, rtol=0
    )


@each_impl
def test_top_p_of_everything_is_full_attention(impl):
    query, key, value = random_qkv(100)
    out = sla2_attention(
        query,
        key,
        value,
        fixed_alpha_router(-1.0, 2, 16),
        block_q=16,
        block_k=8,
        selection="top_p",
        min_selected=1000,
        impl=impl,
    )
    torch.testing.assert_close(out, dense_attention(query, key, value), atol=1e-12, rtol=0)


@stable
@given(
    length=st.integers(1, 300),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    blocks=st.sampled_from([(16, 8), (7, 5), (128, 64), (8, 32)]),
    sparsity=st.floats(0, 0.99),
    selection=st.sampled_from(["top_k", "top_p"]),
    phi_k=st.sampled_from(["smoothed", "raw"]),
    sparse_dtype=st.sampled_from(["bf16", "bf16", "int8", "int8_fp8", "int8_int8"]),
    per_head=st.booleans(),
    alpha=st.sampled_from(["adaptive", "per_block", None]),
    top_p=st.floats(0.05, 1),
    min_selected=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_torch_agrees_with_reference(
    length, batch, heads, blocks, sparsity, alpha, per_head, seed, **settings
):
    query, key, value = random_qkv(length, batch=batch, heads=heads, head_dim=8, seed=seed)
    table = {"num_query_blocks": 5} if alpha == "per_block" else {}
    router = (
        None
        if alpha is None
        else random_router(heads, 8, seed=seed, per_head=per_head, alpha=alpha, **table)
    )
    settings |= {"block_q": blocks[0], "block_k": blocks[1], "sparsity": sparsity}
    got, got_lse = sla2_attention(
        query, key, value, router, impl="torch", return_lse=True, **settings
    )
    wanted, wanted_lse = sla2_attention(
        query, key, value, router, impl="reference", return_lse=True, **settings
    )
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)
    torch.testing.assert_close(got_lse, wanted_lse, atol=1e-10, rtol=0)
    alone = sla2_attention(query, key, value, router, impl="torch", **settings)
    torch.testing.assert_close(alone, got, atol=1e-12, rtol=0)


@pytest.mark.parametrize("first", range(1, 1001, 100), ids=lambda n: f"L{n}-{n + 99}")
def test_every_length_up_to_1000(first):
    for length in range(first, first + 100):
        query, key, value = random_qkv(length, heads=1, head_dim=4, seed=length)
        got = sla2_attention(query, key, value, sparsity=0.8, impl="torch")
        wanted = sla2_attention(query, key, value, sparsity=0.8, impl="reference")
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0, msg=f"L={length}")


@each_impl
@pytest.mark.parametrize("length", [64, 111, 63])
def test_error_identity_and_best_alpha(impl, length):
    """O_full - O(alpha) = (1 - delta - alpha)(O_s - O_l) + delta (O_d - O_l)."""
    query, key, value = random_qkv(length)
    opts = options()

    def attend(logit, **more):
        return sla2_attention(
            query,
            key,
            value,
            fixed_alpha_router(logit, 2, 16),
            sparsity=opts.sparsity,
            block_q=opts.block_q,
            block_k=opts.block_k,
            impl=impl,
            **more,
        )

    sparse, lse = attend(math.inf, return_lse=True)
    linear = attend(-math.inf)
    full = dense_attention(query, key, value)
    selected = token_mask(route(query, key, None, opts).dropped, 16, 8, length)
    rest = dense_attention(query, key, value, ~selected)
    # [B, L, H, 1]
    delta = 1 - exact_recall(query, key, lse).transpose(1, 2).unsqueeze(-1)
    for logit in (-0.7, 1.3):
        alpha = 1 / (1 + math.exp(-logit))
        torch.testing.assert_close(
            full - attend(logit),
            (1 - delta - alpha) * (sparse - linear) + delta * (rest - linear),
            atol=1e-12,
            rtol=0,
        )
    best = (1 - delta) * sparse + delta * linear
    torch.testing.assert_close(full - best, delta * (rest - linear), atol=1e-12, rtol=0)


@each_impl
@pytest.mark.parametrize("selection", ["top_k", "top_p"])
def test_sparse_branch_and_recall_are_those_of_the_selected_tokens(impl, selection):
    length = 77
    query, key, value = random_qkv(length)
    opts = options(selection=selection, top_p=0.6, sparsity=0.5)
    out, lse = sla2_attention(
        query,
        key,
        value,
        fixed_alpha_router(math.inf, 2, 16),
        sparsity=opts.sparsity,
        block_q=opts.block_q,
        block_k=opts.block_k,
        selection=selection,
        top_p=opts.top_p,
        impl=impl,
        return_lse=True,
    )
    selected = token_mask(route(query, key, None, opts).dropped, 16, 8, length)
    torch.testing.assert_close(
        out, dense_attention(query, key, value, selected), atol=1e-12, rtol=0
    )
    mass = (softmax_scores(query, key) * selected).sum(-1)
    torch.testing.assert_close(exact_recall(query, key, lse), mass, atol=1e-12, rtol=0)


def test_exact_recall_in_chunks(monkeypatch):
    query, key, value = random_qkv(50)
    _, lse = sla2_attention(query, key, value, block_q=16, block_k=8, return_lse=True)
    whole = exact_recall(query, key, lse)
    monkeypatch.setattr("sla_video.kernels.api._RECALL_CHUNK_ELEMENTS", 2 * 50 * 7)
    torch.testing.assert_close(exact_recall(query, key, lse), whole, atol=1e-12, rtol=0)


@each_impl
@stable
@given(seed=st.integers(0, 1000), sparsity=st.sampled_from([0.5, 0.8]))
def test_block_permutation_equivariance(impl, seed, sparsity):
    query, key, value = random_qkv(96, seed=seed)
    router = random_router(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    permuted_q = torch.randperm(6, generator=generator)
    permuted_k = torch.randperm(12, generator=generator)

    def permute(x, order):
        return x.unflatten(1, (len(order), -1))[:, order].flatten(1, 2)

    settings = {"sparsity": sparsity, "block_q": 16, "block_k": 8, "impl": impl}
    out = sla2_attention(query, key, value, router, **settings)
    moved = sla2_attention(
        permute(query, permuted_q),
        permute(key, permuted_k),
        permute(value, permuted_k),
        router,
        **settings,
    )
    torch.testing.assert_close(moved, permute(out, permuted_q), atol=1e-11, rtol=0)


@each_impl
@pytest.mark.parametrize("length", [1, 40, 128])
def test_keys_shifted_by_a_constant_change_only_the_lse(impl, length):
    query, key, value = random_qkv(length)
    shift = random_qkv(1, seed=5)[1]
    settings = {"sparsity": 0.6, "block_q": 16, "block_k": 8, "impl": impl, "return_lse": True}
    out, lse = sla2_attention(query, key, value, **settings)
    moved, moved_lse = sla2_attention(query, key + shift, value, **settings)
    torch.testing.assert_close(moved, out, atol=1e-11, rtol=0)
    along = (query * shift).sum(-1).transpose(1, 2) / 4  # q . shift / sqrt(16)
    torch.testing.assert_close(moved_lse, lse + along, atol=1e-11, rtol=0)


def test_top_p_selects_the_fewest_blocks_that_reach_the_mass():
    query, key, _ = random_qkv(160)
    plan = route(query, key, None, options(selection="top_p", top_p=0.5, sparsity=0))
    top_k = route(query, key, None, options(sparsity=0.95))  # one block a row
    assert plan.valid is not None and plan.dropped is not None and top_k.dropped is not None
    counts = plan.valid.sum(-1)
    assert counts.min() >= 1 and counts.max() <= 20 and counts.unique().numel() > 1
    # The best block is always among them.
    assert ((plan.dropped == 0) | (top_k.dropped == 1)).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_top_p_floor_and_cap(impl):
    query, key, value = random_qkv(160)
    settings = {"block_q": 16, "block_k": 8, "impl": impl}
    top_k = sla2_attention(query, key, value, sparsity=0.8, **settings)
    # A mass no row can miss or reach, so the floor or the cap decides: 4 of 20 blocks.
    for limits in ({"top_p": 1e-9, "min_selected": 4}, {"top_p": 1.0, "max_selected": 4}):
        out = sla2_attention(query, key, value, selection="top_p", **limits, **settings)
        torch.testing.assert_close(out, top_k, atol=1e-12, rtol=0)
    # Without a cap of its own, top-p keeps at most what top-k would.
    out = sla2_attention(query, key, value, sparsity=0.8, selection="top_p", top_p=1.0, **settings)
    torch.testing.assert_close(out, top_k, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_training_free_sla2_beats_plain_top_k_on_broad_attention(sparsity, seed):
    query, key, value = random_qkv(1024, heads=2, head_dim=32, dtype=torch.float32, seed=seed)
    value = value + 1  # something for lost mass to be missed in
    full = dense_attention(query, key, value)
    settings = {"sparsity": sparsity, "block_q": 64, "block_k": 32}
    sla2 = sla2_attention(query, key, value, **settings)
    top_k = sla2_attention(
        query, key, value, fixed_alpha_router(math.inf, 2, 32, torch.float32), **settings
    )
    assert rms(sla2 - full) < 0.7 * rms(top_k - full)


def test_num_selected_counts():
    assert [num_selected(s, 112) for s in (0, 0.8, 0.9, 0.95, 0.97, 0.999)] == [
        112,
        22,
        11,
        6,
        3,
        1,
    ]
    assert num_selected(0.99, 1) == 1
