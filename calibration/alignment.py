"""SSA: full and sparse attention pulled towards each other inside the network (arXiv 2511.20102).

In each step the whole network runs one of the two streams. Each layer also computes the attention
of the other stream, from the same Q, K and V, for a random quarter of its query blocks, and adds

    SL1(h_f, sg h_s) + SL1(sg h_f, h_s)

on per-head outputs `[B, L, H, D]` before the output projection, both divided by the RMS of h_f
(a constant, of each sequence and head). sg is the stop-gradient. The two one-way variants keep one
of the terms.

The kernels take all queries, so the sparse counterpart is computed for all of them and read where
it counts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.pipelines.processor import SLAAttnProcessor

Stream = Literal["full", "sparse"]
# Of the query blocks, for the counterpart.
SHARE = 0.25


def draw_stream(seed: int, step: int) -> Stream:
    """The stream of an optimizer step, each with probability one half.

    A function of seed and step alone: the same for all layers and all processes, and after a
    resumption.
    """
    return "full" if random.Random(f"stream/{seed}/{step}").random() < 0.5 else "sparse"


def draw_blocks(seed: int, step: int, num_blocks: int) -> list[int]:
    """A random quarter of the query blocks, at least one; the same in all processes."""
    count = max(1, round(SHARE * num_blocks))
    return sorted(random.Random(f"blocks/{seed}/{step}").sample(range(num_blocks), count))


def alignment_loss(full: Tensor, sparse: Tensor, weight: Tensor, sides: str) -> Tensor:
    """Alignment of `full` and `sparse` `[B, R, H, D]` at query tokens of `weight` `[R]` 0 or 1.

    Args:
        sides: which outputs are pulled: "full" towards the sparse ones, "sparse" towards the full
            ones, or "both".

    Returns:
        A float32 scalar: the mean over the tokens that count.
    """
    full, sparse = full.float(), sparse.float()
    # [1, R, 1, 1]
    mask = weight.view(1, -1, 1, 1)
    count = mask.sum()
    # [B, 1, H, 1]
    power = (full.detach().square() * mask).sum((1, 3), keepdim=True) / (count * full.shape[3])
    scale = power.clamp_min(1e-12).rsqrt()
    full, sparse = full * scale, sparse * scale
    total = torch.zeros((), device=full.device)
    for pulled, towards, side in ((full, sparse, "full"), (sparse, full, "sparse")):
        if sides in ("both", side):
            error = F.smooth_l1_loss(pulled, towards.detach(), reduction="none")
            total = total + (error * mask).sum()
    return total / (count * full.shape[0] * full.shape[2] * full.shape[3])


class _Attach(torch.autograd.Function):
    """Hand `output` on, and let `loss` have the gradient `factor` when `output` has one.

    So the loss of a layer needs no way out of the network, which compiled, checkpointed and
    sharded blocks would each make hard.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        ctx.like = (loss.dtype, loss.device)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.like
        return grad, torch.full((), ctx.factor, dtype=dtype, device=device), None


class Draw:
    """What a step has drawn, shared by all layers.

    Attributes:
        stream: of the whole network.
        sides: which outputs are pulled.
        factor: gradient of each layer's loss.
        rows: `[R]` query tokens of the quarter; those beyond the sequence are repeats.
        weight: `[R]`, 1 for a token and 0 for a repeat.
    """

    def __init__(self, sides: str, factor: float, device: torch.device) -> None:
        self.sides = sides
        self.factor = factor
        self.device = device
        self.stream: Stream = "sparse"
        self.rows = torch.zeros(0, dtype=torch.long, device=device)
        self.weight = torch.zeros(0, device=device)

    def step(self, seed: int, step: int, length: int, block_q: int) -> Stream:
        """Draw for optimizer step `step` of sequences of `length` tokens."""
        self.stream = draw_stream(seed, step)
        blocks = torch.tensor(draw_blocks(seed, step, -(-length // block_q)))
        rows = (blocks[:, None] * block_q + torch.arange(block_q)).flatten()
        self.rows = rows.clamp(max=length - 1).to(self.device, non_blocking=True)
        self.weight = (rows < length).float().to(self.device, non_blocking=True)
        return self.stream


class LayerAlignment:
    """Attention of one layer under SSA; put into `SLAAttnProcessor.attention`.

    Attributes:
        value: the layer's last loss, without its factor.
    """

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.value = torch.zeros((), device=draw.device)

    def __call__(
        self, processor: SLAAttnProcessor, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        draw = self.draw
        if draw.stream == "full":
            output = full_attention(query, key, value)
            full = output.index_select(1, draw.rows)
            sparse = processor.sla2(query, key, value).index_select(1, draw.rows)
        else:
            output = processor.sla2(query, key, value)
            sparse = output.index_select(1, draw.rows)
            full = full_attention(query.index_select(1, draw.rows), key, value)
        loss = alignment_loss(full, sparse, draw.weight, draw.sides)
        # Not added up: a checkpointed block comes here twice.
        self.value.copy_(loss.detach())
        attached: Tensor = _Attach.apply(output, loss, draw.factor)  # type: ignore[no-untyped-call]
        return attached


def full_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of queries `[B, R, H, D]` to `[B, L, H, D]`, as `[B, R, H, D]`."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return out.transpose(1, 2)


def put_alignment(processors: Mapping[str, SLAAttnProcessor], draw: Draw) -> list[LayerAlignment]:
    """Give every layer that is not dense its alignment."""
    layers = []
    for processor in processors.values():
        if processor.sparsity is not None:
            layer = LayerAlignment(draw)
            processor.attention = layer
            layers.append(layer)
    return layers
