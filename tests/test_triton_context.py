"""The kernel that mixes a context into the output, against `with_context` in float64.

On machines without a GPU it runs in Triton's interpreter. Letters: B batch, H heads, L tokens,
D head dimension, M query blocks, C context tokens.
"""

from __future__ import annotations

import pytest
import torch
from operator_inputs import random_qkv

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import DEVICE, inputs, inside_nan, needs_triton, poisoned_memory, relative

from sla_video.kernels import triton_impl
from sla_video.kernels.api import sla2_attention
from sla_video.kernels.context import Context, with_context
from sla_video.kernels.triton_context import mix_context

pytestmark = needs_triton
BLOCK_Q = 32


def make_case(length, count, *, head_dim=64, dtype=torch.float32, alpha=True, seed=0):
    """Arguments of `with_context`, the context without a mask."""
    query, out, _ = inputs(length, head_dim=head_dim, dtype=dtype, batch=2, seed=seed)
    _, key, value = inputs(count, head_dim=head_dim, dtype=dtype, batch=2, seed=seed + 50)
    generator = torch.Generator().manual_seed(seed)
    lse = 3 + torch.randn(2, 2, length, generator=generator)
    share = torch.rand(2, 2, -(-length // BLOCK_Q), generator=generator)
    share[0, 0, 0] = 0  # as a sigmoid may round
    return (
        query,
        out,
        lse.to(DEVICE),
        share.to(DEVICE) if alpha else None,
        Context(key, value, None),
    )


def check(case, mask, budget):
    """The kernel on views inside of NaN."""
    query, out, lse, alpha, context = case
    wanted = with_context(
        *(None if x is None else x.double() for x in (query, out, lse, alpha)),
        BLOCK_Q,
        Context(context.key.double(), context.value.double(), mask),
    )
    query, out, key, value = (inside_nan(x) for x in (query, out, *context[:2]))
    with poisoned_memory():
        assert mix_context(query, out, lse, alpha, key, value, mask, BLOCK_Q) is None
    assert out.isfinite().all()
    assert relative(out, wanted) <= budget


@pytest.mark.parametrize("alpha", [True, False], ids=["mixed", "all selected"])
@pytest.mark.parametrize(("length", "count"), [(1, 1), (63, 40), (70, 130)])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_kernel_equals_the_formula(head_dim, length, count, alpha):
    check(make_case(length, count, head_dim=head_dim, alpha=alpha), None, 3e-6)


@pytest.mark.parametrize(("dtype", "budget"), [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_kernel_in_half_precision(dtype, budget):
    check(make_case(70, 130, dtype=dtype), None, budget)


@pytest.mark.parametrize("first", ["there", "absent"])
def test_kernel_skips_what_is_masked(first):
    mask = torch.rand(2, 130, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0, :70] = first == "there"  # a whole tile of tokens
    mask[1] = False
    case = make_case(70, 130)
    check(case, mask.to(DEVICE), 3e-6)
    out = case[1].clone()
    mix_context(case[0], out, *case[2:4], *case[4][:2], mask.to(DEVICE), BLOCK_Q)
    assert torch.equal(out[1], case[1][1]) and not torch.allclose(out[0], case[1][0], atol=1e-3)


def test_kernel_is_an_operator_that_compilers_understand():
    query, out, lse, alpha, context = make_case(40, 7)
    mask = torch.ones(2, 7, dtype=torch.bool, device=DEVICE)
    arguments = (query, out, lse, alpha, *context[:2], mask, BLOCK_Q)
    torch.library.opcheck(mix_context, arguments)


@pytest.mark.parametrize("learning", [False, True])
def test_kernel_is_for_inference(learning, monkeypatch):
    calls = []
    monkeypatch.setattr(triton_impl, "mix_context", lambda *_: calls.append("kernel"))
    qkv = inputs(40, head_dim=32)
    _, key, value = inputs(7, head_dim=32)
    # Gradients may be asked for through the context alone.
    key.requires_grad_(learning)
    settings = {"sparsity": 0.5, "block_q": 32, "block_k": 16, "impl": "triton"}
    out = sla2_attention(*qkv, context=(key, value), **settings)
    assert calls == ([] if learning else ["kernel"])
    assert out.requires_grad == learning
    with torch.no_grad():
        sla2_attention(*qkv, context=(key, value), **settings)
    assert calls == ["kernel"] * (1 if learning else 2)


def test_compiled_whole_equals_eager():
    qkv = inputs(70, head_dim=32)
    _, key, value = inputs(7, head_dim=32)
    strided = random_qkv(7, head_dim=64, dtype=torch.float32)[1].to(DEVICE)[..., ::2]

    def run(query, keys, values, key, value):
        settings = {"sparsity": 0.5, "block_q": 32, "block_k": 16, "impl": "triton"}
        return sla2_attention(query, keys, values, context=(key, value), **settings)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for given in (key, strided):
        torch.testing.assert_close(compiled(*qkv, given, value), run(*qkv, given, value))
