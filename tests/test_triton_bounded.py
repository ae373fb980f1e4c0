"""Attention to INT8 keys without a running maximum, where logits are bounded.

Letters: B batch, H heads, L tokens, D head dimension, M query blocks, N key blocks.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import DEVICE, SMALL, inputs, needs_triton, reference, relative, triton

from sla_video.kernels import triton_forward
from sla_video.kernels.api import sla2_attention
from sla_video.kernels.key_places import KeyOrder
from sla_video.kernels.launch_tuning import _ALLOWED_DISTANCE, _distance
from sla_video.kernels.over_query import attention_over_query

pytest_plugins = ["bounded_cases"]
pytestmark = [needs_triton, pytest.mark.usefixtures("no_grad")]
INT8 = SMALL | {"sparse_dtype": "int8"}


def both(choose, run):
    """Results of `run` without and with the bounded launch."""
    choose(False)
    plain = run()
    choose(True)
    return plain, run()


def assert_close(got, wanted):
    """Outputs and log-sum-exps of float32 inputs but for rounding.

    A GPU's library may sum states in another order for another number of heads.
    """
    for x, y in zip(got, wanted, strict=True):
        assert relative(x, y) <= (1e-5 if DEVICE == "cpu" else 1e-3)


def same(got, wanted):
    """Equal; on a GPU, where two variants of a kernel may round apart, nearly so."""
    return torch.equal(got, wanted) if DEVICE == "cpu" else relative(got, wanted) < 1e-3


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    ("length", "head_dim"), [(1, 64), (64, 40), (100, 64), (300, 64), (129, 128), (257, 128)]
)
def test_budgets_are_those_of_the_other_loop(poisoned, choose, marks, length, head_dim, sparsity):
    qkv = inputs(length, head_dim=head_dim, batch=2)
    settings = {"sparsity": sparsity, "block_k": 32}
    out, lse = triton(qkv, sparse_dtype="int8", **settings)
    simulated, simulated_lse = reference(qkv, sparse_dtype="int8", **settings)
    exact, exact_lse = reference(qkv, **settings)
    assert marks and not any(x.any() for x in marks)
    assert relative(out, simulated) <= 2e-3
    assert relative(out, exact) <= 0.02
    assert relative(out, exact) <= 1.05 * relative(simulated, exact) + 1e-5
    assert relative(lse, simulated_lse) <= 1e-3
    torch.testing.assert_close(lse.double(), exact_lse, atol=0.1, rtol=0)


@pytest.mark.parametrize("block_k", [32, 64, 128])
@pytest.mark.parametrize("block_q", [32, 128])
def test_bfloat16_differs_from_the_other_loop_by_less_than_tuning_allows(
    choose, marks, block_q, block_k
):
    qkv = inputs(300, head_dim=128, dtype=torch.bfloat16)
    settings = {"sparsity": 0.5, "block_q": block_q, "block_k": block_k, "sparse_dtype": "int8"}
    (plain, plain_lse), (out, lse) = both(choose, lambda: triton(qkv, **settings))
    assert len(marks) == 1 and not marks[0].any()
    assert 0 < _distance(out, plain) <= _ALLOWED_DISTANCE[torch.bfloat16]
    torch.testing.assert_close(lse, plain_lse, atol=4e-3, rtol=0)
    exact, exact_lse = reference(qkv, **settings | {"sparse_dtype": "bf16"})
    assert relative(out, exact) <= 1.05 * relative(plain, exact)
    torch.testing.assert_close(lse.double(), exact_lse, atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_beyond_the_bound_take_the_other_loop(poisoned, choose, marks, dtype):
    query, key, value = inputs(200, dtype=dtype)
    large = torch.tensor([False, True, False, True, True, False, True], device=DEVICE)
    query[:, 40] *= 1000
    query[:, 96:160, 1] *= 1000
    query[:, 199] *= 1000
    wanted = torch.stack([large, large]).int()[None]
    wanted[0, 0, 3:5] = 0
    settings = INT8 | {"sparsity": 0.4}
    (plain, plain_lse), (out, lse) = both(choose, lambda: triton((query, key, value), **settings))
    assert torch.equal(marks[0], wanted)
    rows = wanted.bool().repeat_interleave(32, 2)[:, :, :200]
    assert same(out[rows.mT], plain[rows.mT])
    assert same(lse[rows], plain_lse[rows])
    assert not torch.equal(out, plain)
    within = out[~rows.mT], plain[~rows.mT]
    assert relative(*within) <= (1e-5 if dtype == torch.float32 else 4e-3)
    simulated, simulated_lse = reference((query, key, value), **settings)
    # Nearly hard maxima: what rounds the other way in the simulation counts.
    assert relative(out, simulated) <= 0.01
    assert relative(out, simulated) <= 1.05 * relative(plain, simulated)
    assert relative(lse, simulated_lse) <= 1e-3


def test_with_all_blocks_beyond_it_is_the_other_loop(choose, marks):
    query, key, value = inputs(200, dtype=torch.bfloat16)
    plain, got = both(choose, lambda: triton((100 * query, 100 * key, value), **INT8))
    assert marks[0].all()
    assert same(got[0], plain[0]) and same(got[1], plain[1])


def test_a_common_offset_of_keys_does_not_count(choose, marks):
    query, key, value = inputs(200)
    key = key + 200 * torch.randn(64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (plain, plain_lse), (out, lse) = both(choose, lambda: triton((query, key, value), **INT8))
    assert not marks[0].any()
    assert_close((out, lse), (plain, plain_lse))
    exact, exact_lse = reference((query, key, value), **SMALL)
    assert relative(out, exact) <= 0.025
    assert relative(lse, exact_lse) <= 0.02


CALLS = {
    "top_p": {"selection": "top_p", "top_p": 0.6},
    "everything": {"sparsity": 0.0},
    "raw_features": {"phi_k": "raw"},
    "long_blocks": {"block_q": 128, "block_k": 128},
    "short_blocks": {"block_q": 16, "block_k": 16},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS.keys())
def test_options(poisoned, choose, marks, options):
    qkv = inputs(300, batch=2)
    plain, got = both(choose, lambda: triton(qkv, **INT8 | options))
    assert len(marks) == 1 and not marks[0].any()
    assert_close(got, plain)


def test_strides_do_not_matter(choose):
    qkv = inputs(77, batch=2)
    wanted = triton(qkv, **INT8)
    got = triton([torch.stack([x] * 3, 2)[:, :, 1] for x in qkv], **INT8)
    assert_close(got, wanted)


@pytest.mark.parametrize("scale", [1, 1000])
def test_keys_in_another_order(choose, marks, scale):
    query, key, value = inputs(200)
    query[:, 64:96] *= scale
    places = torch.rand(1, 2, 200, generator=torch.Generator().manual_seed(0)).argsort(-1)
    order = KeyOrder(places.to(DEVICE), torch.tensor([0, 1], device=DEVICE))
    plain, got = both(choose, lambda: triton((query, key, value), key_order=order, **INT8))
    assert marks[0].sum() == (0 if scale == 1 else 2)
    assert_close(got, plain)


@pytest.mark.parametrize("scale", [1, 1000])
def test_output_over_the_query(choose, marks, scale):
    query, key, value = inputs(200)
    query[:, 64:96] *= scale
    wanted = sla2_attention(query, key, value, impl="triton", **INT8)
    taken = query.clone()
    got = attention_over_query(taken, key, value, impl="triton", **INT8)
    assert got.data_ptr() == taken.data_ptr() and len(marks) == 2
    assert same(got, wanted)


def test_heads_a_few_at_a_time(choose, marks, monkeypatch):
    qkv = inputs(200, batch=2, heads=3)
    wanted = triton(qkv, **INT8)
    monkeypatch.setattr(triton_forward, "_STATE_BYTES", 1)
    got = triton(qkv, **INT8)
    assert len(marks) == 1 + 6
    assert_close(got, wanted)


def test_gradients(choose, marks):
    qkv = inputs(200)
    qkv[0][:, 64:96] *= 1000

    def gradients():
        with torch.enable_grad():
            leaves = [x.clone().requires_grad_() for x in qkv]
            out = sla2_attention(*leaves, impl="triton", **INT8)
            return torch.autograd.grad((out * qkv[2].cos()).sum(), leaves)

    plain, got = both(choose, gradients)
    assert marks[0].sum() == 2
    for x, y in zip(got, plain, strict=True):
        assert relative(x, y) <= 1e-4


def test_equal_inputs_give_equal_bits(choose):
    query, key, value = inputs(200, dtype=torch.bfloat16)
    query[:, 64:96] *= 1000
    first, second = (triton((query, key, value), **INT8) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"sparse_dtype": "bf16"}, torch.bfloat16),
        ({"sparse_dtype": "int8_fp8"}, torch.bfloat16),
        ({"sparse_dtype": "int8_int8"}, torch.bfloat16),
        ({"sparse_dtype": "int8"}, torch.float16),
        ({"sparse_dtype": "int8", "selection": "soft_top_k"}, torch.float32),
    ],
    ids=["bf16", "int8_fp8", "int8_int8", "float16", "soft_top_k"],
)
def test_what_has_no_bound_takes_the_other_loop(choose, marks, options, dtype):
    qkv = inputs(100, dtype=dtype)
    plain, got = both(choose, lambda: triton(qkv, **SMALL | options))
    assert not marks
    assert torch.equal(got[0], plain[0]) and torch.equal(got[1], plain[1])
