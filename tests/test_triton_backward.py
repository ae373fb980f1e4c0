"""Backward kernels against autograd through the float64 reference, selection and alpha given.

On machines without a GPU the kernels run in Triton's interpreter. Letters: B batch, H heads,
L tokens, D head dimension, M query blocks, N key blocks, K blocks listed per query block.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    # Read when a kernel is defined, so before the first import of one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton", reason="Triton is not available on this platform")

from operator_inputs import options, random_qkv, random_router

from sla_video.kernels import reference
from sla_video.kernels.reference import sla2_reference
from sla_video.kernels.routing import num_blocks, route
from sla_video.kernels.triton_backward import sla2_backward
from sla_video.kernels.triton_inverse import invert_selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("query", "key", "value", "alpha")


class Case(NamedTuple):
    """What a forward pass leaves for the backward, and the gradients that arrive."""

    query: Tensor
    key: Tensor
    value: Tensor
    indices: Tensor
    counts: Tensor | None
    alpha: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor | None
    settings: dict


def make_case(
    length,
    *,
    dtype=torch.float32,
    heads=2,
    batch=1,
    head_dim=64,
    sparsity=0.5,
    block_q=32,
    block_k=16,
    ragged=False,
    with_lse=True,
    phi_k="smoothed",
    seed=0,
):
    """Random inputs, a random selection, a random alpha."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = random_qkv(
        length, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype, seed=seed
    )
    grad_out, _, _ = random_qkv(
        length, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype, seed=seed + 100
    )
    num_q, num_k = num_blocks(length, block_q), num_blocks(length, block_k)
    kept = max(1, round((1 - sparsity) * num_k))
    order = torch.rand(batch, heads, num_q, num_k, generator=generator).argsort(-1)
    indices = order[..., :kept].to(torch.int32)
    counts = None
    if ragged:
        indices = order.to(torch.int32)
        counts = torch.randint(1, num_k + 1, indices.shape[:-1], generator=generator)
        # The first row selects everything, whatever the draw.
        counts[..., 0] = num_k
        counts = counts.to(torch.int32)
        # Entries that do not count may hold anything, repetitions too.
        rank = torch.arange(num_k)
        indices = indices.where(rank < counts[..., None], indices[..., :1])
    alpha = None
    if ragged or kept < num_k:
        # Also in rows that drop nothing: the kernels must not rely on its being 1 there.
        alpha = torch.rand(indices.shape[:-1], generator=generator)
    grad_lse = torch.randn(batch, heads, length, generator=generator) if with_lse else None
    settings = {"block_q": block_q, "block_k": block_k, "phi_k": phi_k}
    tensors = (query, key, value, indices, counts, alpha, grad_out, grad_lse)
    return Case(*(None if x is None else x.to(DEVICE) for x in tensors), settings)


def selected_blocks(indices, counts, num_k):
    """True on the selected blocks, `[B, H, M, N]`."""
    rank = torch.arange(indices.shape[-1], device=indices.device)
    valid = rank < (indices.shape[-1] if counts is None else counts[..., None])
    one_hot = torch.nn.functional.one_hot(indices.long(), num_k).bool()
    return (one_hot & valid[..., None]).any(-2)


def attend(case, leaves, dtype=torch.float64, sparse_dtype="bf16"):
    """The reference's branches on the selection of `case`, mixed by alpha.

    Returns:
        O, O_s `[B, L, H, D]`, LSE `[B, H, L]`.
    """
    block_q, block_k = case.settings["block_q"], case.settings["block_k"]
    # [B, H, L, D]
    q, k, v = (x.transpose(1, 2).to(dtype) for x in leaves[:3])
    length = q.shape[2]
    keep = selected_blocks(case.indices, case.counts, num_blocks(length, block_k))
    keep = keep.repeat_interleave(block_k, -1)[..., :length]
    smooth = k - k.mean(2, keepdim=True) if case.settings["phi_k"] == "smoothed" else k
    phi_q, phi_keys = torch.softmax(q, -1), torch.softmax(smooth, -1)
    mixed, sparse, lses = [], [], []
    for m in range(keep.shape[2]):
        rows = slice(m * block_q, (m + 1) * block_q)
        here = keep[:, :, m, None]
        out, lse = reference.sparse_branch(
            q[:, :, rows], k, v, here.to(dtype).log(), block_k, sparse_dtype
        )
        sparse.append(out)
        lses.append(lse)
        if leaves[3] is not None:
            linear = reference.linear_branch(phi_q[:, :, rows], phi_keys, v, (~here).to(dtype))
            alpha = leaves[3][:, :, m, None, None].to(dtype)
            out = alpha * out + (1 - alpha) * linear
        mixed.append(out)
    out, out_sparse = (torch.cat(x, 2).transpose(1, 2) for x in (mixed, sparse))
    return out, out_sparse, torch.cat(lses, 2)


def reference_gradients(case, dtype=torch.float64, sparse_dtype="bf16"):
    """Gradients of query, key, value and alpha in `dtype`, O_s and the LSE."""
    leaves = [
        None if x is None else x.to(dtype).requires_grad_()
        for x in (case.query, case.key, case.value, case.alpha)
    ]
    out, out_sparse, lse = attend(case, leaves, dtype, sparse_dtype)
    loss = (out * case.grad_out.to(dtype)).sum()
    if case.grad_lse is not None:
        loss = loss + (lse * case.grad_lse.to(dtype)).sum()
    gradients = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    return gradients, out_sparse.detach(), lse.detach()


@contextmanager
def poisoned_memory():
    """Fill uninitialised memory with NaN, so that reading it shows; refuse what is random."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before)


def inside_nan(x):
    """The values of x `[B, L, H, D]` as a view into a larger storage full of NaN."""
    storage = x.new_full([size + 8 for size in x.shape], torch.nan)
    view = storage[tuple(slice(4, 4 + size) for size in x.shape)]
    view.copy_(x)
    return view


def kernel_gradients(case, out_sparse, lse, **changes):
    """`sla2_backward` on what a forward pass in the dtype of the inputs would have kept."""
    arguments = {
        "grad_out": case.grad_out,
        "query": case.query,
        "key": case.key,
        "value": case.value,
        "key_mean": case.key.float().mean(1),
        "indices": case.indices,
        "counts": case.counts,
        "alpha": case.alpha,
        "out_sparse": out_sparse.to(case.query.dtype),
        "lse": lse.float(),
        "grad_lse": case.grad_lse,
    }
    with poisoned_memory():
        return sla2_backward(**(arguments | case.settings | changes))


def relative_error(got, wanted):
    """||got - wanted|| / ||wanted||; where nothing is wanted, ||got||."""
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).norm() / (wanted.norm() if wanted.norm() > 0 else 1)).item()


def check(case, budget, **changes):
    """Every gradient within `budget` of the reference; a mapping sets budgets by name."""
    wanted, out_sparse, lse = reference_gradients(case)
    got = kernel_gradients(case, out_sparse, lse, **changes)
    assert (got[3] is None) == (case.alpha is None)
    for name, mine, exact in zip(NAMES, got, wanted, strict=False):
        assert mine.shape == exact.shape
        assert mine.isfinite().all(), name
        error = relative_error(mine, exact)
        limit = budget[name] if isinstance(budget, dict) else budget
        assert error <= limit, f"{name}: relative error {error:.2e}, allowed {limit:.2e}"


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9])
@pytest.mark.parametrize("head_dim", [64, 128, 40])
@pytest.mark.parametrize("length", [1, 64, 100, 200, 300])
def test_float32_gradients(length, head_dim, sparsity):
    check(make_case(length, heads=1, head_dim=head_dim, sparsity=sparsity), 1e-4)


@pytest.mark.parametrize("ragged", [False, True], ids=["top_k", "ragged"])
@pytest.mark.parametrize("phi_k", ["smoothed", "raw"])
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out_and_lse"])
def test_selections_features_and_lse(ragged, phi_k, with_lse):
    case = make_case(100, batch=2, ragged=ragged, phi_k=phi_k, with_lse=with_lse)
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
    assert relative_error(out_sparse, exact_out) > 1e-3
    got = kernel_gradients(case, out_sparse, lse, exact_lse=False)
    for name, mine, exact in zip(NAMES, got, wanted, strict=True):
        assert relative_error(mine, exact) <= 1e-4, name


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
        assert relative_error(mine, exact) <= 1e-4


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
    assert relative_error(with_alpha[3], wanted) <= 1e-5


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


@pytest.mark.parametrize("ragged", [False, True], ids=["top_k", "ragged"])
@pytest.mark.parametrize("length", [1, 100, 300])
def test_inverse_lists(length, ragged):
    case = make_case(length, batch=2, heads=3, head_dim=16, ragged=ragged)
    num_k = num_blocks(length, case.settings["block_k"])
    lists = invert_selection(case.indices, case.counts, num_k)
    assert lists.query_blocks.dtype == lists.offsets.dtype == torch.int32
    assert lists.offsets.shape == (2, 3, num_k + 1)
    selected = selected_blocks(case.indices, case.counts, num_k)
    for b in range(2):
        for h in range(3):
            for n in range(num_k):
                first, last = lists.offsets[b, h, n : n + 2].tolist()
                wanted = selected[b, h, :, n].nonzero().flatten().tolist()
                assert lists.query_blocks[first:last].tolist() == wanted


def test_key_blocks_with_long_lists_come_first():
    # 8 query blocks and 32 key blocks per head; everybody selects block 9 of the second head.
    indices = torch.arange(32, dtype=torch.int32, device=DEVICE).view(1, 1, 8, 4).repeat(1, 2, 1, 1)
    indices[0, 1, :, 0] = 9
    order = invert_selection(indices, None, 32).order.tolist()
    assert order == [32 + 9, *(n for n in range(64) if n != 32 + 9)]


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
