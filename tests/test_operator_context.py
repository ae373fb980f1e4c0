"""Context tokens, to which every query attends exactly: the operator against plain softmaxes.

On machines without a GPU the Triton kernels run in its interpreter. Letters: B batch, H heads,
L tokens, D head dimension, C context tokens.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operator_inputs import fixed_alpha_router, random_qkv, random_router
from torch.autograd import gradcheck

from sla_video.kernels import context as context_module
from sla_video.kernels.api import exact_recall, sla2_attention
from sla_video.kernels.triton_support import why_unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"sparsity": 0.6, "block_q": 16, "block_k": 8}
TRITON = {"sparsity": 0.5, "block_q": 32, "block_k": 16}
needs_triton = pytest.mark.skipif(
    why_unavailable() is not None, reason=f"Triton is {why_unavailable()}"
)
each_plain = pytest.mark.parametrize("impl", ["reference", "torch"])
each_implementation = pytest.mark.parametrize(
    "impl", ["reference", "torch", pytest.param("triton", marks=needs_triton)]
)


def inputs(length, count, *, batch=2, head_dim=16, dtype=torch.float64, seed=0, offset=0.0):
    """Query, key, value `[B, L, H, D]` and context `[B, C, H, D]`; keys share an offset."""
    query, key, value = random_qkv(length, batch=batch, head_dim=head_dim, seed=seed)
    _, text_key, text_value = random_qkv(count, batch=batch, head_dim=head_dim, seed=seed + 50)
    tensors = (query, key + offset, value, text_key + offset, text_value)
    query, key, value, text_key, text_value = (x.to(DEVICE, dtype) for x in tensors)
    return (query, key, value), (text_key, text_value)


def ragged_mask(batch, count):
    """The first sequence has all of the context, the next ones fewer and fewer tokens of it."""
    return (torch.arange(count) < count - 2 * torch.arange(batch)[:, None]).to(DEVICE)


def full_attention(qkv, context, mask=None):
    """Softmax over sequence and context in float64, by torch."""
    query, key, value = (x.double() for x in qkv)
    keys, values = (
        torch.cat((x, y.double()), 1) for x, y in zip((key, value), context, strict=True)
    )
    if mask is not None:
        there = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
        mask = torch.cat((there, mask), 1)[:, None, None]
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, keys, values)), attn_mask=mask
    )
    return out.transpose(1, 2)


@each_plain
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("length", "count"), [(1, 1), (63, 7), (96, 40)])
def test_full_selection_is_full_attention_to_both(impl, length, count, masked):
    qkv, context = inputs(length, count)
    mask = ragged_mask(2, count) if masked and count > 2 else None
    out = sla2_attention(
        *qkv, impl=impl, context=context, context_mask=mask, **{**SMALL, "sparsity": 0.0}
    )
    torch.testing.assert_close(out, full_attention(qkv, context, mask), atol=1e-12, rtol=1e-12)


@each_plain
@pytest.mark.parametrize("alpha", [0.9, 0.2])
def test_a_share_of_the_mass_weighs_the_sequence(impl, alpha):
    qkv, context = inputs(63, 7)
    router = fixed_alpha_router(torch.tensor(alpha / (1 - alpha)).log().item(), 2, 16).to(DEVICE)
    settings = {**SMALL, "impl": impl, "return_lse": True}
    alone, lse = sla2_attention(*qkv, router, **settings)
    out, lse_again = sla2_attention(*qkv, router, context=context, **settings)

    assert torch.equal(lse_again, lse)
    scores = torch.einsum("blhd,bchd->bhlc", qkv[0], context[0]) / 4
    # [B, L, H, 1]: the mass of all keys is that of the selected ones over their share.
    sequence = (lse.exp() / alpha).transpose(1, 2).unsqueeze(-1)
    text = scores.exp().sum(-1).transpose(1, 2).unsqueeze(-1)
    wanted = sequence * alone + torch.einsum("bhlc,bchd->blhd", scores.exp(), context[1])
    torch.testing.assert_close(out, wanted / (sequence + text), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("selection", ["top_k", "top_p"])
@pytest.mark.parametrize("sparse_dtype", ["bf16", "int8_fp8"])
@pytest.mark.parametrize("length", [63, 96])
def test_torch_equals_the_reference(length, sparse_dtype, selection):
    qkv, context = inputs(length, 11)
    router = random_router(2, 16, per_head=True).to(DEVICE)
    settings = {**SMALL, "sparse_dtype": sparse_dtype, "selection": selection}
    settings |= {"context": context, "context_mask": ragged_mask(2, 11), "return_lse": True}
    wanted = sla2_attention(*qkv, router, impl="reference", **settings)
    got = sla2_attention(*qkv, router, impl="torch", **settings)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


@needs_triton
@pytest.mark.parametrize("selection", ["top_k", "top_p", "soft_top_k"])
@pytest.mark.parametrize("sparse_dtype", ["bf16", "int8"])
def test_triton_equals_the_reference(sparse_dtype, selection):
    qkv, context = inputs(70, 11, head_dim=32, dtype=torch.float32)
    router = random_router(2, 32).to(DEVICE)
    settings = {**TRITON, "sparse_dtype": sparse_dtype, "selection": selection}
    mask = ragged_mask(2, 11)
    wanted, wanted_lse = sla2_attention(
        *(x.double() for x in qkv),
        router,
        impl="reference",
        context=[x.double() for x in context],
        context_mask=mask,
        return_lse=True,
        **settings,
    )
    settings |= {"context": context, "context_mask": mask}
    got, lse = sla2_attention(*qkv, router.float(), impl="triton", return_lse=True, **settings)
    budget = 2e-5 if sparse_dtype == "bf16" else 2e-3
    assert (got - wanted).norm() <= budget * wanted.norm()
    assert (lse - wanted_lse).norm() <= budget * wanted_lse.norm()


@each_implementation
@pytest.mark.parametrize("sparse_dtype", ["bf16", "int8"])
def test_what_all_keys_share_changes_nothing(impl, sparse_dtype):
    # Smoothing takes the mean off the keys of the sequence, but not off those of the context.
    settings = {**TRITON, "sparsity": 0.0, "sparse_dtype": sparse_dtype, "impl": impl}
    dtype = torch.float32 if impl == "triton" else torch.float64
    errors = []
    for offset in (0.0, 3.0):
        qkv, context = inputs(70, 11, head_dim=32, dtype=dtype, offset=offset)
        out = sla2_attention(*qkv, context=context, **settings)
        wanted = full_attention(qkv, context)
        errors.append(((out - wanted).norm() / wanted.norm()).item())
    exact = 1e-10 if impl != "triton" else 2e-5
    assert max(errors) <= (exact if sparse_dtype == "bf16" else 1.5 * errors[0] + 1e-3), errors


@each_implementation
def test_a_context_that_is_all_masked_is_none(impl):
    dtype = torch.float32 if impl == "triton" else torch.float64
    qkv, context = inputs(70, 5, head_dim=32, dtype=dtype)
    nothing = torch.tensor([[False] * 5, [True] * 5], device=DEVICE)
    settings = {**TRITON, "impl": impl}
    out = sla2_attention(*qkv, context=context, context_mask=nothing, **settings)
    assert torch.equal(out[0], sla2_attention(*qkv, **settings)[0])
    assert not torch.allclose(out[1], sla2_attention(*qkv, **settings)[1], atol=1e-3)


@each_plain
def test_the_log_sum_exp_still_gives_the_recall_among_the_sequence(impl):
    qkv, context = inputs(63, 7)
    out, lse = sla2_attention(*qkv, impl=impl, context=context, return_lse=True, **SMALL)
    recall = exact_recall(*qkv[:2], lse)
    assert out.shape == qkv[0].shape
    assert recall.min() > 0 and recall.max() <= 1 + 1e-9 and recall.mean() < 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_no_more_than_attention_of_that_dtype(dtype):
    qkv, context = inputs(63, 7)
    truth = full_attention(qkv, context)
    qkv, context = ([x.to(dtype) for x in tensors] for tensors in (qkv, context))
    keys, values = (torch.cat(pair, 1) for pair in zip(qkv[1:], context, strict=True))
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (qkv[0], keys, values)))
    out = sla2_attention(*qkv, context=context, impl="torch", **{**SMALL, "sparsity": 0.0})
    assert out.dtype == dtype
    # The output of the sequence is rounded once before it is mixed.
    assert (out - truth).norm() <= 1.5 * (dense.transpose(1, 2) - truth).norm()


@pytest.mark.parametrize(
    ("impl", "alpha"), [("reference", "adaptive"), ("torch", "adaptive"), ("torch", "per_block")]
)
def test_gradcheck(impl, alpha):
    blocks = {"num_query_blocks": 2} if alpha == "per_block" else {}
    router = random_router(2, 2, alpha=alpha, **blocks)
    qkv, context = inputs(7, 3, batch=1, head_dim=2, seed=3)
    leaves = [x.cpu().requires_grad_() for x in (*qkv, *context)]

    def run(query, key, value, text_key, text_value, *_):
        return sla2_attention(
            query,
            key,
            value,
            router,
            impl=impl,
            context=(text_key, text_value),
            context_mask=torch.tensor([[True, True, False]]),
            return_lse=True,
            sparsity=0.5,
            block_q=4,
            block_k=2,
        )

    assert gradcheck(run, (*leaves, *router.parameters()), atol=1e-6)


@needs_triton
@pytest.mark.parametrize("selection", ["top_k", "soft_top_k"])
def test_triton_gradients_are_those_of_the_reference(selection):
    qkv, context = inputs(70, 11, head_dim=32, dtype=torch.float32)
    weight = random_qkv(70, batch=2, head_dim=32, seed=9)[0].to(DEVICE)
    gradients = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        router = random_router(2, 32, dtype=torch.float32).to(DEVICE, dtype)
        leaves = [x.detach().to(dtype).requires_grad_() for x in (*qkv, *context)]
        out = sla2_attention(
            *leaves[:3],
            router,
            impl=impl,
            selection=selection,
            context=leaves[3:],
            context_mask=ragged_mask(2, 11),
            **TRITON,
        )
        loss = (out * weight.to(dtype)).sum()
        gradients.append(torch.autograd.grad(loss, [*leaves, *router.parameters()]))
    for index, (mine, exact) in enumerate(zip(*gradients, strict=True)):
        assert exact.norm() > 0, index
        assert (mine - exact).norm() <= 2e-4 * exact.norm(), index


@pytest.mark.parametrize("learning", [False, True], ids=["inference", "learning"])
def test_chunks_of_queries_change_nothing(learning, monkeypatch):
    qkv, context = inputs(63, 7)
    leaves = [x.requires_grad_(learning) for x in (*qkv, *context)]

    def run():
        return sla2_attention(*qkv, context=context, impl="torch", **SMALL)

    whole = run()
    grads = torch.autograd.grad(whole.square().sum(), leaves) if learning else []
    # 10 queries of 2 sequences, 2 heads and 7 context tokens.
    monkeypatch.setattr(context_module, "_CHUNK_ELEMENTS", 10 * 28)
    monkeypatch.setattr(context_module, "_CPU_CHUNK_ELEMENTS", 10 * 28)
    parts = run()
    torch.testing.assert_close(parts, whole)
    if learning:
        again = torch.autograd.grad(parts.square().sum(), leaves)
        torch.testing.assert_close(again, grads)


@pytest.mark.parametrize("learning", [False, True], ids=["inference", "learning"])
def test_compiled_whole_equals_eager(learning):
    qkv, context = inputs(63, 7, dtype=torch.float32)
    leaves = [x.requires_grad_(learning) for x in (*qkv, *context)]
    mask = ragged_mask(2, 7)

    def run(*leaves):
        return sla2_attention(
            *leaves[:3], context=leaves[3:], context_mask=mask, impl="torch", **SMALL
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    out, wanted = compiled(*leaves), run(*leaves)
    torch.testing.assert_close(out, wanted)
    if learning:
        got, exact = (torch.autograd.grad(x.square().sum(), leaves) for x in (out, wanted))
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


def test_autocast_casts_the_context_too():
    qkv, context = inputs(63, 7, dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = sla2_attention(*qkv, context=context, impl="torch", **SMALL)
    half = [[x.bfloat16() for x in tensors] for tensors in (qkv, context)]
    wanted = sla2_attention(*half[0], context=half[1], impl="torch", **SMALL)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"context": torch.zeros(1)}, TypeError, "must be a pair"),
        ({"context": (None, None)}, TypeError, "key of `context` must be a tensor"),
        ({"context": "other_dtype"}, TypeError, "got torch.float32 on"),
        ({"context": "other_heads"}, ValueError, r"must be \[B, C, H, D\]"),
        ({"context": "other_count"}, ValueError, "value of `context`"),
        ({"context": "empty"}, ValueError, "C >= 1"),
        ({"context": None}, ValueError, "without a `context`"),
        ({"context_mask": torch.ones(2, 7)}, TypeError, "must be a boolean tensor, got torch.fl"),
        ({"context_mask": torch.ones(2, 6, dtype=torch.bool)}, ValueError, r"\[2, 7\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, said):
    qkv, (key, value) = inputs(20, 7)
    named = {
        "other_dtype": (key.float(), value.float()),
        "other_heads": (key[:, :, :1], value[:, :, :1]),
        "other_count": (key, value[:, :5]),
        "empty": (key[:, :0], value[:, :0]),
    }
    arguments = {"context": (key, value), "context_mask": ragged_mask(2, 7)} | changes
    if isinstance(arguments["context"], str):
        arguments["context"] = named[arguments["context"]]
    with pytest.raises(error, match=said):
        sla2_attention(*qkv, **arguments, **SMALL)
