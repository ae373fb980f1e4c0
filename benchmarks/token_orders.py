"""What the order of the tokens is worth on the embedded model, without training.

For each order: the error of the velocity and of attention and the exact recall at some sparsities,
on noised held-out clips; and the share of the key blocks that hold 95% of the softmax mass of a
query block, when the blocks with most mass are taken first ("oracle") and when those with the best
pooled scores are ("pooled"), as a router without training does. Reproduce:

    python benchmarks/token_orders.py --clips 1 --sparsity 0.9 0.95
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sla_video.config import SLAConfig
from sla_video.pipelines.loading import load_pipeline
from sla_video.pipelines.model_source import find_model
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.processor import SLAAttnProcessor
from sla_video.pipelines.tiny_wan.fidelity import make_probe, measure_fidelity

ORDERS = (
    "raster", "tile:1,8,8", "tile:2,4,8", "tile:4,4,4", "tile:3,5,4", "tile:7,4,4", "tile:7,3,3",
    "morton", "hilbert", "axes:hwt", "axes:htw", "axes:twh", "axes:wht", "axes:wth",
)  # fmt: skip
MASS = 0.95
# Query blocks looked at in each head: every eighth.
STRIDE = 8


class Densities:
    """Full attention, so that all orders see the same, which notes the densities on the way."""

    def __init__(self, config: SLAConfig) -> None:
        self.block_q, self.block_k = config.block_q, config.block_k
        self.found: dict[str, list[Tensor]] = {"oracle": [], "pooled": []}

    def __call__(
        self, _processor: SLAAttnProcessor, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        for q, k in zip(query.transpose(1, 2), key.transpose(1, 2), strict=True):
            for name, density in block_densities(q, k, self.block_q, self.block_k).items():
                self.found[name].append(density)
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def mean(self, name: str) -> float:
        return float(torch.stack(self.found[name]).mean())


def block_densities(query: Tensor, key: Tensor, block_q: int, block_k: int) -> dict[str, Tensor]:
    """Share of the key blocks that hold `MASS`, mean over query blocks, of `[H, L, D]`: `[H]`."""
    rows = torch.stack([part.mean(1) for part in query.split(block_q, 1)[::STRIDE]], 1)
    smooth = key - key.mean(1, keepdim=True)
    pooled_key = torch.stack([part.mean(1) for part in smooth.split(block_k, 1)], 1)
    scale = query.shape[-1] ** -0.5
    # [H, M, N]
    scores = rows @ pooled_key.transpose(1, 2) * scale
    masses = []
    for part in query.split(block_q, 1)[::STRIDE]:
        weights = torch.softmax(part @ smooth.transpose(1, 2) * scale, -1).mean(1)
        masses.append(torch.stack([run.sum(-1) for run in weights.split(block_k, -1)], -1))
    mass = torch.stack(masses, 1)
    found = {}
    for name, by in (("oracle", mass), ("pooled", scores)):
        kept = mass.gather(-1, by.argsort(-1, descending=True)).cumsum(-1)
        found[name] = ((kept < MASS).sum(-1) + 1).float().mean(-1) / mass.shape[-1]
    return found


def measure(pipe: Any, probe: Any, order: str, sparsities: list[float]) -> list[str]:
    """A row of the table."""
    row = [order]
    config = SLAConfig(token_order=order)
    with enable_sla(pipe, config=config) as handle, torch.no_grad():
        densities = Densities(config)
        for processor in handle.processors.values():
            processor.attention = densities
        pipe.transformer(probe.noisy, probe.timestep, probe.text, return_dict=False)
    row += [f"{densities.mean(name):.3f}" for name in ("oracle", "pooled")]
    for sparsity in sparsities:
        with enable_sla(pipe, config=config, sparsity=sparsity) as handle:
            found = measure_fidelity(pipe, handle, probe)
        row += [f"{found[k]:.3f}" for k in ("velocity_error", "attention_rel_l1", "recall")]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1, help="held-out clips, at four noise levels")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.9, 0.95])
    parser.add_argument("--orders", nargs="+", default=ORDERS)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    folder = find_model("tiny-wan").folder
    assert folder is not None
    pipe = load_pipeline(folder, device=device, dtype=torch.float32, offload=False)
    probe = make_probe(pipe, clips=args.clips)
    head = ["order", "density, oracle", "density, pooled"]
    for sparsity in args.sparsity:
        head += [f"{sparsity:g}: velocity error", "attention rel. L1", "recall"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for order in args.orders:
        start = time.perf_counter()
        row = measure(pipe, probe, order, args.sparsity)
        print(f"| {' | '.join(row)} |", flush=True)
        print(f"{order}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
