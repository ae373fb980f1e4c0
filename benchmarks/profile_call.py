"""The kernels of one call of the operator on a GPU, one by one, in a CUDA graph.

    python benchmarks/profile_call.py
    python benchmarks/profile_call.py --shape 75600x40x128 --sparse-dtype bf16 --sparsity 0.9

Prints start, gap and duration of each kernel in microseconds, and the median of the whole, replayed
from the graph and called from Python.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor
from triton.testing import do_bench

from sla_video.kernels.api import sla2_attention
from sla_video.kernels.gpu_bench import Shape, gaussian_inputs

REPLAYS = 4


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="32760x12x128", help="tokens x heads x head dim")
    parser.add_argument("--sparse-dtype", default="int8_fp8")
    parser.add_argument("--sparsity", type=float, default=0.97)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here")
    length, heads, head_dim = (int(part) for part in args.shape.split("x"))
    shape = Shape(length=length, heads=heads, head_dim=head_dim)
    qkv = gaussian_inputs(shape, torch.device("cuda"), torch.bfloat16)

    def run() -> Tensor | tuple[Tensor, Tensor]:
        return sla2_attention(
            *qkv, sparsity=args.sparsity, sparse_dtype=args.sparse_dtype, impl="triton"
        )

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    # The last replay.
    events = events[-(len(events) // REPLAYS) :]
    first = end = events[0].time_range.start
    for event in events:
        start = event.time_range.start
        print(f"+{start - first:9.1f}  gap {start - end:6.1f}", end="")
        print(f"  takes {event.time_range.elapsed_us():9.1f}  {event.name[:70]}")
        end = event.time_range.end
    replayed = do_bench(graph.replay, warmup=30, rep=100, return_mode="median")
    called = do_bench(run, warmup=30, rep=100, return_mode="median")
    print(f"replayed {replayed:.3f} ms, called {called:.3f} ms")


if __name__ == "__main__":
    main()
