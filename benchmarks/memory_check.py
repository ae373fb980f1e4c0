"""Every Triton kernel on small problems with tails, to be run under the GPU's memory checker.

    compute-sanitizer --tool memcheck --leak-check no python benchmarks/memory_check.py

`--part 2/8` runs every eighth case from the second on, which fills Triton's cache in parallel:
compiling is slow under the checker. Without caching of memory by PyTorch, reads past the end of
a tensor show.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from sla_video.kernels.options import Selection, SparseDtype

FORMATS: tuple[tuple[torch.dtype, SparseDtype], ...] = (
    (torch.bfloat16, "bf16"),
    (torch.float16, "bf16"),
    (torch.float32, "bf16"),
    (torch.bfloat16, "int8"),
    (torch.bfloat16, "int8_fp8"),
    (torch.bfloat16, "int8_int8"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts")
    parser.add_argument(
        "--dry-run", action="store_true", help="in Triton's interpreter, on the CPU"
    )
    args = parser.parse_args()
    part, parts = (int(x) for x in args.part.split("/"))
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("no GPU here; --dry-run shows that the script works")
    device = "cpu" if args.dry_run else "cuda"
    # Triton looks at its environment when it is imported.
    from sla_video.kernels.api import sla2_attention
    from sla_video.kernels.triton_rotary import norm_rotate

    selections: tuple[tuple[Selection, int], ...] = (
        ("top_k", 333),
        ("top_p", 129),
        ("soft_top_k", 129),
    )
    cases = list(itertools.product(FORMATS, (40, 128), selections))
    for (dtype, sparse_dtype), head_dim, (selection, length) in cases[part - 1 :: parts]:
        if dtype == torch.float32 and head_dim > 64:
            continue
        # The interpreter computes other types with errors of its own.
        dtype = torch.float32 if args.dry_run else dtype
        # Views of a larger tensor, one token and one head in.
        shape = (2, length + 1, 4, head_dim)
        leaves = [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)]
        qkv = [x[:, 1:, 1:].requires_grad_() for x in leaves]
        found: Any = sla2_attention(
            *qkv,
            sparsity=0.6,
            sparse_dtype=sparse_dtype,
            selection=selection,
            impl="triton",
            return_lse=True,
        )
        out, lse = found
        gradients = torch.autograd.grad(out.float().square().sum() + lse.sum(), qkv)
        assert all(x.isfinite().all() for x in (out, lse, *gradients))
        print(dtype, sparse_dtype, head_dim, selection, length, "done", flush=True)
    if part > 1:
        return
    for dtype, heads, head_dim in ((torch.bfloat16, 12, 128), (torch.float32, 3, 24)):
        rows = torch.randn(2, 38, 3, heads * head_dim, device=device).to(
            torch.float32 if args.dry_run else dtype
        )
        query, key = rows[:, 1:].unbind(2)[:2]
        weights = torch.randn(2, heads * head_dim, device=device, dtype=rows.dtype)
        tables = torch.randn(2, 1, 37, 1, head_dim, device=device)
        turned = norm_rotate(query, key, *weights, *tables, heads=heads, eps=1e-6)
        assert all(x.isfinite().all() for x in turned)
        print(dtype, heads, head_dim, "norm_rotate done", flush=True)


if __name__ == "__main__":
    main()
