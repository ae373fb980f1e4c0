"""What the order of the tokens is worth on synthetic heads at Wan's true grids, where no model is.

    python benchmarks/token_orders_structured.py --grid 21 30 52 --json orders.json
    python benchmarks/token_orders_structured.py --grid 21 45 80 --device cuda

Queries and keys are Gaussian fields that vary smoothly over frames, rows and columns, plus a
constant vector of each head, under Wan's own rotary embedding. Content that is alike draws content
that is alike; the constants, turned by the embedding, make a head look near itself, and along an
axis the more, the more of their power lies in the frequencies of that axis. Heads are drawn with
random lengths of correlation, axes and strengths, the same for all orders. Printed are means over
heads of

    oracle, pooled  share of key blocks that hold 95% of the softmax mass of a query block, the
                    blocks with most mass first, or those with the best pooled scores
    recall, rel-L1  of SLA2 without training at `--sparsity`
    worst head      pooled density against raster order's

at a few query blocks.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from sla_video.kernels.api import sla2_attention
from sla_video.kernels.measures import Losses, measure_losses
from sla_video.kernels.token_order import Grid
from sla_video.pipelines.families.rotary import rotate
from sla_video.pipelines.json_file import JsonFile
from sla_video.pipelines.token_order import make_order

ORDERS = (
    "raster", "tile:1,8,8", "tile:2,4,8", "tile:4,4,4", "tile:3,5,4", "morton", "hilbert",
    "axes:hwt", "axes:htw", "axes:twh", "axes:wht", "axes:wth",
)  # fmt: skip
HEAD_DIM = 128
BLOCK_Q, BLOCK_K = 128, 64


def smooth_field(grid: Grid, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise `[L, D]` of unit variance whose correlation falls over `lengths` tokens."""
    noise = torch.randn(*grid, HEAD_DIM, generator=generator, device=generator.device)
    spectrum = torch.fft.rfftn(noise, dim=(0, 1, 2))
    frequencies = [torch.fft.fftfreq(size) for size in grid[:2]] + [torch.fft.rfftfreq(grid[2])]
    for axis, (frequency, length) in enumerate(zip(frequencies, lengths.tolist(), strict=True)):
        gain = torch.exp(-2 * (math.pi * length * frequency) ** 2).to(noise)
        spectrum *= gain.view([-1 if place == axis else 1 for place in range(4)])
    field = torch.fft.irfftn(spectrum, s=grid, dim=(0, 1, 2))
    return (field / field.std()).flatten(0, 2)


def make_head(
    grid: Grid, generator: torch.Generator, fields: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K before the rotary embedding and V of one head, `[L, D]` each.

    `fields`: where they are drawn from, for another video of the same head.
    """
    fields = fields or generator

    def uniform(low: float, high: float, *size: int) -> Tensor:
        drawn = torch.rand(*size, generator=generator, device=generator.device)
        return low + (high - low) * drawn

    lengths = uniform(0.5, 4.0, 3)
    content = smooth_field(grid, lengths, fields)
    noise = torch.randn(content.shape, generator=fields, device=content.device)
    # Wan's split of the channels: frames, rows, columns.
    sides = [HEAD_DIM - 4 * (HEAD_DIM // 6), 2 * (HEAD_DIM // 6), 2 * (HEAD_DIM // 6)]
    power = torch.repeat_interleave(
        uniform(0.0, 1.0, 3), torch.tensor(sides, device=content.device)
    )
    constant = power * torch.randn(HEAD_DIM, generator=generator, device=content.device)
    share, place, strength = uniform(0.2, 0.8, 1), uniform(0.5, 1.5, 1), uniform(1.2, 2.2, 1)
    query = strength * (share * content + place * constant)
    key = strength * (share * content + place * constant + (1 - share) * noise)
    value = smooth_field(grid, lengths, fields)
    return query, key, value


def make_inputs(grid: Grid, heads: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V `[1, L, H, D]` in raster order, rotated."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = [make_head(grid, generator) for _ in range(heads)]
    query, key, value = (torch.stack(part, 1)[None] for part in zip(*drawn, strict=True))
    rope = WanRotaryPosEmbed(HEAD_DIM, (1, 1, 1), 1024).to(device)
    cos, sin = rope(torch.empty(1, 1, *grid, device=device))
    return *rotate(query, key, cos, sin), value


def measure(qkv: tuple[Tensor, Tensor, Tensor], sparsity: float, blocks: int) -> Losses:
    """Losses of every head, at `blocks` query blocks."""
    output, lse = sla2_attention(*qkv, sparsity=sparsity, return_lse=True)
    return measure_losses(*qkv, output, lse, block_q=BLOCK_Q, block_k=BLOCK_K, most_blocks=blocks)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", type=int, nargs=3, default=[21, 30, 52], metavar=("T", "H", "W"))
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--blocks", type=int, default=8, help="query blocks to measure")
    parser.add_argument("--orders", nargs="+", default=ORDERS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    file, grid = JsonFile(args.json), (args.grid[0], args.grid[1], args.grid[2])
    inputs = make_inputs(grid, args.heads, torch.device(args.device))
    print("| order | oracle | pooled | against raster | worst head | recall | rel-L1 |")
    print("|---|---|---|---|---|---|---|")
    rows: dict[str, dict[str, float]] = {}
    raster: Tensor | None = None
    for name in args.orders:
        order = make_order(name, grid).to(args.device)
        query, key, value = (part[:, order] for part in inputs)
        found = measure((query, key, value), args.sparsity, args.blocks)
        by_head = found.router_density.mean((0, 2))
        raster = by_head if raster is None else raster
        rows[name] = {
            "oracle": float(found.oracle_density.mean()),
            "pooled": float(by_head.mean()),
            "to_raster": float(by_head.mean() / raster.mean() - 1),
            "worst_head": float((by_head / raster).max() - 1),
            "recall": float(found.recall.mean()),
            "rel_l1": float(found.error.sum() / found.magnitude.sum()),
        }
        row = rows[name]
        print(
            f"| {name} | {row['oracle']:.3f} | {row['pooled']:.3f} | {row['to_raster']:+.1%} | "
            f"{row['worst_head']:+.1%} | {row['recall']:.3f} | {row['rel_l1']:.3f} |",
            flush=True,
        )
    file.write({"grid": grid, "heads": args.heads, "sparsity": args.sparsity, "orders": rows})


if __name__ == "__main__":
    main()
