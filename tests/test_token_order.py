"""Orders of a grid of tokens: all are permutations, and blocks of them are compact."""

from __future__ import annotations

import pytest
import torch

from sla_video.kernels.token_order import (
    axes_order,
    hilbert_order,
    inverse_order,
    morton_order,
    raster_order,
    tile_order,
)

ORDERS = {
    "raster": raster_order,
    "tile 3,5,4": lambda grid: tile_order(grid, (3, 5, 4)),
    "tile 4,4,4": lambda grid: tile_order(grid, (4, 4, 4)),
    "morton": morton_order,
    "hilbert": hilbert_order,
    **{axes: lambda grid, a=axes: axes_order(grid, a) for axes in ("htw", "wht", "hwt", "twh")},
}
GRIDS = [(1, 1, 1), (1, 1, 9), (2, 3, 1), (1, 6, 7), (5, 3, 7), (4, 4, 4), (7, 32, 32)]
WAN_480P = (21, 30, 52)


def points(order, grid):
    """[L, 3] positions (t, h, w) of the tokens in that order."""
    return torch.stack(torch.unravel_index(order, grid), dim=1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ORDERS)
def test_every_token_once_and_back(name, grid):
    order = ORDERS[name](grid)
    assert order.dtype == torch.int64
    assert order.sort().values.equal(torch.arange(grid[0] * grid[1] * grid[2]))
    tokens = torch.randn(order.numel())
    assert tokens[order][inverse_order(order)].equal(tokens)


def test_raster_is_as_it_is():
    assert raster_order((3, 4, 5)).equal(torch.arange(60))


@pytest.mark.parametrize("axes", ["thw", "twh", "htw", "hwt", "wth", "wht"])
def test_axes_run_from_the_slowest_to_the_fastest(axes):
    grid = (3, 4, 5)
    columns = points(axes_order(grid, axes), grid)[:, ["thw".index(axis) for axis in axes]]
    assert columns.tolist() == sorted(columns.tolist())


def test_tiles_are_boxes_one_after_another():
    grid, tile = (21, 30, 52), (3, 5, 4)
    blocks = points(tile_order(grid, tile), grid).unflatten(0, (-1, 60))
    low, high = blocks.amin(1), blocks.amax(1)
    assert (high - low + 1 == torch.tensor(tile)).all()
    assert (low % torch.tensor(tile) == 0).all()
    # Within a tile the width runs fastest.
    assert blocks[0, :5].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 1, 0]]


def test_tails_of_tiles_are_smaller_tiles():
    places = points(tile_order((5, 3, 4), (4, 2, 4)), (5, 3, 4)) // torch.tensor([4, 2, 4])
    tiles, counts = torch.unique_consecutive(places, dim=0, return_counts=True)
    assert tiles.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]]
    assert counts.tolist() == [32, 16, 8, 4]


@pytest.mark.parametrize("order", [morton_order, hilbert_order])
@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_curves_fill_cube_after_cube(order, side):
    places = points(order((side,) * 3), (side,) * 3)
    for inner in (2, 4, 8):
        if inner <= side:
            cubes = (places // inner).unflatten(0, (-1, inner**3))
            assert (cubes == cubes[:, :1]).all()


def test_morton_interleaves_bits():
    # From the fastest bit: w, h, t.
    places = points(morton_order((2, 2, 4)), (2, 2, 4)).tolist()
    assert places[:6] == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1]]
    assert places[8] == [0, 0, 2]


@pytest.mark.parametrize("grid", [(2, 2, 2), (8, 8, 8), (4, 8, 16), (16, 2, 32), (6, 30, 52)])
def test_hilbert_steps_from_neighbour_to_neighbour(grid):
    steps = points(hilbert_order(grid), grid).diff(dim=0).abs()
    assert (steps.sum(1) == 1).all()


@pytest.mark.parametrize("grid", [(5, 3, 7), (7, 32, 32), WAN_480P, (1, 5, 9)], ids=str)
def test_hilbert_never_jumps_on_any_grid(grid):
    steps = points(hilbert_order(grid), grid).diff(dim=0).abs()
    assert steps.amax() <= 2
    # Diagonal steps are the price of odd sizes.
    assert (steps.sum(1) > 1).float().mean() < 0.05


@pytest.mark.parametrize(
    ("name", "power"), [("raster", 0.65), ("tile 4,4,4", 0.88), ("hilbert", 0.92)]
)
def test_power_that_pooling_keeps_under_rotary_embedding(name, power):
    """Of e^(i w f), |mean over a block of 64 tokens|^2, mean over blocks and frequencies.

    Wan at 480p, head dimension 128: the width axis has 42 channels, thus 21 frequencies.
    """
    order = ORDERS[name](WAN_480P)
    width = points(order, WAN_480P)[:, 2]
    frequency = 10000.0 ** (-torch.arange(0, 42, 2, dtype=torch.float64) / 42)
    angle = width[:, None] * frequency
    blocks = torch.polar(torch.ones_like(angle), angle)[: width.numel() // 64 * 64]
    kept = blocks.unflatten(0, (-1, 64)).mean(1).abs().square().mean()
    assert float(kept) == pytest.approx(power, abs=0.005)


@pytest.mark.parametrize("grid", [(0, 3, 3), (3, 3)])
@pytest.mark.parametrize("name", ORDERS)
def test_impossible_grids_are_refused(name, grid):
    with pytest.raises(ValueError, match="a grid of tokens"):
        ORDERS[name](grid)


def test_impossible_tiles_and_axes_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        tile_order((3, 3, 3), (1, 0, 2))
    with pytest.raises(ValueError, match="t, h and w"):
        axes_order((3, 3, 3), "tth")
