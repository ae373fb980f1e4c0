"""What an order of the keys for each head is worth on the embedded model.

For each layer and head: the share of the key blocks that hold 95% of the softmax mass, best pooled
scores first, in the order of the tokens, with keys sorted within segments and with hot keys peeled
off. The gate picks one for each head on some noise levels and is judged on the others. Reproduce:

    python benchmarks/key_orders.py --token-order raster hilbert
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional as F

from sla_video.config import SLAConfig
from sla_video.kernels.key_order import (
    KeyOrderKind,
    choose_key_orders,
    density_at_recall,
    key_importance,
    make_key_order,
)
from sla_video.pipelines.loading import load_pipeline
from sla_video.pipelines.model_source import find_model
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.processor import SLAAttnProcessor
from sla_video.pipelines.tiny_wan.fidelity import make_probe

# One query block in so many.
EVERY = 8


class Gate:
    """Full attention, which judges the kinds on one half of the batch and the gate on the other."""

    def __init__(self, recall: float, segment: int) -> None:
        self.settings = {"recall": recall, "every": EVERY}
        self.segment = segment
        self.chosen: list[KeyOrderKind] = []
        # Held-out densities by kind: of each layer `[H]`.
        self.densities: dict[str, list[Tensor]] = {}
        self.gated: list[Tensor] = []

    def __call__(
        self, _processor: SLAAttnProcessor, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        # Every other clip, so that both halves have high and low noise.
        kinds, known = choose_key_orders(
            query[::2], key[::2], segment=self.segment, **self.settings
        )
        importance = key_importance(query[1::2], key[1::2])
        held_out = {
            kind: density_at_recall(
                query[1::2],
                key[1::2],
                make_key_order(kind, importance, segment=self.segment),
                **self.settings,
            )
            for kind in known
        }
        for kind, density in held_out.items():
            self.densities.setdefault(kind, []).append(density)
        self.gated.append(torch.stack([held_out[kind][head] for head, kind in enumerate(kinds)]))
        self.chosen += kinds
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--token-order", nargs="+", default=["raster"])
    parser.add_argument("--clips", type=int, default=1, help="held-out clips, at four noise levels")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--segment", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    folder = find_model("tiny-wan").folder
    assert folder is not None
    device = torch.device(args.device)
    pipe = load_pipeline(folder, device=device, dtype=torch.float32, offload=False)
    probe = make_probe(pipe, clips=args.clips)
    print(
        "| token order | identity | segment sort | hot-peel | gated | where used | worst head "
        "| chosen |\n|---|---|---|---|---|---|---|---|"
    )
    for name in args.token_order:
        gate = Gate(args.recall, args.segment)
        with enable_sla(pipe, config=SLAConfig(token_order=name)) as handle, torch.no_grad():
            for processor in handle.processors.values():
                processor.attention = gate
            pipe.transformer(probe.noisy, probe.timestep, probe.text, return_dict=False)
        every = {kind: torch.stack(found) for kind, found in gate.densities.items()}
        gated = torch.stack(gate.gated)
        means = " | ".join(f"{float(density.mean()):.3f}" for density in every.values())
        ratio = (gated / every["identity"]).flatten()
        worst = float(ratio.max() - 1)
        used = torch.tensor([kind != "identity" for kind in gate.chosen])
        where_used = f"{float(ratio[used].mean() - 1):+.1%}" if used.any() else "-"
        chosen = ", ".join(f"{kind} {count}" for kind, count in Counter(gate.chosen).items())
        row = [name, means, f"{float(gated.mean()):.3f}", where_used, f"{worst:+.1%}", chosen]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
