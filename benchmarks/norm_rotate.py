"""QK norm and rotary embedding of one layer of Wan on a GPU: one kernel, modules, compiled modules.

    python benchmarks/norm_rotate.py
    python benchmarks/norm_rotate.py --shape 27280x24x128

Rates count what has to be moved: queries and keys read once and written once.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from triton.testing import do_bench

from sla_video.kernels.gpu_bench import Shape
from sla_video.pipelines.families.rotary import norm_and_rotate

SHAPES = ("32760x12x128", "75600x40x128")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="tokens x heads x head dim")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here")
    for text in args.shape:
        length, heads, head_dim = (int(part) for part in text.split("x"))
        measure(Shape(length=length, heads=heads, head_dim=head_dim))


def measure(shape: Shape) -> None:
    device = torch.device("cuda")
    attn = WanAttention(dim=8, heads=shape.heads, dim_head=shape.head_dim).to(device).bfloat16()
    width = shape.heads * shape.head_dim
    query, key = torch.randn(2, 1, shape.length, width, device=device, dtype=torch.bfloat16)
    angle = torch.rand(1, shape.length, 1, shape.head_dim // 2, device=device)
    rotary = tuple(table.repeat_interleave(2, -1) for table in (angle.cos(), angle.sin()))
    arguments = attn, query, key, rotary
    torch._dynamo.reset()
    compiled = torch.compile(norm_and_rotate, fullgraph=True)
    runs = {
        "one kernel": partial(norm_and_rotate, *arguments, "triton"),
        "modules": partial(norm_and_rotate, *arguments, "torch"),
        "modules, compiled": partial(compiled, *arguments, "torch"),
    }
    moved = 4 * query.numel() * query.element_size()
    truth = runs["modules"]()
    for name, run in runs.items():
        errors = [
            ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()
            for got, wanted in zip(run(), truth, strict=True)
        ]
        milliseconds = do_bench(run, warmup=25, rep=150, return_mode="median")
        print(
            f"{shape.length}x{shape.heads}x{shape.head_dim} {name}: {milliseconds:.3f} ms, "
            f"{moved / milliseconds / 1e9:.2f} TB/s, differs by {max(errors):.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
