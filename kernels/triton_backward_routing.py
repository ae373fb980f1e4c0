"""Backward of block means and of what the router makes of them.

    logit(p_m) = LSE_{n in sel(m)} x_mn - LSE_{n not in sel(m)} x_mn      x = scores + log c
    dlogit / ds_mn = exp(x_mn - LSE over sel(m)), and -exp(x_mn - LSE over the others) elsewhere

with c_n the share of a whole block that key block n holds. Scores are computed again, and their
gradient is written over them. A row that drops nothing has no gradient.

A token gets the gradient of its block's mean divided by the tokens of the block. It is added to
the token's other gradient where that arrives (`with_block_means`), in one pass instead of three.

Layouts: gradients of tokens `[B, L, H, D]`, of means `[B, H, N, D]` float32. Compute capability 8.0
and above.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_backward_tiles import batch_and_head, head_offset, rows_left
from sla_video.kernels.triton_tiles import launch_on, load_rows, padded_dim, store_rows, strides


@triton.jit(do_not_specialize=["num_k", "num_selected"])
def _mass_logit_backward_kernel(
    scores_ptr,
    indices_ptr,
    counts_ptr,
    grad_logit_ptr,
    num_k,
    num_selected,
    log_tail,
    scale,
    ROW: tl.constexpr,
    LIST: tl.constexpr,
):
    """Turn one row of products, scores after `scale`, into their gradient."""
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * num_k
    offs = tl.arange(0, ROW)
    exists = offs < num_k
    count = num_selected
    if counts_ptr is not None:
        count = tl.load(counts_ptr + row)
    listed = tl.arange(0, LIST) < count
    n = tl.load(indices_ptr + row * num_selected + tl.arange(0, LIST), mask=listed, other=0)

    kept = tl.load(scores_ptr + n, mask=listed, other=float("-inf")) * scale
    kept += tl.where(n == num_k - 1, log_tail, 0.0)
    kept = tl.exp(kept - tl.max(kept, 0))
    grad = scale * tl.load(grad_logit_ptr + row)
    # What is selected is taken out of the row: all threads have read it, and read the row after.
    tl.debug_barrier()
    tl.store(scores_ptr + n, tl.full([LIST], float("-inf"), tl.float32), mask=listed)
    tl.debug_barrier()
    dropped = tl.load(scores_ptr + offs, mask=exists, other=float("-inf")) * scale
    dropped += tl.where(offs == num_k - 1, log_tail, 0.0)
    largest = tl.max(dropped, 0)
    some = largest > float("-inf")
    dropped = tl.exp(dropped - tl.where(some, largest, 0.0))
    grad = tl.where(some, grad, 0.0)
    dropped_sum = tl.where(some, tl.sum(dropped, 0), 1.0)
    tl.store(scores_ptr + offs, -dropped * (grad / dropped_sum), mask=exists)
    tl.debug_barrier()
    tl.store(scores_ptr + n, kept * (grad / tl.sum(kept, 0)), mask=listed)


@torch.library.custom_op("sla_video::mass_logit_backward", mutates_args=())
def mass_logit_backward(
    queries: Tensor,
    keys: Tensor,
    key_mean: Tensor | None,
    indices: Tensor,
    counts: Tensor | None,
    grad_logit: Tensor,
    length: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the router features through the logit of the mass that is selected.

    Args:
        queries, keys: `[B, H, M, D]`, `[B, H, N, D]` float32.
        key_mean: `[B, H, D]`, subtracted from the keys, which changes rounding errors alone.
        indices: `[B, H, M, K]` int32, the selected key blocks of each query block.
        counts: `[B, H, M]` int32, how many entries of each row count; None when all do.
        grad_logit: `[B, H, M]` float32.
        length, block_k: L, and tokens per key block, of which the last has but the rest.
    """
    batch, heads, num_q, head_dim = queries.shape
    num_k, num_selected = keys.shape[-2], indices.shape[-1]
    row = max(32, triton.next_power_of_2(num_k))
    # Also where the backward pass runs under autocast.
    with launch_on(queries), torch.autocast(queries.device.type, enabled=False):
        if key_mean is not None:
            keys = keys - key_mean[:, :, None]
        queries, keys = queries.flatten(0, 1), keys.flatten(0, 1)
        scores = queries @ keys.mT
        _mass_logit_backward_kernel[(batch * heads * num_q,)](
            scores_ptr=scores,
            indices_ptr=indices.contiguous(),
            counts_ptr=None if counts is None else counts.contiguous(),
            grad_logit_ptr=grad_logit.contiguous(),
            num_k=num_k,
            num_selected=num_selected,
            log_tail=math.log((length - (num_k - 1) * block_k) / block_k),
            scale=head_dim**-0.5,
            ROW=row,
            LIST=triton.next_power_of_2(num_selected),
            num_warps=min(16, max(1, row // 512)),
        )
        grad_queries, grad_keys = scores @ keys, scores.mT @ queries
    return (
        grad_queries.view(batch, heads, num_q, head_dim),
        grad_keys.view(batch, heads, num_k, head_dim),
    )


@mass_logit_backward.register_fake
def _(queries: Tensor, keys: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape)


def share_mean_gradient(grad_mean: Tensor, length: int, block: int) -> Tensor:
    """Gradients of the block means `[B, H, N, D]` from that of the mean of all tokens `[B, H, D]`.

    Each block weighs in the mean of all as many tokens as it holds.
    """
    before_last = num_blocks(length, block) - 1
    share = (grad_mean * (block / length))[:, :, None]
    last = share * ((length - before_last * block) / block)
    return torch.cat([share.expand(-1, -1, before_last, -1), last], 2)


@triton.jit(do_not_specialize=["length", "num_blocks"])
def _add_means_gradient_kernel(
    grad_ptr,
    grad_means_ptr,
    out_ptr,
    grad_strides,
    out_strides,
    length,
    heads,
    num_blocks,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the tokens of one block, and of its mean."""
    n = tl.program_id(0).to(tl.int64)
    b, h, bh = batch_and_head(tl.program_id(1), heads)
    cols = tl.arange(0, D_PAD)
    rows = rows_left(n * BLOCK, length)
    grad_means_ptr += (bh * num_blocks + n) * D
    share = tl.load(grad_means_ptr + cols, mask=cols < D, other=0.0) / tl.minimum(rows, BLOCK)
    grad = tl.zeros([BLOCK, D_PAD], tl.float32) + share[None, :]
    if grad_ptr is not None:
        grad_ptr += head_offset(grad_strides, b, n * BLOCK, h)
        grad += load_rows(grad_ptr, grad_strides[1], rows, BLOCK, D, D_PAD).to(tl.float32)
    out_ptr += head_offset(out_strides, b, n * BLOCK, h)
    store_rows(out_ptr, out_strides[1], grad, rows, BLOCK, D, D_PAD)


@torch.library.custom_op("sla_video::add_means_gradient", mutates_args=())
def _add_means_gradient(
    like: Tensor, grad: Tensor | None, grad_means: Tensor, block: int
) -> Tensor:
    """Gradient `grad` of `[B, L, H, D]` (None for zero) plus that of the means of its blocks."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    _, length, heads, head_dim = like.shape
    if grad is not None and grad.stride(-1) != 1:
        grad = grad.contiguous()
    with launch_on(like):
        _add_means_gradient_kernel[(grad_means.shape[2], like.shape[0] * heads)](
            grad_ptr=grad,
            grad_means_ptr=grad_means.contiguous(),
            out_ptr=out,
            grad_strides=strides(out if grad is None else grad),
            out_strides=strides(out),
            length=length,
            heads=heads,
            num_blocks=grad_means.shape[2],
            D=head_dim,
            D_PAD=padded_dim(head_dim),
            BLOCK=block,
            num_warps=4,
        )
    return out


@_add_means_gradient.register_fake
def _(like: Tensor, grad: Tensor | None, grad_means: Tensor, block: int) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


class _WithBlockMeans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, means: Tensor, block: int) -> tuple[Tensor, Tensor]:
        ctx.block = block
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return x.view_as(x), means.view_as(means)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_means: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        if grad_means is None:
            return grad, None, None
        (x,) = ctx.saved_tensors
        return _add_means_gradient(x, grad, grad_means, ctx.block), None, None


def with_block_means(x: Tensor, means: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x and the means of its blocks, both as they are, and differentiable as functions of x.

    Whatever is made of either, x gets its gradient in one pass.

    Args:
        x: `[B, L, H, D]`.
        means: `[B, H, N, D]` float32, means of x over blocks of `block` tokens, without a gradient.
    """
    result: tuple[Tensor, Tensor] = _WithBlockMeans.apply(x, means, block)  # type: ignore[no-untyped-call]
    return result
