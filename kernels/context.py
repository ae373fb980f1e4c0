"""Context tokens: keys and values outside the sequence that every query attends to exactly.

Text tokens of joint text-video models, for instance. SLA2 gives the output O_v for the L tokens of
the sequence and the log-sum-exp lse_s of those it selected. alpha estimates which share of the
softmax mass they hold, so that of all L tokens has the logarithm

    l_v = lse_s - log(alpha)

With exact attention O_c, l_c to the context, the softmax over both is, up to what alpha and the
linear branch get wrong,

    O = sigmoid(l_v - l_c) O_v + sigmoid(l_c - l_v) O_c

Letters: B batch, H heads, L tokens, D head dimension, M query blocks, C context tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sla_video.kernels.routing import compute_dtype

# An alpha that rounds to zero would give the sequence infinite mass.
SMALLEST_ALPHA = torch.finfo(torch.float32).tiny
# Scores of one chunk of queries, in elements: 64 MiB in float32, or of the size of a cache.
_CHUNK_ELEMENTS = 16 * 2**20
_CPU_CHUNK_ELEMENTS = 2 * 2**20


class Context(NamedTuple):
    """What all queries attend to besides the sequence.

    Attributes:
        key, value: `[B, C, H, D]`.
        mask: `[B, C]`, False on tokens that are not there; None when all are.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None


def check_context(
    context: object, mask: object, query: Tensor, *, cast: bool = False
) -> Context | None:
    """The context of a call with `query` `[B, L, H, D]`, None if it has none.

    Args:
        cast: take other floating dtypes too, as autocast does, to that of `query`.

    Raises:
        TypeError: not a pair of tensors of the dtype and device of `query`, or a mask not boolean.
        ValueError: shapes that do not fit.
    """
    if context is None:
        if mask is not None:
            raise ValueError("`context_mask` was given without a `context` to mask")
        return None
    if not isinstance(context, (tuple, list)) or len(context) != 2:
        raise TypeError(
            f"`context` must be a pair (key, value) or None, got {type(context).__name__}"
        )
    key, value = (
        x.to(query.dtype) if cast and isinstance(x, Tensor) and x.is_floating_point() else x
        for x in context
    )
    batch, _, heads, head_dim = query.shape
    for name, x in (("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dtype != query.dtype or x.device != query.device:
            got = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"the {name} of `context` must be a tensor of the dtype and device of `query`, "
                f"{query.dtype} on {query.device}, got {got}"
            )
        count = x.shape[1] if x.dim() == 4 else 0
        if x.shape != (batch, count, heads, head_dim) or count == 0 or x.shape != key.shape:
            raise ValueError(
                f"the {name} of `context` must be [B, C, H, D] = "
                f"[{batch}, C, {heads}, {head_dim}] with one C >= 1 for key and value, "
                f"got {list(x.shape)}"
            )
    if mask is None:
        return Context(key, value, None)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"`context_mask` must be a boolean tensor, got {got}")
    if mask.shape != key.shape[:2] or mask.device != query.device:
        raise ValueError(
            f"`context_mask` must be [B, C] = {list(key.shape[:2])} on {query.device}, "
            f"got {list(mask.shape)} on {mask.device}"
        )
    return Context(key, value, mask)


def total_mass(lse: Tensor, alpha: Tensor | None, block_q: int) -> Tensor:
    """Estimated log-mass l_v `[B, H, L]` of all keys.

    Args:
        lse: `[B, H, L]`, of the selected keys.
        alpha: `[B, H, M]`, the share they are thought to hold; None where they are all.
    """
    if alpha is None:
        return lse
    missing = alpha.to(lse.dtype).clamp_min(SMALLEST_ALPHA).log()
    return lse - missing.repeat_interleave(block_q, -1)[..., : lse.shape[-1]]


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for gradients of what is computed from these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def with_context(
    query: Tensor, out: Tensor, lse: Tensor, alpha: Tensor | None, block_q: int, context: Context
) -> Tensor:
    """The output of SLA2 and exact attention to the context, put together.

    Bounded memory, also for the backward pass, and no wait for the device.

    Args:
        query: `[B, L, H, D]`.
        out, lse, alpha: output `[B, L, H, D]`, log-sum-exp `[B, H, L]` of the selected part and
            mix weight `[B, H, M]` of SLA2 (None: nothing was dropped).

    Returns:
        `[B, L, H, D]` in the dtype of `out`.
    """
    dtype = compute_dtype(query.dtype)
    # [B, H, D, C], [B, H, C, D]
    keys = context.key.permute(0, 2, 3, 1).to(dtype)
    values = context.value.transpose(1, 2).to(dtype)
    bias = None
    if context.mask is not None:
        # Not infinity, of which no softmax could be taken where a whole context is masked.
        bias = torch.zeros_like(context.mask, dtype=dtype)
        bias = bias.masked_fill(~context.mask, torch.finfo(dtype).min)[:, None, None]
    mass = total_mass(lse, alpha, block_q)

    def rows(query: Tensor, out: Tensor, mass: Tensor) -> Tensor:
        """One chunk of queries: `[B, R, H, D]`, `[B, R, H, D]` and `[B, H, R]`."""
        scores = (query.transpose(1, 2).to(dtype) * query.shape[-1] ** -0.5) @ keys
        if bias is not None:
            scores = scores + bias
        weight = torch.sigmoid(mass - scores.logsumexp(-1)).unsqueeze(-1)
        video = out.transpose(1, 2).to(dtype)
        mixed = torch.lerp(torch.softmax(scores, -1) @ values, video, weight)
        return mixed.transpose(1, 2).to(out.dtype)

    batch, length, heads, _ = query.shape
    budget = _CHUNK_ELEMENTS if query.device.type != "cpu" else _CPU_CHUNK_ELEMENTS
    size = max(1, budget // (batch * heads * keys.shape[-1]))
    learning = needs_gradients(query, out, mass, keys, values)
    parts = []
    for start in range(0, length, size):
        own = slice(start, start + size)
        given = (query[:, own], out[:, own], mass[..., own])
        # The scores are made again for the backward pass rather than kept.
        parts.append(checkpoint(rows, *given, use_reentrant=False) if learning else rows(*given))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
