"""Forward passes for the tests of the backward kernels, and their gradients by autograd in float64.

Letters: B batch, H heads, L tokens, D head dimension, M query blocks, N key blocks, K blocks listed
per query block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from operator_inputs import random_qkv
from torch import Tensor
from triton_cases import DEVICE, poisoned_memory, relative

from sla_video.kernels import reference
from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_backward import sla2_backward

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


def kernel_gradients(case, out_sparse, lse, **changes):
    """`sla2_backward` on what a forward pass in the dtype of the inputs would have kept.

    Returns:
        gradients of query, key, value and alpha.
    """
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
    # Matrix products of torch are the same on every run, but it does not promise so.
    with poisoned_memory(warn_only=True):
        query, key, value, key_mean, alpha = sla2_backward(**(arguments | case.settings | changes))
    assert (key_mean is None) == (case.alpha is None or case.settings["phi_k"] == "raw")
    if key_mean is not None:
        # The mean over tokens shares its gradient out.
        key = key.float() + key_mean[:, None] / case.key.shape[1]
    return query, key, value, alpha


def check(case, budget, **changes):
    """Every gradient within `budget` of the reference; a mapping sets budgets by name."""
    wanted, out_sparse, lse = reference_gradients(case)
    got = kernel_gradients(case, out_sparse, lse, **changes)
    assert (got[3] is None) == (case.alpha is None)
    for name, mine, exact in zip(NAMES, got, wanted, strict=False):
        assert mine.shape == exact.shape
        assert mine.isfinite().all(), name
        error = relative(mine, exact)
        limit = budget[name] if isinstance(budget, dict) else budget
        assert error <= limit, f"{name}: relative error {error:.2e}, allowed {limit:.2e}"
