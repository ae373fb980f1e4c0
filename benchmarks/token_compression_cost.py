"""What attention among fewer tokens costs at Wan's true sizes; part of `token_compression.py`.

Q, K and V are smooth fields under Wan's rotary embedding (`token_orders_structured`), bf16 on a
GPU. Each inner attention is timed on all tokens, on the kept ones alone, and compressed: gathered,
run, filled and scattered back. Printed beside the time are

    speed     the inner attention on all tokens over this
    overhead  what compression adds to the inner attention on the kept tokens, as a share of the
              inner attention on all tokens
    window    of a full step, what it puts aside, and `refresh_every - 1` short ones: as many full
              steps over that
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from token_orders_structured import make_inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sla_video.kernels.api import sla2_attention
from sla_video.kernels.gpu_timing import Run, time_runs
from sla_video.kernels.token_compression import (
    Inner,
    TokenSelection,
    compressed_attention,
    fewer_keys,
    gather_tokens,
    nearest_kept,
    select_tokens,
    short_attention,
)
from sla_video.kernels.token_order import Grid
from sla_video.kernels.token_scores import (
    always_kept,
    always_kept_on,
    coverage_count,
    rank_tokens,
    share_count,
    token_scores,
)

SHAPES = {"1.3B-480p": ((21, 30, 52), 12), "14B-720p": ((21, 45, 80), 40)}
REFRESH_EVERY = 4
BLOCK_Q = 128
# mode, fill, residual
WAYS = (
    ("kv", "zero", False),
    ("kv", "zero", True),
    ("qkv", "zero", False),
    ("qkv", "prev", False),
    ("qkv", "prev", True),
    ("qkv", "neighbor", False),
    ("qkv", "linear", False),
)
Qkv = tuple[Tensor, Tensor, Tensor]


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """cuDNN's attention; PyTorch's own choice without a GPU."""
    parts = [part.transpose(1, 2) for part in (query, key, value)]
    if not query.is_cuda:
        return F.scaled_dot_product_attention(*parts).transpose(1, 2)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(*parts).transpose(1, 2)


def sla2(query: Tensor, key: Tensor, value: Tensor, *, sparsity: float, low: str) -> Tensor:
    """SLA2 without training, also of fewer keys."""
    run = partial(sla2_attention, sparsity=sparsity, sparse_dtype=low)
    return fewer_keys(run, query, key, value, BLOCK_Q)  # type: ignore[arg-type]


class Compressed:
    """One way to compress one inner attention, with all that a short step needs at hand."""

    def __init__(
        self, qkv: Qkv, grid: Grid, pairs: float, inner: Inner, mode: Any, fill: Any, residual: bool
    ) -> None:
        self.qkv, self.inner, self.mode, self.fill = qkv, inner, mode, fill
        self.grid, self.pairs, self.has_residual = grid, pairs, residual
        self.extra: dict[str, Tensor] = {}
        self.selection = self.select()
        self.prepare()
        kept = self.selection.kept
        keys = [gather_tokens(part, kept) for part in qkv[1:]]
        query = qkv[0] if mode == "kv" else gather_tokens(qkv[0], kept)
        self.short: Qkv = (query, keys[0], keys[1])

    def select(self) -> TokenSelection:
        """Scores, ranking and choice; counted by coverage too, as with `tau`."""
        query, key, _ = self.qkv
        always = always_kept_on(self.grid, str(query.device))
        scores = token_scores(query, key, self.grid)
        ranking = rank_tokens(scores, always)
        coverage_count(scores, ranking, always, 0.005)
        share = self.pairs if self.mode == "kv" else self.pairs**0.5
        number = int(always_kept(self.grid).sum())
        return select_tokens(ranking, share_count(query.shape[1], number, share))

    def prepare(self) -> None:
        """What a full step puts aside. Its output is at hand there: values stand in for it."""
        selection, output = self.select(), self.qkv[2]
        if self.has_residual:
            short = short_attention(*self.qkv, selection, self.inner, mode=self.mode)
            whole = output if self.mode == "kv" else gather_tokens(output, selection.kept)
            self.extra["residual"] = whole - short
        if self.fill == "prev" and self.mode == "qkv":
            self.extra["dropped_output"] = gather_tokens(output, selection.dropped)
        if self.fill == "neighbor":
            self.extra["nearest"] = nearest_kept(selection, self.grid)

    def __call__(self) -> Tensor:
        return compressed_attention(
            *self.qkv, self.selection, self.inner, mode=self.mode, fill=self.fill, **self.extra
        )

    def inner_alone(self) -> Tensor:
        """The inner attention of tokens that have been gathered."""
        return self.inner(*self.short)


def check(qkv: Qkv, grid: Grid, pairs: float) -> None:
    """Compressed attention against its definition, at a few queries of a few heads."""
    query, key, value = (part[:, :, :2].contiguous() for part in qkv)
    case = Compressed((query, key, value), grid, pairs, dense, "kv", "zero", False)
    rows = torch.arange(0, query.shape[1], max(1, query.shape[1] // 64), device=query.device)
    found = case()[:, rows].float()
    q, k, v = (part.float().transpose(1, 2) for part in (query[:, rows], key, value))
    logits = q @ k.mT / math.sqrt(query.shape[-1])
    kept = torch.zeros(logits.shape[:2] + logits.shape[-1:], dtype=torch.bool, device=query.device)
    kept.scatter_(-1, case.selection.kept, True)
    expected = torch.softmax(logits.masked_fill(~kept[:, :, None], -torch.inf), -1) @ v
    wrong = float((found - expected.transpose(1, 2)).norm() / expected.norm())
    assert wrong < 1e-2, f"compressed attention is wrong by {wrong:.3g}"
    length = query.shape[1]
    ranking = torch.arange(length, device=query.device).expand(1, 2, -1)
    everything = select_tokens(ranking, length)
    one = compressed_attention(query, key, value, everything, dense)
    assert torch.equal(one, dense(query, key, value)), "keeping everything is not the inner one"
    if query.is_cuda:
        check_waits(qkv, grid, pairs)


def check_waits(qkv: Qkv, grid: Grid, pairs: float) -> None:
    """Nothing waits for the device, in a full step or in a short one."""
    for way in WAYS:
        query, key, value = (part[:, :, :2].contiguous() for part in qkv)
        case = Compressed((query, key, value), grid, pairs, dense, *way)
        case()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.prepare()
            case()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def gathers(qkv: Qkv, places: Tensor) -> dict[tuple[str, None], Run]:
    """Ways to gather K and V."""
    index = places.transpose(1, 2)[..., None].expand(-1, -1, -1, qkv[1].shape[-1])
    ways: dict[str, Run] = {
        "gather K and V by rows": lambda: [gather_tokens(part, places) for part in qkv[1:]],
        "gather K and V by torch.gather": lambda: [part.gather(1, index) for part in qkv[1:]],
    }
    return {(name, None): way for name, way in ways.items()}


def measure(
    shape: str, grid: Grid, heads: int, *, pairs: float, sparsity: float, low: str, device: str
) -> list[dict[str, Any]]:
    """The rows of one shape."""
    target = torch.device(device)
    dtype = torch.bfloat16 if target.type == "cuda" else torch.float32
    query, key, value = make_inputs(grid, heads, target)
    qkv = (query.to(dtype), key.to(dtype), value.to(dtype))
    del query, key, value
    check(qkv, grid, pairs)
    rows: list[dict[str, Any]] = []
    inners: dict[str, Inner] = {
        "dense": dense,
        f"SLA2 {sparsity:.0%}": partial(sla2, sparsity=sparsity, low=low),
    }
    for name, inner in inners.items():
        for mode in ("kv", "qkv"):
            rows += _rows_of(shape, name, inner, mode, qkv, grid, pairs, target)
    return rows


def _rows_of(
    shape: str,
    name: str,
    inner: Inner,
    mode: str,
    qkv: Qkv,
    grid: Grid,
    pairs: float,
    device: torch.device,
) -> list[dict[str, Any]]:
    # One way at a time is in memory.
    rows = []
    for way in WAYS:
        if way[0] != mode:
            continue
        case = Compressed(qkv, grid, pairs, inner, *way)
        runs: dict[tuple[str, float | None], Run] = {
            ("full", None): partial(inner, *qkv),
            ("short", None): case.inner_alone,
            ("compressed", None): case,
            ("prepare", None): case.prepare,
        }
        if name == "dense" and way == WAYS[0]:
            runs |= gathers(qkv, case.selection.kept)
        found = {
            row.attention: row.milliseconds
            for row in time_runs(runs, "forward", device, seconds=1.0)
            if row.milliseconds is not None
        }
        full, short, compressed = (found[part] for part in ("full", "short", "compressed"))
        window = full + found["prepare"] + (REFRESH_EVERY - 1) * compressed
        row = {
            "shape": shape,
            "inner": name,
            "mode": mode,
            "fill": way[1] if mode == "qkv" else "",
            "residual": way[2],
            "kept": case.selection.kept.shape[-1] / qkv[0].shape[1],
            "milliseconds": found,
            "speed": full / compressed,
            "overhead": (compressed - short) / full,
            "window": REFRESH_EVERY * full / window,
        }
        rows.append(row)
        print(
            f"| {shape} | {name} | {mode} | {row['fill']} | {'yes' if way[2] else ''} | "
            f"{row['kept']:.1%} | {full:.2f} | {short:.2f} | {compressed:.2f} | "
            f"{found['prepare']:.2f} | {row['speed']:.2f} | {row['overhead']:.1%} | "
            f"{row['window']:.2f} |",
            flush=True,
        )
        for extra in found.keys() - {"full", "short", "compressed", "prepare"}:
            print(f"| {shape} | {extra} | | | | | | | {found[extra]:.2f} | | | | |", flush=True)
    return rows


def print_head() -> None:
    """Above the rows."""
    print(
        "| shape | inner | mode | fill | residual | kept | full ms | short inner ms | "
        "compressed ms | put aside ms | speed | overhead | window |\n" + "|---" * 13 + "|"
    )
