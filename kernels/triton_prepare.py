"""Second pass of the Triton implementation over K and V, with Ks = K - mean(K) over all tokens.

Writes what the sparse and linear kernels visit block by block:

    low_keys[n]     = round(Ks[n] / s_n)          INT8, one scale s_n = max|Ks[n]| / 127 per block
    low_values[n]   = V[n]^T / s_d                FP8 E4M3 or INT8, one scale per channel
    features[n]     = phi(Ks[n]) or phi(K[n])     softmax over D
    feature_sums[n] = sum_j phi(k_j)
    total           = sum_n features[n]^T V[n]    and total_features = sum_n feature_sums[n]

Layouts: inputs are `[B, L, H, D]` with any strides but 1 along D, read once. What is written is
`[B, H, N, ...]`, one contiguous tile per key block, rows padded with zeros to whole blocks and D to
`padded_dim(D)`, so that later kernels need no masks to load it. V is stored transposed,
`[D, block_k]`, because the FP8 matrix units of Hopper and Ada take both operands only with the
summed dimension contiguous; so are features in FP8. Totals are summed per chunk of blocks, then
over chunks: nothing is atomic, equal inputs give equal bits. Hardware: compute capability 8.0; FP8
8.9.
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
    launch_on,
    load_rows,
    padded_dim,
    quantization_scale,
    round_to_int8,
    row_softmax,
    strides,
)

FeatureStorage = Literal["value", "fp8", "none"]

# Programs that share the totals of all heads: a few waves on the largest GPUs.
_TOTAL_PROGRAMS = 512


class KeyOperands(NamedTuple):
    """K and V as the sparse and linear kernels read them; P is `padded_dim(D)`.

    Attributes:
        low_keys, key_scale: INT8 `[B, H, N, block_k, P]` and its scales `[B, H, N]`.
        low_values, value_scale: FP8 or INT8 `[B, H, N, P, block_k]`, its scales `[B, H, P]`.
        features: `[B, H, N, block_k, P]` in the dtype of V, or FP8 `[B, H, N, P, block_k]`, then
            448 times too large and paired with `low_values`; None if they are to be recomputed.
        feature_sums: `[B, H, N, P]`.
        total, total_features: `[B, H, P, P]`, `[B, H, P]`, in units of the operands.
    """

    low_keys: Tensor | None = None
    key_scale: Tensor | None = None
    low_values: Tensor | None = None
    value_scale: Tensor | None = None
    features: Tensor | None = None
    feature_sums: Tensor | None = None
    total: Tensor | None = None
    total_features: Tensor | None = None


@triton.jit(do_not_specialize=["length", "num_k", "chunk", "num_chunks"])
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
    partial_total_ptr,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    heads,
    length,
    num_k,
    chunk,
    num_chunks,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPARSE_DTYPE: tl.constexpr,
    NEED_FEATURES: tl.constexpr,
    FEATURE_STORAGE: tl.constexpr,
    SMOOTH_FEATURES: tl.constexpr,
):
    """One program per chunk of key blocks."""
    c = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    first_block = bh.to(tl.int64) * num_k
    offs_d = tl.arange(0, D_PAD)
    offs_k = tl.arange(0, BLOCK_K)
    mask_d = offs_d < D
    # Tiles [BLOCK_K, D_PAD] and transposed [D_PAD, BLOCK_K], both contiguous.
    tile = offs_k[:, None] * D_PAD + offs_d[None, :]
    tile_t = offs_d[:, None] * BLOCK_K + offs_k[None, :]
    LOW_VALUES: tl.constexpr = SPARSE_DTYPE == "int8_fp8" or SPARSE_DTYPE == "int8_int8"

    # Features in FP8 use its whole range.
    FEATURE_UNIT: tl.constexpr = 448.0 if FEATURE_STORAGE == "fp8" else 1.0

    mean = tl.load(key_mean_ptr + bh * D + offs_d, mask=mask_d, other=0.0)
    if LOW_VALUES:
        value_max = tl.load(value_max_ptr + bh * D + offs_d, mask=mask_d, other=0.0)
        value_scale = quantization_scale(value_max, 448.0 if SPARSE_DTYPE == "int8_fp8" else 127.0)
        if c == 0:
            tl.store(value_scale_ptr + bh * D_PAD + offs_d, value_scale)
    if NEED_FEATURES:
        total = tl.zeros([D_PAD, D_PAD], tl.float32)

    for n in range(c * chunk, tl.minimum((c + 1) * chunk, num_k)):
        start = tl.cast(n, tl.int64) * BLOCK_K
        rows = length - n * BLOCK_K
        mask_k = (offs_k < rows)[:, None]
        key_base_ptr = key_ptr + b * stride_kb + h * stride_kh + start * stride_kl
        key = load_rows(key_base_ptr, stride_kl, rows, BLOCK_K, D, D_PAD).to(tl.float32)
        smooth = tl.where(mask_k, key - mean[None, :], 0.0)
        if SPARSE_DTYPE != "bf16":
            key_scale = quantization_scale(tl.max(tl.abs(smooth)), 127.0)
            tl.store(key_scale_ptr + first_block + n, key_scale)
            low_base_ptr = low_keys_ptr + (first_block + n) * (BLOCK_K * D_PAD)
            tl.store(low_base_ptr + tile, round_to_int8(smooth * (1.0 / key_scale)))
        if LOW_VALUES or NEED_FEATURES:
            value_base_ptr = value_ptr + b * stride_vb + h * stride_vh + start * stride_vl
            value = load_rows(value_base_ptr, stride_vl, rows, BLOCK_K, D, D_PAD)
        if LOW_VALUES:
            scaled = value.to(tl.float32) * (1.0 / value_scale)[None, :]
            if SPARSE_DTYPE == "int8_fp8":
                low = tl.clamp(scaled, -448.0, 448.0).to(tl.float8e4nv)
            else:
                low = round_to_int8(scaled)
            low_base_ptr = low_values_ptr + (first_block + n) * (BLOCK_K * D_PAD)
            tl.store(low_base_ptr + tile_t, tl.trans(low))
        if NEED_FEATURES:
            phi = row_softmax(smooth if SMOOTH_FEATURES else key, D, D_PAD)
            phi = tl.where(mask_k, phi, 0.0)
            sums_ptr = feature_sums_ptr + (first_block + n) * D_PAD
            tl.store(sums_ptr + offs_d, tl.sum(phi, 0) * FEATURE_UNIT)
            if FEATURE_STORAGE == "fp8":
                low_phi = (phi * FEATURE_UNIT).to(tl.float8e4nv)
                features_base_ptr = features_ptr + (first_block + n) * (BLOCK_K * D_PAD)
                tl.store(features_base_ptr + tile_t, tl.trans(low_phi))
                # The same numbers in a dtype that any matrix unit multiplies in any layout.
                phi = low_phi.to(tl.bfloat16)
                value = low.to(tl.bfloat16)
            else:
                phi = phi.to(value.dtype)
                if FEATURE_STORAGE == "value":
                    features_base_ptr = features_ptr + (first_block + n) * (BLOCK_K * D_PAD)
                    tl.store(features_base_ptr + tile, phi)
            total = tl.dot(tl.trans(phi), value, total, input_precision="tf32x3")

    if NEED_FEATURES:
        partial_ptr = partial_total_ptr + (bh.to(tl.int64) * num_chunks + c) * (D_PAD * D_PAD)
        tl.store(partial_ptr + offs_d[:, None] * D_PAD + offs_d[None, :], total)


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
    feature_storage: FeatureStorage = "value",
) -> KeyOperands:
    """Pass 2 over key, value `[B, L, H, D]`, each contiguous along D.

    Args:
        key_mean, value_max: of `block_statistics`; value_max only for a low-bit P V.
        need_features: whether a linear branch will follow.
        feature_storage: `"value"` stores features in the dtype of V; `"fp8"`, for `"int8_fp8"`
            only, in E4M3; `"none"` leaves it to the linear kernel to compute them again.
    """
    low_keys = sparse_dtype != "bf16"
    low_values = sparse_dtype in ("int8_fp8", "int8_int8")
    if not (low_keys or need_features):
        return KeyOperands()
    batch, length, heads, head_dim = key.shape
    num_k, pad = num_blocks(length, block_k), padded_dim(head_dim)
    num_chunks = max(1, min(num_k, _TOTAL_PROGRAMS // (batch * heads)))
    chunk = -(-num_k // num_chunks)
    num_chunks = -(-num_k // chunk)
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
    partial_total = buffer(need_features, torch.float32, num_chunks, pad, pad)
    with launch_on(key):
        _prepare_keys_kernel[(num_chunks, batch * heads)](
            key,
            value,
            key_mean,
            value_max,
            operands.low_keys,
            operands.key_scale,
            operands.low_values,
            operands.value_scale,
            operands.features,
            operands.feature_sums,
            partial_total,
            *strides(key),
            *strides(value),
            heads,
            length,
            num_k,
            chunk,
            num_chunks,
            D=head_dim,
            D_PAD=pad,
            BLOCK_K=block_k,
            SPARSE_DTYPE=sparse_dtype,
            NEED_FEATURES=need_features,
            FEATURE_STORAGE=feature_storage,
            SMOOTH_FEATURES=phi_k == "smoothed",
            num_warps=8 if pad == 128 else 4,
            num_stages=2,
        )
    if partial_total is None or operands.feature_sums is None:
        return operands
    return operands._replace(
        total=partial_total.sum(2), total_features=operands.feature_sums.sum(2)
    )
