"""The kernels after routing as one differentiable operator, opaque to `torch.compile`.

    forward    triton_forward: O, and what the backward needs of it
    backward   triton_backward

Gradients of Q, K and V are those with the selection and alpha fixed, plus what alpha's gradient
sends through the router, which is left to autograd; so is what reaches the tokens through the mean
of the keys in phi. A low-bit forward has the gradients of the unquantized branch; alpha's own sees
the value that was mixed. Nothing is kept for the backward but Q, K, V, the selection, alpha,
mean(K), O_s and its log-sum-exp.

Custom operators have no optional results: an empty tensor stands for one that is not wanted.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sla_video.kernels.options import Options, PhiK, SparseDtype
from sla_video.kernels.triton_backward import sla2_backward
from sla_video.kernels.triton_backward_routing import share_mean_gradient
from sla_video.kernels.triton_forward import attend_all, forward_arguments
from sla_video.kernels.triton_routing import BlockPlan
from sla_video.kernels.triton_statistics import BlockStatistics


@torch.library.custom_op("sla_video::mixed_attention", mutates_args=())
def _mixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_means: Tensor,
    key_mean: Tensor,
    value_max: Tensor | None,
    low_query: Tensor | None,
    query_scale: Tensor | None,
    query_norm: Tensor | None,
    indices: Tensor,
    counts: Tensor | None,
    alpha: Tensor | None,
    dropped: Tensor | None,
    block_q: int,
    block_k: int,
    sparse_dtype: str,
    phi_k: str,
    need_lse: bool,
    keep_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """O `[B, L, H, D]`, the log-sum-exp `[B, H, L]`, and O_s where it is not O.

    The last two are empty unless `need_lse` and `keep_sparse` ask for them. `key_means`, of which
    `key_mean` is the mean, are here for the gradient of `key_mean`.
    """
    return attend_all(
        query,
        key,
        value,
        key_mean,
        value_max,
        low_query,
        query_scale,
        query_norm,
        indices,
        counts,
        alpha,
        dropped,
        block_q=block_q,
        block_k=block_k,
        sparse_dtype=cast(SparseDtype, sparse_dtype),
        phi_k=cast(PhiK, phi_k),
        need_lse=need_lse,
        keep_sparse=keep_sparse,
    )


@_mixed_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, key_means: Tensor, key_mean: Tensor, *more: Any
) -> tuple[Tensor, ...]:
    _, _, _, _, _, _, alpha, *_, need_lse, keep_sparse = more
    batch, length, heads, _ = query.shape
    lse = (batch, heads, length) if need_lse else (0,)
    sparse = query.shape if keep_sparse and alpha is not None else (0,)
    return query.new_empty(query.shape), key_mean.new_empty(lse), query.new_empty(sparse)


@torch.library.custom_op("sla_video::mixed_attention_backward", mutates_args=())
def _mixed_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    indices: Tensor,
    counts: Tensor | None,
    alpha: Tensor | None,
    out_sparse: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    phi_k: str,
    exact_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, key_mean and alpha; the last two may be empty."""
    grad_query, grad_key, grad_value, grad_key_mean, grad_alpha = sla2_backward(
        grad_out,
        query,
        key,
        value,
        key_mean,
        indices,
        counts,
        alpha,
        out_sparse,
        lse,
        block_q=block_q,
        block_k=block_k,
        phi_k=cast(PhiK, phi_k),
        grad_lse=grad_lse,
        exact_lse=exact_lse,
    )
    if grad_key_mean is None:
        grad_key_mean = key_mean.new_empty(0)
    if grad_alpha is None:
        grad_alpha = key_mean.new_empty(0)
    return grad_query, grad_key, grad_value, grad_key_mean, grad_alpha


@_mixed_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, *more: Any
) -> tuple[Tensor, ...]:
    _, key_mean, _, _, alpha, _, _, _, _, phi_k, _ = more
    gradients = (query.new_empty(query.shape) for _ in range(3))
    mean = (0,) if alpha is None or phi_k == "raw" else key_mean.shape
    return (
        *gradients,
        key_mean.new_empty(mean),
        key_mean.new_empty((0,) if alpha is None else alpha.shape),
    )


class _Settings(NamedTuple):
    """What the backward needs to know besides tensors."""

    block_q: int
    block_k: int
    phi_k: str
    exact_lse: bool


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, _, key_mean, _, _, _, _, indices, counts, alpha, _, *settings = inputs
    block_q, block_k, sparse_dtype, phi_k, _, _ = settings
    out, lse, out_sparse = output
    sparse = out if alpha is None else out_sparse
    ctx.save_for_backward(query, key, value, key_mean, indices, counts, alpha, sparse, lse)
    ctx.settings = _Settings(block_q, block_k, phi_k, sparse_dtype == "bf16")
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    query, key, value, key_mean, indices, counts, alpha, sparse, lse = ctx.saved_tensors
    settings: _Settings = ctx.settings
    if grad_out is None:
        grad_out = torch.zeros_like(query)
    grad_query, grad_key, grad_value, grad_key_mean, grad_alpha = _mixed_attention_backward(
        grad_out,
        grad_lse,
        query,
        key,
        value,
        key_mean,
        indices,
        counts,
        alpha,
        sparse,
        lse,
        *settings,
    )
    grad_key_means = None
    if grad_key_mean.numel():
        grad_key_means = share_mean_gradient(grad_key_mean, key.shape[1], settings.block_k)
    return (
        grad_query,
        grad_key,
        grad_value,
        grad_key_means,
        *(None,) * 7,
        None if alpha is None else grad_alpha,
        *(None,) * 7,
    )


_mixed_attention.register_autograd(_backward, setup_context=_save)


def mixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    statistics: BlockStatistics,
    plan: BlockPlan,
    options: Options,
    *,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`alpha O_s + (1 - alpha) O_l` and, with `need_lse`, the log-sum-exp of the selected part.

    Args:
        query, key, value: `[B, L, H, D]`, each contiguous along D.
        statistics, plan: of the same inputs and options.
    """
    # O_s in memory of its own, and the log-sum-exp, only if someone will ask for gradients.
    learning = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, plan.alpha)
    )
    out, lse, _ = _mixed_attention(
        query,
        key,
        value,
        statistics.key_means,
        *forward_arguments(statistics, plan, options),
        need_lse or learning,
        learning,
    )
    return out, lse if need_lse else None
