"""Backward of SLA2 for soft selections: all pairs of blocks, each with a weight of its own.

With logits u of the mask m = sigmoid(u), log m enters the logits of the sparse branch and 1 - m
weighs the states of the linear one (formulas and letters of `triton_backward_sparse.py` and
`triton_backward_linear.py`):

    dlog m_mn    = sum of dS over the tokens of query block m and key block n
    d(1 - m_mn)  = sum over i in m of w_i (phi(q_i) S_n dO_i^T - e_i phi(q_i) s_n)
                 = <sum_i w_i phi(q_i)^T dO_i, S_n> - <sum_i w_i e_i phi(q_i), s_n>
    du_mn        = (1 - m) dlog m - m (1 - m) d(1 - m)

The second is one matrix product of the states of query blocks and of key blocks, 2 M N D^2
operations a head, like the sums of states. All else is done by the kernels for hard selections,
with lists of every block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.kernels.options import PhiK
from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_backward_key import key_backward
from sla_video.kernels.triton_backward_linear import linear_query_backward
from sla_video.kernels.triton_backward_sparse import sparse_query_backward
from sla_video.kernels.triton_backward_states import BlockStates, key_states, sum_dropped
from sla_video.kernels.triton_inverse import InverseLists
from sla_video.kernels.triton_tiles import launch_on, padded_row

_LOG2E = 1.4426950408889634


def log2_mask(logits: Tensor) -> Tensor:
    """`log2 sigmoid(u)`: what the kernels add to the logits of a key block."""
    return F.logsigmoid(logits) * _LOG2E


def drop_weights(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """`1 - sigmoid(u)` `[B, H, M, N']`, zero beyond the last of N key blocks."""
    num_k = logits.shape[-1]
    return F.pad(torch.sigmoid(-logits).to(dtype), (0, padded_row(num_k) - num_k))


def every_block(like: Tensor, num_q: int, num_k: int) -> Tensor:
    """`[B, H, M, N]` int32: lists of all key blocks."""
    row = torch.arange(num_k, device=like.device, dtype=torch.int32)
    return row.expand(like.shape[0], like.shape[2], num_q, num_k).contiguous()


def soft_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    logits: Tensor,
    alpha: Tensor,
    out_sparse: Tensor,
    lse: Tensor,
    *,
    block_q: int,
    block_k: int,
    phi_k: PhiK,
    grad_lse: Tensor | None,
    exact_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of O and of its log-sum-exp, as `sla2_backward` has them for hard selections.

    Args:
        logits: u, `[B, H, M, N]` float32.

    Returns:
        gradients of query, key and value `[B, L, H, D]`, of key_mean (None for raw features),
        alpha and logits.
    """
    grad_out, query, key, value, out_sparse = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (grad_out.to(query.dtype), query, key, value, out_sparse)
    )
    lse, alpha = lse.contiguous(), alpha.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    length, head_dim = query.shape[1], query.shape[3]
    num_q, num_k = num_blocks(length, block_q), num_blocks(length, block_k)
    bias, mean = log2_mask(logits).contiguous(), key_mean if phi_k == "smoothed" else None
    # [B * H, M', N']
    table = drop_weights(logits, query.dtype).flatten(0, 1)
    table = F.pad(table, (0, 0, 0, padded_row(num_q) - num_q))
    grad_query, grad_key, grad_value = (query.new_empty(query.shape) for _ in range(3))
    with launch_on(query):
        of_keys = key_states(key, mean, value, block_k)
        grad_alpha, of_queries = linear_query_backward(
            grad_out,
            query,
            sum_dropped(of_keys, table[:, :num_q]),
            alpha,
            out_sparse,
            grad_query,
            block_q=block_q,
        )
        grad_dropped = _pair_products(of_queries, of_keys)[..., :num_q, :num_k]
        # Features of queries stand there times L / D.
        grad_dropped = grad_dropped * (head_dim / length)
        del of_keys
        row_lse, row_delta = sparse_query_backward(
            grad_out,
            query,
            key,
            value,
            every_block(query, num_q, num_k),
            None,
            alpha,
            out_sparse,
            lse,
            grad_query,
            grad_lse=grad_lse,
            exact_lse=exact_lse,
            add=True,
            bias=bias,
            block_q=block_q,
            block_k=block_k,
        )
        grad_key_mean, grad_bias = key_backward(
            grad_out,
            query,
            key,
            value,
            row_lse,
            row_delta,
            _every_pair(query, num_q, num_k),
            sum_dropped(of_queries, table[..., :num_k].mT),
            mean,
            grad_key,
            grad_value,
            bias=bias,
            block_q=block_q,
            block_k=block_k,
        )
    assert grad_key_mean is not None and grad_bias is not None
    mean_gradient = None if mean is None else grad_key_mean[..., :head_dim]
    drop = torch.sigmoid(-logits)
    grad_logits = drop * (grad_bias - torch.sigmoid(logits) * grad_dropped)
    return grad_query, grad_key, grad_value, mean_gradient, grad_alpha, grad_logits


def _pair_products(queries: BlockStates, keys: BlockStates) -> Tensor:
    """`<S_m, S_n> - <s_m, s_n>` of all pairs of blocks, `[B, H, M', N']` float32."""
    left, right = (x.states.flatten(0, 1).flatten(2) for x in (queries, keys))
    # Also where the backward pass runs under autocast.
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and left.dtype != torch.float32:
            # Rounded to 16 bits, the two would not cancel where values have a common offset.
            products = torch.bmm(left, right.mT, out_dtype=torch.float32)
        else:
            products = left.float() @ right.mT.float()
        products = products.unflatten(0, queries.sums.shape[:2])
        if queries.factors is not None and keys.factors is not None:
            products *= queries.factors[..., None] * keys.factors[..., None, :]
        found: Tensor = products - queries.sums @ keys.sums.mT
    return found


def _every_pair(like: Tensor, num_q: int, num_k: int) -> InverseLists:
    """Lists of all query blocks."""
    heads = like.shape[0] * like.shape[2]
    dtype = torch.int16 if num_q < 2**15 else torch.int32
    row = torch.arange(num_q, device=like.device, dtype=dtype)
    counts = torch.full((heads, num_k), num_q, device=like.device, dtype=torch.int32)
    order = torch.arange(heads * num_k, device=like.device, dtype=torch.int32)
    return InverseLists(row.expand(heads, num_k, num_q).contiguous(), counts, order)
