"""What an order of the keys for each head is worth on the embedded model.

For each layer and head: the share of the key blocks that hold 95% of the softmax mass, best pooled
scores first, with keys in place, sorted within segments and with hot keys peeled off. The gate
picks one for each head on some prompts and is judged on others, while the dense pipeline denoises
them. Reproduce:

    python benchmarks/key_orders.py --token-order raster hilbert tile:4,4,4
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from sla_video.calibration.key_orders import LayerChoice, measure_model
from sla_video.config import SLAConfig
from sla_video.pipelines.loading import load_pipeline
from sla_video.pipelines.model_source import find_model
from sla_video.pipelines.router_files import load_routers
from sla_video.pipelines.tiny_wan.evaluate import held_out_prompts


def summary(found: dict[str, LayerChoice]) -> dict[str, Any]:
    """Means over heads of what held-out calls need."""
    in_place = torch.cat([layer.in_place for layer in found.values()]).cpu()
    gated = torch.cat([layer.density for layer in found.values()]).cpu()
    kinds = [kind for layer in found.values() for kind in layer.kinds]
    used = torch.tensor([kind != "identity" for kind in kinds])
    ratio = gated / in_place - 1
    return {
        "in_place": float(in_place.mean()),
        "gated": float(gated.mean()),
        "where_used": float(ratio[used].mean()) if used.any() else None,
        "worst_head": float(ratio.max()),
        "dropped": sum(layer.dropped for layer in found.values()),
        "kinds": dict(Counter(kinds)),
        "layers": {name: layer.kinds for name, layer in found.items()},
    }


HEAD = (
    "| token order | in place | gated | where used | worst head | dropped | kinds |\n"
    "|---|---|---|---|---|---|---|"
)


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    where_used = "-" if row["where_used"] is None else f"{row['where_used']:+.1%}"
    kinds = ", ".join(f"{kind} {count}" for kind, count in row["kinds"].items())
    return (
        f"| {name} | {row['in_place']:.3f} | {row['gated']:.3f} | {where_used} "
        f"| {row['worst_head']:+.1%} | {row['dropped']} | {kinds} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--token-order", nargs="+", default=["raster"])
    parser.add_argument("--prompts", type=int, default=4, help="half of them judge")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps")
    parser.add_argument("--capture-steps", type=int, default=2, help="looked at, of each prompt")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--every", type=int, default=8, help="one query block in so many")
    parser.add_argument("--routers", help="folder of trained routers; default: none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    source = find_model("tiny-wan")
    assert source.folder is not None
    device = torch.device(args.device)
    pipe = load_pipeline(source.folder, device=device, dtype=torch.float32, offload=False)
    routers = None if args.routers is None else load_routers(args.routers).routers
    _, prompts = held_out_prompts(args.prompts)
    rows = {}
    print(HEAD)
    for name in args.token_order:
        start = time.perf_counter()
        found = measure_model(
            pipe,
            prompts,
            frames=source.defaults.frames,
            height=source.defaults.height,
            width=source.defaults.width,
            denoising_steps=args.steps,
            guidance_scale=source.defaults.guidance_scale,
            max_sequence_length=source.defaults.max_sequence_length,
            config=SLAConfig(token_order=name, sparsity=args.sparsity),
            routers=routers,
            held_out=args.prompts // 2,
            capture_steps=args.capture_steps,
            every=args.every,
        )
        row = rows[name] = summary(found)
        print(line(name, row), flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if args.json is not None:
        args.json.write_text(json.dumps({"arguments": sys.argv[1:], "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
