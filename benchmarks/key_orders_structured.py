"""What an order of the keys for each head is worth on synthetic heads at Wan's true grids.

    python benchmarks/key_orders_structured.py --grid 21 30 52 --device cuda --json keys.json

Heads are those of `token_orders_structured.py`. In every third one, a few keys that lie scattered
hold much of the mass of all queries, as sinks of trained models do: which keys differs from video
to video, and is found again by each measuring. The gate chooses by some videos and is judged by
others; the table is that of `key_orders.py`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from key_orders import HEAD, line, summary
from token_orders_structured import HEAD_DIM, make_head
from torch import Tensor

from sla_video.calibration.capture import Capture
from sla_video.calibration.key_orders import Measures, choose_kinds, measure_call
from sla_video.config import SLAConfig
from sla_video.kernels.token_order import Grid
from sla_video.pipelines.families.rotary import rotate
from sla_video.pipelines.json_file import JsonFile
from sla_video.pipelines.token_order import make_order


def make_video(grid: Grid, heads: int, video: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Q and K `[1, L, H, D]` in raster order, rotated. Heads have the same habits in each video."""
    fields = torch.Generator(device).manual_seed(1000 + video)
    drawn = [make_head(grid, torch.Generator(device).manual_seed(h), fields) for h in range(heads)]
    query, key = (torch.stack([head[part] for head in drawn], 1)[None] for part in (0, 1))
    rope = WanRotaryPosEmbed(HEAD_DIM, (1, 1, 1), 1024).to(device)
    cos, sin = rope(torch.empty(1, 1, *grid, device=device))
    query, key = rotate(query, key, cos, sin)
    for h in range(0, heads, 3):
        habits = torch.Generator().manual_seed(100 + h)
        hot, mass = torch.rand(2, generator=habits).tolist()
        _add_hot_keys(query[0, :, h], key[0, :, h], 0.002 + 0.015 * hot, 0.3 + 0.6 * mass, fields)
    return query, key


def _add_hot_keys(
    query: Tensor, key: Tensor, share: float, mass: float, fields: torch.Generator
) -> None:
    """Give a `share` of the keys of one head about `mass` of the softmax mass of all queries."""
    hot = torch.rand(key.shape[0], generator=fields, device=key.device) < share
    towards = torch.randn(HEAD_DIM, generator=fields, device=key.device)
    towards /= towards.norm()
    # What all other keys weigh, by the logits of a few queries.
    rows = query[:: max(1, len(query) // 64)]
    spread = torch.logsumexp(rows @ key.T / HEAD_DIM**0.5, -1).mean() - math.log(len(key))
    logit = float(spread) + math.log(mass / (1 - mass) * (1 - share) / share)
    strength = max(logit, 0.0) ** 0.5 * HEAD_DIM**0.25
    query += strength * towards
    key[hot] += strength * towards


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", type=int, nargs=3, default=[21, 30, 52], metavar=("T", "H", "W"))
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--videos", type=int, default=2, help="half of them judge")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--every", type=int, default=32, help="one query block in so many")
    parser.add_argument("--orders", nargs="+", default=["raster", "tile:4,4,4", "hilbert"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    file, grid = JsonFile(args.json), (args.grid[0], args.grid[1], args.grid[2])
    device, config = torch.device(args.device), SLAConfig(sparsity=args.sparsity)
    measured: dict[str, list[Measures]] = {name: [] for name in args.orders}
    for video in range(args.videos):
        query, key = make_video(grid, args.heads, video, device)
        for name, found in measured.items():
            order = make_order(name, grid).to(device)
            call = Capture(query[:, order], key[:, order], key[:, :1])
            found.append(measure_call(call, args.sparsity, config, every=args.every))
    print(HEAD)
    rows = {}
    for name, found in measured.items():
        half = args.videos // 2
        rows[name] = summary({"heads": choose_kinds(found[:half], found[half:])})
        print(line(name, rows[name]), flush=True)
    file.write({"grid": grid, "heads": args.heads, "sparsity": args.sparsity, "rows": rows})


if __name__ == "__main__":
    main()
