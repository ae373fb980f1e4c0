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
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from torch import Tensor

from sla_video.kernels.options import Selection, SparseDtype

FORMATS: tuple[tuple[torch.dtype, SparseDtype], ...] = (
    (torch.bfloat16, "bf16"),
    (torch.float16, "bf16"),
    (torch.float32, "bf16"),
    (torch.bfloat16, "int8"),
    (torch.bfloat16, "int8_fp8"),
    (torch.bfloat16, "int8_int8"),
)
# With 129 tokens: one token in the last block of queries, and in that of keys.
SELECTIONS: tuple[tuple[Selection, int], ...] = (
    ("top_k", 333),
    ("top_p", 129),
    ("soft_top_k", 129),
)
# Query and key blocks of which both are no multiple of 16 in number, so that sums of states in the
# backward pass are filled up with zeros, and more than 16 of each.
LONG = 2600


class Inputs:
    """Random tensors where the kernels run."""

    def __init__(self, device: str, dry: bool) -> None:
        self.device, self.dry = device, dry

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        """The interpreter computes other types with errors of its own."""
        return torch.float32 if self.dry else wanted

    def tensor(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype(dtype))

    def within(self, length: int, head_dim: int, dtype: torch.dtype) -> Tensor:
        """`[2, L, 3, D]`: a view of a larger tensor, one token and one head in."""
        return self.tensor(2, length + 1, 4, head_dim, dtype=dtype)[:, 1:, 1:]


def run_operator(
    inputs: Inputs,
    dtype: torch.dtype,
    sparse_dtype: SparseDtype,
    head_dim: int,
    selection: Selection,
    length: int,
) -> list[Tensor]:
    """Forward, log-sum-exp and backward."""
    from sla_video.kernels.api import sla2_attention

    qkv = [inputs.within(length, head_dim, dtype).requires_grad_() for _ in range(3)]
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
    return [out, lse, *gradients]


def run_bounded(inputs: Inputs, head_dim: int) -> list[Tensor]:
    """INT8 keys without a running maximum; every other sequence has logits beyond the bound."""
    from sla_video.kernels.api import sla2_attention
    from sla_video.kernels.launch_choice import LaunchCase, trying
    from sla_video.kernels.launch_lists import LaunchConfig

    query, key, value = (inputs.within(333, head_dim, torch.bfloat16) for _ in range(3))
    query[1] *= 1000
    columns = 64 if head_dim <= 64 else 128
    case = LaunchCase("attend", "int8", query.device, query.dtype, columns, 128, 64)
    with trying({case: LaunchConfig(8, 2, bounded=True)}):
        out: Any = sla2_attention(
            query, key, value, sparsity=0.6, sparse_dtype="int8", impl="triton"
        )
    return [out]


@torch.no_grad()
def run_context(
    inputs: Inputs, dtype: torch.dtype, head_dim: int, tokens: int, masked: bool
) -> list[Tensor]:
    """Tokens outside the sequence, in inference: a kernel of their own."""
    from sla_video.kernels.api import sla2_attention

    qkv = [inputs.within(129, head_dim, dtype) for _ in range(3)]
    context = tuple(inputs.within(tokens, head_dim, dtype) for _ in range(2))
    mask = None
    if masked:
        mask = torch.arange(tokens, device=inputs.device) < torch.tensor([[1], [tokens - 3]]).to(
            inputs.device
        )
    out: Any = sla2_attention(*qkv, sparsity=0.6, impl="triton", context=context, context_mask=mask)
    return [out]


@torch.no_grad()
def run_norm_rotate(
    inputs: Inputs, dtype: torch.dtype, heads: int, head_dim: int, table_dtype: torch.dtype
) -> list[Tensor]:
    from sla_video.kernels.triton_rotary import norm_rotate

    rows = inputs.tensor(2, 38, 3, heads * head_dim, dtype=dtype)
    query, key = rows[:, 1:].unbind(2)[:2]
    weights = inputs.tensor(2, heads * head_dim, dtype=dtype)
    tables = inputs.tensor(2, 1, 37, 1, head_dim, dtype=table_dtype)
    return list(norm_rotate(query, key, *weights, *tables, heads=heads, eps=1e-6))


def cases(inputs: Inputs) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """What to run, by name."""
    for (dtype, sparse_dtype), head_dim, (selection, length) in itertools.product(
        FORMATS, (40, 128), SELECTIONS
    ):
        if dtype == torch.float32 and head_dim > 64:
            continue
        words = (dtype, sparse_dtype, head_dim, selection, length)
        run = partial(run_operator, inputs, dtype, sparse_dtype, head_dim, selection, length)
        yield " ".join(map(str, words)), run
    for dtype, head_dim in ((torch.bfloat16, 128), (torch.float16, 40)):
        if inputs.dry:
            continue
        run = partial(run_operator, inputs, dtype, "int8", head_dim, "top_k", LONG)
        yield f"{dtype} int8 {head_dim} top_k {LONG}, sums filled up", run
    for dtype, head_dim, tokens, masked in (
        (torch.bfloat16, 128, 77, False),
        (torch.bfloat16, 128, 130, True),
        (torch.float16, 40, 1, False),
        (torch.float32, 40, 33, True),
    ):
        run = partial(run_context, inputs, dtype, head_dim, tokens, masked)
        yield f"{dtype} {head_dim} context of {tokens}{', masked' if masked else ''}", run
    for dtype, heads, head_dim, table_dtype in (
        (torch.bfloat16, 12, 128, torch.float32),
        (torch.bfloat16, 40, 128, torch.bfloat16),
        (torch.float16, 5, 64, torch.float32),
        (torch.float32, 3, 24, torch.float32),
    ):
        run = partial(run_norm_rotate, inputs, dtype, heads, head_dim, table_dtype)
        yield f"{dtype} {heads} x {head_dim} norm_rotate", run
    for head_dim in (40, 128):
        yield f"int8 {head_dim} without a running maximum", partial(run_bounded, inputs, head_dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts")
    parser.add_argument(
        "--dry-run", action="store_true", help="in Triton's interpreter, on the CPU"
    )
    args = parser.parse_args()
    part, parts = (int(x) for x in args.part.split("/"))
    if args.dry_run:
        # Triton looks at its environment when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("no GPU here; --dry-run shows that the script works")
    inputs = Inputs("cpu" if args.dry_run else "cuda", args.dry_run)
    for name, run in list(cases(inputs))[part - 1 :: parts]:
        start = time.perf_counter()
        assert all(x.isfinite().all() for x in run()), name
        print(f"{name}: done in {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
