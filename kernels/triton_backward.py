"""Backward of SLA2 for hard selections: the sparse and the linear part put together.

    key states         products phi(K)^T V of each key block
    linear, queries    dQ, dalpha; the same products of weighted query features and dO
    sparse, queries    + dQ of the sparse branch; log-sum-exp and delta of each row
    keys               dK, dV of both branches

Both linear branches get the states summed over what is dropped. Key blocks find the query blocks
that selected them in inverted lists (`triton_inverse.py`). Nothing synchronises with the host or
adds atomically.
"""

from __future__ import annotations

from torch import Tensor

from sla_video.kernels.options import PhiK
from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_backward_key import key_backward
from sla_video.kernels.triton_backward_linear import linear_query_backward
from sla_video.kernels.triton_backward_sparse import sparse_query_backward
from sla_video.kernels.triton_backward_states import key_states, sum_dropped
from sla_video.kernels.triton_inverse import dropped_table, invert_selection
from sla_video.kernels.triton_support import DTYPES, LARGEST_HEAD_DIM
from sla_video.kernels.triton_tiles import launch_on


def sla2_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    indices: Tensor,
    counts: Tensor | None,
    alpha: Tensor | None,
    out_sparse: Tensor,
    lse: Tensor,
    *,
    block_q: int,
    block_k: int,
    phi_k: PhiK,
    grad_lse: Tensor | None = None,
    exact_lse: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `O = alpha O_s + (1 - alpha) O_l` and of its log-sum-exp, selection fixed.

    The gradient through alpha ends at alpha: what alpha was computed from, block means and learned
    tensors, is left to autograd, and so is the gradient through the mean of the keys inside phi.

    Args:
        grad_out: `[B, L, H, D]` in the dtype of query.
        query, key, value: `[B, L, H, D]`, bfloat16, float16 or float32, D <= 128.
        key_mean: `[B, H, D]` float32, mean key over tokens.
        indices: `[B, H, M, K]` int32, the selected key blocks of each query block.
        counts: `[B, H, M]` int32, how many entries of each row count; None when all do.
        alpha: `[B, H, M]` float32 mix weight; None when nothing is dropped anywhere.
        out_sparse: O_s `[B, L, H, D]` as it was mixed.
        lse: `[B, H, L]` float32, log-sum-exp of the selected logits in terms of the keys as given,
            quantized where O_s is.
        block_q, block_k: tokens per query block and per key block, powers of two from 16 on.
        phi_k: whether phi was taken of smoothed or of raw keys.
        grad_lse: `[B, H, L]` float32, gradient of the log-sum-exp.
        exact_lse: False where the sparse branch was quantized. Its gradients are those of the
            unquantized branch, whose log-sum-exp and O_s are computed from `lse` and `out_sparse`,
            which are near; the gradient of alpha takes `out_sparse` as it is.

    Returns:
        gradients of query, key and value `[B, L, H, D]`, contiguous, in the dtype of query, of
        key_mean, `[B, H, D]` float32 (None without alpha and for raw features), and of alpha,
        `[B, H, M]` float32 (None without alpha).

    Raises:
        ValueError: head dimension, dtype or block size that the kernels do not handle.
    """
    head_dim = query.shape[-1]
    if head_dim > LARGEST_HEAD_DIM:
        raise ValueError(
            f"impl='triton' handles head dimensions up to {LARGEST_HEAD_DIM}, got {head_dim}; "
            "use impl='torch'"
        )
    if query.dtype not in DTYPES:
        raise ValueError(
            "impl='triton' handles bfloat16, float16 and float32, "
            f"got {query.dtype}; use impl='torch'"
        )
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 16 or block & (block - 1):
            raise ValueError(
                f"impl='triton' handles `{name}` that is a power of two from 16 on, got {block}; "
                "use impl='torch'"
            )
    grad_out, query, key, value, out_sparse = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (grad_out.to(query.dtype), query, key, value, out_sparse)
    )
    indices, lse, key_mean = indices.contiguous(), lse.contiguous(), key_mean.contiguous()
    counts = None if counts is None else counts.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_query, grad_key, grad_value = (query.new_empty(query.shape) for _ in range(3))
    grad_alpha = states = None
    mean = key_mean if phi_k == "smoothed" else None
    with launch_on(query):
        num_q, num_k = indices.shape[2], num_blocks(query.shape[1], block_k)
        dropped = dropped_table(indices, counts, num_k, query.dtype)
        if alpha is not None:
            alpha = alpha.contiguous()
            states = key_states(key, mean, value, block_k)
            # The name is used again, to let go of what it stood for.
            states = sum_dropped(states, dropped[:, :num_q])
            grad_alpha, states = linear_query_backward(
                grad_out,
                query,
                states,
                alpha,
                out_sparse,
                grad_query,
                block_q=block_q,
            )
            states = sum_dropped(states, dropped[..., :num_k].mT)
        row_lse, row_delta = sparse_query_backward(
            grad_out,
            query,
            key,
            value,
            indices,
            counts,
            alpha,
            out_sparse,
            lse,
            grad_query,
            grad_lse=grad_lse,
            exact_lse=exact_lse,
            add=alpha is not None,
            block_q=block_q,
            block_k=block_k,
        )
        grad_key_mean, _ = key_backward(
            grad_out,
            query,
            key,
            value,
            row_lse,
            row_delta,
            invert_selection(dropped[:, :num_q, :num_k], indices.shape[-1]),
            states,
            mean,
            grad_key,
            grad_value,
            block_q=block_q,
            block_k=block_k,
        )
    if grad_key_mean is not None:
        grad_key_mean = None if mean is None else grad_key_mean[..., :head_dim]
    return grad_query, grad_key, grad_value, grad_key_mean, grad_alpha
