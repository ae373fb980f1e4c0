"""Attention among fewer tokens (after Token Sparse Attention, arXiv 2602.03216).

Each head gathers the tokens it keeps, any attention runs on the short sequence, and what it gives
is scattered back:

    mode "kv":   O = inner(Q, K[kept], V[kept])
    mode "qkv":  O[kept] = inner(Q[kept], K[kept], V[kept]),  O[dropped] = fill

What full attention gave beyond that in an earlier call, `residual`, may be added: from one
denoising step to the next it changes far less than what dropped tokens contribute. How many tokens
are kept is one number for all heads; which ones is up to each head (`token_scores`). Where all are
kept the result is that of `inner`, bit for bit. Gradients reach everything but the choice and what
is taken from an earlier call. Nothing here waits for the device.

Letters: B batch, H heads, L tokens, K kept tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.kernels.routing import compute_dtype
from sla_video.kernels.token_order import Grid

CompressionMode = Literal["kv", "qkv"]
CompressionFill = Literal["prev", "neighbor", "linear", "zero"]
# Attention of query `[B, L, H, D]` to key and value `[B, K, H, D]`, to the shape of query.
Inner = Callable[[Tensor, Tensor, Tensor], Tensor]


class TokenSelection(NamedTuple):
    """Which tokens each head keeps.

    Attributes:
        kept: `[B, H, K]` int64, rising, so that neighbours stay neighbours.
        dropped: `[B, H, L - K]` int64, rising.
    """

    kept: Tensor
    dropped: Tensor


def select_tokens(ranking: Tensor, count: int) -> TokenSelection:
    """The first `count` tokens of each row of `ranking` `[B, H, L]`, and the others.

    Raises:
        ValueError: `count` is not from 1 to L.
    """
    if not 1 <= count <= ranking.shape[-1]:
        raise ValueError(f"`count` must be from 1 to {ranking.shape[-1]} tokens, got {count}")
    kept, dropped = ranking.split([count, ranking.shape[-1] - count], -1)
    return TokenSelection(kept.sort(-1).values, dropped.sort(-1).values)


def gather_tokens(x: Tensor, places: Tensor) -> Tensor:
    """The tokens `[B, K, H, D]` of x `[B, L, H, D]` at the `places` `[B, H, K]` of each head."""
    batch, _, heads, head_dim = x.shape
    # Whole rows of D: several times the speed of `gather`, which moves single numbers.
    rows = x.reshape(-1, head_dim).index_select(0, _rows(places, x.shape[1]))
    return rows.view(batch, -1, heads, head_dim)


def compressed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: TokenSelection,
    inner: Inner,
    *,
    mode: CompressionMode = "kv",
    fill: CompressionFill = "linear",
    dropped_output: Tensor | None = None,
    nearest: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Attention `[B, L, H, D]` to the kept tokens; see the top of this file.

    Args:
        query, key, value: `[B, L, H, D]`, rotated.
        inner: the attention to run. In mode "kv" it gets fewer keys than queries; `fewer_keys`
            adapts one that cannot have that.
        fill: in mode "qkv", what dropped queries get. "prev": `dropped_output`; "neighbor": the
            output of the kept query nearest on the grid; "linear": the linear branch of SLA2 over
            all tokens; "zero": nothing, as published.
        dropped_output: `[B, L - K, H, D]`, for fill="prev" the output of earlier at `dropped`.
        nearest: for fill="neighbor", of `nearest_kept`.
        residual: what full attention gave beyond `short_attention` in an earlier call, in the
            shape of the latter; added to what it gives now.

    Raises:
        ValueError: an unknown mode or fill, or one without what it takes.
    """
    _check_choice("mode", mode, get_args(CompressionMode))
    _check_choice("fill", fill, get_args(CompressionFill))
    if selection.dropped.shape[-1] == 0:
        return inner(query, key, value)
    output = short_attention(query, key, value, selection, inner, mode=mode)
    if residual is not None:
        output = output + residual.detach().to(output.dtype)
    if mode == "kv":
        return output
    if fill == "neighbor":
        if nearest is None:
            raise ValueError("fill='neighbor' needs `nearest`, which `nearest_kept` makes")
        return gather_tokens(output, nearest)
    if fill == "prev":
        if dropped_output is None:
            raise ValueError("fill='prev' needs `dropped_output`, the output of an earlier call")
        filling = dropped_output.detach()
    elif fill == "linear":
        filling = linear_attention(gather_tokens(query, selection.dropped), key, value)
    else:
        filling = output.new_zeros(())
    return _scatter(output, filling.to(output.dtype), selection, query.shape[1])


def short_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: TokenSelection,
    inner: Inner,
    *,
    mode: CompressionMode,
) -> Tensor:
    """What `inner` gives of the kept tokens: `[B, L, H, D]` in mode "kv", else `[B, K, H, D]`."""
    parts = gather_tokens(key, selection.kept), gather_tokens(value, selection.kept)
    return inner(query if mode == "kv" else gather_tokens(query, selection.kept), *parts)


def nearest_kept(selection: TokenSelection, grid: Grid, *, order: Tensor | None = None) -> Tensor:
    """For every token, which of the K kept ones is nearest on the grid: `[B, H, L]` int64.

    Kept tokens are nearest to themselves.

    Args:
        selection: holds the tokens of `always_kept`, so that each token has a neighbour within one
            step along every axis.
        order: `[L]` raster place of each token; None is raster order.
    """
    batch, heads, count = selection.kept.shape
    length = count + selection.dropped.shape[-1]
    device = selection.kept.device
    places = selection.kept if order is None else order.to(device)[selection.kept]
    rank = torch.full((batch, heads, length), -1, dtype=torch.int32, device=device)
    own = torch.arange(count, dtype=torch.int32, device=device)
    rank.scatter_(-1, places, own.expand(places.shape))
    on_grid = rank.unflatten(-1, grid)
    # A border of tokens that are not there: [B, H, T + 2, H + 2, W + 2].
    bordered = F.pad(on_grid, (1,) * 6, value=-1)
    steps = sorted(product((0, 1, 2), repeat=3), key=lambda s: -sum((i - 1) ** 2 for i in s))
    found = on_grid
    for step in steps:  # from the farthest to the token itself
        there = bordered
        for axis, (start, size) in enumerate(zip(step, grid, strict=True)):
            there = there.narrow(2 + axis, start, size)
        found = torch.where(there >= 0, there, found)
    nearest: Tensor = found.flatten(-3).long()
    return nearest if order is None else nearest[..., order.to(device)]


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SLA2's linear branch over all tokens, as of a query block that selects nothing.

    `phi(q) (sum_j phi(k_j)^T v_j) / (phi(q) . sum_j phi(k_j))` with phi the softmax over D, of the
    keys less their mean.

    Args:
        query: `[B, Q, H, D]`; key, value: `[B, L, H, D]`.
    """
    dtype = compute_dtype(query.dtype)
    # [B, H, L, D], in the inputs' dtype: sums of products are exact enough on matrix units.
    smooth = key - key.mean(1, keepdim=True, dtype=dtype).to(key.dtype)
    phi_k = torch.softmax(smooth, -1).transpose(1, 2)
    state = phi_k.mT @ value.transpose(1, 2)
    # [B, H, 1, D]
    total = phi_k.sum(2, keepdim=True, dtype=dtype)
    phi_q = torch.softmax(query, -1).transpose(1, 2)
    weight = (phi_q.to(dtype) * total).sum(-1, keepdim=True)
    return ((phi_q @ state) / weight).to(query.dtype).transpose(1, 2)


def fewer_keys(inner: Inner, query: Tensor, key: Tensor, value: Tensor, block_q: int) -> Tensor:
    """`inner`, which takes as many queries as keys, for queries `[B, L, H, D]` and K keys.

    The queries go in runs of K. For attention whose query blocks know nothing of each other but
    their means this changes nothing: tokens that fill up the last block are its mean.

    Raises:
        ValueError: K is no multiple of `block_q`, so that blocks would be cut elsewhere.
    """
    length, count = query.shape[1], key.shape[1]
    if length == count:
        return inner(query, key, value)
    if count % block_q:
        raise ValueError(
            f"the {count} keys that are kept are no multiple of the {block_q} queries of a block"
        )
    *whole, last = query.split(count, 1)
    missing = -last.shape[1] % block_q
    if missing:
        tail = last[:, last.shape[1] // block_q * block_q :]
        mean = tail.mean(1, keepdim=True, dtype=compute_dtype(query.dtype)).to(query.dtype)
        last = torch.cat((last, mean.expand(-1, missing, -1, -1)), 1)
    last = F.pad(last, (0, 0, 0, 0, 0, count - last.shape[1]))
    return torch.cat([inner(run, key, value) for run in (*whole, last)], 1)[:, :length]


def _scatter(output: Tensor, filling: Tensor, selection: TokenSelection, length: int) -> Tensor:
    """`[B, L, H, D]` with `output` at `kept` and `filling` (a scalar is 0) at `dropped`."""
    batch, _, heads, head_dim = output.shape
    shape = (batch * length * heads, head_dim)
    whole = output.new_zeros(shape) if filling.dim() == 0 else output.new_empty(shape)
    whole = whole.index_copy_(0, _rows(selection.kept, length), output.reshape(-1, head_dim))
    if filling.dim():
        rows = _rows(selection.dropped, length)
        whole = whole.index_copy_(0, rows, filling.reshape(-1, head_dim))
    return whole.view(batch, length, heads, head_dim)


def _rows(places: Tensor, length: int) -> Tensor:
    """Where tokens `[B, H, K]` lie in a tensor `[B, L, H, D]` of rows of D: `[B * K * H]`."""
    batch, heads, _ = places.shape
    first = torch.arange(batch, device=places.device)[:, None, None] * length
    head = torch.arange(heads, device=places.device)
    return ((first + places.transpose(1, 2)) * heads + head).flatten()


def _check_choice(name: str, given: object, choices: tuple[str, ...]) -> None:
    if given not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {known}, got {given!r}")
