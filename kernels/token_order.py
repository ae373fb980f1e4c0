"""Orders of the tokens of a video, whose grid is (T, H, W), as permutations.

Attention does not care: with keys and values in any order, and queries in any other, each query
gets the same output. Blocks do care. A block is a run of tokens, and one that is compact in space
and time has tokens that are alike, so that important keys lie in fewer blocks, and the mean of a
block says more about its tokens. PBS-Attn, arXiv 2510.21270.

An order is an int64 tensor `[L]`, L = T H W: `tokens[order]` are the tokens in that order, and
`order[i]` is the place of the i-th of them in raster order, where the width runs fastest.
"""

from __future__ import annotations

import torch

from sla_video.kernels.hilbert import hilbert_points

Grid = tuple[int, int, int]


def raster_order(grid: Grid) -> torch.Tensor:
    """As Diffusers has them: frame by frame, row by row."""
    return axes_order(grid, "thw")


def axes_order(grid: Grid, axes: str) -> torch.Tensor:
    """Line by line along other axes: `axes` names them from the slowest to the fastest.

    "thw" is raster order; in "hwt" all frames of one place follow each other.

    Raises:
        ValueError: `axes` is no permutation of "thw".
    """
    if sorted(axes) != sorted("thw"):
        raise ValueError(f"`axes` must be the letters t, h and w in some order, got {axes!r}")
    return _places(grid).permute(*("thw".index(axis) for axis in axes)).flatten()


def tile_order(grid: Grid, tile: Grid) -> torch.Tensor:
    """Tile by tile of `tile` = (t, h, w) tokens, in raster order within and without.

    Tiles at the far ends of the grid are smaller where `tile` does not divide it.
    """
    if min(tile) < 1:
        raise ValueError(f"`tile` must hold at least one token along each axis, got {tile}")
    order = [
        box.flatten()
        for frames in _places(grid).split(tile[0], dim=0)
        for rows in frames.split(tile[1], dim=1)
        for box in rows.split(tile[2], dim=2)
    ]
    return torch.cat(order)


def morton_order(grid: Grid) -> torch.Tensor:
    """Morton order (Z-order): by the interleaved bits of the three positions."""
    _check(grid)
    positions = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    code = torch.zeros(grid, dtype=torch.int64)
    for bit in range(max(grid).bit_length()):
        for axis, position in enumerate(positions):
            code |= (position >> bit & 1) << (3 * bit + 2 - axis)
    return code.flatten().argsort()


def hilbert_order(grid: Grid) -> torch.Tensor:
    """Along a generalised Hilbert curve, of which neighbours are neighbours in the video."""
    _check(grid)
    # [L, 3]
    points = torch.tensor(list(hilbert_points(grid)), dtype=torch.int64)
    t, h, w = points.unbind(1)
    return (t * grid[1] + h) * grid[2] + w


def inverse_order(order: torch.Tensor) -> torch.Tensor:
    """The order that undoes `order`: `tokens[order][inverse_order(order)]` is `tokens`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


def _places(grid: Grid) -> torch.Tensor:
    """`[T, H, W]` of each token's place in raster order."""
    _check(grid)
    return torch.arange(grid[0] * grid[1] * grid[2]).view(grid)


def _check(grid: Grid) -> None:
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"a grid of tokens is (T, H, W) of at least 1 each, got {tuple(grid)}")
