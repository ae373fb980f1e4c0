"""What the order of the tokens is worth on the embedded model, without training.

On noised held-out clips, for each order: the share of the key blocks that hold 95% of the softmax
mass of a query block, when the blocks with most mass are taken first ("oracle") and when those with
the best pooled scores are ("pooled"), as a router without training does; and at some sparsities the
relative L1 error of attention, its recall, and the relative L2 error of the velocity. All but the
last see the queries, keys and values of the dense model, at a few query blocks. Reproduce:

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

from sla_video.kernels.api import sla2_attention
from sla_video.kernels.measures import Losses, measure_losses
from sla_video.pipelines.loading import load_pipeline
from sla_video.pipelines.model_source import find_model
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.processor import SLAAttnProcessor
from sla_video.pipelines.tiny_wan.fidelity import Probe, make_probe

ORDERS = (
    "raster", "tile:1,8,8", "tile:2,4,8", "tile:4,4,4", "tile:3,5,4", "tile:7,4,4", "tile:7,3,3",
    "morton", "hilbert", "axes:hwt", "axes:htw", "axes:twh", "axes:wht", "axes:wth",
)  # fmt: skip
# Query blocks looked at in each head.
MEASURED = 7


class Watch:
    """Full attention, so that all orders see the same, which measures SLA2 beside it."""

    def __init__(self, sparsities: list[float]) -> None:
        self.found: dict[float, list[Losses]] = {sparsity: [] for sparsity in sparsities}

    def __call__(
        self, processor: SLAAttnProcessor, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        for sparsity, losses in self.found.items():
            output, lse = sla2_attention(query, key, value, sparsity=sparsity, return_lse=True)
            blocks = {name: processor.operator_options[name] for name in ("block_q", "block_k")}
            losses.append(
                measure_losses(query, key, value, output, lse, most_blocks=MEASURED, **blocks)
            )
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def measure(pipe: Any, probe: Probe, order: str, sparsities: list[float]) -> list[str]:
    """A row of the table."""
    watch = Watch(sparsities)
    with enable_sla(pipe, token_order=order) as handle, torch.no_grad():
        for processor in handle.processors.values():
            processor.attention = watch
        run(pipe, probe)
    row = [order]
    for index, (sparsity, losses) in enumerate(watch.found.items()):
        if index == 0:
            for name in ("oracle_density", "router_density"):
                row.append(f"{mean([getattr(each, name) for each in losses]):.3f}")
        with enable_sla(pipe, sparsity=sparsity, token_order=order):
            velocity = run(pipe, probe)
        wrong = (velocity - probe.velocity).norm() / probe.velocity.norm()
        rel_l1 = [each.error.sum() / each.magnitude.sum() for each in losses]
        recall = mean([each.recall for each in losses])
        row += [f"{float(wrong):.3f}", f"{mean(rel_l1):.3f}", f"{recall:.3f}"]
    return row


@torch.no_grad()
def run(pipe: Any, probe: Probe) -> Tensor:
    """The velocity, clip by clip."""
    parts = (part.split(1) for part in (probe.noisy, probe.timestep, probe.text))
    return torch.cat(
        [pipe.transformer(*inputs, return_dict=False)[0] for inputs in zip(*parts, strict=True)]
    )


def mean(values: list[Tensor]) -> float:
    """Of all elements, with the same weight for each layer."""
    return float(torch.stack([value.mean() for value in values]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1, help="held-out clips, at four noise levels")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95])
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
