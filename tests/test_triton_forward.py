"""The Triton operator against the float64 reference; interpreted where there is no GPU.

Letters: L tokens, D head dimension.
"""

from __future__ import annotations

import math

import pytest
import torch
from operator_inputs import dense_attention, random_router
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import (
    DEVICE,
    SMALL,
    inputs,
    inside_nan,
    needs_triton,
    reference,
    relative,
    triton,
)

from sla_video.kernels.api import sla2_attention

pytestmark = [needs_triton, pytest.mark.usefixtures("no_grad")]
LOW_BIT = ["int8", "int8_fp8", "int8_int8"]


def same(got, wanted):
    """Equal; on a GPU, where other strides make another variant of a kernel, up to rounding."""
    return torch.equal(got, wanted) if DEVICE == "cpu" else relative(got, wanted) < 1e-3


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("selection", ["top_k", "top_p"])
@pytest.mark.parametrize(
    ("length", "head_dim"),
    [(1, 64), (63, 64), (64, 64), (100, 40), (129, 128), (300, 64)],
    ids=lambda n: str(n),
)
def test_float32_is_the_reference(poisoned, length, head_dim, selection, sparsity):
    qkv = inputs(length, head_dim=head_dim, batch=2)
    settings = {"sparsity": sparsity, "selection": selection, "top_p": 0.7}
    out, lse = triton(qkv, **settings)
    wanted, wanted_lse = reference(qkv, **settings)
    assert relative(out, wanted) <= 1e-5
    assert relative(lse, wanted_lse) <= 1e-5


@pytest.mark.parametrize(
    ("block_q", "block_k"), [(16, 16), (32, 64), (64, 128), (128, 32)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("phi_k", ["smoothed", "raw"])
def test_block_sizes_and_features(block_q, block_k, phi_k):
    qkv = inputs(140, head_dim=32)
    settings = {"sparsity": 0.6, "block_q": block_q, "block_k": block_k, "phi_k": phi_k}
    out, lse = triton(qkv, **settings)
    wanted, wanted_lse = reference(qkv, **settings)
    assert relative(out, wanted) <= 1e-5
    assert relative(lse, wanted_lse) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_head": True},
        {"alpha": "per_block", "num_query_blocks": 5},
        {"alpha": "per_block", "num_query_blocks": 3},
    ],
    ids=["adaptive", "per_head", "per_block", "per_block_interpolated"],
)
@pytest.mark.parametrize("selection", ["top_k", "top_p"])
def test_routers(options, selection):
    qkv = inputs(150, head_dim=40)
    router = random_router(2, 40, dtype=torch.float32, **options).to(DEVICE)
    settings = SMALL | {"selection": selection}
    out, lse = triton(qkv, router, **settings)
    wanted, wanted_lse = reference(qkv, router, **settings)
    assert relative(out, wanted) <= 1e-5
    assert relative(lse, wanted_lse) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
class TestErrorBudget:
    """At most twice the error of torch's own attention, or of `impl="torch"`, in the same dtype."""

    @pytest.mark.parametrize("length", [63, 300])
    def test_everything_selected(self, dtype, length):
        qkv = inputs(length, dtype=dtype)
        wanted = dense_attention(*(x.double() for x in qkv))
        out, _ = triton(qkv, sparsity=0)
        assert out.dtype == dtype
        assert relative(out, wanted) <= 2 * relative(dense_attention(*qkv), wanted)

    @pytest.mark.parametrize(("length", "head_dim"), [(300, 64), (129, 128)])
    @pytest.mark.parametrize("phi_k", ["smoothed", "raw"])
    def test_whole_operator(self, dtype, length, head_dim, phi_k):
        qkv = inputs(length, dtype=dtype, head_dim=head_dim)
        router = random_router(2, head_dim, dtype=torch.float32).to(DEVICE)
        settings = SMALL | {"sparsity": 0.8, "phi_k": phi_k}
        wanted, wanted_lse = reference(qkv, router.float(), **settings)
        out, lse = triton(qkv, router.float(), **settings)
        theirs = sla2_attention(*qkv, router, impl="torch", **settings)
        assert lse.dtype == torch.float32
        assert relative(out, wanted) <= 2 * relative(theirs, wanted)
        torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5, rtol=0)

    def test_linear_branch_alone(self, dtype):
        qkv = inputs(300, dtype=dtype)
        router = random_router(2, 64, alpha="per_block", num_query_blocks=1, dtype=torch.float32)
        router.alpha_table.fill_(-math.inf)
        router.to(DEVICE)
        wanted, _ = reference(qkv, router, **SMALL)
        router = router.float()
        theirs = sla2_attention(*qkv, router, impl="torch", **SMALL)
        # Features, the state and the weights of the state are rounded as well as the output.
        assert relative(triton(qkv, router, **SMALL)[0], wanted) <= 3 * relative(theirs, wanted)


LAYOUTS = {
    "heads_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "fused_qkv": lambda x: torch.stack([x] * 3, 2)[:, :, 1],
    "every_other_token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "head_dim_strided": lambda x: x.mT.contiguous().mT,
    "expanded_batch": lambda x: x[:1].expand(2, -1, -1, -1),
    "off_by_one": lambda x: F.pad(x, (1, 2))[..., 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("sparse_dtype", ["bf16", "int8_int8"])
def test_strides_do_not_matter(layout, sparse_dtype):
    qkv = [layout(x) for x in inputs(77, batch=2)]
    settings = SMALL | {"sparse_dtype": sparse_dtype}
    out, lse = triton(qkv, **settings)
    wanted, wanted_lse = triton(
        [x.clone(memory_format=torch.contiguous_format) for x in qkv], **settings
    )
    assert same(out, wanted) and same(lse, wanted_lse)


@pytest.mark.parametrize("sparse_dtype", ["bf16", *LOW_BIT])
@pytest.mark.parametrize("length", [1, 63, 100])
def test_nan_around_the_inputs_never_leaks(poisoned, length, sparse_dtype):
    qkv = inputs(length)
    settings = SMALL | {"sparse_dtype": sparse_dtype}
    out, lse = triton([inside_nan(x) for x in qkv], **settings)
    wanted, wanted_lse = triton(qkv, **settings)
    assert out.isfinite().all() and lse.isfinite().all()
    assert same(out, wanted) and same(lse, wanted_lse)


@pytest.mark.parametrize("sparse_dtype", ["bf16", "int8_fp8"])
def test_equal_inputs_give_equal_bits(sparse_dtype):
    qkv = inputs(200, dtype=torch.bfloat16)
    first, second = (triton(qkv, sparse_dtype=sparse_dtype, **SMALL) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    without_lse = sla2_attention(*qkv, impl="triton", sparse_dtype=sparse_dtype, **SMALL)
    assert torch.equal(without_lse, first[0])


@pytest.mark.parametrize("sparse_dtype", ["bf16", *LOW_BIT])
def test_extreme_scores_stay_finite(sparse_dtype):
    query, key, value = inputs(150)
    out, lse = triton((100 * query, 100 * key, value), sparse_dtype=sparse_dtype, **SMALL)
    assert out.isfinite().all() and lse.isfinite().all()
    assert out.abs().max() <= 1.1 * value.abs().max()


def test_states_do_not_overflow_float16():
    """Summed over tokens, the state would be 300 times these values."""
    query, key, value = inputs(300, dtype=torch.float16)
    key, value = key * 0, value.abs() * 1000
    key[..., 3] = 30  # all features in one channel
    settings = SMALL | {"phi_k": "raw"}
    out, _ = triton((query, key, value), **settings)
    assert relative(out, reference((query, key, value), **settings)[0]) <= 2e-3
