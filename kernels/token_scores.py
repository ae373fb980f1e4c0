"""Which tokens attention can do without (after Token Sparse Attention, arXiv 2602.03216).

A token's score is the softmax weight that probe queries give its key. Language models probe with
the last queries; video attention has no last query, so probes are spread over the grid (T, H, W).
Few probes tell neighbours apart badly: scores are averaged over the 3 x 3 x 3 tokens around each.
The first latent frame, which carries the layout, and every other token along each axis (1 in 8, so
that every dropped token has a kept neighbour) are always kept.

Tokens may be in another order than raster: `order` `[L]` is the raster place of each, as
`token_order` makes it. Nothing here waits for the device. Letters: B batch, H heads, L tokens, D
head dimension.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.kernels.key_order import key_importance
from sla_video.kernels.token_order import Grid, inverse_order

# Kept counts are multiples of it: whole blocks of queries, and few different shapes.
COUNT_MULTIPLE = 128
# Weights of probes that are held at a time, in elements: 256 MiB in float32.
_WEIGHT_ELEMENTS = 64 * 2**20
# Reciprocal powers of the root of x^4 = x + 1, whose multiples fill a cube evenly (R3 sequence).
_STEPS = (0.8191725133961645, 0.6710436067037893, 0.5497004779019703)


def probe_places(grid: Grid, probes: int) -> Tensor:
    """Raster places `[P]` of at most `probes` tokens, evenly spread along all axes at once.

    Equal strides in raster order would meet the same few columns in every row.
    """
    _check_grid(grid)
    if probes < 1:
        raise ValueError(f"`probes` must be at least 1, got {probes}")
    if math.prod(grid) <= probes:
        return torch.arange(math.prod(grid))
    # [P, 3], in [0, 1)
    points = (torch.arange(probes, dtype=torch.float64)[:, None] + 0.5) * torch.tensor(
        _STEPS, dtype=torch.float64
    )
    t, h, w = ((points % 1) * torch.tensor(grid)).long().unbind(1)
    return (t * grid[1] + h) * grid[2] + w


def always_kept(grid: Grid) -> Tensor:
    """True `[L]`, in raster order, on the first frame and on the even places of all axes."""
    _check_grid(grid)
    kept = torch.zeros(grid, dtype=torch.bool)
    kept[0] = True
    kept[::2, ::2, ::2] = True
    return kept.flatten()


@torch.no_grad()
def token_scores(
    query: Tensor, key: Tensor, grid: Grid, *, order: Tensor | None = None, probes: int = 128
) -> Tensor:
    """Score `[B, H, L]` of each token, in the order of the tokens; sums to 1 over them.

    Args:
        query, key: `[B, L, H, D]`, rotated.
        grid: (T, H, W) with L tokens.
        order: `[L]` raster place of each token; None is raster order.

    Raises:
        ValueError: a grid or an order of another length.
    """
    batch, length = query.shape[:2]
    _check_length(length, grid, order)
    rows = _probes_on(grid, probes, str(query.device))
    if order is not None:
        rows = inverse_order(order.to(query.device))[rows]
    group = max(1, _WEIGHT_ELEMENTS // (batch * length * rows.numel()))
    parts = [
        key_importance(q, k, rows=rows)
        for q, k in zip(query.split(group, 2), key.split(group, 2), strict=True)
    ]
    return pool_scores(torch.cat(parts, 1), grid, order=order)


def pool_scores(scores: Tensor, grid: Grid, *, order: Tensor | None = None) -> Tensor:
    """Mean of scores `[B, H, L]` over the 3 x 3 x 3 tokens around each, made to sum to 1.

    At the ends of the grid the mean is over the tokens that are there.
    """
    _check_length(scores.shape[-1], grid, order)
    if order is not None:
        scores = scores[..., inverse_order(order.to(scores.device))]
    # A mean over a box is one of means over lines; `avg_pool3d` refuses grids smaller than its box.
    pooled = scores.unflatten(-1, grid)
    for axis in (-3, -2, -1):
        pooled = _mean_of_three(pooled.movedim(axis, -1)).movedim(-1, axis)
    pooled = pooled.flatten(-3)
    if order is not None:
        pooled = pooled[..., order.to(scores.device)]
    normed: Tensor = pooled / pooled.sum(-1, keepdim=True)
    return normed


def rank_tokens(scores: Tensor, always: Tensor) -> Tensor:
    """Tokens `[B, H, L]` from the first to keep to the first to drop.

    Args:
        scores: `[B, H, L]`.
        always: `[L]`, True on tokens that rank before all others.
    """
    ranked: Tensor = scores.masked_fill(always.to(scores.device), torch.inf)
    return ranked.argsort(dim=-1, descending=True, stable=True)


def coverage_count(scores: Tensor, ranking: Tensor, always: Tensor, tau: float) -> Tensor:
    """Dynamic Token Coverage: how many tokens to keep, a scalar on the device.

    The same number in every head: the fewest at which the scores of what each head drops, its
    lowest, sum to at most `tau` in the mean over heads and batch. Rounded up to
    `COUNT_MULTIPLE`, at most L, and never less than `always`.

    Args:
        scores: `[B, H, L]`, each row sums to 1.
        ranking: of `rank_tokens`.
        always: `[L]`.
        tau: largest mass to drop, in [0, 1).
    """
    _check_share("tau", tau, within=0 <= tau < 1, interval="[0, 1)")
    # Mean scores from the first to drop on: [L].
    rising = scores.gather(-1, ranking).double().mean((0, 1)).flip(0)
    dropped = (rising.cumsum(0) <= tau).sum()
    kept = scores.shape[-1] - dropped
    return _rounded(kept.maximum(always.sum().to(kept.device)), scores.shape[-1])


def share_count(length: int, always: int, share: float) -> int:
    """How many of `length` tokens to keep for a `share` of them in (0, 1]; rounded as above."""
    _check_share("share", share, within=0 < share <= 1, interval="(0, 1]")
    # What a product of floats is off a whole number is not another token.
    count = max(math.ceil(share * length - 1e-6), always)
    return min(-(-count // COUNT_MULTIPLE) * COUNT_MULTIPLE, length)


def _mean_of_three(x: Tensor) -> Tensor:
    """Of each number of the last axis and those beside it."""
    size = x.shape[-1]
    total = F.pad(x, (1, 1)).unfold(-1, 3, 1).sum(-1)
    around = torch.full((size,), 3.0, dtype=x.dtype, device=x.device)
    around[0] -= 1
    around[-1] -= 1
    return total / around


def _rounded(count: Tensor, length: int) -> Tensor:
    return ((count + COUNT_MULTIPLE - 1) // COUNT_MULTIPLE * COUNT_MULTIPLE).clamp(max=length)


def _check_share(name: str, value: float, *, within: bool, interval: str) -> None:
    if not within:
        raise ValueError(f"`{name}` must be in {interval}, got {value}")


def _check_grid(grid: Grid) -> None:
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"a grid of tokens is (T, H, W) of at least 1 each, got {tuple(grid)}")


def _check_length(length: int, grid: Grid, order: Tensor | None) -> None:
    _check_grid(grid)
    if math.prod(grid) != length or (order is not None and order.shape != (length,)):
        listed = "" if order is None else f" and an order of {list(order.shape)}"
        raise ValueError(f"{length} tokens do not fit a grid of {tuple(grid)}{listed}")


# Made once, since a copy from the host to the device may have to wait for it.
@functools.lru_cache(maxsize=16)
def _probes_on(grid: Grid, probes: int, device: str) -> Tensor:
    # A tensor made in inference mode could never be used in training.
    with torch.inference_mode(False):
        return probe_places(grid, probes).to(device)


@functools.lru_cache(maxsize=16)
def always_kept_on(grid: Grid, device: str) -> Tensor:
    """`always_kept` on a device, kept from call to call."""
    with torch.inference_mode(False):
        return always_kept(grid).to(device)
