"""Where the Triton implementation runs and what it can do, without importing Triton."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from sla_video.kernels.options import Options, SparseDtype

# Ampere: the first generation with asynchronous copies and bfloat16 matrix units.
_OLDEST_CAPABILITY = (8, 0)
# Ada: the first with FP8 matrix units.
_FP8_CAPABILITY = (8, 9)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 128
# Shared memory that tiles of 128 x 128 float32 take, as on data centre GPUs; 64 columns fit others.
_FLOAT32_SHARED_BYTES = 196608
_BLOCKS = (16, 32, 64, 128)
# CUDA's limit on the second dimension of a grid.
_MOST_HEADS = 65535
# A row of all heads is one tile of the kernel that norms it.
_MOST_HEADS_IN_A_ROW = 64


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def interpreted() -> bool:
    """Whether Triton was told to interpret kernels, which is for tests: slow, but on any device."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_unavailable() -> str | None:
    """Why no Triton kernel runs on this machine; None if they do."""
    if importlib.util.find_spec("triton") is None:
        return "not available: the package 'triton' is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "not available: there is no CUDA GPU; use 'torch' instead"
    return _too_old(torch.device("cuda", torch.cuda.current_device()))


def why_not(query: Tensor, options: Options) -> str | None:
    """Why the Triton implementation cannot do this call; None if it can.

    Arguments are those of `sla2_attention`, already checked.
    """
    reason: str | None = why_unavailable()
    if reason is not None:
        return reason
    batch, _, heads, head_dim = query.shape
    # Not `head_dim` itself, which is a symbol where a compiler takes sizes for dynamic.
    columns = 64 if head_dim <= 64 else 128
    reason = _why_not_on(query.device, query.dtype, columns, options.sparse_dtype)
    if reason is not None:
        return reason
    if query.dtype not in DTYPES:
        return f"for float16, bfloat16 and float32, got {query.dtype}; use 'torch' instead"
    if head_dim > LARGEST_HEAD_DIM:
        return f"for head dimensions up to {LARGEST_HEAD_DIM}, got {head_dim}; use 'torch' instead"
    if batch * heads > _MOST_HEADS:
        return f"for at most {_MOST_HEADS} heads in a batch, got {batch} x {heads}"
    # The 8-bit matrix units sum over 32 elements at a time.
    blocks_k = _BLOCKS[1:] if options.sparse_dtype in ("int8_fp8", "int8_int8") else _BLOCKS
    for name, block, known in (
        ("block_q", options.block_q, _BLOCKS),
        ("block_k", options.block_k, blocks_k),
    ):
        if block not in known:
            return (
                f"for `{name}` in {', '.join(map(str, known))} with sparse_dtype="
                f"{options.sparse_dtype!r}, got {block}; use 'torch' instead"
            )
    return None


def rotary_refusal(states: Tensor, heads: int) -> str | None:
    """Why `triton_rotary` cannot take queries or keys `[B, L, H*D]`; None if it can."""
    reason: str | None = why_unavailable()
    if reason is not None:
        return reason
    # Of what is told apart there, a pass over memory needs no more than the smallest.
    reason = _why_not_on(states.device, states.dtype, 64, "bf16")
    if reason is not None:
        return reason
    if states.dtype not in DTYPES:
        return f"for float16, bfloat16 and float32, got {states.dtype}"
    head_dim = states.shape[-1] // heads
    if head_dim % 2 or head_dim > LARGEST_HEAD_DIM or heads > _MOST_HEADS_IN_A_ROW:
        return (
            f"for even head dimensions up to {LARGEST_HEAD_DIM} and up to {_MOST_HEADS_IN_A_ROW} "
            f"heads, got {head_dim} and {heads}"
        )
    if states.shape[0] > _MOST_HEADS:
        return f"for batches of at most {_MOST_HEADS}, got {states.shape[0]}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_not_on(
    device: torch.device, dtype: torch.dtype, columns: int, sparse_dtype: SparseDtype
) -> str | None:
    """What the device lacks; None if nothing."""
    if interpreted():
        return None
    if device.type != "cuda":
        return f"for CUDA tensors, and `query` is on {device}; use 'torch' instead"
    reason = _too_old(device)
    if reason is not None:
        return reason
    if sparse_dtype == "int8_fp8" and _capability(device) < _FP8_CAPABILITY:
        return (
            f"without FP8 on {torch.cuda.get_device_name(device)}, whose compute "
            "capability is below 8.9; use sparse_dtype='int8' or 'int8_int8'"
        )
    if dtype == torch.float32 and columns > 64:
        properties = torch.cuda.get_device_properties(device)
        shared_bytes = getattr(properties, "shared_memory_per_block_optin", 0)
        if shared_bytes < _FLOAT32_SHARED_BYTES:
            return (
                f"for float32 with head dimensions up to 64 on {properties.name}; "
                "use a 16-bit dtype, or 'torch' instead"
            )
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _too_old(device: torch.device) -> str | None:
    found = _capability(device)
    if found >= _OLDEST_CAPABILITY:
        return None
    return (
        "not available: it needs compute capability 8.0 or newer, and "
        f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; use 'torch' instead"
    )
