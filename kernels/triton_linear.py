"""Linear branch over the blocks that are not selected, and the mix with the sparse branch.

    A_m = sum_n S_n,  z_m = sum_n s_n,   n over the key blocks that query block m drops
    O_l[i] = phi(q_i) A_m / (phi(q_i) . z_m)
    O[i]   = alpha_m O_s[i] + (1 - alpha_m) O_l[i]

with the states S_n = phi(K_n)^T V_n and s_n = sum_j phi(k_j) of the key blocks, from
`triton_prepare`. All sums of one head are one product of a table of zeros and ones `[M, N]` and
the states `[N, (D + 1) D]`: work of matrix units that does not depend on the sparsity, 2 M N D^2
operations a head, as many as attending to 1/128 of the keys for D = 128 and the usual blocks. Only
what is dropped is summed, so nothing cancels.

What is here runs inside the kernel of `triton_attend`, whose layouts and names it shares. Hardware:
compute capability 8.0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.triton_tiles import unscaled_softmax


@triton.jit
def linear_rows(
    query,
    state,
    weight,
    state_unit_ptr,
    alpha,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """(1 - alpha) O_l of queries `[ROWS, D_PAD]`, from A_m in their dtype and z_m in float32."""
    offs_d = tl.arange(0, D_PAD)
    # The denominator of phi(q) cancels.
    phi_q = unscaled_softmax(query.to(tl.float32), D, D_PAD)
    divisor = tl.sum(phi_q * weight[None, :], 1)
    # For float32, split operands would not fit into shared memory here.
    linear = tl.dot(phi_q.to(query.dtype), state, input_precision="ieee")
    linear = linear * ((1.0 - alpha) / tl.maximum(divisor, 1e-30))[:, None]
    if state_unit_ptr is not None:
        linear = linear * tl.load(state_unit_ptr + offs_d)[None, :]
    return linear


def sum_dropped_states(states: Tensor, dropped: Tensor) -> Tensor:
    """A_m and z_m of all query blocks: `[B, H, M, P + 1, P]`.

    Args:
        states: S_n and, as one more row, s_n of the key blocks: `[B, H, N, P + 1, P]`.
        dropped: `[B, H, M, N]` in the same dtype, equal and positive where m drops n, else 0.

    N is best a multiple of 8, without which matrix units are not fed at full speed.
    """
    *heads, num_q, _ = dropped.shape
    # Also where this runs under autocast.
    with torch.autocast(states.device.type, enabled=False):
        sums = torch.bmm(dropped.flatten(0, 1), states.flatten(0, 1).flatten(2))
    return sums.view(*heads, num_q, *states.shape[3:])
