"""SLA2 without custom kernels: gathered key blocks, batched matmuls, any device torch runs on.

Per head group: copy K and V into contiguous blocks, reduce the blocks left to the linear branch to
one D x D state S and one D-vector z per query block, then visit the query blocks in chunks and mix

    O = alpha softmax(Q Ksel^T / sqrt(D)) Vsel + (1 - alpha) phi(Q) S / (phi(Q) z)

On CPUs the groups and chunks are sized to stay in cache, which is worth more than fewer calls;
elsewhere they are sized to bound memory. Nothing synchronises with the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.kernels.context import Context, with_context
from sla_video.kernels.key_places import KeyOrder, take_tokens
from sla_video.kernels.options import Options, PhiK
from sla_video.kernels.router import Router
from sla_video.kernels.routing import compute_dtype, num_blocks, route
from sla_video.kernels.torch_sparse import SparseBranch

# Scores of one chunk per thread, in elements: small enough to be reused from cache.
_CPU_CHUNK_ELEMENTS = 512 * 1024
# Keys, values, features and states of one head group, in bytes: inside a shared L3 cache.
_CPU_GROUP_BYTES = 8 * 2**20
# The same two budgets where memory, not cache, is the limit.
_CHUNK_ELEMENTS = 64 * 2**20
_GROUP_BYTES = 2 * 2**30


def sla2_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    router: Router | None,
    options: Options,
    *,
    need_lse: bool,
    context: Context | None = None,
    key_order: KeyOrder | None = None,
) -> tuple[Tensor, Tensor | None]:
    """SLA2 (arXiv 2602.12675) on `[B, L, H, D]`; see `sla2_attention`, which checks arguments.

    Returns:
        the output `[B, L, H, D]` in the dtype of `query`, and the log-sum-exp of the selected
        part `[B, H, L]` (None unless `need_lse`).
    """
    batch, length, heads, head_dim = query.shape
    block_q, block_k = options.block_q, options.block_k
    always = None
    if key_order is not None:
        key, value = (take_tokens(x, key_order.places) for x in (key, value))
        always = key_order.always
    plan = route(query, key, router, options, always)
    num_q, kept = plan.indices.shape[-2:]
    compute = compute_dtype(query.dtype)
    # [B, H, M, block_q, D]
    padding = num_q * block_q - length
    rows = F.pad(query, (0, 0, 0, 0, 0, padding)) if padding else query
    rows = rows.unflatten(1, (num_q, block_q)).permute(0, 3, 1, 2, 4)
    out = query.new_empty(batch, num_q * block_q, heads, head_dim)
    out_rows = out.unflatten(1, (num_q, block_q)).permute(0, 3, 1, 2, 4)
    want_lse = need_lse or context is not None
    lse = query.new_empty(batch, heads, num_q, block_q, dtype=compute) if want_lse else None

    learning = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, plan.alpha)
    )
    group, chunk = _schedule(query, options, num_q, kept, learning)
    for b in range(batch):
        for h in range(0, heads, group):
            heads_now = slice(h, h + group)
            keys = _head_blocks(key[b, :, heads_now], block_k)
            values = _head_blocks(value[b, :, heads_now], block_k)
            key_mean = plan.key_mean[b, heads_now]
            linear = None
            if plan.dropped is not None:
                features = _key_features(keys, key_mean, length, options.phi_k)
                linear = _linear_branch(
                    rows[b, heads_now], features, values, plan.dropped[b, heads_now]
                )
            sparse = SparseBranch(
                keys,
                values,
                key_mean,
                length=length,
                sparse_dtype=options.sparse_dtype,
                need_lse=want_lse,
            )
            for m in range(0, num_q, chunk):
                here = (b, heads_now, slice(m, m + chunk))
                result, lse_here = sparse(
                    rows[here], plan.indices[here], None if plan.valid is None else plan.valid[here]
                )
                if linear is not None and plan.alpha is not None:
                    alpha = plan.alpha[here][..., None, None]
                    result = torch.lerp(linear[:, m : m + chunk], result, alpha)
                out_rows[here] = result
                if lse is not None and lse_here is not None:
                    lse[here] = lse_here
    out, lse = out[:, :length], None if lse is None else lse.flatten(2)[..., :length]
    if context is not None and lse is not None:
        out = with_context(query, out, lse, plan.alpha, block_q, context)
    return out, lse if need_lse else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _num_threads() -> int:
    return torch.get_num_threads()


def _schedule(
    query: Tensor, options: Options, num_q: int, kept: int, learning: bool
) -> tuple[int, int]:
    """Heads per group and query blocks per chunk."""
    length, heads, head_dim = query.shape[1:]
    num_k = num_blocks(length, options.block_k)
    scores = options.block_q * kept * options.block_k
    group_bytes = 4 * (3 * length * head_dim + (num_q + num_k) * head_dim**2)
    # Autograd keeps every chunk anyway, so small ones would only add calls.
    if query.device.type == "cpu" and not learning:
        group = max(1, _CPU_GROUP_BYTES // group_bytes)
        chunk = _num_threads() * max(1, _CPU_CHUNK_ELEMENTS // scores)
    else:
        group = max(1, _GROUP_BYTES // group_bytes)
        chunk = max(1, _CHUNK_ELEMENTS // scores)
    group = min(group, heads)
    chunks = -(-num_q // max(1, chunk // group))
    return group, -(-num_q // chunks)


def _head_blocks(x: Tensor, block: int) -> Tensor:
    """Blocks of x `[L, h, D]`, contiguous `[h, N, block, D]`, zero beyond L."""
    x = x.transpose(0, 1)
    padding = num_blocks(x.shape[1], block) * block - x.shape[1]
    x = F.pad(x, (0, 0, 0, padding)) if padding else x
    return x.reshape(x.shape[0], -1, block, x.shape[2]).contiguous()


def _key_features(keys: Tensor, key_mean: Tensor, length: int, phi_k: PhiK) -> Tensor:
    """phi of keys `[h, N, block_k, D]`, zero for tokens beyond L; key_mean is `[h, D]`."""
    tokens = keys.flatten(1, 2)[:, :length].to(key_mean.dtype)
    features = torch.softmax(tokens - key_mean[:, None] if phi_k == "smoothed" else tokens, -1)
    # Padding after the softmax leaves absent tokens without weight.
    padding = keys.shape[1] * keys.shape[2] - length
    features = F.pad(features, (0, 0, 0, padding)) if padding else features
    return features.view(keys.shape)


def _linear_branch(rows: Tensor, key_features: Tensor, values: Tensor, dropped: Tensor) -> Tensor:
    """O_l `[h, M, block_q, D]` of rows of the same shape over the blocks in dropped `[h, M, N]`.

    Summing what is dropped, rather than subtracting what is selected from the total, costs a
    small matmul and loses nothing to cancellation.
    """
    # [h, N, D, D] -> [h, M, D, D]
    states = key_features.mT @ values.to(key_features.dtype)
    states = (dropped @ states.flatten(2)).unflatten(-1, states.shape[-2:])
    # [h, M, D, 1]
    normaliser = (dropped @ key_features.sum(2)).unsqueeze(-1)
    features = torch.softmax(rows.to(key_features.dtype), -1)
    weight = features @ normaliser
    # Zero where a row drops nothing: then the numerator is zero too, and alpha is 1.
    weight = torch.where(weight > 0, weight, torch.ones_like(weight))
    out: Tensor = (features @ states) / weight
    return out
