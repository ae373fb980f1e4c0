"""Scores of key blocks, and the best ones of each query block, from router features.

    scores = Qb (Kb - mean)^T / sqrt(D)     float32, by matrix units in three TF32 products
    indices_m = the K best of row m, ascending
    logit_m = LSE_{n in sel(m)}(s_mn + log c_n) - LSE_{n not in sel(m)}(s_mn + log c_n)

Selection: one program owns one row and keeps it in registers. A bound is bisected between the
smallest and the largest score until K scores reach it; ten steps mostly do. Equal scores, that no
bound parts, are left to a second bisection, of floats mapped to integers that sort as they do: of
equal ones the leftmost are taken. Lists are ascending: programs that run at the same time then walk
the keys in the same order, and a shorter last block comes last.

Layouts: features `[B, H, M, D]`, `[B, H, N, D]`, contiguous; a row of scores is filled with -inf to
a multiple of 16. Hardware: compute capability 8.0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.triton_tiles import launch_on, padded_dim, padded_row


@triton.jit(do_not_specialize=["num_q", "num_k"])
def _scores_kernel(
    queries_ptr,
    keys_ptr,
    key_mean_ptr,
    scores_ptr,
    num_q,
    num_k,
    stride_m,
    scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """scale * queries (keys - key_mean)^T, and -inf from column N to the end of a row."""
    offs_k = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    offs_q = tl.program_id(1) * TILE_Q + tl.arange(0, TILE_Q)
    bh = tl.program_id(2).to(tl.int64)
    queries_ptr += bh * num_q * D
    keys_ptr += bh * num_k * D
    scores = tl.zeros([TILE_Q, TILE_K], tl.float32)
    for start in range(0, D_PAD, TILE_D):
        offs_d = start + tl.arange(0, TILE_D)
        mask_d = (offs_d < D)[None, :]
        mask = (offs_q < num_q)[:, None] & mask_d
        offs = offs_q[:, None] * D + offs_d[None, :]
        queries = tl.load(queries_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mask = (offs_k < num_k)[:, None] & mask_d
        offs = offs_k[:, None] * D + offs_d[None, :]
        keys = tl.load(keys_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if key_mean_ptr is not None:
            keys -= tl.load(key_mean_ptr + bh * D + offs_d, mask=offs_d < D, other=0.0)[None, :]
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision="tf32x3")
    scores = tl.where((offs_k < num_k)[None, :], scores * scale, float("-inf"))
    scores_ptr += bh * num_q * stride_m
    offs = offs_q.to(tl.int64)[:, None] * stride_m + offs_k[None, :]
    tl.store(
        scores_ptr + offs, scores, mask=(offs_q < num_q)[:, None] & (offs_k < stride_m)[None, :]
    )


@triton.jit
def _reach_in_order(scores, exists, num_k, num_selected):
    """Ones for the K best scores, the leftmost of equal ones, where no bound parts K of them."""
    # Negative floats sort backwards: flip all of their bits, and the sign of the others.
    bits = scores.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    order = tl.where(exists, order, 0)
    # At least K scores reach `low`, fewer reach `high`.
    low = tl.min(tl.where(exists, order, 0xFFFFFFFF), 0)
    high = tl.max(order, 0) + 1
    found = num_k
    while (found != num_selected) & (high - low > 1):
        middle = low + (high - low) // 2
        count = tl.sum((order >= middle).to(tl.int32), 0)
        enough = count >= num_selected
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        found = tl.where(enough, count, found)
    selected = (order >= low).to(tl.int32)
    equal = ((order == low) & (found != num_selected)).to(tl.int32)
    above = selected - equal
    wanted = num_selected - tl.sum(above, 0)
    return above + equal * (tl.cumsum(equal, 0) <= wanted).to(tl.int32)


@triton.jit(do_not_specialize=["num_q", "heads", "num_k", "num_selected"])
def _select_top_k_kernel(
    scores_ptr,
    always_ptr,
    indices_ptr,
    logit_ptr,
    alpha_ptr,
    dropped_ptr,
    num_q,
    heads,
    num_k,
    num_selected,
    stride_m,
    log_tail,
    ROW: tl.constexpr,
):
    """log_tail: log of the share of a whole block that the last one holds.

    `always_ptr`: for each head, how many leading blocks come before all others; or None.
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, ROW)
    # The rest of a row is -inf, up to a multiple of 16: aligned vectors are read.
    scores = tl.load(scores_ptr + row * stride_m + offs, mask=offs < stride_m, other=float("-inf"))
    # NaN must not unsettle the count, nor must -0.
    scores = tl.where(scores == scores, scores, float("-inf")) + 0.0
    exists = offs < num_k
    top = tl.max(scores, 0)
    ranks = scores
    if always_ptr is not None:
        # As good as the best, and of equal ones the leftmost are taken.
        leading = tl.load(always_ptr + row // num_q % heads)
        ranks = tl.where(offs < leading, top, scores)

    # At least K ranks reach `low`.
    low = tl.min(tl.where(exists, ranks, float("inf")), 0)
    high = top
    middle = 0.5 * low + 0.5 * high
    found = num_k
    while (found != num_selected) & (middle > low) & (middle < high):
        count = tl.sum((ranks >= middle).to(tl.int32), 0)
        enough = count >= num_selected
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        found = tl.where(enough, count, found)
        middle = 0.5 * low + 0.5 * high
    selected = (ranks >= low).to(tl.int32)
    if found != num_selected:
        selected = _reach_in_order(ranks, exists, num_k, num_selected)
    position = tl.cumsum(selected, 0) - 1
    row_ptr = indices_ptr + row * num_selected
    tl.store(row_ptr + position, offs, mask=selected > 0)

    dropped = tl.where(exists & (selected == 0), 1.0, 0.0).to(dropped_ptr.dtype.element_ty)
    tl.store(dropped_ptr + row * stride_m + offs, dropped, mask=offs < stride_m)

    log_mass = scores + tl.where(offs == num_k - 1, log_tail, 0.0)
    dropped_max = tl.max(tl.where(selected > 0, float("-inf"), log_mass), 0)
    if always_ptr is not None:
        # The best may be among the dropped, if nothing but leading blocks is kept.
        top = tl.max(tl.where(selected > 0, scores, float("-inf")), 0)
    mass = tl.exp(log_mass - tl.where(selected > 0, top, dropped_max))
    kept = tl.sum(tl.where(selected > 0, mass, 0.0), 0)
    rest = tl.sum(tl.where(selected > 0, 0.0, mass), 0)
    logit = top + tl.log(kept) - dropped_max - tl.log(rest)
    tl.store(logit_ptr + row, logit)
    if alpha_ptr is not None:
        tl.store(alpha_ptr + row, tl.sigmoid(logit))


def select_rows(
    scores: Tensor,
    num_k: int,
    num_selected: int,
    log_tail: float = 0.0,
    *,
    dtype: torch.dtype = torch.float32,
    need_alpha: bool = True,
    always: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The best key blocks of each row, and the logit of the softmax mass they hold.

    Args:
        scores: of `block_scores`.
        num_k, num_selected: N, and K from 1 to N - 1.
        log_tail: log of the share of a whole block that the last block holds.
        dtype: of the table.
        need_alpha: return the sigmoid of the logits too.
        always: `[H]` int32, leading blocks of each head that are selected before all others.

    Returns:
        ascending indices `[B, H, M, K]` int32, logits and their sigmoid `[B, H, M]` float32, and a
        table like scores that holds 1 where a block is dropped and 0 elsewhere. Of equal scores,
        the leftmost are taken.
    """
    *shape, stride_m = scores.shape
    indices = torch.empty(*shape, num_selected, dtype=torch.int32, device=scores.device)
    logit = torch.empty(shape, dtype=torch.float32, device=scores.device)
    alpha = torch.empty_like(logit) if need_alpha else None
    dropped = torch.empty_like(scores, dtype=dtype)
    row = max(32, triton.next_power_of_2(num_k))
    with launch_on(scores):
        _select_top_k_kernel[(logit.numel(),)](
            scores,
            None if always is None else always.contiguous(),
            indices,
            logit,
            alpha,
            dropped,
            shape[2],
            shape[1],
            num_k,
            num_selected,
            stride_m,
            log_tail,
            ROW=row,
            # 16 elements of a row in each thread.
            num_warps=min(16, max(1, row // 512)),
        )
    return indices, logit, alpha, dropped


def block_scores(queries: Tensor, keys: Tensor, key_mean: Tensor | None) -> Tensor:
    """`queries (keys - key_mean)^T / sqrt(D)`, rows filled with -inf to a multiple of 16."""
    batch, heads, num_q, head_dim = queries.shape
    num_k, pad = keys.shape[2], padded_dim(head_dim)
    stride_m = padded_row(num_k)
    shape = batch, heads, num_q, stride_m
    scores = torch.empty(shape, dtype=torch.float32, device=queries.device)
    tile_q, tile_k = 128, 64
    with launch_on(queries):
        _scores_kernel[(-(-stride_m // tile_k), -(-num_q // tile_q), batch * heads)](
            queries.contiguous(),
            keys.contiguous(),
            None if key_mean is None else key_mean.contiguous(),
            scores,
            num_q,
            num_k,
            stride_m,
            head_dim**-0.5,
            D=head_dim,
            D_PAD=pad,
            TILE_Q=tile_q,
            TILE_K=tile_k,
            TILE_D=32,
            num_warps=8,
            num_stages=2,
        )
    return scores
