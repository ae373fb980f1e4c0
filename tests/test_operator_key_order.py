"""The operator with an order of keys for each head, against the specification in float64."""

from __future__ import annotations

import pytest
import torch
from key_order_specification import sla2_with_key_order
from operator_inputs import dense_attention, random_router

from sla_video import sla2_attention
from sla_video.kernels.key_places import KeyOrder, take_tokens
from sla_video.kernels.triton_support import why_unavailable

BLOCKS = {"block_q": 16, "block_k": 16}
LENGTH, HEADS, BATCH = 90, 2, 2
needs_triton = pytest.mark.skipif(
    why_unavailable() is not None, reason=f"Triton is {why_unavailable()}"
)
IMPLEMENTATIONS = ["reference", "torch", pytest.param("triton", marks=needs_triton)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(impl="reference", length=LENGTH, dim=16, seed=0, heads=HEADS, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads, dim)
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    if impl == "triton":
        # Values that float32 holds: what differs is arithmetic.
        return [part.float().to(DEVICE) for part in parts]
    return parts


def random_order(length=LENGTH, always=(0, 2), batch=BATCH, dtype=torch.int64, device="cpu"):
    generator = torch.Generator().manual_seed(9)
    places = torch.rand(batch, len(always), length, generator=generator).argsort(-1)
    return KeyOrder(places.to(device, dtype), torch.tensor(always, dtype=dtype, device=device))


def assert_near(impl, got, wanted):
    bound = {"rtol": 1e-4, "atol": 1e-5} if impl == "triton" else {}
    torch.testing.assert_close(got.double().cpu(), wanted, **bound)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1, 7, 90])
def test_full_selection_is_full_attention_in_any_order(impl, length):
    qkv = inputs(impl, length)
    order = random_order(length, device=qkv[0].device)
    output = sla2_attention(*qkv, sparsity=0, key_order=order, impl=impl, **BLOCKS)
    assert_near(impl, output, dense_attention(*(part.double().cpu() for part in qkv)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("top_p", [None, 0.5])
@pytest.mark.parametrize("routed", [False, True])
def test_operator_is_the_specification(impl, top_p, routed):
    qkv = inputs(impl)
    router = random_router(HEADS, 16).double() if routed else None
    exact = [part.double().cpu() for part in qkv]
    order = random_order()
    wanted = sla2_with_key_order(*exact, order, router, sparsity=0.6, top_p=top_p, **BLOCKS)
    plain = sla2_attention(*exact, router, sparsity=0.6, impl="reference", **BLOCKS)
    assert (wanted[0] - plain).abs().max() > 0.01, "the order makes no difference"
    settings = {} if top_p is None else {"selection": "top_p", "top_p": top_p}
    here = random_order(dtype=torch.int32, device=qkv[0].device)
    if router is not None:
        router = router.to(qkv[0].device, qkv[0].dtype)
    with torch.no_grad():
        output, lse = sla2_attention(
            *qkv, router, sparsity=0.6, key_order=here, impl=impl, return_lse=True,
            **settings, **BLOCKS,
        )  # fmt: skip
    assert_near(impl, output, wanted[0])
    assert_near(impl, lse, wanted[1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_leading_blocks_have_no_more_room_than_the_selection(impl):
    qkv = inputs(impl)
    order = random_order(always=(9, 9))
    exact = [part.double().cpu() for part in qkv]
    wanted, _ = sla2_with_key_order(*exact, order, sparsity=0.7, **BLOCKS)
    here = random_order(always=(9, 9), device=qkv[0].device)
    output = sla2_attention(*qkv, sparsity=0.7, key_order=here, impl=impl, **BLOCKS)
    assert_near(impl, output, wanted)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_keys_that_stay_in_place_change_no_bit(impl):
    qkv = inputs(impl)
    places = torch.arange(LENGTH, device=qkv[0].device).expand(BATCH, HEADS, LENGTH)
    order = KeyOrder(places, torch.zeros(HEADS, dtype=torch.int64, device=qkv[0].device))
    settings = {"sparsity": 0.6, "impl": impl, **BLOCKS}
    with_order = sla2_attention(*qkv, key_order=order, **settings)
    apart = (with_order - sla2_attention(*qkv, **settings)).abs().max()
    assert apart <= (0 if impl != "triton" or DEVICE == "cpu" else 1e-5)


@needs_triton
@pytest.mark.parametrize(
    ("sparse_dtype", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("int8", torch.bfloat16),
        ("int8_fp8", torch.float32),
        ("int8_int8", torch.float16),
    ],
)
def test_kernels_find_keys_where_they_are(sparse_dtype, dtype):
    """What the kernels make of keys and values that have been moved, bit by bit."""
    query, key, value = (part.to(dtype) for part in inputs("triton", 140, heads=2, batch=1))
    order = random_order(140, (0, 0), 1, device=query.device)
    settings = {
        "sparsity": 0.6, "impl": "triton", "sparse_dtype": sparse_dtype, "return_lse": True,
        "block_q": 32, "block_k": 32,
    }  # fmt: skip
    output, lse = sla2_attention(query, key, value, key_order=order, **settings)
    moved = (take_tokens(part, order.places) for part in (key, value))
    expected, expected_lse = sla2_attention(query, *moved, **settings)
    for got, wanted in ((output, expected), (lse, expected_lse)):
        # On a GPU a kernel that reads elsewhere may add in another order.
        apart = (got.double() - wanted.double()).norm() / wanted.double().norm()
        assert apart <= (0 if DEVICE == "cpu" else 2e-3)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients(impl):
    def gradients(operator, device="cpu", dtype=torch.float64):
        parts = [part.to(device, dtype).requires_grad_() for part in inputs(impl)]
        router = random_router(HEADS, 16).to(device, dtype)
        leaves = [*parts, *router.parameters()]
        output = operator(*parts, router)
        weight = inputs(seed=3)[0].to(output)
        return torch.autograd.grad((output * weight).sum(), leaves)

    order = random_order()
    wanted = gradients(
        lambda *inputs: sla2_with_key_order(*inputs[:3], order, inputs[3], sparsity=0.6, **BLOCKS)[
            0
        ]
    )
    device = DEVICE if impl == "triton" else "cpu"
    here = random_order(device=device)
    found = gradients(
        lambda *inputs: sla2_attention(*inputs, sparsity=0.6, key_order=here, impl=impl, **BLOCKS),
        device,
        torch.float32 if impl == "triton" else torch.float64,
    )
    for got, want in zip(found, wanted, strict=True):
        assert ((got.double().cpu() - want).norm() / want.norm()) < 2e-5


def test_bad_orders_are_refused():
    qkv = inputs(length=20)
    places, always = random_order(20)
    for order, error, message in [
        (places, TypeError, "must be a KeyOrder or None, got Tensor"),
        (KeyOrder(places.double(), always), TypeError, "`places` .* got torch.float64"),
        (KeyOrder(places, None), TypeError, "`always` .* got NoneType"),
        (KeyOrder(places[:1], always), ValueError, r"must be \[2, 2, 20\] .* got \[1, 2, 20\]"),
        (KeyOrder(places, always[:1]), ValueError, r"must be \[2\] .* got \[1\]"),
    ]:
        with pytest.raises(error, match=message):
            sla2_attention(*qkv, key_order=order, **BLOCKS)
    with pytest.raises(ValueError, match="`key_order` is not for selection='soft_top_k'"):
        sla2_attention(*qkv, key_order=KeyOrder(places, always), selection="soft_top_k", **BLOCKS)
