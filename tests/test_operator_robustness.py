"""The operator on awkward memory, dtypes and arguments."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from operator_inputs import (
    dense_attention,
    fixed_alpha_router,
    options,
    random_qkv,
    random_router,
    rms,
    token_mask,
)

from sla_video.kernels import api
from sla_video.kernels.api import available_implementations, exact_recall, sla2_attention
from sla_video.kernels.reference import top_p_mask
from sla_video.kernels.routing import route, select_top_p

each_impl = pytest.mark.parametrize("impl", ["reference", "torch"])
SMALL = {"sparsity": 0.7, "block_q": 16, "block_k": 8}


@pytest.fixture
def poisoned_memory():
    """Fill uninitialised memory with NaN, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)


def inside_nan(x):
    """The values of x `[B, L, H, D]` as a view into a larger storage full of NaN."""
    batch, length, heads, head_dim = x.shape
    storage = torch.full((batch + 1, length + 9, heads + 2, head_dim + 3), math.nan, dtype=x.dtype)
    view = storage[:batch, 4 : 4 + length, 1 : 1 + heads, 2 : 2 + head_dim]
    view.copy_(x)
    return view


@each_impl
@pytest.mark.parametrize("sparse_dtype", ["bf16", "int8_fp8"])
@pytest.mark.parametrize("selection", ["top_k", "top_p"])
@pytest.mark.parametrize("length", [1, 63, 111, 128])
def test_nan_in_unused_memory_never_leaks(poisoned_memory, impl, length, selection, sparse_dtype):
    inputs = random_qkv(length, batch=2)
    settings = SMALL | {"impl": impl, "selection": selection, "sparse_dtype": sparse_dtype}
    wanted, wanted_lse = sla2_attention(*inputs, return_lse=True, **settings)
    poisoned = [inside_nan(x).requires_grad_() for x in inputs]
    out, lse = sla2_attention(*poisoned, return_lse=True, **settings)
    assert out.isfinite().all()
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-12, rtol=0)
    gradients = torch.autograd.grad(out.square().sum() + lse.sum(), poisoned)
    assert all(gradient.isfinite().all() for gradient in gradients)


LAYOUTS = {
    "heads_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "fused_qkv": lambda x: (
        torch.stack([x] * 3, 2).flatten(2).unflatten(2, (3, *x.shape[2:]))[:, :, 1]
    ),
    "every_other_token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "head_dim_strided": lambda x: x.mT.contiguous().mT,
    "expanded_batch": lambda x: x[:1].expand(2, -1, -1, -1),
}


@each_impl
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("length", [64, 77])
def test_strides_do_not_matter(impl, layout, length):
    inputs = [layout(x) for x in random_qkv(length, batch=2)]
    dense = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
    out, lse = sla2_attention(*inputs, return_lse=True, impl=impl, **SMALL)
    wanted, wanted_lse = sla2_attention(*dense, return_lse=True, impl=impl, **SMALL)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-12, rtol=0)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_chunks_and_groups_do_not_matter(monkeypatch, grad):
    inputs = random_qkv(200, batch=2, heads=3)
    wanted = sla2_attention(*inputs, impl="reference", **SMALL)
    for chunk, group in ((1, 1), (16 * 8 * 4 * 5, 1), (2**30, 2**30)):
        for name in ("_CPU_CHUNK_ELEMENTS", "_CHUNK_ELEMENTS"):
            monkeypatch.setattr(f"sla_video.kernels.torch_impl.{name}", chunk)
        for name in ("_CPU_GROUP_BYTES", "_GROUP_BYTES"):
            monkeypatch.setattr(f"sla_video.kernels.torch_impl.{name}", group)
        leaves = [x.clone().requires_grad_(grad) for x in inputs]
        out = sla2_attention(*leaves, impl="torch", **SMALL)
        torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
class TestErrorBudget:
    """At most twice the error that scaled_dot_product_attention makes in the same dtype."""

    length = 500

    def errors(self, dtype, router, mask):
        query, key, value = (x.double() for x in random_qkv(self.length, head_dim=64, dtype=dtype))
        settings = SMALL | {"block_q": 64, "block_k": 32}
        wanted = sla2_attention(query, key, value, router, impl="reference", **settings)
        low = [x.to(dtype) for x in (query, key, value)]
        out = sla2_attention(*low, router, impl="torch", **settings)
        assert out.dtype == dtype
        dense = dense_attention(query, key, value, mask)
        return (
            rms(out - wanted) / rms(wanted),
            rms(dense_attention(*low, mask) - dense) / rms(dense),
        )

    def test_sparse_branch(self, dtype):
        query, key, _ = random_qkv(self.length, head_dim=64, dtype=dtype)
        plan = route(query, key, None, options(block_q=64, block_k=32))
        mask = token_mask(plan.dropped, 64, 32, self.length)
        ours, theirs = self.errors(dtype, fixed_alpha_router(math.inf, 2, 64), mask)
        assert ours <= 2 * theirs

    def test_whole_operator(self, dtype):
        ours, theirs = self.errors(dtype, random_router(2, 64, dtype=torch.float32), None)
        assert ours <= 2 * theirs

    def test_lse(self, dtype):
        query, key, value = random_qkv(self.length, head_dim=64, dtype=dtype)
        _, lse = sla2_attention(query, key, value, return_lse=True, impl="torch", **SMALL)
        assert lse.dtype == torch.float32
        _, wanted = sla2_attention(
            query.double(), key.double(), value.double(), return_lse=True, **SMALL
        )
        torch.testing.assert_close(lse.double(), wanted, atol=1e-5, rtol=0)


def test_autocast_behaves_as_for_dense_attention():
    query, key, value = random_qkv(100, dtype=torch.float32)
    wanted = sla2_attention(*(x.bfloat16() for x in (query, key, value)), **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        out = sla2_attention(query, key, value.bfloat16(), **SMALL)
        assert out.dtype == dense_attention(query, key, value.bfloat16()).dtype
    assert torch.equal(out, wanted)


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(sla2_attention, backend="eager", fullgraph=True)
    query, key, value = random_qkv(100)
    router = random_router()
    settings = SMALL | {"impl": "torch"}
    torch.testing.assert_close(
        compiled(query, key, value, router, **settings),
        sla2_attention(query, key, value, router, **settings),
    )


def test_extreme_scores_stay_finite():
    query, key, value = random_qkv(100, dtype=torch.float32)
    for impl in ("reference", "torch"):
        out, lse = sla2_attention(
            100 * query, 100 * key, value, impl=impl, return_lse=True, **SMALL
        )
        assert out.isfinite().all() and lse.isfinite().all()


BAD_OPTIONS = {
    "sparsity_1": ({"sparsity": 1.0}, r"`sparsity` must be in \[0, 1\), got 1\.0"),
    "sparsity_negative": ({"sparsity": -0.1}, r"`sparsity` must be in \[0, 1\), got -0\.1"),
    "sparsity_nan": ({"sparsity": math.nan}, "`sparsity`.*got nan"),
    "impl": ({"impl": "cuda"}, "`impl` must be one of .*'torch'.*got 'cuda'"),
    "triton": ({"impl": "triton"}, "impl='triton' is (for float16|not available).*'torch'"),
    "torch_soft": ({"impl": "torch", "selection": "soft_top_k"}, "use impl='reference'"),
    "sparse_dtype": ({"sparse_dtype": "fp4"}, "`sparse_dtype` must be one of 'bf16'.*'fp4'"),
    "phi_k": ({"phi_k": "elu"}, "`phi_k` must be one of 'smoothed', 'raw', got 'elu'"),
    "selection": ({"selection": "best"}, "`selection` must be one of 'top_k'.*got 'best'"),
    "top_p": ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0\.0"),
    "tau": ({"tau": 0.0}, r"`tau` must be positive, got 0\.0"),
    "block_q": ({"block_q": 0}, "`block_q` must be at least 1, got 0"),
    "max_selected": ({"min_selected": 3, "max_selected": 2}, "at least `min_selected` .3., got 2"),
}


@pytest.mark.parametrize(("given", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options(given, message):
    with pytest.raises(ValueError, match=message):
        sla2_attention(*random_qkv(8), **given)


def test_block_sizes_are_counts():
    with pytest.raises(TypeError, match=r"`block_k` must be an integer, got 64\.0"):
        sla2_attention(*random_qkv(8), block_k=64.0)


def test_bad_tensors():
    query, key, value = random_qkv(8)
    with pytest.raises(ValueError, match=r"`key` must have the shape of `query`, \[1, 8, 2, 16\]"):
        sla2_attention(query, key[:, :4], value)
    with pytest.raises(ValueError, match=r"`query` must be \[B, L, H, D\].*got \[8, 2, 16\]"):
        sla2_attention(query[0], key[0], value[0])
    with pytest.raises(ValueError, match="without empty dimensions"):
        sla2_attention(query[:, :0], key[:, :0], value[:, :0])
    with pytest.raises(TypeError, match="`value` must have the dtype and device of `query`"):
        sla2_attention(query, key, value.float())
    with pytest.raises(TypeError, match="must be floating point"):
        sla2_attention(query.long(), key.long(), value.long())
    with pytest.raises(ValueError, match=r"`router` is for 3 heads of 16.*2 heads of 16"):
        sla2_attention(query, key, value, random_router(3, 16))
    with pytest.raises(ValueError, match=r"`lse_selected` must be \[B, H, L\] = \[1, 2, 8\]"):
        exact_recall(query, key, torch.zeros(1, 8, 2))
    with pytest.raises(ValueError, match="one shape"):
        exact_recall(query, key[:, :4], torch.zeros(1, 2, 8))


def test_auto_says_once_what_it_chose(monkeypatch, caplog):
    monkeypatch.setattr(api, "_ANNOUNCED", set())
    with caplog.at_level(logging.INFO, logger="sla_video"):
        for _ in range(3):
            sla2_attention(*random_qkv(8))
            sla2_attention(*random_qkv(8), selection="soft_top_k", block_k=2)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "'torch'" in messages[0] and "'reference'" in messages[1]


def test_available_implementations():
    states = available_implementations()
    assert states["reference"] == states["torch"] == "available"
    assert states["triton"] == "available" or states["triton"].startswith("not available: ")


@pytest.mark.parametrize("always", [None, torch.tensor([2])], ids=["any", "leading"])
def test_top_p_selects_something_however_masses_are_rounded(always):
    # 905 equal masses add up to less than one in float32. Then one block alone, and NaN.
    log_mass = torch.zeros(1, 1, 3, 905)
    log_mass[0, 0, 1, 1:] = -torch.inf
    log_mass[0, 0, 2] = torch.nan
    assert torch.softmax(log_mass[0, 0, 0], -1).cumsum(-1)[-1] < 1
    for cap in (1, 7, 905):
        indices, valid = select_top_p(log_mass, 1.0, 1, cap, always)
        assert valid.sum(-1).min() >= 1
        assert indices[0, 0, 0][valid[0, 0, 0]].unique().numel() == cap
        mask = top_p_mask(log_mass.log_softmax(-1), 1.0, 1, cap, always)
        assert mask.sum(-1).min() >= 1
        assert mask[0, 0, 0].sum() == cap
