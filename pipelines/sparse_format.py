"""Which number format the sparse branch takes where nobody names one.

Nothing in this file imports torch before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, get_args

from sla_video.kernels.options import SparseDtype
from sla_video.pipelines.errors import InputError

if TYPE_CHECKING:
    import torch

    from sla_video.config import SLAConfig


def check_format(name: str) -> None:
    """Raise `InputError` unless `name` is a format of the sparse branch."""
    known = get_args(SparseDtype)
    if name not in known:
        raise InputError(f"`sparse_dtype` must be one of {', '.join(known)}, got {name!r}")


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the operator runs in Triton there, in 16 bits, compiled."""
    import torch

    from sla_video.kernels.triton_support import interpreted, why_unavailable

    sixteen_bit = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and sixteen_bit and not interpreted() and not why_unavailable()


def fastest_format(device: torch.device) -> SparseDtype:
    """What is fastest on GPUs of its kind.

    Hopper adds FP8 products with too few bits, so that each block's has to be added apart, which
    takes what it saves (`kernels/README.md`). Before Ada there is no FP8.
    """
    if device.type == "cuda":
        capability = _capability(device)
        if capability < (8, 9) or capability == (9, 0):
            return "int8"
    return "int8_fp8"


def choose_format(
    asked: str | None, config: SLAConfig, device: torch.device, dtype: torch.dtype
) -> SparseDtype:
    """The format to generate with.

    Without one that was asked for: of routers that were trained with a low-bit one, theirs; else
    the fastest, where the kernels run. Elsewhere low-bit numbers are simulated, and gain nothing.

    Args:
        config: of the routers, or the defaults.

    Raises:
        InputError: a format that the GPU lacks.
    """
    given = config.sparse_dtype if asked is None else cast("SparseDtype", asked)
    if given == "int8_fp8" and device.type == "cuda" and _capability(device) < (8, 9):
        source = "the routers use" if asked is None else "`sparse_dtype` is"
        raise InputError(
            f"{source} {given!r}, and {device} has no FP8, which takes compute capability 8.9: "
            "use --sparse-dtype int8 or bf16"
        )
    kernels = config.impl in ("auto", "triton") and has_kernels(device, dtype)
    if asked is not None or given != "bf16" or not kernels:
        return given
    fastest = fastest_format(device)
    # 8-bit products of P and V sum over 32 keys at a time.
    return "int8" if fastest == "int8_fp8" and config.block_k < 32 else fastest


def _capability(device: torch.device) -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability(device)
