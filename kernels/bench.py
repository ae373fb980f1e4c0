"""Time the operator against dense attention, side by side on the device at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.kernels.api import Implementation, available_implementations, sla2_attention
from sla_video.kernels.options import num_selected
from sla_video.kernels.routing import num_blocks

BLOCK_Q, BLOCK_K = 128, 64
# Long enough for tails and several blocks, short enough for the reference to take no time.
_CHECK_LENGTH = 777
_CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3}
_CHECK_TOLERANCE_BF16 = 3e-2


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One line of the table.

    Attributes:
        impl: `"dense"` (scaled_dot_product_attention) or an implementation of SLA2.
        sparsity: share of key blocks not attended to exactly; 0 for dense.
        num_selected: key blocks kept per query block, of `num_key_blocks`.
        milliseconds: median over the repeats.
        fastest_milliseconds: minimum over the repeats.
        speedup: median of dense divided by the median of this row.
    """

    impl: str
    sparsity: float
    num_selected: int
    num_key_blocks: int
    milliseconds: float
    fastest_milliseconds: float
    speedup: float


def bench_operator(
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    sparsity: float | Sequence[float],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    repeats: int = 5,
    impls: Sequence[Implementation] | None = None,
    on_repeat: Callable[[int, int], None] | None = None,
) -> list[BenchRow]:
    """Medians of dense attention and of the whole SLA2 operator (router and linear branch too).

    Inputs are random, `[B, L, H, D]` as a transformer hands them over. Contestants take turns
    within each repeat, so that a busy machine slows all of them. Each implementation must first
    agree with the reference on a short sequence.

    Args:
        sparsity: one value or several, each in [0, 1).
        impls: implementations to time; default all available ones but the reference.
        on_repeat: called with (repeats done, repeats) for a progress bar.

    Returns:
        the dense row, then one row per sparsity and implementation.

    Raises:
        ValueError: a size, sparsity or implementation out of range.
        RuntimeError: an implementation disagrees with the reference.
    """
    for name, size in (
        ("batch", batch),
        ("length", length),
        ("heads", heads),
        ("head_dim", head_dim),
        ("repeats", repeats),
    ):
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}")
    device = torch.device(device)
    sparsities = [sparsity] if isinstance(sparsity, (int, float)) else list(sparsity)
    total = num_blocks(length, BLOCK_K)
    counts = {value: num_selected(value, total) for value in sparsities}
    if impls is None:
        states = available_implementations()
        fast: tuple[Implementation, ...] = ("torch", "triton")
        impls = [name for name in fast if states[name] == "available"]
        if device.type != "cuda":
            # Interpreted kernels are not worth timing.
            impls = [name for name in impls if name != "triton"]

    with torch.no_grad():
        for impl in impls:
            for value in sparsities:
                _check_against_reference(impl, heads, head_dim, value, device, dtype)
        query, key, value_ = _inputs(batch, length, heads, head_dim, device, dtype)
        runs: dict[tuple[str, float], Callable[[], Tensor]] = {
            ("dense", 0.0): lambda: _dense(query, key, value_)
        }
        for share in sparsities:
            for impl in impls:
                runs[impl, share] = _sla2(query, key, value_, share, impl)
        seconds = _time_interleaved(runs, device, repeats, on_repeat)

    dense = median(seconds["dense", 0.0])
    return [
        BenchRow(
            impl=impl,
            sparsity=share,
            num_selected=total if impl == "dense" else counts[share],
            num_key_blocks=total,
            milliseconds=1e3 * median(times),
            fastest_milliseconds=1e3 * min(times),
            speedup=dense / median(times),
        )
        for (impl, share), times in seconds.items()
    ]


def _inputs(
    batch: int, length: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, batch, length, heads, head_dim)
    query, key, value = torch.randn(shape, generator=generator).to(device, dtype).unbind(0)
    return query, key, value


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _sla2(
    query: Tensor, key: Tensor, value: Tensor, sparsity: float, impl: Implementation
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        return sla2_attention(
            query,
            key,
            value,
            sparsity=sparsity,
            block_q=BLOCK_Q,
            block_k=BLOCK_K,
            impl=impl,
        )

    return run


def _check_against_reference(
    impl: Implementation,
    heads: int,
    head_dim: int,
    sparsity: float,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    inputs = _inputs(1, _CHECK_LENGTH, heads, head_dim, device, dtype)
    wanted = _sla2(*inputs, sparsity, "reference")()
    error = (_sla2(*inputs, sparsity, impl)() - wanted).abs().max().item()
    allowed = _CHECK_TOLERANCE.get(dtype, _CHECK_TOLERANCE_BF16)
    if not error <= allowed:
        raise RuntimeError(
            f"impl={impl!r} differs from the reference by {error:.2e} at sparsity {sparsity} in "
            f"{dtype} on {device}, more than {allowed:.0e}: not worth timing"
        )


def _time_interleaved(
    runs: dict[tuple[str, float], Callable[[], Tensor]],
    device: torch.device,
    repeats: int,
    on_repeat: Callable[[int, int], None] | None,
) -> dict[tuple[str, float], list[float]]:
    """Seconds of every repeat of every run, after one untimed round."""
    seconds: dict[tuple[str, float], list[float]] = {name: [] for name in runs}
    for repeat in range(-1, repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
        if on_repeat is not None:
            on_repeat(repeat + 1, repeats)
    return seconds
