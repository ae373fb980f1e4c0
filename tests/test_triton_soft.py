"""SoftTop-k with `impl="triton"`: outputs and every gradient against the float64 reference.

On machines without a GPU the kernels run in Triton's interpreter. Letters: B batch, H heads, L
tokens, D head dimension.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from operator_inputs import random_router

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import DEVICE, inputs, inside_nan, needs_triton, relative

from sla_video.kernels import triton_forward
from sla_video.kernels.api import sla2_attention
from sla_video.kernels.router import Router
from sla_video.kernels.triton_soft import _soft_attention, _soft_attention_backward

SMALL = {"selection": "soft_top_k", "sparsity": 0.5, "block_q": 32, "block_k": 32}
LOW_BIT = ("int8", "int8_fp8")
pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned")]


def outcome(qkv, router=None, *, impl="triton", weight_lse=1.0, **settings):
    """Output, log-sum-exp, and gradients by name of a loss that weighs each number differently."""
    qkv = [x.detach().requires_grad_() for x in qkv]
    settings = SMALL | settings
    out, lse = sla2_attention(*qkv, router, impl=impl, return_lse=True, **settings)
    generator = torch.Generator().manual_seed(9)
    weight, of_lse = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        for x in (out, lse)
    )
    named = dict(zip(("query", "key", "value"), qkv, strict=True))
    named |= {} if router is None else dict(router.named_parameters())
    loss = (out.double() * weight).sum() + weight_lse * (lse.double() * of_lse).sum()
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {"out": out, "lse": lse} | dict(zip(named, gradients, strict=True))


def exactly(qkv, router=None, **settings):
    """The same by the reference in float64."""
    if router is not None:
        table = getattr(router, "alpha_table", None)
        copy = Router(
            router.heads,
            router.head_dim,
            per_head=router.per_head,
            alpha=router.alpha,
            num_query_blocks=None if table is None else table.shape[1],
        )
        copy.load_state_dict(router.state_dict())
        router = copy.to(DEVICE, torch.float64)
    return outcome([x.double() for x in qkv], router, impl="reference", **settings)


def make_router(head_dim=64, **options):
    return random_router(2, head_dim, dtype=torch.float32, **options).to(DEVICE)


def check(got, wanted, budget):
    assert got.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert (got[name] is None) == (exact is None), name
        if exact is not None:
            limit = budget[name] if isinstance(budget, dict) else budget
            error = relative(got[name], exact)
            assert error <= limit, f"{name}: relative error {error:.2e}, allowed {limit:.2e}"


CASES = {
    "two heads of 64": (100, 64, {}, {}),
    "heads of 128, one short block": (65, 128, {}, {}),
    "odd head": (70, 40, {}, {}),
    "raw features": (70, 64, {}, {"phi_k": "raw"}),
    # The kernels work on both in several tiles.
    "large blocks": (140, 64, {}, {"block_q": 128, "block_k": 64}),
    "one kept of three": (70, 64, {"per_head": True}, {"sparsity": 0.9}),
    "table of alpha": (70, 64, {"alpha": "per_block", "num_query_blocks": 5}, {}),
    "sharp": (100, 64, {}, {"tau": 0.01}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_float32(case):
    length, head_dim, of_router, settings = case
    qkv, router = inputs(length, head_dim=head_dim), make_router(head_dim, **of_router)
    wanted = exactly(qkv, router, **settings)
    # Nothing is compared with zero: every tensor that is learned has a gradient.
    assert all(x.norm() > 0 for x in wanted.values() if x is not None)
    check(outcome(qkv, router, **settings), wanted, 1e-4)


def test_without_a_router_and_in_batches():
    qkv = inputs(40, batch=2)
    check(outcome(qkv), exactly(qkv), 1e-4)


@pytest.mark.parametrize("settings", [{}, {"sparse_dtype": "int8"}], ids=["exact", "int8"])
def test_keeping_everything_is_full_attention(settings):
    qkv, router = inputs(70), make_router()
    got = outcome(qkv, router, sparsity=0, **settings)
    hard = outcome(qkv, router, sparsity=0, selection="top_k", **settings)
    for name, x in hard.items():
        assert got[name] is None if x is None else torch.equal(got[name], x), name


def check_16_bit(qkv, router, **settings):
    """1%; for sums over a whole head, which cancel, or what rounding O and dO alone costs them."""
    got, wanted = outcome(qkv, router, **settings), exactly(qkv, router, **settings)
    assert all(got[name].dtype == qkv[0].dtype for name in ("out", "query", "key", "value"))
    rounded = outcome(qkv, router, impl="reference", **settings)
    budget = dict.fromkeys(wanted, 0.01)
    for name in ("alpha_scale", "alpha_bias"):
        budget[name] = max(0.01, 3 * relative(rounded[name], wanted[name]))
    check(got, wanted, budget)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit(dtype, head_dim):
    check_16_bit(inputs(100, head_dim=head_dim, dtype=dtype), make_router(head_dim))


@pytest.mark.skipif(DEVICE == "cpu", reason="too slow in Triton's interpreter; needs a CUDA GPU")
@pytest.mark.parametrize("length", [777, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_of_long_sequences(dtype, length):
    qkv = inputs(length, head_dim=128, dtype=dtype)
    check_16_bit(qkv, make_router(128), sparsity=0.9, block_q=128, block_k=64)


@pytest.mark.parametrize("sparse_dtype", LOW_BIT)
def test_low_bit_has_the_gradients_of_the_unquantized_branch(sparse_dtype):
    qkv = inputs(100)
    # A mix weight that does not depend on Q and K: its own gradient uses the value as computed.
    router = make_router(alpha="per_block", num_query_blocks=4)
    wanted, exact = (
        exactly(qkv, router, sparse_dtype=name, weight_lse=0.0) for name in (sparse_dtype, "bf16")
    )
    assert relative(wanted["out"], exact["out"]) > 1e-3
    got = outcome(qkv, router, sparse_dtype=sparse_dtype, weight_lse=0.0)
    loose = 2e-4 if sparse_dtype == "int8" else 0.03
    budget = dict.fromkeys(wanted, 1e-4) | {"out": loose, "lse": 1e-4, "alpha_table": loose}
    check(got, wanted, budget)


def test_a_sharp_mask_is_the_hard_selection():
    qkv, router = inputs(100), make_router()
    got = outcome(qkv, router, tau=1e-5)
    hard = outcome(qkv, router, selection="top_k")
    for name in ("out", "lse", "value", "alpha_bias"):
        assert relative(got[name], hard[name]) <= 1e-4, name


def test_strided_inputs_and_nothing_read_beyond_them():
    query, key, value = inputs(70)
    wanted = outcome((query, key, value))
    got = outcome((inside_nan(query), inside_nan(key), inside_nan(value).mT.contiguous().mT))
    # A GPU sums in another order for other strides.
    check(got, wanted, 1e-6 if DEVICE == "cpu" else 1e-3)


def test_two_runs_and_any_share_of_the_heads_are_equal_to_the_bit(monkeypatch):
    qkv, router = inputs(70, dtype=torch.bfloat16), make_router()
    first, second = (outcome(qkv, router) for _ in range(2))
    assert all(torch.equal(first[name], x) for name, x in second.items())
    monkeypatch.setattr(triton_forward, "_STATE_BYTES", 1)
    third = outcome(qkv, router)
    # A GPU's library may sum in another order for another number of heads.
    check(third, first, 0 if DEVICE == "cpu" else 1e-3)


def test_what_is_kept_for_the_backward():
    """Q, K, V and O_s, once each; all else grows with the number of pairs of blocks at most."""
    qkv, kept = [x.requires_grad_() for x in inputs(500, heads=1)], {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        sla2_attention(*qkv, impl="triton", **SMALL)
    size, pairs = qkv[0].nbytes, 16 * 16 * 4
    assert {x.data_ptr() for x in qkv} <= kept.keys()
    assert sum(nbytes >= size for nbytes in kept.values()) == 4
    assert all(nbytes <= 16 * pairs for nbytes in kept.values() if nbytes < size)


def test_compiled_without_graph_breaks():
    router = random_router(1, 32, dtype=torch.float32).to(DEVICE)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(query, key, value):
        return sla2_attention(query, key, value, router, impl="triton", **SMALL)

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for length in (70, 100, 130):
        qkv = [x.requires_grad_() for x in inputs(length, heads=1, head_dim=32)]
        learned = [*qkv, *router.parameters()]
        got, wanted = (
            torch.autograd.grad(f(*qkv).square().sum(), learned) for f in (compiled, run)
        )
        for one, other in zip(got, wanted, strict=True):
            assert relative(one, other) <= 1e-5
    # One graph for the first length and one for all others.
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "operator", [_soft_attention, _soft_attention_backward], ids=["forward", "backward"]
)
def test_operators_are_registered_correctly(operator, monkeypatch):
    """`opcheck` on the call that a small problem makes."""
    calls = []
    their_call = type(operator).__call__

    def record(self, *args, **kwargs):
        if self is operator:
            calls.append(args)
        return their_call(self, *args, **kwargs)

    monkeypatch.setattr(type(operator), "__call__", record)
    outcome(inputs(50), make_router(), sparse_dtype="int8")
    monkeypatch.undo()
    (args,) = calls
    differentiable = operator is _soft_attention
    args = [
        x.detach().requires_grad_(differentiable and x.is_floating_point() and x.requires_grad)
        if isinstance(x, torch.Tensor)
        else x
        for x in args
    ]
    torch.library.opcheck(operator, args)
