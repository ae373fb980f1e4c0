"""What rounding P and V to FP8 E4M3 costs, whatever the kernel.

E4M3 has 3 mantissa bits: rounding moves a number by 2.6% (root mean square), and P and V are
rounded independently, which makes 3.7% of O_s. Here nothing else is rounded, all is float64, and
each row of P and each channel of V has the best of 8 scales in an octave. Letters as in
`sampled_reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sla_video.kernels.options import Options
from sla_video.kernels.quantize import E4M3_MAX
from sla_video.kernels.sampled_reference import SampledReference

_SCALES = [2 ** (i / 8) for i in range(8)]


def e4m3_bound(qkv: Sequence[Tensor], options: Options, exact: SampledReference) -> float:
    """Relative L2 error of the sampled rows of the mixed output for Q, K, V `[B, L, H, D]`."""
    query, key, value = qkv
    length, block_q, block_k = query.shape[1], options.block_q, options.block_k
    squares = 0.0
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            q, k, v = (x[b, :, h].double() for x in (query, key, value))
            low_v = round_e4m3(v, 0)
            for i, m in enumerate(dict.fromkeys((exact.rows // block_q).tolist())):
                kept = exact.selected[b, h, i].repeat_interleave(block_k)[:length]
                logits = q[m * block_q : (m + 1) * block_q] @ k[kept].mT / q.shape[-1] ** 0.5
                weights = torch.softmax(logits, -1)
                change = round_e4m3(weights, -1) @ low_v[kept] - weights @ v[kept]
                squares += float((exact.alpha[b, h, i] * change).square().sum())
    return squares**0.5 / float(exact.output.norm())


def round_e4m3(x: Tensor, dim: int) -> Tensor:
    """x rounded, with one scale for all along `dim`: the one with the smallest error."""
    largest = x.abs().amax(dim, keepdim=True).clamp(min=1e-300)
    best, smallest = x, torch.full_like(largest, torch.inf)
    for factor in _SCALES:
        scale = largest * factor / E4M3_MAX
        rounded = (x / scale).float().to(torch.float8_e4m3fn).to(x.dtype) * scale
        error = (rounded - x).square().sum(dim, keepdim=True)
        best = torch.where(error < smallest, rounded, best)
        smallest = torch.minimum(error, smallest)
    return best
