"""Sums over all key blocks of one head, from which the linear branch subtracts the selected ones.

    T = sum_n features[n]^T V[n]    t = sum_n feature_sums[n]

Each program sums a run of blocks, and one sum over the runs follows: nothing is atomic, so equal
inputs give equal bits. Features are those that the linear kernel reads, so that what it subtracts
was rounded in the same way, unless those are in FP8: then they are made again from K. What a query
block selects is a small part of the sums, and only that part has the error of FP8. Layouts as in
`triton_prepare`. Hardware: compute capability 8.0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.triton_tiles import (
    LaunchConfig,
    capability,
    launch_on,
    load_rows,
    padded_dim,
    row_softmax,
    strides,
)

# Programs that share the blocks of all heads: two for each multiprocessor of an H100.
_PROGRAMS = 264


@triton.jit(do_not_specialize=["length", "num_k", "run"])
def _feature_totals_kernel(
    key_ptr,
    value_ptr,
    key_mean_ptr,
    features_ptr,
    feature_sums_ptr,
    partial_ptr,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    heads,
    length,
    num_k,
    run,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per run of key blocks. Features are made here where none are given."""
    part = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    offs_d = tl.arange(0, D_PAD)
    offs_k = tl.arange(0, BLOCK_K)
    tile = offs_k[:, None] * D_PAD + offs_d[None, :]
    first_block = bh.to(tl.int64) * num_k
    value_base_ptr = value_ptr + b * stride_vb + h * stride_vh
    key_base_ptr = key_ptr + b * stride_kb + h * stride_kh
    mean = tl.zeros([D_PAD], tl.float32)
    if key_mean_ptr is not None:
        mean = tl.load(key_mean_ptr + bh * D + offs_d, mask=offs_d < D, other=0.0)

    last = tl.minimum((part + 1) * run, num_k)
    tl.assume(last > part * run)
    total = tl.zeros([D_PAD, D_PAD], tl.float32)
    weight = tl.zeros([D_PAD], tl.float32)
    for n in range(part * run, last):
        block = first_block + n
        weight += tl.load(feature_sums_ptr + block * D_PAD + offs_d)
        rows = length - n * BLOCK_K
        start = tl.cast(n, tl.int64) * BLOCK_K
        value = load_rows(value_base_ptr + start * stride_vl, stride_vl, rows, BLOCK_K, D, D_PAD)
        if features_ptr is not None:
            phi = tl.load(features_ptr + block * (BLOCK_K * D_PAD) + tile)
        else:
            key = load_rows(key_base_ptr + start * stride_kl, stride_kl, rows, BLOCK_K, D, D_PAD)
            # Absent tokens get features too, and zeros for values.
            phi = row_softmax(key.to(tl.float32) - mean[None, :], D, D_PAD).to(value.dtype)
        total = tl.dot(tl.trans(phi), value, total, input_precision="tf32x3")

    row = bh.to(tl.int64) * tl.num_programs(0) + part
    partial_base_ptr = partial_ptr + row * ((D_PAD + 1) * D_PAD)
    tl.store(partial_base_ptr + offs_d[:, None] * D_PAD + offs_d[None, :], total)
    tl.store(partial_base_ptr + D_PAD * D_PAD + offs_d, weight)


def _config(key: Tensor, pad: int) -> LaunchConfig:
    if key.dtype == torch.float32:
        return LaunchConfig(8 if pad == 128 else 4, 1)
    if pad < 128:
        return LaunchConfig(4, 3)
    # On Hopper two programs share a multiprocessor.
    return LaunchConfig(8, 3, max_registers=128 if capability(key.device)[0] == 9 else None)


def feature_totals(
    key: Tensor,
    value: Tensor,
    key_mean: Tensor | None,
    features: Tensor | None,
    feature_sums: Tensor,
    *,
    block_k: int,
) -> Tensor:
    """T and, as one more row, t: `[B, H, P + 1, P]` float32.

    Args:
        key, value: `[B, L, H, D]`, contiguous along D.
        key_mean: `[B, H, D]` float32 for features of smoothed keys, None for those of raw ones.
        features: `[B, H, N, block_k, P]` of `prepare_keys`; None to make them again.
        feature_sums: of `prepare_keys`.
    """
    batch, length, heads, head_dim = key.shape
    num_k, pad = feature_sums.shape[2], padded_dim(head_dim)
    runs = max(1, min(num_k, _PROGRAMS // (batch * heads)))
    run = -(-num_k // runs)
    runs = -(-num_k // run)
    shape = batch, heads, runs, pad + 1, pad
    partial = torch.empty(shape, dtype=torch.float32, device=key.device)
    with launch_on(key):
        _feature_totals_kernel[(runs, batch * heads)](
            key,
            value,
            key_mean,
            features,
            feature_sums,
            partial,
            *strides(key),
            *strides(value),
            heads,
            length,
            num_k,
            run,
            D=head_dim,
            D_PAD=pad,
            BLOCK_K=block_k,
            **_config(key, pad).keywords(),
        )
    return partial.sum(2)
