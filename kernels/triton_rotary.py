"""RMSNorm over all heads and rotary embedding of Q and K, in one pass over memory.

    y = x / sqrt(mean(x^2 over H D) + eps) * weight
    z[2i] = y[2i] cos[i] - y[2i+1] sin[i],  z[2i+1] = y[2i] sin[i] + y[2i+1] cos[i]

Inputs are `[B, L, H*D]` as the projections leave them, outputs `[B, L, H, D]`. Everything between
is float32 and rounded once. Compilers make two or three kernels of it, and rows of several
thousand channels are read again by each. There is no gradient. Hardware: compute capability 8.0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.triton_tiles import launch_on

# Elements of a tile, at least, and of each warp: few registers, so many warps wait at a time.
_TILE = 4096
_WARP_TILE = 512
# Half of a multiprocessor's for 16 warps, which two more than that would leave alone there.
_MAX_REGISTERS = 64


@triton.jit
def _normed_and_rotated(
    x,
    weight_ptr,
    offs_c,
    real,
    turn_cos,
    turn_sin,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    H_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Rows x `[ROWS, H_PAD, D_PAD]` normed and turned; turns are `[ROWS, 1, D_PAD / 2]`."""
    x = x.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(tl.sum(x * x, 2), 1) / C + eps)
    weight = tl.load(weight_ptr + offs_c, mask=real, other=0.0).to(tl.float32)
    y = x * factor[:, None, None] * weight
    even, odd = tl.split(tl.reshape(y, (ROWS, H_PAD, D_PAD // 2, 2)))
    z = tl.join(even * turn_cos - odd * turn_sin, even * turn_sin + odd * turn_cos)
    return tl.reshape(z, (ROWS, H_PAD, D_PAD))


@triton.jit(do_not_specialize=["length", "eps"])
def _norm_rotate_kernel(
    query_ptr,
    key_ptr,
    query_weight_ptr,
    key_weight_ptr,
    cos_ptr,
    sin_ptr,
    query_out_ptr,
    key_out_ptr,
    stride_qb,
    stride_ql,
    stride_kb,
    stride_kl,
    stride_cl,
    stride_sl,
    stride_qob,
    stride_qol,
    stride_kob,
    stride_kol,
    length,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    H_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """One program per ROWS tokens of one batch entry: their queries and their keys.

    Outputs may be the inputs. Warps may hold other elements as they load than as they store, so
    stores wait for the loads of all.
    """
    start = (tl.program_id(0) * ROWS).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    # [ROWS, H_PAD, D_PAD]
    offs_l = tl.arange(0, ROWS)[:, None, None]
    offs_h = tl.arange(0, H_PAD)[None, :, None]
    offs_d = tl.arange(0, D_PAD)[None, None, :]
    offs_c = offs_h * D + offs_d
    real = (offs_h < H) & (offs_d < D)
    rows = offs_l < length - start
    mask = rows & real
    # Both are asked for before either is waited for.
    query_ptr += b * stride_qb + start * stride_ql
    key_ptr += b * stride_kb + start * stride_kl
    query = tl.load(query_ptr + offs_l * stride_ql + offs_c, mask=mask, other=0.0)
    key = tl.load(key_ptr + offs_l * stride_kl + offs_c, mask=mask, other=0.0)
    # Of the two equal numbers that belong to a pair, cosines are read at the first and sines at
    # the second, as the stock processor does. [ROWS, 1, D_PAD / 2]
    offs_p = 2 * tl.arange(0, D_PAD // 2)[None, None, :]
    turn_mask = rows & (offs_p < D)
    cos_ptr += start * stride_cl
    sin_ptr += start * stride_sl
    cos = tl.load(cos_ptr + offs_l * stride_cl + offs_p, mask=turn_mask, other=0.0)
    sin = tl.load(sin_ptr + offs_l * stride_sl + offs_p + 1, mask=turn_mask, other=0.0)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    query = _normed_and_rotated(
        query, query_weight_ptr, offs_c, real, cos, sin, eps, H * D, ROWS, H_PAD, D_PAD
    )
    key = _normed_and_rotated(
        key, key_weight_ptr, offs_c, real, cos, sin, eps, H * D, ROWS, H_PAD, D_PAD
    )
    query_out_ptr += b * stride_qob + start * stride_qol
    key_out_ptr += b * stride_kob + start * stride_kol
    query = query.to(query_out_ptr.dtype.element_ty)
    key = key.to(key_out_ptr.dtype.element_ty)
    tl.debug_barrier()
    tl.store(query_out_ptr + offs_l * stride_qol + offs_c, query, mask=mask)
    tl.store(key_out_ptr + offs_l * stride_kol + offs_c, key, mask=mask)


@torch.library.custom_op("sla_video::norm_rotate", mutates_args=())
def _norm_rotate(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    shape = _split(query, heads)
    out = query.new_empty(shape), query.new_empty(shape)
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    _launch(query, key, query_weight, key_weight, cos, sin, *out, heads=heads, eps=eps)
    return out


@_norm_rotate.register_fake
def _(query: Tensor, key: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    *_, heads, _ = more
    shape = _split(query, heads)
    return query.new_empty(shape), query.new_empty(shape)


@torch.library.custom_op("sla_video::norm_rotate_", mutates_args={"query", "key"})
def _norm_rotate_(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> None:
    _launch(query, key, query_weight, key_weight, cos, sin, query, key, heads=heads, eps=eps)


@_norm_rotate_.register_fake
def _(*_: Any) -> None:
    return


def _split(states: Tensor, heads: int) -> tuple[int, ...]:
    return (*states.shape[:2], heads, states.shape[2] // heads)


def _launch(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_out: Tensor,
    key_out: Tensor,
    *,
    heads: int,
    eps: float,
) -> None:
    """Outputs may be the inputs; heads lie side by side in a row of either."""
    batch, length, _, head_dim = _split(query, heads)
    heads_pad, pad = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim)
    cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (cos, sin))
    rows = max(1, _TILE // (heads_pad * pad))
    num_warps = max(1, rows * heads_pad * pad // _WARP_TILE)
    with launch_on(query):
        _norm_rotate_kernel[(triton.cdiv(length, rows), batch)](
            query,
            key,
            query_weight.contiguous(),
            key_weight.contiguous(),
            cos,
            sin,
            query_out,
            key_out,
            *query.stride()[:2],
            *key.stride()[:2],
            cos.stride(1),
            sin.stride(1),
            *query_out.stride()[:2],
            *key_out.stride()[:2],
            length,
            eps,
            H=heads,
            D=head_dim,
            ROWS=rows,
            H_PAD=heads_pad,
            D_PAD=pad,
            num_warps=num_warps,
            maxnreg=_MAX_REGISTERS,
        )


def norm_rotate(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    eps: float,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over all channels, then rotary embedding of neighbouring pairs in each head.

    Args:
        query, key: `[B, L, H*D]`, any strides, D even. `rotary_refusal` says what else they have
            to be.
        query_weight, key_weight: `[H*D]`.
        cos, sin: `[1, L, 1, D]`, each number twice.
        heads: H.
        eps: added to the mean of squares.
        in_place: write the result over query and key, whose channels then have to lie side by side
            and no two of whose rows may share memory.

    Returns:
        query and key `[B, L, H, D]` in their own dtype, contiguous or in place; without gradients.
    """
    if in_place:
        _norm_rotate_(query, key, query_weight, key_weight, cos, sin, heads, eps)
        return query.unflatten(2, (heads, -1)), key.unflatten(2, (heads, -1))
    both: tuple[Tensor, Tensor] = _norm_rotate(
        query, key, query_weight, key_weight, cos, sin, heads, eps
    )
    return both
