"""Orders of the keys for each head: exact whatever they are, and chosen where they help."""

from __future__ import annotations

import pytest
import torch

from sla_video.kernels.key_order import (
    choose_key_orders,
    join_key_orders,
    key_importance,
    make_key_order,
)
from sla_video.kernels.key_order_measures import measure_orders

BLOCKS = {"block_q": 16, "block_k": 8}
KINDS = ("identity", "segment_sort", "hot_peel")


def inputs(length=100, heads=2, batch=2, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads, dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_importance_is_the_mean_softmax_of_the_probes():
    query, key, _ = inputs(64)
    weights = torch.softmax(torch.einsum("blhd,bmhd->bhlm", query, key) / 8**0.5, -1)
    torch.testing.assert_close(key_importance(query, key, probes=64), weights.mean(2))
    torch.testing.assert_close(key_importance(query, key, probes=999), weights.mean(2))
    torch.testing.assert_close(
        key_importance(query, key, probes=2), weights[:, :, [16, 48]].mean(2)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 9, 100])
def test_orders_are_permutations(kind, length):
    query, key, _ = inputs(length)
    order = make_key_order(kind, key_importance(query, key), segment=24, block_k=8)
    assert (order.places.sort(-1).values == torch.arange(length)).all()


def test_segments_are_sorted_within():
    importance = torch.rand(2, 3, 100, generator=torch.Generator().manual_seed(1))
    places = make_key_order("segment_sort", importance, segment=24).places
    for start in range(0, 100, 24):
        part = places[..., start : start + 24]
        assert part.amin() >= start and part.amax() < start + 24
        assert (importance.gather(-1, part).diff(dim=-1) <= 0).all()


def test_hot_keys_lead_and_the_rest_stays_in_order():
    importance = torch.rand(2, 3, 100, generator=torch.Generator().manual_seed(1))
    order = make_key_order("hot_peel", importance, hot_share=0.1, block_k=8)
    # 10 keys take two blocks of 8.
    assert order.always.tolist() == [2, 2, 2]
    hot, cold = order.places[..., :16], order.places[..., 16:]
    assert (importance.gather(-1, hot).amin(-1) >= importance.gather(-1, cold).amax(-1)).all()
    assert (cold.diff(dim=-1) > 0).all()


def local_and_hot(length=512, dim=16):
    """A head whose queries look around themselves, and one whose queries want scattered keys."""
    generator = torch.Generator().manual_seed(2)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * (
        torch.tensor([0.5, 0.2, 0.07, 0.025, 0.012, 0.0062, 0.0031, 0.0016], dtype=torch.float64)
    )
    around = 2.8 * torch.cat((angle.cos(), angle.sin()), -1)
    noise = torch.randn(length, dim, generator=generator, dtype=torch.float64)
    wanted = torch.zeros(length, dtype=torch.float64)
    wanted[torch.randperm(length, generator=generator)[:12]] = 1
    direction = torch.ones(dim, dtype=torch.float64)
    query = torch.stack((around, direction + 0.3 * noise), 1)
    key = torch.stack((around, 2.5 * wanted[:, None] * direction + 0.3 * noise.flip(0)), 1)
    return query[None], key[None]


def test_each_head_gets_the_order_that_suits_it():
    query, key = local_and_hot()
    settings = {"block_q": 32, "block_k": 16, "segment": 128, "hot_share": 0.03, "every": 1}
    kinds, densities = choose_key_orders(query, key, **settings)
    assert kinds == ["identity", "hot_peel"]
    # Sorting takes a local head apart, which is why it is not done to all.
    assert densities["segment_sort"][0] > 1.5 * densities["identity"][0]
    assert densities["hot_peel"][1] < 0.5 * densities["identity"][1]
    importance = key_importance(query, key)
    orders = {
        kind: make_key_order(kind, importance, block_k=16, segment=128, hot_share=0.03)
        for kind in KINDS
    }
    joined = join_key_orders(kinds, orders)
    assert joined.always.tolist() == [0, 1]
    found = measure_orders(query, key, {"joined": joined}, selected=9, block_q=32, block_k=16)
    density = found["joined"].density
    expected = torch.stack([densities[kind][head] for head, kind in enumerate(kinds)])
    torch.testing.assert_close(density, expected)
    assert (density <= densities["identity"]).all()


def test_density_counts_blocks_until_the_mass_is_there():
    query, key, _ = inputs(64, batch=1, heads=1)
    order = make_key_order("identity", key_importance(query, key))
    weights = torch.softmax(query[0, :, 0] @ key[0, :, 0].T / 8**0.5, -1)
    # [M, N]
    mass = weights.unflatten(0, (4, 16)).mean(1).unflatten(1, (8, 8)).sum(-1)
    blocks = query[0, :, 0].unflatten(0, (4, 16)).mean(1)
    smooth = key[0, :, 0] - key[0, :, 0].mean(0)
    ranks = (blocks @ smooth.unflatten(0, (8, 8)).mean(1).T).argsort(-1, descending=True)
    counts = []
    for row, rank in zip(mass, ranks, strict=True):
        total, count = 0.0, 0
        while total < 0.8:
            total += float(row[rank[count]])
            count += 1
        counts.append(count / 8)
    found = measure_orders(query, key, {"it": order}, recall=0.8, selected=3, **BLOCKS)["it"]
    assert float(found.density) == pytest.approx(sum(counts) / 4)
    best = torch.stack([row[rank[:3]].sum() for row, rank in zip(mass, ranks, strict=True)])
    assert float(found.recall) == pytest.approx(float(best.mean()))
    found = measure_orders(query, key, {"it": order}, recall=1.0, **BLOCKS)["it"]
    assert float(found.density) == pytest.approx(1)


def test_bad_settings_are_refused():
    importance = torch.rand(1, 1, 10)
    with pytest.raises(ValueError, match="`kind` must be one of identity, segment_sort, hot_peel"):
        make_key_order("sorted", importance)
    with pytest.raises(ValueError, match=r"got 0 and 0\.02"):
        make_key_order("segment_sort", importance, segment=0)
    with pytest.raises(ValueError, match="got 512 and 0"):
        make_key_order("hot_peel", importance, hot_share=0)
