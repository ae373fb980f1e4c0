"""What an order of the keys for each head costs: to measure it, and to attend in it.

At the shape of Wan 14B at 720p, with half of the heads sorted in segments, a quarter with hot keys
in front and a quarter as they are; that is more than a gate leaves. Beside it dense attention, SLA2
without an order, and SLA2 on copies of K and V in the new order. A correctness check comes first.

    python benchmarks/key_order_cost.py --json key_order_cost.json
    python benchmarks/key_order_cost.py --dry-run                    # anywhere, at a toy size
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

TOLERANCE = {"bf16": 0.01, "int8": 0.03, "int8_fp8": 0.08}
# Of a kernel that reads elsewhere, and may add in another order.
SAME = 2e-3
MEASURE = "measuring the order"


def layer_order(heads: int, sparsity: float) -> Any:
    """The orders of a layer, measured in each call."""
    from sla_video.config import SLAConfig
    from sla_video.pipelines.key_order import LayerKeyOrder
    from sla_video.pipelines.pipeline_steps import PipelineSteps

    kinds = [("segment_sort", "hot_peel", "segment_sort", "identity")[h % 4] for h in range(heads)]
    settings = SLAConfig(key_order_refresh=1)
    return LayerKeyOrder(tuple(kinds), settings, sparsity, PipelineSteps())


def check(device: torch.device, dtype: torch.dtype, sparse_dtype: Any, length: int) -> float:
    """Relative error against the `torch` implementation, with an order that matters."""
    from sla_video.kernels.api import sla2_attention
    from sla_video.kernels.gpu_bench import Shape, gaussian_inputs
    from sla_video.kernels.key_places import take_tokens

    query, key, value = gaussian_inputs(Shape(length=length, heads=4, head_dim=128), device, dtype)
    # Keys that many queries want, scattered.
    key[:, :: length // 40] *= 3
    order = layer_order(4, 0.5)(query, key)
    settings = {"sparsity": 0.5, "sparse_dtype": sparse_dtype, "key_order": order}
    out = sla2_attention(query, key, value, impl="triton", **settings)
    wanted = sla2_attention(query, key, value, impl="torch", **settings)
    error = float((out.float() - wanted.float()).norm() / wanted.float().norm())
    if not error <= TOLERANCE[sparse_dtype]:
        raise SystemExit(f"{sparse_dtype}: error {error:.4f} to impl='torch': not worth timing")
    if any(int(x) for x in order.always):
        order = order._replace(always=torch.zeros_like(order.always))
    found = sla2_attention(query, key, value, impl="triton", **{**settings, "key_order": order})
    moved = (take_tokens(x, order.places) for x in (key, value))
    copied = sla2_attention(query, *moved, sparsity=0.5, sparse_dtype=sparse_dtype, impl="triton")
    apart = float((found.float() - copied.float()).norm() / copied.float().norm())
    if not apart <= SAME:
        raise SystemExit(f"{sparse_dtype}: {apart:.4f} from what copies of K and V give")
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="75600x40x128", help="tokens x heads x head dim")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--sparse-dtype", nargs="+", default=["int8_fp8", "int8", "bf16"])
    parser.add_argument("--refresh", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each table")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    from sla_video.kernels.api import sla2_attention
    from sla_video.kernels.gpu_bench import Shape, gaussian_inputs
    from sla_video.kernels.gpu_timing import CUDNN, dense_runs, time_runs
    from sla_video.kernels.key_order import key_importance, make_key_order
    from sla_video.kernels.key_places import take_tokens

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = "300x4x128" if args.dry_run else args.shape
    length, heads, head_dim = (int(part) for part in shape.split("x"))
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "shape": shape,
        "sparsity": args.sparsity,
        "refresh": args.refresh,
        "errors": {},
        "tables": {},
    }
    for sparse_dtype in args.sparse_dtype:
        error = check(device, dtype, sparse_dtype, 300 if args.dry_run else 3000)
        report["errors"][sparse_dtype] = error
        print(f"{sparse_dtype}: error to impl='torch' {error:.4f}", flush=True)

    size = Shape(length=length, heads=heads, head_dim=head_dim)
    query, key, value = qkv = gaussian_inputs(size, device, dtype)
    layer = layer_order(heads, args.sparsity)
    order = layer(query, key)
    importance = key_importance(query, key)
    for sparse_dtype in args.sparse_dtype:
        settings = {"sparsity": args.sparsity, "sparse_dtype": sparse_dtype, "impl": "triton"}

        def operator(settings: Any = settings, **more: Any) -> Any:
            return sla2_attention(query, key, value, **settings, **more)

        def on_copies(settings: Any = settings) -> Any:
            moved = (take_tokens(x, order.places) for x in (key, value))
            return sla2_attention(query, *moved, **settings)

        runs: Any = {
            "SLA2": operator,
            "SLA2, order given": lambda run=operator: run(key_order=order),
            "SLA2, order measured": lambda run=operator: run(key_order=layer(query, key)),
            "SLA2 on copies": on_copies,
            MEASURE: lambda: layer(query, key),
            "  importance, all heads": lambda: key_importance(query, key),
            "  segment sort, all heads": lambda: make_key_order("segment_sort", importance),
            "  hot peel, all heads": lambda: make_key_order("hot_peel", importance),
        }
        runs = {(name, args.sparsity): run for name, run in runs.items()}
        if device.type == "cuda":
            dense = dense_runs(qkv)
            runs = {(CUDNN, None): dense[CUDNN, None], **runs}
        repeats = 1 if args.dry_run else None
        with torch.no_grad():
            rows = time_runs(runs, "forward", device, repeats=repeats, seconds=args.seconds)
        times = {row.attention: row.milliseconds for row in rows}
        for row in rows:
            if row.note:
                print(f"{row.attention}: {row.note}")
        base = times.get(CUDNN) or times["SLA2"]
        assert base is not None
        print(f"\n{sparse_dtype}, {shape}, sparsity {args.sparsity}")
        print("| | ms | share of dense |\n|---|---|---|")
        for name, took in times.items():
            if took is not None:
                print(f"| {name} | {took:.2f} | {took / base:.1%} |")
        plain, given, anew = (
            times[f"SLA2{what}"] for what in ("", ", order given", ", order measured")
        )
        if plain and given and anew:
            mean = (anew - given) / args.refresh + given - plain
            print(
                f"more than SLA2: {anew - plain:+.2f} ms measured in each step "
                f"({(anew - plain) / base:.1%} of dense), {mean:+.2f} ms in one of {args.refresh} "
                f"({mean / base:.1%})",
                flush=True,
            )
        report["tables"][sparse_dtype] = times
    if device.type == "cuda":
        report["peak_bytes"] = torch.cuda.max_memory_allocated()
    if args.json is not None:
        args.json.write_text(json.dumps({"arguments": sys.argv[1:], **report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
