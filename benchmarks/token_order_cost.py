"""What reordering the tokens of a Wan transformer costs in one forward.

One block of Wan 14B at 720p (random weights, no text to speak of) with and without an order; what
is more than in raster order is paid once, however many blocks there are. Reproduce:

    python benchmarks/token_order_cost.py                       # a GPU
    python benchmarks/token_order_cost.py --device cpu --heads 2 --latents 4 8 8 --repeats 2
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from sla_video.pipelines.patching import enable_sla

ORDERS = ("raster", "tile:3,5,4", "tile:4,4,4", "morton", "hilbert")


def build(heads: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A transformer of one block."""
    with torch.device(device):
        model: nn.Module = WanTransformer3DModel(
            num_attention_heads=heads, ffn_dim=1024, num_layers=1
        )
    model.to(dtype)
    return model.eval()


def milliseconds(model: nn.Module, inputs: dict[str, torch.Tensor], repeats: int) -> float:
    """Median of a forward."""
    device, times = inputs["hidden_states"].device, []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            model(**inputs, return_dict=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--latents", type=int, nargs=3, default=[21, 90, 160])
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    model = build(args.heads, device, dtype)
    inputs = {
        "hidden_states": torch.randn(1, 16, *args.latents, device=device, dtype=dtype),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": torch.randn(1, 8, 4096, device=device, dtype=dtype),
    }
    print("| order | ms | more than raster |\n|---|---|---|")
    raster = None
    for order in ORDERS:
        with enable_sla(model, sparsity=args.sparsity, token_order=order):
            took = milliseconds(model, inputs, args.repeats)
        raster = took if raster is None else raster
        print(f"| {order} | {took:.2f} | {took - raster:+.2f} |", flush=True)


if __name__ == "__main__":
    main()
