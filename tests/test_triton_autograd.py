"""Gradients of `impl="triton"` as autograd, autocast, checkpoints and the compiler see them.

Compared with autograd through the float64 reference. On machines without a GPU the kernels run in
Triton's interpreter. Letters: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from operator_inputs import random_qkv, random_router
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import DEVICE, needs_triton, relative

from sla_video.kernels import triton_forward
from sla_video.kernels.api import sla2_attention
from sla_video.kernels.router import Router
from sla_video.kernels.triton_attend import attend
from sla_video.kernels.triton_autograd import _mixed_attention, _mixed_attention_backward
from sla_video.kernels.triton_routing import _select
from sla_video.kernels.triton_statistics import _block_statistics

HEADS, HEAD_DIM = 2, 32
SMALL = {"sparsity": 0.5, "block_q": 32, "block_k": 16, "top_p": 0.7}
ROUTERS = {
    "adaptive": {},
    "adaptive_per_head": {"per_head": True},
    "per_block": {"alpha": "per_block", "num_query_blocks": 3},
    "per_block_interpolated": {"alpha": "per_block", "num_query_blocks": 5},
}
pytestmark = needs_triton
each_selection = pytest.mark.parametrize("selection", ["top_k", "top_p"])


def leaves(length=70, *, dtype=torch.float32, batch=1, seed=0):
    """Query, key, value, to be differentiated."""
    qkv = random_qkv(
        length, batch=batch, heads=HEADS, head_dim=HEAD_DIM, dtype=torch.float32, seed=seed
    )
    return [x.to(DEVICE, dtype).requires_grad_() for x in qkv]


def make_router(**options):
    return random_router(HEADS, HEAD_DIM, dtype=torch.float32, **options).to(DEVICE)


def in_float64(router):
    copy = Router(
        router.heads,
        router.head_dim,
        per_head=router.per_head,
        alpha=router.alpha,
        num_query_blocks=router.alpha_table.shape[1] if router.alpha == "per_block" else None,
    )
    copy.load_state_dict(router.state_dict())
    return copy.to(DEVICE, torch.float64)


def loss(out, lse):
    """Linear, so that gradients do not depend on the outputs; weighs every number differently."""
    shape = (*out.shape[:-1], HEAD_DIM + 1)
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(out.device)
    lse_weight = weight[..., -1].transpose(1, 2)
    return (out.double() * weight[..., :-1]).sum() + (lse.double() * lse_weight).sum()


def gradients(run, qkv, router):
    """Of query, key, value and the router's parameters by name, None where there is none."""
    named = dict(zip(("query", "key", "value"), qkv, strict=True))
    named |= {} if router is None else dict(router.named_parameters())
    found = torch.autograd.grad(loss(*run()), list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def operator_gradients(qkv, router=None, impl="triton", **settings):
    return gradients(
        lambda: sla2_attention(*qkv, router, impl=impl, return_lse=True, **(SMALL | settings)),
        qkv,
        router,
    )


def reference_gradients(qkv, router=None, **settings):
    qkv = [x.detach().double().requires_grad_() for x in qkv]
    router = None if router is None else in_float64(router)
    return operator_gradients(qkv, router, impl="reference", **settings)


def check(got, wanted, budget):
    """Every gradient there is in `wanted`, and no other, within `budget`."""
    assert got.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert (got[name] is None) == (exact is None), name
        if exact is not None:
            error = relative(got[name], exact)
            limit = budget[name] if isinstance(budget, dict) else budget
            assert error <= limit, f"{name}: relative error {error:.2e}, allowed {limit:.2e}"


def assert_equal_bits(got, wanted):
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(got[name], x), name


@each_selection
@pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS.keys())
def test_float32_gradients_are_those_of_the_reference(options, selection):
    qkv, router = leaves(), make_router(**options)
    wanted = reference_gradients(qkv, router, selection=selection)
    assert sum(x is not None for x in wanted.values()) == (7 if router.alpha == "adaptive" else 4)
    check(operator_gradients(qkv, router, selection=selection), wanted, 1e-4)


@pytest.mark.parametrize("phi_k", ["smoothed", "raw"])
def test_without_a_router(phi_k):
    qkv = leaves()
    check(operator_gradients(qkv, phi_k=phi_k), reference_gradients(qkv, phi_k=phi_k), 1e-4)


@each_selection
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_budget(dtype, selection):
    """1%, or twice the error of `impl="torch"` in the same dtype."""
    qkv, router = leaves(100, dtype=dtype), make_router()
    wanted = reference_gradients(qkv, router, selection=selection)
    theirs = operator_gradients(qkv, router, impl="torch", selection=selection)
    got = operator_gradients(qkv, router, selection=selection)
    assert all(got[name].dtype == dtype for name in ("query", "key", "value"))
    check(got, wanted, {name: max(0.01, 2 * relative(theirs[name], wanted[name])) for name in got})


@each_selection
def test_int8_has_the_gradients_of_the_unquantized_branch(selection):
    qkv, router = leaves(), make_router()
    settings = {"selection": selection, "sparse_dtype": "int8"}
    wanted = reference_gradients(qkv, router, **settings)
    # Those of the mix weight see the low-bit value, so all of them differ from the exact ones.
    exact = reference_gradients(qkv, router, selection=selection)
    assert all(relative(wanted[name], exact[name]) > 1e-4 for name in ("query", "alpha_scale"))
    # A number halfway between two integers may be rounded either way: O_s differs by some 1e-5, and
    # more so what goes through alpha, which sees the difference of O_s and O_l.
    budget = dict.fromkeys(wanted, 5e-4) | dict.fromkeys(("query", "key", "value"), 2e-5)
    check(operator_gradients(qkv, router, **settings), wanted, budget)


@pytest.mark.parametrize("sparse_dtype", ["int8", "int8_fp8", "int8_int8"])
def test_low_bit_changes_no_gradient_but_that_of_alpha(sparse_dtype):
    qkv, router = leaves(), make_router(alpha="per_block", num_query_blocks=3)
    exact = operator_gradients(qkv, router, block_k=32)
    low = operator_gradients(qkv, router, block_k=32, sparse_dtype=sparse_dtype)
    # Linear in O_s, so this one tells that the forward was low-bit.
    assert relative(low.pop("alpha_table"), exact.pop("alpha_table")) > 1e-4
    check(low, exact, 2e-5)


@pytest.mark.parametrize(
    "settings",
    [{"sparsity": 0.0}, {"selection": "top_p", "top_p": 1.0, "sparsity": 0.0}],
    ids=["top_k", "top_p"],
)
def test_nothing_dropped(settings):
    qkv, router = leaves(), make_router()
    got = operator_gradients(qkv, router, **settings)
    wanted = reference_gradients(qkv, router, **settings)
    for name, x in got.items():
        if name in ("query", "key", "value"):
            assert relative(x, wanted[name]) <= 1e-4, name
        else:
            assert x is None or not x.any(), name


@pytest.mark.parametrize("which", ["query", "value", "router", "lse"])
def test_gradients_that_are_wanted_alone(which):
    qkv, router = leaves(), make_router()
    every = {name: x for name, x in operator_gradients(qkv, router).items() if x is not None}
    settings = SMALL | {"impl": "triton", "return_lse": True}
    if which == "lse":
        qkv = [x.detach().requires_grad_() for x in qkv]
        _, lse = sla2_attention(*qkv, router, **settings)
        query, key = torch.autograd.grad(lse.sum(), qkv[:2])
        exact = [x.detach().double().requires_grad_() for x in qkv]
        settings["impl"] = "reference"
        _, lse = sla2_attention(*exact, in_float64(router), **settings)
        wanted = torch.autograd.grad(lse.sum(), exact[:2])
        assert relative(query, wanted[0]) <= 1e-4 and relative(key, wanted[1]) <= 1e-4
        return
    for x in [*qkv, *router.parameters()]:
        x.requires_grad_(False)
    if which == "router":
        names = [name for name, x in router.named_parameters() if x.requires_grad_() is not None]
        learned = list(router.parameters())
    else:
        names, learned = [which], [qkv[("query", "key", "value").index(which)].requires_grad_()]
    found = torch.autograd.grad(loss(*sla2_attention(*qkv, router, **settings)), learned)
    for name, x in zip(names, found, strict=True):
        assert torch.equal(x, every[name]), name


def test_strided_inputs():
    """Views into one projection, and one that is not contiguous along D."""
    query, key, value = (x.detach() for x in leaves())
    fused = torch.stack([query, key, value], 2).requires_grad_()
    views = [fused[:, :, 0], fused[:, :, 1], fused[:, :, 2].mT.contiguous().mT]
    assert views[2].stride(-1) != 1
    out, lse = sla2_attention(*views, impl="triton", return_lse=True, **SMALL)
    (got,) = torch.autograd.grad(loss(out, lse), [fused])
    wanted = operator_gradients([x.requires_grad_() for x in (query, key, value)])
    assert torch.equal(got, torch.stack(list(wanted.values()), 2))


def test_autocast():
    qkv, router = leaves(), make_router()
    settings = SMALL | {"impl": "triton", "return_lse": True}

    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            out, lse = sla2_attention(*qkv, router, **settings)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        return out, lse

    def cast_first():
        return sla2_attention(*(x.bfloat16() for x in qkv), router, **settings)

    got = gradients(run, qkv, router)
    assert all(x.dtype == torch.float32 for x in got.values())
    assert_equal_bits(got, gradients(cast_first, qkv, router))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint(use_reentrant):
    qkv, router = leaves(), make_router()

    def run(*qkv):
        return sla2_attention(*qkv, router, impl="triton", return_lse=True, **SMALL)

    plain = {name: x.clone() for name, x in operator_gradients(qkv, router).items()}
    loss(*checkpoint(run, *qkv, use_reentrant=use_reentrant)).backward()
    got = dict(zip(("query", "key", "value"), (x.grad for x in qkv), strict=True))
    got |= {name: x.grad for name, x in router.named_parameters()}
    assert_equal_bits(got, plain)


def test_what_is_kept_for_the_backward():
    """Q, K, V and O_s, once each; all else is smaller."""
    qkv, router = leaves(200), make_router()
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        sla2_attention(*qkv, router, impl="triton", **SMALL)
    size = qkv[0].nbytes
    assert sum(nbytes >= size for nbytes in kept.values()) == 4
    assert {x.data_ptr() for x in qkv} <= kept.keys()
    assert sum(nbytes for nbytes in kept.values() if nbytes < size) < size


@pytest.mark.parametrize("learning", [False, True])
def test_the_sparse_output_is_kept_only_for_gradients(learning, monkeypatch):
    kept = []

    def record(*args, out_sparse, **keywords):
        kept.append(out_sparse is not None)
        attend(*args, out_sparse=out_sparse, **keywords)

    monkeypatch.setattr(triton_forward, "attend", record)
    with torch.set_grad_enabled(learning):
        sla2_attention(*leaves(40), impl="triton", **SMALL)
    assert kept == [learning]


@pytest.mark.parametrize("sparse_dtype", ["bf16", "int8_fp8"])
def test_heads_may_be_worked_on_a_few_at_a_time(sparse_dtype, monkeypatch):
    qkv = [x.detach() for x in leaves(64)]
    qkv = [torch.cat([x, x.flip(1)]).repeat(1, 1, 2, 1)[:, :, :3] for x in qkv]
    settings = {"sparse_dtype": sparse_dtype, "impl": "triton", "return_lse": True}
    settings = SMALL | {"block_k": 32} | settings
    wanted = sla2_attention(*qkv, **settings)
    one_head = (2 + 2) * (HEAD_DIM + 1) * HEAD_DIM * 4
    for size, shares in ((1, 6), (2 * one_head, 4), (3 * one_head, 2), (6 * one_head, 1)):
        monkeypatch.setattr(triton_forward, "_STATE_BYTES", size)
        assert len(list(triton_forward._shares(qkv[1], 2, 2, True))) == shares
        for got, whole in zip(sla2_attention(*qkv, **settings), wanted, strict=True):
            # A GPU's library may sum in another order for another number of heads.
            assert torch.equal(got, whole) if DEVICE == "cpu" else relative(got, whole) < 1e-3


def test_second_derivatives_are_refused():
    query, key, value = leaves(40)
    out = sla2_attention(query, key, value, impl="triton", **SMALL)
    (grad,) = torch.autograd.grad(out.square().sum(), [query], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "settings",
    [{}, {"selection": "top_p", "sparse_dtype": "int8"}],
    ids=["top_k-bf16", "top_p-int8"],
)
def test_compiled_without_graph_breaks(settings):
    router = make_router()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(query, key, value):
        return sla2_attention(
            query, key, value, router, impl="triton", return_lse=True, **(SMALL | settings)
        )

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for length in (50, 70, 90):
        qkv = leaves(length)
        got = gradients(lambda: compiled(*qkv), qkv, router)  # noqa: B023
        assert_equal_bits(got, gradients(lambda: run(*qkv), qkv, router))  # noqa: B023
    # One graph for the first length and one for all others.
    assert counter.frame_count <= 2


OPERATORS = {
    "statistics": _block_statistics,
    "selection": _select,
    "attention": _mixed_attention,
    "attention_backward": _mixed_attention_backward,
}


@pytest.mark.parametrize("variant", ["top_k", "top_p", "everything"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_registered_correctly(name, variant, monkeypatch):
    """`opcheck` on the calls that a small problem makes."""
    calls = []
    operator = OPERATORS[name]
    their_call = type(operator).__call__

    def record(self, *args, **kwargs):
        if self is operator:
            calls.append(args)
        return their_call(self, *args, **kwargs)

    monkeypatch.setattr(type(operator), "__call__", record)
    settings = {
        "top_k": {},
        "top_p": {"selection": "top_p", "sparse_dtype": "int8_int8", "block_k": 32},
        "everything": {"sparsity": 0.0},
    }[variant]
    operator_gradients(leaves(50), make_router(), **settings)
    monkeypatch.undo()
    if name == "selection" and variant == "everything":
        assert not calls
        return
    (args,) = calls
    differentiable = name != "attention_backward"
    args = [
        x.detach().requires_grad_(differentiable and x.is_floating_point() and x.requires_grad)
        if isinstance(x, torch.Tensor)
        else x
        for x in args
    ]
    torch.library.opcheck(operator, args)
