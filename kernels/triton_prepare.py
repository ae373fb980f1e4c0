"""Second pass of the Triton implementation over K and V, with Ks = K - mean(K) over all tokens.

Writes what the sparse and linear kernels visit block by block:

    low_keys[n]     = round(Ks[n] / s_n)          INT8, one scale s_n = max|Ks[n]| / 127 per block
    low_values[n]   = V[n]^T / s_d                FP8 E4M3 or INT8, one scale per channel
    features[n]     = phi(Ks[n]) or phi(K[n])     softmax over D
    feature_sums[n] = sum_j phi(k_j)

and, for the linear branch to subtract from, sums over all key blocks of one head:

    T = sum_n phi(Ks[n])^T V[n]    t = sum_n feature_sums[n]

Each program takes a run of blocks, and one sum over the runs follows: K and V are read once, and
nothing is atomic, so equal inputs give equal bits. Features in T are rounded like those that the
linear kernel reads, so that what it subtracts was rounded in the same way, unless those are in FP8:
T is exact then. What a query block selects is a small part of the sums, and only that part has the
error of FP8.

Layouts: inputs are `[B, L, H, D]` with any strides but 1 along D. What is written is
`[B, H, N, ...]`, one contiguous tile per key block, rows padded with zeros to whole blocks and D to
`padded_dim(D)`, so that later kernels need no masks to load it. V is stored transposed,
`[D, block_k]`, because the FP8 matrix units of Hopper and Ada take both operands only with the
summed dimension contiguous; so are features in FP8. Keys stand in `matrix_order` there. Hardware:
compute capability 8.0; FP8 8.9.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.options import PhiK, SparseDtype
from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_tiles import (
    LaunchConfig,
    blocks_per_program,
    capability,
    launch_on,
    matrix_order,
    multiprocessors,
    padded_dim,
    quantization_scale,
    round_to_int8,
    strides,
)

FeatureStorage = Literal["value", "fp8", "none"]


class KeyOperands(NamedTuple):
    """K and V as the sparse and linear kernels read them; P is `padded_dim(D)`.

    Attributes:
        low_keys, key_scale: INT8 `[B, H, N, block_k, P]` and its scales `[B, H, N]`.
        low_values, value_scale: FP8 or INT8 `[B, H, N, P, block_k]`, keys in `matrix_order`, and
            its scales `[B, H, P]`.
        features: `[B, H, N, block_k, P]` in the dtype of V, or FP8 `[B, H, N, P, block_k]`, then
            448 times too large and paired with `low_values`; None if they are to be recomputed.
        feature_sums: `[B, H, N, P]`.
        totals: `[B, H, P + 1, P]`, the sum of features^T V over all keys and, in the last row, that
            of the features; of the rounded features unless they are in FP8.
    """

    low_keys: Tensor | None = None
    key_scale: Tensor | None = None
    low_values: Tensor | None = None
    value_scale: Tensor | None = None
    features: Tensor | None = None
    feature_sums: Tensor | None = None
    totals: Tensor | None = None


@triton.jit
def _transposed(x, BLOCK_K: tl.constexpr, D_PAD: tl.constexpr):
    """Tile `[D_PAD, BLOCK_K]` of x `[BLOCK_K, D_PAD]`, position 4 i + j from row j BLOCK_K / 4 + i.

    A thread has loaded the four rows of one i: it moves four bytes at a time, not single ones.
    """
    x = tl.permute(tl.reshape(x, (4, BLOCK_K // 4, D_PAD)), (2, 1, 0))
    return tl.reshape(x, (D_PAD, BLOCK_K))


@triton.jit(do_not_specialize=["length", "num_k", "run"])
def _prepare_keys_kernel(
    key_ptr,
    value_ptr,
    key_mean_ptr,
    value_max_ptr,
    low_keys_ptr,
    key_scale_ptr,
    low_values_ptr,
    value_scale_ptr,
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
    SPARSE_DTYPE: tl.constexpr,
    NEED_FEATURES: tl.constexpr,
    FEATURE_STORAGE: tl.constexpr,
    SMOOTH_FEATURES: tl.constexpr,
):
    """One program per run of key blocks."""
    part = tl.program_id(0)
    # From the last head to the first: of what was read last, much is still in the L2 cache.
    bh = tl.num_programs(1) - 1 - tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    LOW_VALUES: tl.constexpr = SPARSE_DTYPE == "int8_fp8" or SPARSE_DTYPE == "int8_int8"
    # The whole range of FP8 is used.
    UNIT: tl.constexpr = 448.0 if FEATURE_STORAGE == "fp8" else 1.0
    offs_d = tl.arange(0, D_PAD)
    mask_d = offs_d < D
    # Rows of K and V are read in the order that `_transposed` wants.
    position = tl.arange(0, BLOCK_K)
    offs_k = matrix_order(position % (BLOCK_K // 4) * 4 + position // (BLOCK_K // 4))
    # Tiles [BLOCK_K, D_PAD] and transposed [D_PAD, BLOCK_K], both contiguous.
    tile = offs_k[:, None] * D_PAD + offs_d[None, :]
    tile_t = offs_d[:, None] * BLOCK_K + position[None, :]
    mean = tl.load(key_mean_ptr + bh * D + offs_d, mask=mask_d, other=0.0)
    if LOW_VALUES:
        value_max = tl.load(value_max_ptr + bh * D + offs_d, mask=mask_d, other=0.0)
        LARGEST: tl.constexpr = 448.0 if SPARSE_DTYPE == "int8_fp8" else 127.0
        value_scale = quantization_scale(value_max, LARGEST)
        if part == 0:
            tl.store(value_scale_ptr + bh * D_PAD + offs_d, value_scale)
        value_scale = 1.0 / value_scale
    key_base_ptr = key_ptr + b * stride_kb + h * stride_kh
    value_base_ptr = value_ptr + b * stride_vb + h * stride_vh
    first_block = bh.to(tl.int64) * num_k

    last = tl.minimum((part + 1) * run, num_k)
    # Without a way around the loop, its matrix products need not wait for each other.
    tl.assume(last > part * run)
    if NEED_FEATURES:
        total = tl.zeros([D_PAD, D_PAD], tl.float32)
        weight = tl.zeros([D_PAD], tl.float32)
    for n in range(part * run, last):
        block = first_block + n
        first = block * (BLOCK_K * D_PAD)
        start = tl.cast(n, tl.int64) * BLOCK_K
        rows = length - n * BLOCK_K
        exists = offs_k < rows
        # Absent keys repeat the last one, which leaves the largest magnitude as it is.
        rows_k = tl.minimum(offs_k, rows - 1)[:, None]
        key_block_ptr = key_base_ptr + start * stride_kl
        key_block_ptr += rows_k * stride_kl + offs_d[None, :]
        if D < D_PAD:
            key = tl.load(key_block_ptr, mask=mask_d[None, :], other=0.0).to(tl.float32)
        else:
            key = tl.load(key_block_ptr).to(tl.float32)
        if LOW_VALUES or NEED_FEATURES:
            mask = exists[:, None] & mask_d[None, :] if D < D_PAD else exists[:, None]
            value_block_ptr = value_base_ptr + start * stride_vl
            value_block_ptr += offs_k[:, None] * stride_vl + offs_d[None, :]
            value = tl.load(value_block_ptr, mask=mask, other=0.0)

        smooth = key - mean[None, :]
        if SPARSE_DTYPE != "bf16":
            key_scale = quantization_scale(tl.max(tl.abs(smooth)), 127.0)
            tl.store(key_scale_ptr + block, key_scale)
            factor = tl.where(exists, 1.0 / key_scale, 0.0)
            tl.store(low_keys_ptr + first + tile, round_to_int8(smooth * factor[:, None]))
        if LOW_VALUES:
            scaled = value.to(tl.float32) * value_scale[None, :]
            # The conversion to FP8 saturates, so rounding of the scale does no harm.
            low = scaled.to(tl.float8e4nv) if SPARSE_DTYPE == "int8_fp8" else round_to_int8(scaled)
            tl.store(low_values_ptr + first + tile_t, _transposed(low, BLOCK_K, D_PAD))
        if NEED_FEATURES:
            x = smooth if SMOOTH_FEATURES else key
            if D < D_PAD:
                x = tl.where(mask_d[None, :], x, float("-inf"))
            top = tl.max(x, 1) * 1.4426950408889634
            phi = tl.exp2(x * 1.4426950408889634 - top[:, None])
            phi = phi * tl.where(exists, UNIT / tl.sum(phi, 1), 0.0)[:, None]
            if FEATURE_STORAGE == "fp8":
                low = _transposed(phi.to(tl.float8e4nv), BLOCK_K, D_PAD)
                tl.store(features_ptr + first + tile_t, low)
            elif FEATURE_STORAGE == "value":
                tl.store(features_ptr + first + tile, phi.to(features_ptr.dtype.element_ty))
            sums = tl.sum(phi, 0) * (1.0 / UNIT)
            tl.store(feature_sums_ptr + block * D_PAD + offs_d, sums)
            weight += sums
            phi = tl.trans(phi.to(value.dtype))
            total = tl.dot(phi, value, total, input_precision="tf32x3")

    if NEED_FEATURES:
        row = bh.to(tl.int64) * tl.num_programs(0) + part
        partial_base_ptr = partial_ptr + row * ((D_PAD + 1) * D_PAD)
        tile = offs_d[:, None] * D_PAD + offs_d[None, :]
        tl.store(partial_base_ptr + tile, total * (1.0 / UNIT))
        tl.store(partial_base_ptr + D_PAD * D_PAD + offs_d, weight)


def _config(key: Tensor, block_k: int, pad: int, need_features: bool) -> LaunchConfig:
    if not need_features:
        return LaunchConfig(4, 1)
    if key.dtype == torch.float32:
        return LaunchConfig(8 if pad == 128 else 4, 1)
    if pad < 128:
        return LaunchConfig(4, 3)
    # T fills a quarter of the registers, and nothing is spilled: one program per multiprocessor,
    # which fetches blocks ahead as far as shared memory reaches.
    if capability(key.device)[0] == 9:
        return LaunchConfig(8, 3)
    return LaunchConfig(8, 2 if block_k <= 64 else 1)


def prepare_keys(
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    value_max: Tensor | None,
    *,
    block_k: int,
    sparse_dtype: SparseDtype,
    phi_k: PhiK,
    need_features: bool,
    feature_storage: FeatureStorage | None = None,
) -> KeyOperands:
    """Pass 2 over key, value `[B, L, H, D]`, each contiguous along D.

    Args:
        key_mean, value_max: of `block_statistics`; value_max only for a low-bit P V.
        need_features: whether a linear branch will follow.
        feature_storage: `"value"` stores features in the dtype of V; `"fp8"`, for `"int8_fp8"`
            only and there the default, in E4M3, which halves what the linear kernel reads; `"none"`
            leaves it to the linear kernel to compute them again.
    """
    low_keys = sparse_dtype != "bf16"
    low_values = sparse_dtype in ("int8_fp8", "int8_int8")
    if not (low_keys or need_features):
        return KeyOperands()
    if feature_storage is None:
        feature_storage = "fp8" if sparse_dtype == "int8_fp8" else "value"
    batch, length, heads, head_dim = key.shape
    num_k, pad = num_blocks(length, block_k), padded_dim(head_dim)
    fp8 = torch.float8_e4m3fn

    def buffer(wanted: bool, dtype: torch.dtype, *shape: int) -> Tensor | None:
        if not wanted:
            return None
        return torch.empty(batch, heads, *shape, dtype=dtype, device=key.device)

    low_dtype = fp8 if sparse_dtype == "int8_fp8" else torch.int8
    if feature_storage == "fp8":
        features = buffer(need_features, fp8, num_k, pad, block_k)
    else:
        stored = need_features and feature_storage == "value"
        features = buffer(stored, value.dtype, num_k, block_k, pad)
    operands = KeyOperands(
        low_keys=buffer(low_keys, torch.int8, num_k, block_k, pad),
        key_scale=buffer(low_keys, torch.float32, num_k),
        low_values=buffer(low_values, low_dtype, num_k, pad, block_k),
        value_scale=buffer(low_values, torch.float32, pad),
        features=features,
        feature_sums=buffer(need_features, torch.float32, num_k, pad),
    )
    run = 1
    if need_features:
        # Of smaller tiles, several programs share a multiprocessor.
        programs = multiprocessors(key.device) * (1 if pad == 128 else 2)
        run = blocks_per_program(num_k, batch * heads, programs)
    runs = -(-num_k // run)
    partial = buffer(need_features, torch.float32, runs, pad + 1, pad)
    with launch_on(key):
        _prepare_keys_kernel[(runs, batch * heads)](
            key,
            value,
            key_mean.contiguous(),
            value_max,
            operands.low_keys,
            operands.key_scale,
            operands.low_values,
            operands.value_scale,
            operands.features,
            operands.feature_sums,
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
            SPARSE_DTYPE=sparse_dtype,
            NEED_FEATURES=need_features,
            FEATURE_STORAGE=feature_storage,
            SMOOTH_FEATURES=phi_k == "smoothed",
            **_config(key, block_k, pad, need_features).keywords(),
        )
    if partial is None:
        return operands
    return operands._replace(totals=partial[:, :, 0] if runs == 1 else partial.sum(2))
