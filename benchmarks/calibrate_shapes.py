"""Time stage 1 of calibration at the shapes of a real model, without its weights.

    python benchmarks/calibrate_shapes.py                       # Wan 1.3B at 480p, on a GPU
    python benchmarks/calibrate_shapes.py --length 2048 --heads 2 --calls 3 --steps 20  # a dry run

Q, K and V are random but structured: keys drift from block to block, so that blocks differ as they
do in videos. One layer is fitted; a model has `--layers` of them. Prints one line of JSON: seconds
for the tables, the fits and the judging, peak memory, and all layers together. Capturing takes what
the dense pipeline takes for `--calls` / 4 prompts and is not part of it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

import torch

from sla_video.calibration.capture import Capture
from sla_video.calibration.fit import fit_layer
from sla_video.calibration.fit_options import FitOptions
from sla_video.calibration.layer_data import LayerData, judge
from sla_video.config import SLAConfig


def structured_call(args: argparse.Namespace, seed: int, dtype: torch.dtype) -> Capture:
    """Tokens whose mean walks along the sequence, `[1, L, H, D]`, in host memory."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, args.length, args.heads, args.head_dim)
    steps = -(-args.length // 256)

    def drifting(scale: float) -> torch.Tensor:
        walk = torch.randn(1, steps, args.heads, args.head_dim, generator=generator)
        drift = walk.repeat_interleave(256, 1)[:, : args.length]
        return (torch.randn(shape, generator=generator) + scale * drift).to(dtype)

    return Capture(drifting(1.0), drifting(1.0), drifting(0.5))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=32760)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--calls", type=int, default=16, help="captured, the last 4 held out")
    parser.add_argument("--steps", type=int, default=FitOptions().steps)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95, 0.97])
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    options = FitOptions(steps=args.steps)
    if on_gpu:
        free = torch.cuda.mem_get_info()[0]
        options = FitOptions(steps=args.steps, table_memory=free // 2)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    calls = [structured_call(args, seed, dtype) for seed in range(args.calls)]

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    held_out = min(4, args.calls - 1)
    start = now()
    data = LayerData(
        calls, held_out=held_out, config=SLAConfig(), options=options, device=device, seed=0
    )
    seconds = {"tables": now() - start}
    start = now()
    judge(data, None, args.sparsity[0])
    seconds["judge"] = now() - start
    fits = []
    for sparsity in args.sparsity:
        start = now()
        fits.append(fit_layer(data, sparsity, options, device=device))
        seconds[f"fit {sparsity:g}"] = now() - start
    of_layer = seconds["tables"] + sum(v for k, v in seconds.items() if k.startswith("fit"))
    report = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "shape": [args.length, args.heads, args.head_dim],
        "calls": args.calls,
        "steps": args.steps,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "table_gib": round(data.table_bytes / 2**30, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "minutes_all_layers": round(of_layer * args.layers / 60, 2),
        "fits": [
            {
                "sparsity": fit.sparsity,
                "chosen": fit.chosen,
                "before": asdict(fit.before),
                "after": asdict(fit.after),
            }
            for fit in fits
        ],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
