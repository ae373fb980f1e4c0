"""Compile the Triton kernels before they are needed."""

from __future__ import annotations

import logging
import time

import torch

from sla_video.kernels.api import sla2_attention
from sla_video.kernels.options import PhiK, Selection, SparseDtype
from sla_video.kernels.triton_support import interpreted

_LOGGER = logging.getLogger("sla_video")


def warmup(
    head_dim: int = 128,
    *,
    heads: int = 12,
    length: int = 1000,
    dtype: torch.dtype = torch.bfloat16,
    sparse_dtype: SparseDtype = "bf16",
    selection: Selection = "top_k",
    phi_k: PhiK = "smoothed",
    block_q: int = 128,
    block_k: int = 64,
    backward: bool = False,
    return_lse: bool = False,
    device: str | torch.device | None = None,
) -> float:
    """Compile what `sla2_attention` will run on a GPU, by running it once on a small problem.

    Compiled kernels stay in this process, and in Triton's cache on disk for the next one. They
    serve every length, sparsity and batch size; only the sort of a row of scores is compiled anew
    for each power of two of L / block_k, in about a second, unless `length` is that of the real
    calls. Other arguments have to be those of the real calls; of `heads` it matters whether they
    are one, a multiple of 16, or neither.

    Args:
        head_dim, heads, length: D, H and L of the problem.
        backward: compile the backward pass, too.
        return_lse: of the calls to come.
        device: a GPU, by default the current one. On others nothing is compiled.

    Returns:
        the seconds it took; 0 where there is nothing to compile.

    Raises:
        ValueError: sizes or options that the kernels are not made for.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    # Interpreted kernels run anywhere.
    if device.type != "cuda" and not interpreted():
        _LOGGER.info("warmup: there is nothing to compile for %s", device)
        return 0.0
    start = time.perf_counter()
    shape = (1, length, heads, head_dim)
    # Not by the user's generator, whose numbers must not depend on a warm-up.
    ramp = torch.linspace(-1, 1, 997, device=device).repeat(length * heads * head_dim // 997 + 1)
    base = ramp[: length * heads * head_dim].view(shape).to(dtype)
    with torch.enable_grad() if backward else torch.no_grad():
        query, key, value = (base.clone().requires_grad_(backward) for _ in range(3))
        result = sla2_attention(
            query,
            key,
            value,
            # Few blocks are selected, and some are not.
            sparsity=0.9,
            block_q=block_q,
            block_k=block_k,
            sparse_dtype=sparse_dtype,
            selection=selection,
            phi_k=phi_k,
            impl="triton",
            return_lse=return_lse,
        )
        out = result[0] if isinstance(result, tuple) else result
        if backward:
            out.sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    _LOGGER.info("warmup: compiled for %s in %.1f s", device, seconds)
    return seconds
