"""Backward kernels against autograd through the float64 reference, selection and alpha given.

On machines without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from operator_inputs import options, random_qkv, random_router

pytest.importorskip("triton", reason="Triton has no build for this platform")

from backward_cases import NAMES, Case, check, kernel_gradients, make_case, reference_gradients
from triton_cases import DEVICE, inside_nan, needs_triton, relative

from sla_video.kernels.reference import sla2_reference
from sla_video.kernels.routing import route
from sla_video.kernels.triton_backward_states import key_states, sum_dropped
from sla_video.kernels.triton_inverse import dropped_table

pytestmark = needs_triton


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9])
@pytest.mark.parametrize("head_dim", [64, 128, 40])
@pytest.mark.parametrize("length", [1, 64, 100, 300])
def test_float32_gradients(length, head_dim, sparsity):
    check(make_case(length, heads=1, head_dim=head_dim, sparsity=sparsity), 1e-4)


@pytest.mark.parametrize("ragged", [False, True], ids=["top_k", "ragged"])
@pytest.mark.parametrize("phi_k", ["smoothed", "raw"])
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out_and_lse"])
def test_selections_features_and_lse(ragged, phi_k, with_lse):
    case = make_case(70, batch=2, ragged=ragged, phi_k=phi_k, with_lse=with_lse)
    check(case, 1e-4)


# The default blocks, blocks that take several tiles, and blocks of one tile of 16.
@pytest.mark.parametrize("blocks", [(128, 64), (64, 128), (16, 16)], ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["top_k", "ragged"])
def test_block_sizes(blocks, ragged):
    block_q, block_k = blocks
    check(make_case(300, heads=1, block_q=block_q, block_k=block_k, ragged=ragged), 1e-4)


@pytest.mark.parametrize("ragged", [False, True], ids=["top_k", "ragged"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_gradients(dtype, head_dim, ragged):
    """Within some roundings of the dtype from float64 on the rounded inputs."""
    case = make_case(200, dtype=dtype, heads=1, head_dim=head_dim, ragged=ragged, sparsity=0.8)
    check(case, 0.006 if dtype == torch.bfloat16 else 0.001)


@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_float16_holds_small_and_large_gradients(factor):
    case = make_case(100, heads=1, dtype=torch.float16, with_lse=False)
    check(case._replace(grad_out=case.grad_out * factor), 0.01)


@pytest.mark.parametrize("sparse_dtype", ["int8", "int8_fp8"])
@pytest.mark.parametrize("ragged", [False, True], ids=["top_k", "ragged"])
def test_quantized_forward_has_the_gradient_of_the_unquantized_branch(sparse_dtype, ragged):
    case = make_case(100, ragged=ragged)
    wanted, out_sparse, lse = reference_gradients(case, sparse_dtype=sparse_dtype)
    _, exact_out, _ = reference_gradients(case)
    assert relative(out_sparse, exact_out) > 1e-3
    got = kernel_gradients(case, out_sparse, lse, exact_lse=False)
    for name, mine, exact in zip(NAMES, got, wanted, strict=True):
        assert relative(mine, exact) <= 1e-4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_quantized_forward_in_16_bit(dtype):
    case = make_case(200, dtype=dtype, heads=1, sparsity=0.8)
    wanted, _, _ = reference_gradients(case)
    _, out_sparse, lse = reference_gradients(case, sparse_dtype="int8_fp8")
    got = kernel_gradients(case, out_sparse, lse, exact_lse=False)
    for name, mine, exact in zip(NAMES[:3], got, wanted, strict=False):
        assert relative(mine, exact) <= (0.006 if dtype == torch.bfloat16 else 0.001), name


@pytest.mark.parametrize("error", [-5.0, 5.0])
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out_and_lse"])
def test_quantized_forward_may_be_far_off(error, with_lse):
    """The gradients of Q, K and V do not depend on how near it was."""
    case = make_case(100, with_lse=with_lse)
    wanted, out_sparse, lse = reference_gradients(case)
    got = kernel_gradients(case, 0.5 * out_sparse + 0.3, lse + error, exact_lse=False)
    for name, mine, exact in zip(NAMES[:3], got, wanted, strict=False):
        assert relative(mine, exact) <= 1e-4, name


@pytest.mark.parametrize("phi_k", ["smoothed", "raw"])
@pytest.mark.parametrize("selection", ["top_k", "top_p"])
def test_with_autograd_through_the_router(selection, phi_k):
    """Kernels up to alpha and autograd from there: the gradients of the whole operator."""
    settings = options(
        selection=selection, phi_k=phi_k, block_q=32, block_k=16, sparsity=0.5, top_p=0.7
    )
    inputs = [x.to(DEVICE) for x in random_qkv(150, head_dim=64, dtype=torch.float32)]
    weight = random_qkv(150, head_dim=64, seed=9, dtype=torch.float32)[0].to(DEVICE)
    router = random_router(2, 64, per_head=True).to(DEVICE)
    parameters = list(router.parameters())

    leaves = [x.double().requires_grad_() for x in inputs]
    out, lse = sla2_reference(*leaves, router, settings, need_lse=True)
    loss = (out * weight).sum() + lse.sum()
    wanted = torch.autograd.grad(loss, [*leaves, *parameters])

    leaves = [x.double().requires_grad_() for x in inputs]
    plan = route(leaves[0], leaves[1], router, settings)
    counts = None if plan.valid is None else plan.valid.sum(-1).to(torch.int32)
    blocks = {"block_q": 32, "block_k": 16, "phi_k": phi_k}
    indices = plan.indices.to(torch.int32)
    alpha = plan.alpha.detach().float()
    grad_lse = torch.ones(1, 2, 150, device=DEVICE)
    case = Case(*inputs, indices, counts, alpha, weight, grad_lse, blocks)
    _, out_sparse, lse = reference_gradients(case)
    *direct, grad_alpha = kernel_gradients(case, out_sparse, lse)
    through_alpha = torch.autograd.grad(plan.alpha, [*leaves[:2], *parameters], grad_alpha.double())
    got = [direct[0] + through_alpha[0], direct[1] + through_alpha[1], direct[2]]
    got += through_alpha[2:]
    for mine, exact in zip(got, wanted, strict=True):
        assert relative(mine, exact) <= 1e-4


def test_nothing_dropped_leaves_the_linear_branch_out():
    """alpha is 1 and sparsity 0: gradients of full attention, also where alpha is given."""
    case = make_case(100, sparsity=0)
    assert case.alpha is None
    _, out_sparse, lse = reference_gradients(case)
    plain = kernel_gradients(case, out_sparse, lse)
    shape = case.indices.shape[:-1]
    with_alpha = kernel_gradients(
        case._replace(alpha=torch.ones(shape, device=DEVICE)), out_sparse, lse
    )
    for one, other in zip(plain[:3], with_alpha[:3], strict=True):
        assert torch.equal(one, other)
    wanted = (case.grad_out * out_sparse).sum(-1).transpose(1, 2)
    wanted = torch.stack([x.sum(-1) for x in wanted.split(case.settings["block_q"], -1)], -1)
    assert relative(with_alpha[3], wanted) <= 1e-5


def test_key_block_that_nobody_or_everybody_selects():
    case = make_case(100)
    # Blocks 0 and 1 in each row, and no other.
    indices = torch.arange(2, dtype=torch.int32, device=DEVICE).expand(1, 2, 4, 2).contiguous()
    check(case._replace(indices=indices), 1e-4)
    # Linear branch only: what every query block selected gets exactly nothing.
    alpha = torch.zeros(1, 2, 4, device=DEVICE)
    settings = case.settings | {"phi_k": "raw"}
    case = case._replace(indices=indices, alpha=alpha, grad_lse=None, settings=settings)
    check(case, 1e-4)
    _, grad_key, grad_value, _ = kernel_gradients(case, *reference_gradients(case)[1:])
    assert (grad_key[:, :32] == 0).all() and (grad_value[:, :32] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "budget"),
    [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 6e-3)],
    ids=["fp32", "fp16", "bf16"],
)
def test_sums_of_states_over_what_is_dropped(dtype, budget):
    case = make_case(300, batch=2, dtype=dtype, ragged=True)
    # Values beyond what sums in float16 could hold, and a block of nothing.
    value = case.value * 1000
    value[:, 16:32] = 0
    states = key_states(case.key, None, value, 16)
    dropped = dropped_table(case.indices, case.counts, 19, dtype)
    # Beyond the 19 blocks there are zeros to sum.
    assert dropped.shape[2] == states.states.shape[2] == states.sums.shape[2] == 32
    dropped = dropped[:, : case.indices.shape[2]]
    for rows in (dropped, torch.zeros_like(dropped), torch.ones_like(dropped)):
        got, factors, sums = sum_dropped(states, rows)
        got = got.double() if factors is None else got.double() * factors[:, :, None, None, None]
        phi = torch.nn.functional.pad(case.key.double().softmax(-1), (0, 0, 0, 0, 0, 4))
        padded = torch.nn.functional.pad(value.double(), (0, 0, 0, 0, 0, 4))
        phi, padded = (x.unflatten(1, (19, 16)) for x in (phi, padded))
        weight = rows[..., :19].double().unflatten(0, (2, 2))
        exact = torch.einsum("bhmn,bnjhc,bnjhd->bhmcd", weight, phi, padded)
        assert relative(got, exact) <= budget
        assert relative(sums, torch.einsum("bhmn,bnjhc->bhmc", weight, phi)) <= budget


def test_strided_inputs():
    case = make_case(100, batch=2)
    fused = torch.stack([case.query, case.key, case.value], 2)
    query, key, value = fused.unbind(2)
    assert not query.is_contiguous()
    # [B, H, L, D] in memory.
    grad_out = case.grad_out.transpose(1, 2).contiguous().transpose(1, 2)
    check(case._replace(query=query, key=key, value=value, grad_out=grad_out), 1e-4)


def test_nothing_is_read_beyond_the_inputs():
    case = make_case(100, batch=2)
    names = ("query", "key", "value", "grad_out")
    check(case._replace(**{name: inside_nan(getattr(case, name)) for name in names}), 1e-4)


def test_expanded_gradient():
    """What `out.sum().backward()` sends: every stride is 0."""
    case = make_case(100)
    check(case._replace(grad_out=torch.ones((), device=DEVICE).expand(case.query.shape)), 1e-4)


def test_keys_far_from_zero():
    """Offsets per channel that the softmax does not see; one of them takes all of a raw phi."""
    case = make_case(100)
    offset = torch.zeros(64, device=DEVICE)
    offset[::7] = 20.0
    check(case._replace(key=case.key + offset), 1e-4)


@pytest.mark.parametrize("exact_lse", [True, False], ids=["exact", "quantized"])
def test_logits_far_below_zero(exact_lse):
    """About -200: a key that does not exist, with logit 0, would weigh exp(200)."""
    case = make_case(100)
    case = case._replace(query=case.query * 0.1 + 5, key=case.key * 0.1 - 5)
    check(case, 1e-3, exact_lse=exact_lse)


def test_float16_holds_large_sums():
    """All features on one channel and values of 500: their sum over 300 tokens is 150,000."""
    case = make_case(300, heads=1, dtype=torch.float16, phi_k="raw", with_lse=False)
    case.key[..., 0] += 20
    gradients = kernel_gradients(
        case._replace(value=case.value + 500), *reference_gradients(case)[1:]
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("exact_lse", [True, False], ids=["exact", "quantized"])
def test_two_runs_are_equal_to_the_bit(exact_lse):
    case = make_case(100, heads=1, dtype=torch.bfloat16, ragged=True)
    _, out_sparse, lse = reference_gradients(case)
    first, second = (kernel_gradients(case, out_sparse, lse, exact_lse=exact_lse) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="too slow in Triton's interpreter; needs a CUDA GPU")
@pytest.mark.parametrize("ragged", [False, True], ids=["top_k", "ragged"])
@pytest.mark.parametrize("length", [777, 4096, 7168])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_gradients_of_long_sequences(dtype, length, ragged):
    settings = {"head_dim": 128, "block_q": 128, "block_k": 64, "sparsity": 0.9}
    check(make_case(length, dtype=dtype, ragged=ragged, **settings), 0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 160}, "head dimensions up to 128, got 160"),
        ({"dtype": torch.float64}, "got torch.float64"),
        ({"block_q": 24}, "`block_q` that is a power of two from 16 on, got 24"),
        ({"block_k": 8}, "`block_k` that is a power of two from 16 on, got 8"),
    ],
    ids=["head_dim", "dtype", "block_q", "block_k"],
)
def test_what_the_kernels_cannot_do(changes, message):
    case = make_case(50, **changes)
    _, out_sparse, lse = reference_gradients(case)
    with pytest.raises(ValueError, match=message):
        kernel_gradients(case, out_sparse, lse)
