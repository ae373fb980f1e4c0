"""SoftTop-k in Triton: every key block takes part in both branches, as much as its mask says.

    u = soft_topk_logits(scores)     m = sigmoid(u), rows sum to K
    A_m = sum_n (1 - m_mn) S_n       z_m = sum_n (1 - m_mn) s_n
    O_s = softmax(S + log m) V       O_l[i] = phi(q_i) A_m / (phi(q_i) . z_m)
    O = alpha O_s + (1 - alpha) O_l

The kernels are those of hard selections, with lists of all key blocks, one number added to the
logits of each pair of blocks, and weights for the sums of states. Dense attention's work, then, but
nothing larger than `[M, N]` per head in memory. Scores, mask and alpha are plain torch, whose
autograd takes over where `triton_soft_backward` ends: at u and alpha.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.kernels.options import Options, PhiK, SparseDtype, most_selected
from sla_video.kernels.router import Router
from sla_video.kernels.routing import block_counts, mix_alpha, num_blocks, router_scores
from sla_video.kernels.soft_topk import soft_topk_logits
from sla_video.kernels.triton_backward_routing import share_mean_gradient
from sla_video.kernels.triton_forward import attend_all
from sla_video.kernels.triton_soft_backward import (
    drop_weights,
    every_block,
    log2_mask,
    soft_backward,
)
from sla_video.kernels.triton_statistics import BlockStatistics


@torch.library.custom_op("sla_video::soft_attention", mutates_args=())
def _soft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_means: Tensor,
    key_mean: Tensor,
    value_max: Tensor | None,
    low_query: Tensor | None,
    query_scale: Tensor | None,
    logits: Tensor,
    alpha: Tensor,
    block_q: int,
    block_k: int,
    sparse_dtype: str,
    phi_k: str,
    need_lse: bool,
    keep_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """O `[B, L, H, D]`, the log-sum-exp `[B, H, L]` and O_s, the last two empty unless wanted.

    `logits` are u; `key_means` are here for the gradient of their mean, `key_mean`.
    """
    length = query.shape[1]
    return attend_all(
        query,
        key,
        value,
        key_mean,
        value_max,
        low_query,
        query_scale,
        # Logits with a bias have no bound.
        None,
        every_block(query, num_blocks(length, block_q), num_blocks(length, block_k)),
        None,
        alpha,
        drop_weights(logits, value.dtype),
        block_q=block_q,
        block_k=block_k,
        sparse_dtype=cast(SparseDtype, sparse_dtype),
        phi_k=cast(PhiK, phi_k),
        need_lse=need_lse,
        keep_sparse=keep_sparse,
        bias=log2_mask(logits),
    )


@_soft_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, key_means: Tensor, key_mean: Tensor, *more: Any
) -> tuple[Tensor, ...]:
    *_, need_lse, keep_sparse = more
    batch, length, heads, _ = query.shape
    lse = (batch, heads, length) if need_lse else (0,)
    sparse = query.shape if keep_sparse else (0,)
    return query.new_empty(query.shape), key_mean.new_empty(lse), query.new_empty(sparse)


@torch.library.custom_op("sla_video::soft_attention_backward", mutates_args=())
def _soft_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    logits: Tensor,
    alpha: Tensor,
    out_sparse: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    phi_k: str,
    exact_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, key_mean (which may be empty), alpha and logits."""
    grad_query, grad_key, grad_value, grad_key_mean, grad_alpha, grad_logits = soft_backward(
        grad_out,
        query,
        key,
        value,
        key_mean,
        logits,
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
    return grad_query, grad_key, grad_value, grad_key_mean, grad_alpha, grad_logits


@_soft_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, *more: Any
) -> tuple[Tensor, ...]:
    _, key_mean, logits, alpha, *_, phi_k, _ = more
    gradients = (query.new_empty(query.shape) for _ in range(3))
    mean = key_mean.new_empty((0,) if phi_k == "raw" else key_mean.shape)
    return *gradients, mean, torch.empty_like(alpha), torch.empty_like(logits)


class _Settings(NamedTuple):
    """What the backward needs to know besides tensors."""

    block_q: int
    block_k: int
    phi_k: str
    exact_lse: bool


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, _, key_mean, _, _, _, logits, alpha, *settings = inputs
    block_q, block_k, sparse_dtype, phi_k, _, _ = settings
    _, lse, out_sparse = output
    ctx.save_for_backward(query, key, value, key_mean, logits, alpha, out_sparse, lse)
    ctx.settings = _Settings(block_q, block_k, phi_k, sparse_dtype == "bf16")
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    query, key, *_ = ctx.saved_tensors
    settings: _Settings = ctx.settings
    if grad_out is None:
        grad_out = torch.zeros_like(query)
    grad_query, grad_key, grad_value, grad_key_mean, grad_alpha, grad_logits = (
        _soft_attention_backward(grad_out, grad_lse, *ctx.saved_tensors, *settings)
    )
    grad_key_means = None
    if grad_key_mean.numel():
        grad_key_means = share_mean_gradient(grad_key_mean, key.shape[1], settings.block_k)
    gradients = (grad_query, grad_key, grad_value, grad_key_means)
    return *gradients, *(None,) * 4, grad_logits, grad_alpha, *(None,) * 6


_soft_attention.register_autograd(_backward, setup_context=_save)


def soft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    statistics: BlockStatistics,
    router: Router | None,
    options: Options,
    *,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """SLA2 with a soft selection, differentiable to Q, K, V and all of the router.

    Returns:
        the output, with `need_lse` the log-sum-exp of the selected part, and alpha `[B, H, M]`.

    Args:
        query, key, value: `[B, L, H, D]`, each contiguous along D.
        statistics: of the same inputs and options, with differentiable means.

    Raises:
        ValueError: as many key blocks to keep as there are: nothing is soft then.
    """
    key_means = statistics.key_means
    # Without a gradient of its own: what all scores of a row share changes neither u nor alpha.
    smooth = key_means - statistics.key_mean[:, :, None]
    scores = router_scores(statistics.query_means, smooth, router)
    logits = soft_topk_logits(scores, most_selected(options, scores.shape[-1]), options.tau)
    # A shorter last block holds fewer tokens, hence less mass at the same score.
    log_mass = scores + block_counts(query.shape[1], options.block_k, scores).log()
    kept, dropped = (log_mass + F.logsigmoid(u) for u in (logits, -logits))
    alpha = mix_alpha(kept.logsumexp(-1) - dropped.logsumexp(-1), router)
    learning = torch.is_grad_enabled() and any(
        x.requires_grad for x in (query, key, value, logits, alpha)
    )
    out, lse, _ = _soft_attention(
        query,
        key,
        value,
        key_means,
        statistics.key_mean,
        statistics.value_max,
        statistics.low_query,
        statistics.query_scale,
        logits,
        alpha,
        options.block_q,
        options.block_k,
        options.sparse_dtype,
        options.phi_k,
        need_lse or learning,
        learning,
    )
    return out, lse if need_lse else None, alpha
