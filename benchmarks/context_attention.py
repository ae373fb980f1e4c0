"""What attention to video and text costs: SLA2 with a context against dense attention to both.

    python benchmarks/context_attention.py --json context.json
    python benchmarks/context_attention.py --dry-run

The shape is HunyuanVideo's, 129 frames of 720 x 1280 with 256 tokens of text. A correctness check
comes first, on a short sequence against the float64 reference. Times are medians in milliseconds of
one call, contestants taking turns. "kernel" and "plain" are the two ways to mix the context in, of
inference and of training; "text queries" is the dense part that a joint model adds. `--dry-run`
runs everything once at a toy size, on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens of video x heads x head dim x tokens of text.
SHAPE = "118800x24x128x256"
# Of attention in bfloat16.
TOLERANCE = 0.01


def inputs(text: str, device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Query, key, value of the video and of the text, and a mask that hides a third of the text."""
    length, heads, head_dim, count = (int(part) for part in text.split("x"))
    generator = torch.Generator(device).manual_seed(0)

    def three(tokens: int) -> list[Tensor]:
        shape = (1, tokens, heads, head_dim)
        return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3)]

    mask = torch.arange(count, device=device)[None] < count - count // 3
    return three(length), three(count), mask


def check(device: str, dtype: torch.dtype, impl: Any, sparsity: float) -> float:
    """Relative error of a short problem; SystemExit if it is too large."""
    from sla_video.kernels.api import sla2_attention

    video, text, mask = inputs("1500x2x128x100", device, dtype)
    settings = {"sparsity": sparsity, "context_mask": mask}
    got = sla2_attention(*video, context=tuple(text[1:]), impl=impl, **settings)
    exact = [x.double() for x in video]
    context = tuple(x.double() for x in text[1:])
    wanted = sla2_attention(*exact, context=context, impl="reference", **settings)
    assert isinstance(got, Tensor) and isinstance(wanted, Tensor)
    error = ((got - wanted).norm() / wanted.norm()).item()
    if not error <= TOLERANCE:
        sys.exit(f"context_attention: relative error {error:.1e}, allowed {TOLERANCE}")
    return error


def contestants(shape: str, device: str, dtype: torch.dtype, impl: Any, sparsity: float) -> Any:
    """Name and sparsity -> call."""
    from sla_video.kernels.api import sla2_attention
    from sla_video.kernels.context import Context, with_context
    from sla_video.kernels.gpu_timing import dense_runs

    video, text, mask = inputs(shape, device, dtype)
    context = (text[1], text[2])
    joint = [torch.cat(pair, 1) for pair in zip(video, text, strict=True)]
    settings = {"sparsity": sparsity, "impl": impl}
    out, lse = sla2_attention(*video, return_lse=True, **settings)
    alpha = torch.full((1, video[0].shape[2], -(-video[0].shape[1] // 128)), 0.5, device=device)

    def text_queries() -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (text[0], joint[1], joint[2]))
        there = F.pad(mask, (video[0].shape[1], 0), value=True)[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=there)

    runs = {
        # Without the mask, which FlashAttention does not take.
        **dense_runs(joint),
        ("SLA2 without context", sparsity): lambda: sla2_attention(*video, **settings),
        ("SLA2 with context", sparsity): lambda: sla2_attention(
            *video, context=context, context_mask=mask, **settings
        ),
        ("mix alone, plain", sparsity): lambda: with_context(
            video[0], out, lse, alpha, 128, Context(*context, mask)
        ),
        ("text queries", None): text_queries,
    }
    if impl == "triton":
        from sla_video.kernels.triton_context import mix_context

        runs["mix alone, kernel", sparsity] = lambda: mix_context(
            video[0], out, lse, alpha, *context, mask, 128
        )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default=SHAPE, help="video tokens x heads x head dim x text")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()

    from sla_video.kernels.gpu_timing import time_runs

    cuda = torch.cuda.is_available()
    if not cuda and not arguments.dry_run:
        sys.exit("context_attention: there is no GPU; use --dry-run")
    device = "cuda" if cuda else "cpu"
    impl = "triton" if cuda else "torch"
    dtype = torch.bfloat16
    shape = "700x2x64x30" if arguments.dry_run else arguments.shape
    with torch.no_grad():
        error = check(device, dtype, impl, arguments.sparsity)
        runs = contestants(shape, device, dtype, impl, arguments.sparsity)
        repeats = 1 if arguments.dry_run else None
        rows = time_runs(runs, "forward", torch.device(device), repeats=repeats)
    print(f"{shape}, {dtype}, relative error {error:.1e}")
    for row in rows:
        time = row.note or f"{row.milliseconds:9.3f} ms"
        print(f"{row.attention:26s} {row.sparsity or '':5} {time}")
    if cuda:
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    if arguments.json is not None:
        found = {"shape": shape, "error": error, "rows": [vars(row) for row in rows]}
        temporary = arguments.json.with_suffix(".part")
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, arguments.json)


if __name__ == "__main__":
    main()
