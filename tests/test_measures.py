"""What attention loses, against the definitions written out in float64 for one row at a time."""

from __future__ import annotations

import math

import pytest
import torch

import sla_video.kernels.measures as measures_module
from sla_video.kernels.api import sla2_attention
from sla_video.kernels.context import Context
from sla_video.kernels.measures import measure_losses, measured_blocks
from sla_video.kernels.router import Router

BLOCKS = {"block_q": 16, "block_k": 8}


@torch.no_grad()
def make(length, *, dtype=torch.float32, batch=2, heads=3):
    torch.manual_seed(length)
    query, key, value = (torch.randn(batch, length, heads, 16) * 2 for _ in range(3))
    router = Router(heads, 16)
    router.query_proj.add_(0.2 * torch.randn_like(router.query_proj))
    query, key, value = (x.to(dtype) for x in (query, key, value))
    output, lse = sla2_attention(
        query, key, value, router, sparsity=0.7, return_lse=True, impl="reference", **BLOCKS
    )
    return query, key, value, output, lse, router.requires_grad_(False)


def expected(query, key, value, output, router, b, h, m, coverage):
    """Of one query block, with loops: recall, |error|, |full|, both densities."""
    length = query.shape[1]
    q, k, v, out = (x[b, :, h].double() for x in (query, key, value, output))
    total = math.ceil(length / 8)
    rows = range(16 * m, min(16 * m + 16, length))
    key_blocks = [range(8 * n, min(8 * n + 8, length)) for n in range(total)]
    q_mean = q[list(rows)].mean(0) @ router.query_proj.double()
    scores = [float(q_mean @ (k[list(block)].mean(0) - k.mean(0))) for block in key_blocks]
    ranked = sorted(range(total), key=lambda n: -scores[n])
    kept = set(ranked[: max(1, round(0.3 * total))])
    mass, recall, error, magnitude = [0.0] * total, [], [], []
    for row in rows:
        weights = torch.softmax(k @ q[row] / 4, 0)
        full = weights @ v
        error.append((out[row] - full).abs())
        magnitude.append(full.abs())
        shares = [float(weights[list(block)].sum()) for block in key_blocks]
        recall.append(sum(shares[n] for n in kept))
        mass = [a + share / len(rows) for a, share in zip(mass, shares, strict=True)]

    def density(order):
        reached = 0.0
        for count, n in enumerate(order, 1):
            reached += mass[n]
            if reached >= coverage:
                return count / total
        return 1.0

    oracle = density(sorted(range(total), key=lambda n: -mass[n]))
    return sum(recall) / len(rows), error, magnitude, oracle, density(ranked)


@pytest.mark.parametrize("length", [100, 64, 7])
@pytest.mark.parametrize("coverage", [0.95, 0.5])
def test_all_of_them_by_definition(length, coverage, monkeypatch):
    # Chunks of single heads and single blocks must make no difference.
    monkeypatch.setattr(measures_module, "_CHUNK_ELEMENTS", 16 * length)
    query, key, value, output, lse, router = make(length)
    losses = measure_losses(query, key, value, output, lse, router, coverage=coverage, **BLOCKS)
    blocks = math.ceil(length / 16)
    assert losses.recall.shape == (2, 3, blocks)
    for b in range(2):
        for h in range(3):
            errors, magnitudes = [], []
            for m in range(blocks):
                recall, error, magnitude, oracle, by_router = expected(
                    query, key, value, output, router, b, h, m, coverage
                )
                errors += error
                magnitudes += magnitude
                assert float(losses.recall[b, h, m]) == pytest.approx(recall, abs=1e-5)
                assert float(losses.oracle_density[b, h, m]) == pytest.approx(oracle)
                assert float(losses.router_density[b, h, m]) == pytest.approx(by_router)
            wrong, size = (float(torch.stack(x).mean()) for x in (errors, magnitudes))
            assert float(losses.error[b, h]) == pytest.approx(wrong, rel=1e-4, abs=1e-6)
            assert float(losses.magnitude[b, h]) == pytest.approx(size, rel=1e-4)


def test_any_chunk_gives_the_same(monkeypatch):
    inputs = make(100)
    whole = measure_losses(*inputs, **BLOCKS)
    for elements in (1, 16 * 100 * 2, 16 * 100 * 7):
        monkeypatch.setattr(measures_module, "_CHUNK_ELEMENTS", elements)
        for one, other in zip(whole, measure_losses(*inputs, **BLOCKS), strict=True):
            torch.testing.assert_close(one, other)


def test_some_blocks_are_the_same_as_among_all():
    inputs = make(100)
    every = measure_losses(*inputs, **BLOCKS)
    some = measure_losses(*inputs, most_blocks=3, **BLOCKS)
    chosen = measured_blocks(100, 16, 3)
    assert chosen.tolist() == [1, 3, 5]
    for name in ("recall", "oracle_density", "router_density"):
        torch.testing.assert_close(getattr(some, name), getattr(every, name)[..., chosen])
    assert measured_blocks(100, 16, 99).tolist() == list(range(7))
    assert measured_blocks(7, 16, 1).tolist() == [0]


def test_nothing_is_lost_where_everything_is_selected():
    query, key, value, *_ = make(100)
    output, lse = sla2_attention(query, key, value, sparsity=0, return_lse=True, **BLOCKS)
    losses = measure_losses(query, key, value, output, lse, coverage=1.0, **BLOCKS)
    torch.testing.assert_close(losses.recall, torch.ones_like(losses.recall))
    assert (losses.error / losses.magnitude).max() < 1e-5
    assert (losses.oracle_density <= losses.router_density).all()
    assert losses.router_density.max() <= 1


def test_a_context_counts_in_the_error_only():
    query, key, value, output, lse, router = make(100)
    torch.manual_seed(5)
    context = torch.randn(2, 2, 9, 3, 16) * 2
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 4:] = False
    mask[1] = False
    plain = measure_losses(query, key, value, output, lse, router, **BLOCKS)
    losses = measure_losses(
        query, key, value, output, lse, router, context=Context(*context, mask), **BLOCKS
    )
    for name in ("recall", "oracle_density", "router_density"):
        assert torch.equal(getattr(losses, name), getattr(plain, name))
    keys, values = (torch.cat([x, y], 1) for x, y in zip((key, value), context, strict=True))
    seen = torch.cat([torch.ones(2, 100, dtype=torch.bool), mask], 1)[:, None, None]
    full = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, keys, values)), attn_mask=seen
    ).transpose(1, 2)
    torch.testing.assert_close(losses.error, (output - full).abs().mean((1, 3)))
    torch.testing.assert_close(losses.magnitude, full.abs().mean((1, 3)))
    torch.testing.assert_close(losses.error[1], plain.error[1])
    assert not torch.allclose(losses.error[0], plain.error[0])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"coverage": 0.0}, r"`coverage` must be in \(0, 1\], got 0.0"),
        ({"coverage": float("nan")}, "`coverage`"),
        ({"most_blocks": 0}, "`most_blocks` must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_settings(setting, words):
    with pytest.raises(ValueError, match=words):
        measure_losses(*make(7), **BLOCKS, **setting)
