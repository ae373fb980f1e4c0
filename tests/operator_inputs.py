"""Inputs and independent formulas shared by the tests of the operator.

Letters: B batch, H heads, L tokens, D head dimension, M query blocks, N key blocks.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

from sla_video.kernels.options import Options
from sla_video.kernels.router import Router

# Same examples on every run and machine; no deadline, since machines are busy.
stable = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def random_qkv(length, *, batch=1, heads=2, head_dim=16, dtype=torch.float64, seed=0):
    """Query, key, value `[B, L, H, D]`; keys share an offset, as those of real models do."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads, head_dim)
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return query.to(dtype), (key + 0.5).to(dtype), value.to(dtype)


def random_router(heads=2, head_dim=16, *, seed=0, dtype=torch.float64, **options):
    """A router whose every parameter is away from its starting value."""
    router = Router(heads, head_dim, **options).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter += 0.4 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            ).to(dtype)
    return router


def fixed_alpha_router(alpha_logit, heads, head_dim, dtype=torch.float64):
    """Identity projections and one mix weight everywhere: +inf is sparse only, -inf linear only."""
    router = Router(heads, head_dim, alpha="per_block", num_query_blocks=1).to(dtype)
    with torch.no_grad():
        router.alpha_table.fill_(alpha_logit)
    return router


def options(**changes):
    """Options of a small operator, some of them changed."""
    return Options(**{"sparsity": 0.7, "block_q": 16, "block_k": 8, **changes})


def dense_attention(query, key, value, mask=None):
    """scaled_dot_product_attention on `[B, L, H, D]`."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2)


def softmax_scores(query, key):
    """Full softmax weights `[B, H, L, L]`."""
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    return torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1)


def token_mask(dropped, block_q, block_k, length):
    """`[B, H, M, N]` marks of dropped blocks -> True on the selected tokens, `[B, H, L, L]`."""
    mask = (dropped == 0).repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)
    return mask[:, :, :length, :length]


def rms(x):
    return x.double().pow(2).mean().sqrt().item()
