"""Compile the Triton kernels before they are needed."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch

from sla_video.kernels.api import sla2_attention
from sla_video.kernels.options import PhiK, Selection, SparseDtype
from sla_video.kernels.triton_support import interpreted

_LOGGER = logging.getLogger("sla_video")
_LENGTH, _SPARSITY = 1000, 0.9
# Wan at 480p, as sparse as is of use.
_TUNED_LENGTH, _TUNED_SPARSITY = 32760, 0.97


def warmup(
    head_dim: int = 128,
    *,
    heads: int = 12,
    length: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    sparse_dtype: SparseDtype = "bf16",
    selection: Selection = "top_k",
    phi_k: PhiK = "smoothed",
    block_q: int = 128,
    block_k: int = 64,
    backward: bool = False,
    return_lse: bool = False,
    tune: bool = False,
    sparsity: float | None = None,
    device: str | torch.device | None = None,
) -> float:
    """Compile what `sla2_attention` will run on a GPU, by running it once on a small problem.

    Compiled kernels stay in this process, and in Triton's cache on disk for the next one. They
    serve every length, sparsity and batch size; only the sort of a row of scores is compiled anew
    for each power of two of L / block_k, in about a second, unless `length` is that of the real
    calls. Other arguments have to be those of the real calls; of `heads` it matters whether they
    are one, a multiple of 16, or neither.

    With `tune`, the launches on the list of each kernel are also timed against each other, in about
    half a minute, and the fastest are used from then on, in other processes too: see
    `kernels/README.md`. Nothing is ever tuned unasked.

    Args:
        head_dim, heads, length: D, H and L of the problem; L is 1,000, and 32,760 to tune at.
        backward: compile the backward pass, too.
        return_lse: of the calls to come.
        tune: find the fastest launches.
        sparsity: of the problem; 0.9, and 0.97 to tune at.
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

    def compile_all() -> None:
        _run_once(
            (1, length or _LENGTH, heads, head_dim),
            dtype,
            device,
            backward=backward,
            # Few blocks are selected, and some are not.
            sparsity=_SPARSITY if sparsity is None else sparsity,
            block_q=block_q,
            block_k=block_k,
            sparse_dtype=sparse_dtype,
            selection=selection,
            phi_k=phi_k,
            return_lse=return_lse,
        )

    compile_all()
    if tune:
        # Needs Triton, which is there if that went well.
        from sla_video.kernels.launch_tuning import Problem, tune_operator

        problem = Problem(
            length=length or _TUNED_LENGTH,
            heads=heads,
            head_dim=head_dim,
            dtype=dtype,
            sparse_dtype=sparse_dtype,
            sparsity=_TUNED_SPARSITY if sparsity is None else sparsity,
            block_q=block_q,
            block_k=block_k,
            selection=selection,
            phi_k=phi_k,
            backward=backward,
        )
        tune_operator(problem, device)
        compile_all()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    done = "compiled and tuned" if tune else "compiled"
    _LOGGER.info("warmup: %s for %s in %.1f s", done, device, seconds)
    return seconds


def _run_once(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    backward: bool,
    **options: Any,
) -> None:
    # Not by the user's generator, whose numbers must not depend on a warm-up.
    numbers = math.prod(shape)
    ramp = torch.linspace(-1, 1, 997, device=device).repeat(numbers // 997 + 1)
    base = ramp[:numbers].view(shape).to(dtype)
    with torch.enable_grad() if backward else torch.no_grad():
        query, key, value = (base.clone().requires_grad_(backward) for _ in range(3))
        result = sla2_attention(query, key, value, impl="triton", **options)
        out = result[0] if isinstance(result, tuple) else result
        if backward:
            out.sum().backward()
