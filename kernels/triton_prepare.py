"""Second pass of the Triton implementation over K and V, with Ks = K - mean(K) over all tokens.

Writes what the sparse and the linear branch take of each key block n:

    low_keys[n]     = round(Ks[n] / s_n)          INT8, one scale s_n = max|Ks[n]| / 127 per block
    key_norm[n]     = max_j |Ks[j]| over block n  where logits are to be bounded (`triton_bounded`)
    low_values[n]   = V[n]^T / s_d                FP8 E4M3 or INT8, one scale per channel
    states[n]       = phi(Ks[n])^T V[n]           or of K[n]; phi is softmax over D. Of float16
                                                  V[n] / max|V| is taken, which cannot overflow
    states[n, -1]   = sum_j phi(k_j)

K and V are read once, where they lie: the tokens of block n are those that an order of keys names,
where heads have one. Layouts: inputs are `[B, L, H, D]` with any strides but 1 along D. What is
written is `[B, H, N, ...]`, one contiguous tile per key block, rows padded with zeros to whole
blocks and D to `padded_dim(D)`, so that later kernels need no masks to load it. Low-bit V is stored
transposed, `[D, block_k]`, because the FP8 matrix units of Hopper and Ada take both operands only
with the summed dimension contiguous; keys stand in `matrix_order` there. Hardware: compute
capability 8.0; FP8 8.9.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.launch_choice import launch_config
from sla_video.kernels.launch_lists import LaunchConfig
from sla_video.kernels.options import PhiK, SparseDtype
from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_tiles import (
    blocks_per_program,
    launch_on,
    matrix_order,
    multiprocessors,
    padded_dim,
    padded_row,
    quantization_scale,
    round_to_int8,
    strides,
    unscaled_softmax,
)


class KeyOperands(NamedTuple):
    """What is made of K and V for both branches; P is `padded_dim(D)`.

    Attributes:
        low_keys, key_scale: INT8 `[B, H, N, block_k, P]` and its scales `[B, H, N]`.
        key_norm: `[B, H, N]` float32, largest norm of a smoothed key of the block.
        low_values, value_scale: FP8 or INT8 `[B, H, N, P, block_k]`, keys in `matrix_order`, and
            its scales `[B, H, P]`.
        states: `[B, H, N, P + 1, P]` in the dtype of V, then blocks of zeros to a multiple of 16.
        state_unit: `[B, H, P]` float32, what states are to be multiplied by; None for 1.
    """

    low_keys: Tensor | None = None
    key_scale: Tensor | None = None
    key_norm: Tensor | None = None
    low_values: Tensor | None = None
    value_scale: Tensor | None = None
    states: Tensor | None = None
    state_unit: Tensor | None = None


@triton.jit
def _transposed(x, BLOCK_K: tl.constexpr, D_PAD: tl.constexpr):
    """Tile `[D_PAD, BLOCK_K]` of x `[BLOCK_K, D_PAD]`, position 4 i + j from row j BLOCK_K / 4 + i.

    A thread has loaded the four rows of one i: it moves four bytes at a time, not single ones.
    """
    x = tl.permute(tl.reshape(x, (4, BLOCK_K // 4, D_PAD)), (2, 1, 0))
    return tl.reshape(x, (D_PAD, BLOCK_K))


@triton.jit
def _larger(x, y, other_x, other_y):
    return tl.maximum(x, other_x), tl.maximum(y, other_y)


@triton.jit(do_not_specialize=["heads", "length", "num_k", "state_blocks", "run"])
def _prepare_keys_kernel(
    key_ptr,
    value_ptr,
    key_mean_ptr,
    value_max_ptr,
    low_keys_ptr,
    key_scale_ptr,
    key_norm_ptr,
    low_values_ptr,
    value_scale_ptr,
    states_ptr,
    state_unit_ptr,
    places_ptr,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    heads,
    length,
    num_k,
    state_blocks,
    run,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPARSE_DTYPE: tl.constexpr,
    SMOOTH_FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per run of key blocks."""
    part = tl.program_id(0)
    # From the last head to the first: of what was read last, much is still in the L2 cache.
    bh = tl.num_programs(1) - 1 - tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    LOW_VALUES: tl.constexpr = SPARSE_DTYPE == "int8_fp8" or SPARSE_DTYPE == "int8_int8"
    offs_d = tl.arange(0, D_PAD)
    mask_d = offs_d < D
    # Rows of K and V are read in the order that `_transposed` wants.
    position = tl.arange(0, BLOCK_K)
    offs_k = matrix_order(position % (BLOCK_K // 4) * 4 + position // (BLOCK_K // 4))
    tile = offs_k[:, None] * D_PAD + offs_d[None, :]
    mean = tl.load(key_mean_ptr + bh * D + offs_d, mask=mask_d, other=0.0)
    LARGEST: tl.constexpr = 448.0 if SPARSE_DTYPE == "int8_fp8" else 127.0
    if value_max_ptr is not None:  # noqa: SIM102, a constant and a value
        if part == 0:
            largest = tl.load(value_max_ptr + bh * D + offs_d, mask=mask_d, other=0.0)
            if LOW_VALUES:
                scale = quantization_scale(largest, LARGEST)
                tl.store(value_scale_ptr + bh * D_PAD + offs_d, scale)
            if state_unit_ptr is not None:
                unit = quantization_scale(largest, 1.0)
                tl.store(state_unit_ptr + bh * D_PAD + offs_d, unit)
    key_base_ptr = key_ptr + b * stride_kb + h * stride_kh
    value_base_ptr = value_ptr + b * stride_vb + h * stride_vh
    first_block = bh.to(tl.int64) * num_k

    last = tl.minimum((part + 1) * run, num_k)
    # Without a way around the loop, its matrix products need not wait for each other.
    tl.assume(last > part * run)
    for n in range(part * run, last):
        block = first_block + n
        first = block * (BLOCK_K * D_PAD)
        start = tl.cast(n, tl.int64) * BLOCK_K
        rows = length - n * BLOCK_K
        exists = offs_k < rows
        # Absent keys repeat the last one, which leaves the largest magnitude as it is.
        rows_k = tl.minimum(offs_k, rows - 1)
        if places_ptr is None:
            key_block_ptr = key_base_ptr + start * stride_kl
            key_block_ptr += rows_k[:, None] * stride_kl + offs_d[None, :]
        else:
            row_ptr = places_ptr + bh.to(tl.int64) * length + start
            places = tl.load(row_ptr + rows_k).to(tl.int64)
            key_block_ptr = key_base_ptr + places[:, None] * stride_kl + offs_d[None, :]
        if D < D_PAD:
            key = tl.load(key_block_ptr, mask=mask_d[None, :], other=0.0).to(tl.float32)
        else:
            key = tl.load(key_block_ptr).to(tl.float32)

        smooth = key - mean[None, :]
        if SPARSE_DTYPE != "bf16":
            if key_norm_ptr is None:
                largest_key = tl.max(tl.abs(smooth))
            else:
                # Both at once: threads wait for each other as often as for one.
                largest_key, square = tl.reduce(
                    (tl.max(tl.abs(smooth), 1), tl.sum(smooth * smooth, 1)), 0, _larger
                )
                tl.store(key_norm_ptr + block, tl.sqrt(square))
            key_scale = quantization_scale(largest_key, 127.0)
            tl.store(key_scale_ptr + block, key_scale)
            factor = tl.where(exists, 1.0 / key_scale, 0.0)
            tl.store(low_keys_ptr + first + tile, round_to_int8(smooth * factor[:, None]))
        if states_ptr is not None:
            phi = unscaled_softmax(smooth if SMOOTH_FEATURES else key, D, D_PAD)
            phi = phi * tl.where(exists, 1.0 / tl.sum(phi, 1), 0.0)[:, None]
            phi = phi.to(value_ptr.dtype.element_ty)
            state_block = bh.to(tl.int64) * state_blocks + n
            state_ptr = states_ptr + state_block * ((D_PAD + 1) * D_PAD)
            # Of the rounded features, as the products.
            sums = tl.sum(phi.to(tl.float32), 0)
            tl.store(state_ptr + D_PAD * D_PAD + offs_d, sums.to(states_ptr.dtype.element_ty))
        if LOW_VALUES or states_ptr is not None:
            # Some columns of V at a time, which bounds registers.
            for column in tl.static_range(0, D_PAD, COLUMNS):
                offs_e = column + tl.arange(0, COLUMNS)
                mask = exists[:, None]
                if D < D_PAD:
                    mask = mask & (offs_e < D)[None, :]
                if places_ptr is None:
                    value_block_ptr = value_base_ptr + start * stride_vl
                    value_block_ptr += offs_k[:, None] * stride_vl + offs_e[None, :]
                else:
                    value_block_ptr = value_base_ptr + places[:, None] * stride_vl
                    value_block_ptr += offs_e[None, :]
                value = tl.load(value_block_ptr, mask=mask, other=0.0)
                if value_max_ptr is not None:
                    value_max = tl.load(value_max_ptr + bh * D + offs_e, mask=offs_e < D, other=0.0)
                if LOW_VALUES:
                    scale = quantization_scale(value_max, LARGEST)
                    low = value.to(tl.float32) * (1.0 / scale)[None, :]
                    # The conversion to FP8 saturates, so rounding of the scale does no harm.
                    if SPARSE_DTYPE == "int8_fp8":
                        low = low.to(tl.float8e4nv)
                    else:
                        low = round_to_int8(low)
                    tile_t = offs_e[:, None] * BLOCK_K + position[None, :]
                    low = _transposed(low, BLOCK_K, COLUMNS)
                    tl.store(low_values_ptr + first + tile_t, low)
                if states_ptr is not None:
                    state = tl.dot(tl.trans(phi), value, input_precision="tf32x3")
                    if state_unit_ptr is not None:
                        state = state * (1.0 / quantization_scale(value_max, 1.0))[None, :]
                    square = offs_d[:, None] * D_PAD + offs_e[None, :]
                    tl.store(state_ptr + square, state.to(states_ptr.dtype.element_ty))


def _config(key: Tensor, block_k: int, need_states: bool) -> LaunchConfig:
    if not need_states:
        return LaunchConfig(4, 1)
    variant = "" if block_k <= 64 else "long blocks"
    return launch_config("prepare_keys", key, block_k=block_k, variant=variant)


def prepare_keys(
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    value_max: Tensor | None,
    *,
    block_k: int,
    sparse_dtype: SparseDtype,
    phi_k: PhiK,
    need_states: bool,
    need_key_norm: bool = False,
    places: Tensor | None = None,
) -> KeyOperands:
    """Pass 2 over key, value `[B, L, H, D]`, each contiguous along D.

    Args:
        key_mean, value_max: of `block_statistics`; value_max for a low-bit P V and for float16.
        need_states: whether a linear branch will follow.
        need_key_norm: whether logits are to be bounded; of low-bit keys only.
        places: `[B, H, L]` int32 of a `KeyOrder`.
    """
    low_keys = sparse_dtype != "bf16"
    low_values = sparse_dtype in ("int8_fp8", "int8_int8")
    if not (low_keys or need_states):
        return KeyOperands()
    batch, length, heads, head_dim = key.shape
    num_k, pad = num_blocks(length, block_k), padded_dim(head_dim)

    def buffer(wanted: bool, dtype: torch.dtype, *shape: int) -> Tensor | None:
        if not wanted:
            return None
        return torch.empty(batch, heads, *shape, dtype=dtype, device=key.device)

    low_dtype = torch.float8_e4m3fn if sparse_dtype == "int8_fp8" else torch.int8
    half = need_states and value.dtype == torch.float16
    operands = KeyOperands(
        low_keys=buffer(low_keys, torch.int8, num_k, block_k, pad),
        key_scale=buffer(low_keys, torch.float32, num_k),
        key_norm=buffer(low_keys and need_key_norm, torch.float32, num_k),
        low_values=buffer(low_values, low_dtype, num_k, pad, block_k),
        value_scale=buffer(low_values, torch.float32, pad),
        states=buffer(need_states, value.dtype, padded_row(num_k), pad + 1, pad),
        state_unit=buffer(half, torch.float32, pad),
    )
    if operands.states is not None and operands.states.shape[2] > num_k:
        operands.states[:, :, num_k:].zero_()
    need_max = half or low_values
    assert value_max is not None or not need_max, "statistics lack the largest values"
    # Runs of blocks let a program fetch one while it works on another.
    run = 1
    if need_states:
        programs = 2 * multiprocessors(key.device)
        run = blocks_per_program(num_k, batch * heads, programs)
    with launch_on(key):
        _prepare_keys_kernel[(-(-num_k // run), batch * heads)](
            key,
            value,
            key_mean.contiguous(),
            value_max if need_max else None,
            operands.low_keys,
            operands.key_scale,
            operands.key_norm,
            operands.low_values,
            operands.value_scale,
            operands.states,
            operands.state_unit,
            None if places is None else places.contiguous(),
            *strides(key),
            *strides(value),
            heads,
            length,
            num_k,
            padded_row(num_k),
            run,
            D=head_dim,
            D_PAD=pad,
            BLOCK_K=block_k,
            SPARSE_DTYPE=sparse_dtype,
            SMOOTH_FEATURES=phi_k == "smoothed",
            COLUMNS=min(pad, 64),
            **_config(key, block_k, need_states).keywords(),
        )
    return operands
