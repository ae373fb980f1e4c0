"""The benchmark of the Triton operator on a GPU: whole, its sparse kernel alone, with backward.

SLA2 is timed only if it agrees with the float64 reference at the very shape, on a sample of query
blocks. Beside it run dense attention and the peers that are installed (`peers.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sla_video.kernels.api import sla2_attention
from sla_video.kernels.gpu_timing import (
    GpuRow,
    Name,
    Run,
    dense_runs,
    lazily,
    time_runs,
    why_it_failed,
)
from sla_video.kernels.options import Options, SparseDtype, num_selected
from sla_video.kernels.peers import PEERS
from sla_video.kernels.routing import num_blocks
from sla_video.kernels.sampled_reference import clear_error, sampled_reference, spread_blocks

BLOCK_Q, BLOCK_K = 128, 64
SPARSE_ALONE = "SLA2 sparse kernel alone"
# Relative L2 error on Gaussian inputs above which nothing is timed, whatever the sparsity. Rounding
# P and V to E4M3 alone costs up to 3.6%.
ALLOWED_ERROR = {"bf16": 0.01, "int8": 0.02, "int8_fp8": 0.04, "int8_int8": 0.03}
GROWTH_LENGTHS = tuple(2**power for power in range(13, 20))
_SAMPLED_BLOCKS = 3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One tensor `[B, L, H, D]`.

    Attributes:
        name: what it stands for; may be empty.
        backward: also time forward and backward together.
    """

    length: int
    heads: int
    head_dim: int
    batch: int = 1
    name: str = ""
    backward: bool = False


# Wan 2.1 at 81 frames: the 1.3B model has 12 heads, the 14B model 40.
WAN_SHAPES = (
    Shape(name="1.3B-480p", length=32760, heads=12, head_dim=128, backward=True),
    Shape(name="14B-720p", length=75600, heads=40, head_dim=128),
    Shape(name="14B-480p", length=32760, heads=40, head_dim=128),
    Shape(name="1.3B-720p", length=75600, heads=12, head_dim=128),
)


def gaussian_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value."""
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.batch, shape.length, shape.heads, shape.head_dim)
    return [torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(3)]


@torch.no_grad()
def check_error(qkv: Sequence[Tensor], sparsity: float, sparse_dtype: SparseDtype) -> float:
    """Relative L2 distance of the operator to the unquantized float64 reference, sampled.

    Raises:
        RuntimeError: it is larger than the format can explain.
    """
    query, key, value = qkv
    blocks = spread_blocks(query.shape[1], BLOCK_Q, _SAMPLED_BLOCKS)
    wanted = sampled_reference(query, key, value, None, _options(sparsity, "bf16"), blocks)
    error = clear_error(forward(qkv, sparsity, sparse_dtype)(), wanted)
    if not error <= ALLOWED_ERROR[sparse_dtype]:
        raise RuntimeError(
            f"sparse_dtype={sparse_dtype!r} differs from the float64 reference by {error:.4f} at "
            f"sparsity {sparsity} on {list(query.shape)} in {query.dtype}, more than "
            f"{ALLOWED_ERROR[sparse_dtype]}: not worth timing"
        )
    return error


def forward(qkv: Sequence[Tensor], sparsity: float, sparse_dtype: SparseDtype) -> Run:
    """The whole operator."""
    query, key, value = qkv

    def run() -> Tensor:
        return sla2_attention(
            query,
            key,
            value,
            sparsity=sparsity,
            block_q=BLOCK_Q,
            block_k=BLOCK_K,
            sparse_dtype=sparse_dtype,
            impl="triton",
        )

    return run


@torch.no_grad()
def time_forward(
    qkv: Sequence[Tensor],
    sparsities: Sequence[float],
    sparse_dtype: SparseDtype,
    *,
    repeats: int | None = None,
) -> list[GpuRow]:
    """Dense attention, SLA2, its sparse kernel alone, and the peers that are installed."""
    query = qkv[0]
    length = query.shape[1]
    # Two products of two operations each.
    per_token = 4 * query.numel()
    runs = dense_runs(qkv)
    operations: dict[Name, float] = {name: per_token * length for name in runs}
    for sparsity in sparsities:
        runs["SLA2", sparsity] = forward(qkv, sparsity, sparse_dtype)
    for sparsity in sparsities:
        runs[SPARSE_ALONE, sparsity] = lazily(sparse_alone, qkv, sparsity, sparse_dtype)
        visited = BLOCK_K * num_selected(sparsity, num_blocks(length, BLOCK_K))
        operations[SPARSE_ALONE, sparsity] = per_token * min(visited, length)
    for peer in PEERS:
        if peer.installed() is not None:
            for share in sparsities if peer.sparse else (None,):
                runs[peer.name, share] = lazily(peer.prepare, *qkv, share or 0.0)
    return time_runs(runs, "forward", query.device, operations=operations, repeats=repeats)


def time_backward(
    qkv: Sequence[Tensor],
    sparsity: float,
    sparse_dtype: SparseDtype,
    *,
    repeats: int | None = None,
) -> list[GpuRow]:
    """Forward and the gradients of query, key and value together; the forward is low-bit."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    gradient = torch.randn_like(qkv[0])

    def both(run: Run) -> Run:
        return lambda: torch.autograd.grad(run(), leaves, gradient)

    runs = {name: both(run) for name, run in dense_runs(leaves).items()}
    runs["SLA2", sparsity] = both(forward(leaves, sparsity, sparse_dtype))
    return time_runs(runs, "forward + backward", qkv[0].device, repeats=repeats)


@torch.no_grad()
def forward_memory(
    qkv: Sequence[Tensor], sparsity: float, sparse_dtype: SparseDtype
) -> dict[str, Any] | None:
    """Peak memory of one forward pass beyond its inputs, as a share of the bytes of Q, K and V.

    `extra` leaves the output out, `extra_with_output` counts it. None without a CUDA device.
    """
    device = qkv[0].device
    if device.type != "cuda":
        return None
    run = forward(qkv, sparsity, sparse_dtype)
    run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = run()
    torch.cuda.synchronize(device)
    with_output = torch.cuda.max_memory_allocated(device) - before
    given = sum(x.nbytes for x in qkv)
    return {
        "sparsity": sparsity,
        "qkv_bytes": given,
        "extra_bytes": with_output - output.nbytes,
        "extra": (with_output - output.nbytes) / given,
        "extra_with_output": with_output / given,
    }


def time_growth(
    lengths: Sequence[int],
    sparsity: float,
    sparse_dtype: SparseDtype,
    *,
    heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int | None = None,
    longest_dense: float = 2000,
) -> Iterator[dict[str, Any]]:
    """For each of ascending lengths: milliseconds and notes by name, and SLA2's error.

    A dense attention is left out where its last time, times the square of the lengths' ratio,
    exceeds `longest_dense` milliseconds. Too little memory is a note, too.
    """
    expected: dict[str, float] = {}
    before = 0
    for length in lengths:
        growth = (length / before) ** 2 if before else 0
        expected = {name: ms * growth for name, ms in expected.items()}
        notes = {
            name: f"left out: about {ms / 1000:.0f} s a call"
            for name, ms in expected.items()
            if ms > longest_dense
        }
        times: dict[str, float] = {}
        error = None
        try:
            shape = Shape(length=length, heads=heads, head_dim=head_dim)
            qkv = gaussian_inputs(shape, device, dtype)
            error = check_error(qkv, sparsity, sparse_dtype)
            runs = {name: run for name, run in dense_runs(qkv).items() if name[0] not in notes}
            runs["SLA2", sparsity] = forward(qkv, sparsity, sparse_dtype)
            with torch.no_grad():
                found = time_runs(runs, "forward", device, repeats=repeats, seconds=0.6)
        except (RuntimeError, MemoryError) as failure:
            notes["SLA2"] = why_it_failed(failure)
            found = []
        for row in found:
            if row.milliseconds is None:
                notes[row.attention] = row.note
            else:
                times[row.attention] = row.milliseconds
        expected |= {name: ms for name, ms in times.items() if name != "SLA2"}
        before = length
        yield {"length": length, "error": error, "milliseconds": times, "notes": notes}


def sparse_alone(qkv: Sequence[Tensor], sparsity: float, sparse_dtype: SparseDtype) -> Run:
    """The kernel of the sparse branch on operands that are ready."""
    from sla_video.kernels.triton_attend import attend
    from sla_video.kernels.triton_bounded import wants_norms
    from sla_video.kernels.triton_prepare import prepare_keys
    from sla_video.kernels.triton_routing import plan_blocks
    from sla_video.kernels.triton_statistics import block_statistics

    query, key, value = qkv
    options = _options(sparsity, sparse_dtype)
    need_norms = wants_norms(query, options)
    statistics = block_statistics(
        query,
        key,
        value,
        block_q=BLOCK_Q,
        block_k=BLOCK_K,
        need_value_max=sparse_dtype in ("int8_fp8", "int8_int8"),
        need_low_query=sparse_dtype != "bf16",
        need_query_norm=need_norms,
    )
    means = (statistics.query_means, statistics.key_means, statistics.key_mean)
    plan = plan_blocks(*means, query.shape[1], None, options, value.dtype)
    operands = prepare_keys(
        key,
        value,
        statistics.key_mean,
        statistics.value_max,
        block_k=BLOCK_K,
        sparse_dtype=sparse_dtype,
        phi_k="smoothed",
        need_states=False,
        need_key_norm=need_norms,
    )
    out = torch.empty_like(query)

    def run() -> Tensor:
        attend(
            query,
            key,
            value,
            plan.indices,
            plan.counts,
            statistics.key_mean,
            operands=operands,
            block_q=BLOCK_Q,
            block_k=BLOCK_K,
            out=out,
            sparse_dtype=sparse_dtype,
            low_query=statistics.low_query,
            query_scale=statistics.query_scale,
            query_norm=statistics.query_norm,
        )
        return out

    return run


def _options(sparsity: float, sparse_dtype: SparseDtype) -> Options:
    return Options(sparsity=sparsity, block_q=BLOCK_Q, block_k=BLOCK_K, sparse_dtype=sparse_dtype)
