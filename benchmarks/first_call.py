"""Seconds from the first call of the operator to its result, nothing compiled before.

python benchmarks/first_call.py
python benchmarks/first_call.py --shape 75600x40x128 --sparse-dtype bf16 --warmup
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

# Before Triton is imported.
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton_cache_")

import torch

import sla_video
from sla_video.kernels.gpu_bench import Shape, gaussian_inputs


def timed(name: str, run: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    print(f"{name}: {time.perf_counter() - start:.3f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="32760x12x128", help="tokens x heads x head dim")
    parser.add_argument("--sparse-dtype", default="int8_fp8")
    parser.add_argument("--warmup", action="store_true", help="call `sla_video.warmup` before")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here")
    length, heads, head_dim = (int(part) for part in args.shape.split("x"))
    shape = Shape(length=length, heads=heads, head_dim=head_dim)
    # This also makes the CUDA context, which is not ours.
    qkv = gaussian_inputs(shape, torch.device("cuda"), torch.bfloat16)
    torch.cuda.synchronize()
    kind = {"sparse_dtype": args.sparse_dtype}
    if args.warmup:
        timed("warmup", lambda: sla_video.warmup(head_dim, heads=heads, length=length, **kind))

    def forward() -> Any:
        return sla_video.sla2_attention(*qkv, sparsity=0.97, impl="triton", **kind)

    timed("first forward", forward)
    timed("second forward", forward)
    for x in qkv:
        x.requires_grad_()
    out = timed("first forward for training", forward)
    timed("first backward", lambda: torch.autograd.grad(out, qkv, torch.ones_like(out)))


if __name__ == "__main__":
    main()
