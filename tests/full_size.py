"""Inputs and error budgets of the full-size tests of the Triton operator.

Everything is compared with the float64 reference, on a sample of query blocks where there are many.
Letters: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

import torch
from e4m3_bound import e4m3_bound
from operator_inputs import dense_attention, options
from torch.nn import functional as F
from triton_cases import DEVICE, relative

from sla_video.kernels.api import sla2_attention
from sla_video.kernels.sampled_reference import clear_error, sampled_reference, spread_blocks

SAMPLED_BLOCKS = 3


def gaussian(length, *, batch=1, heads=2, head_dim=64, dtype=torch.bfloat16, seed=0):
    """Query, key, value `[B, L, H, D]`."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shape = (batch, length, heads, head_dim)
    return [
        torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)
        for _ in range(3)
    ]


def with_outliers(qkv, seed=1):
    """Keys as those of real models are: channels with offsets, some very large, and odd entries.

    All tokens share an offset of one standard deviation in each channel, of 50 in every sixteenth;
    one entry in a thousand is five times as large.
    """
    query, key, value = qkv
    generator = torch.Generator(key.device).manual_seed(seed)
    draw = {"generator": generator, "device": key.device, "dtype": torch.float32}
    offset = torch.randn(key.shape[-1], **draw)
    offset[::16] *= 50
    odd = torch.rand(key.shape, **draw) < 1e-3
    return [query, (key * (1 + 4 * odd) + offset).to(key.dtype), value]


LAYOUTS = {
    "heads_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "fused_qkv": lambda x: torch.stack([x] * 3, 2)[:, :, 1],
    "every_other_token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "head_dim_strided": lambda x: x.mT.contiguous().mT,
    "off_by_one": lambda x: F.pad(x, (1, 2))[..., 1:-2],
}


def operator(qkv, sparsity, sparse_dtype, **settings):
    return sla2_attention(
        *qkv, sparsity=sparsity, sparse_dtype=sparse_dtype, impl="triton", **settings
    )


def chosen_options(sparsity, sparse_dtype="bf16"):
    return options(sparsity=sparsity, sparse_dtype=sparse_dtype, block_q=128, block_k=64)


def forward_failures(qkv, sparsity, sparse_dtype, name, *, low_bit_limit=0.02, blocks=None):
    """A line for each output that is too far from the unquantized float64 reference.

    16-bit: twice the error of dense `scaled_dot_product_attention` in that dtype. INT8:
    `low_bit_limit`. INT8 and FP8: `low_bit_limit`, or where rounding P and V to E4M3 costs more
    than that by itself, 1.25 times this and the error of INT8 together (as independent errors
    add): fixed scales are up to a tenth worse than the best ones where there are few tokens.
    """
    chosen = chosen_options(sparsity)
    if blocks is None:
        blocks = spread_blocks(qkv[0].shape[1], chosen.block_q, SAMPLED_BLOCKS)
    sixteen_bit = sparse_dtype == "bf16"
    with torch.no_grad():
        wanted = sampled_reference(*qkv, None, chosen, blocks, need_dense=sixteen_bit)
        out = operator(qkv, sparsity, sparse_dtype)
        error = clear_error(out, wanted)
        limit = low_bit_limit
        if sixteen_bit:
            query = qkv[0][:, wanted.rows]
            limit = 2 * relative(dense_attention(query, *qkv[1:]), wanted.dense) + 1e-6
        elif sparse_dtype == "int8_fp8" and error > limit:
            int8 = min(0.02, clear_error(operator(qkv, sparsity, "int8"), wanted))
            limit = max(limit, 1.25 * (e4m3_bound(qkv, chosen, wanted) ** 2 + int8**2) ** 0.5)
    failures = []
    if out.dtype != qkv[0].dtype or out.shape != qkv[0].shape or not out.isfinite().all():
        failures.append(f"{name}: {out.dtype} {list(out.shape)}, finite {out.isfinite().all()}")
    # Comparing nothing would pass.
    if (wanted.margin > 1e-4).double().mean() < 0.5:
        failures.append(f"{name}: hardly any selection is clear")
    if not error <= limit:
        failures.append(f"{name}: relative error {error:.4f}, allowed {limit:.4f}")
    return failures


def gradient_failures(qkv, sparsity, sparse_dtype, limit, name):
    """A line for each gradient that is off by more than `limit`, the loss on sampled rows alone."""
    chosen = chosen_options(sparsity, sparse_dtype)
    blocks = spread_blocks(qkv[0].shape[1], chosen.block_q, SAMPLED_BLOCKS)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    wanted = sampled_reference(*exact, None, chosen, blocks)
    clear = (wanted.margin > 1e-4).transpose(1, 2)[..., None]
    generator = torch.Generator(DEVICE).manual_seed(2)
    weight = torch.randn(wanted.output.shape, generator=generator, device=DEVICE) * clear
    # What the kernels are given, rounded as they are given it.
    weight = weight.to(qkv[0].dtype)
    expected = torch.autograd.grad((wanted.output * weight.double()).sum(), exact)
    leaves = [x.detach().requires_grad_() for x in qkv]
    arriving = torch.zeros_like(leaves[0])
    arriving[:, wanted.rows] = weight
    got = torch.autograd.grad(operator(leaves, sparsity, sparse_dtype), leaves, arriving)
    errors = {
        which: relative(mine, theirs)
        for which, mine, theirs in zip(("dQ", "dK", "dV"), got, expected, strict=True)
    }
    return [
        f"{name}: relative error of {which} {error:.5f}, allowed {limit}"
        for which, error in errors.items()
        if not error <= limit
    ]
