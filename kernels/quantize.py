"""Simulated low-bit arithmetic of the sparse branch (scheme of SageAttention2++, arXiv 2505.21136).

Every function quantizes and dequantizes at once and keeps the dtype of its input, so that the
same matmuls run on values that a low-bit kernel could hold. Nothing here is differentiable on
purpose: the backward pass of the low-bit branch is that of the unquantized one
(see `kernels/README.md`), so callers run these functions without gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla_video.kernels.options import SparseDtype

INT8_MAX = 127.0
E4M3_MAX = 448.0


def _scale(x: Tensor, dim: int | tuple[int, ...], largest: float) -> Tensor:
    scale = x.abs().amax(dim, keepdim=True) / largest
    # An all-zero block has no scale; 1 keeps it zero.
    return torch.where(scale > 0, scale, torch.ones_like(scale))


@torch.no_grad()
def quantize_int8(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Round `x` to symmetric INT8 and back, one scale for all entries along `dim`."""
    scale = _scale(x, dim, INT8_MAX)
    return (x / scale).round().clamp(-INT8_MAX, INT8_MAX) * scale


@torch.no_grad()
def quantize_fp8(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Round `x` to FP8 E4M3 and back, one scale for all entries along `dim`."""
    scale = _scale(x, dim, E4M3_MAX)
    return _round_e4m3((x / scale).clamp(-E4M3_MAX, E4M3_MAX)) * scale


def quantize_value(value: Tensor, sparse_dtype: SparseDtype) -> Tensor:
    """Quantize V `[..., L, D]` with one scale per channel, where `sparse_dtype` asks for it."""
    if sparse_dtype == "int8_fp8":
        return quantize_fp8(value, -2)
    if sparse_dtype == "int8_int8":
        return quantize_int8(value, -2)
    return value


@torch.no_grad()
def quantize_weights(weights: Tensor, sparse_dtype: SparseDtype) -> Tensor:
    """Quantize unnormalised softmax weights `exp(s - max) ∈ [0, 1]` with a fixed scale.

    The fixed scale needs no search for a maximum, since the largest weight of a row is 1.
    """
    if sparse_dtype == "int8_fp8":
        return _round_e4m3(weights * E4M3_MAX) / E4M3_MAX
    if sparse_dtype == "int8_int8":
        return (weights * INT8_MAX).round() / INT8_MAX
    return weights


def _round_e4m3(x: Tensor) -> Tensor:
    return x.to(torch.float32).to(torch.float8_e4m3fn).to(x.dtype)
