"""Attention among fewer tokens, against the definitions written out in float64.

Letters: B batch, H heads, L tokens, K kept tokens, D head dimension.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from captured import capture
from operator_inputs import random_qkv, random_router

from sla_video import sla2_attention
from sla_video.kernels.token_compression import (
    compressed_attention,
    fewer_keys,
    gather_tokens,
    linear_attention,
    nearest_kept,
    select_tokens,
    short_attention,
)
from sla_video.kernels.token_order import hilbert_order
from sla_video.kernels.token_scores import (
    always_kept,
    coverage_count,
    probe_places,
    rank_tokens,
    share_count,
    token_scores,
)

GRIDS = [(1, 1, 1), (1, 1, 3), (2, 1, 1), (3, 5, 7), (4, 6, 8)]
grids = pytest.mark.parametrize("grid", GRIDS, ids=str)
FILLS = ("prev", "neighbor", "linear", "zero")


def sdpa(query, key, value):
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)


def choose(grid, count=None, *, batch=2, seed=0):
    """A selection with random scores: about half of the tokens unless told."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand((batch, 2, math.prod(grid)), generator=generator)
    always = always_kept(grid)
    count = count or min(math.prod(grid), max(int(always.sum()), math.prod(grid) // 2))
    return select_tokens(rank_tokens(scores, always), count)


def expected_output(query, key, value, selection, mode, fill, previous, grid):
    """With loops over heads and tokens."""
    batch, length, heads, head_dim = query.shape
    output = torch.zeros_like(query)
    place = list(itertools.product(*map(range, grid)))
    for b, h in itertools.product(range(batch), range(heads)):
        kept = selection.kept[b, h].tolist()
        q, k, v = query[b, :, h], key[b, :, h], value[b, :, h]
        for token in range(length):
            if mode == "kv" or token in kept:
                weights = torch.softmax(k[kept] @ q[token] / head_dim**0.5, 0)
                output[b, token, h] = weights @ v[kept]
        if mode == "kv":
            continue
        phi_k = torch.softmax(k - k.mean(0), -1)
        for token in set(range(length)) - set(kept):
            if fill == "prev":
                output[b, token, h] = previous[b, token, h]
            elif fill == "neighbor":
                nearest = min(kept, key=lambda other: math.dist(place[token], place[other]))
                distance = math.dist(place[token], place[nearest])
                same = [o for o in kept if math.dist(place[token], place[o]) == distance]
                # Any of those that are equally near will do: take what is closest to ours.
                output[b, token, h] = torch.stack([output[b, o, h] for o in same]).mean(0)
            elif fill == "linear":
                weights = phi_k @ torch.softmax(q[token], -1)
                output[b, token, h] = weights @ v / weights.sum()
    return output


@pytest.mark.parametrize("mode", ["kv", "qkv"])
@grids
def test_keeping_everything_is_the_inner_attention_bit_for_bit(grid, mode):
    query, key, value = random_qkv(math.prod(grid), dtype=torch.float32)
    scores = token_scores(query, key, grid)
    everything = select_tokens(rank_tokens(scores, always_kept(grid)), math.prod(grid))
    assert torch.equal(
        compressed_attention(query, key, value, everything, sdpa, mode=mode, fill="prev"),
        sdpa(query, key, value),
    )


@pytest.mark.parametrize("grid", [(3, 5, 7), (2, 1, 1), (1, 1, 3)], ids=str)
@pytest.mark.parametrize(
    ("mode", "fill"), [("kv", "zero"), ("qkv", "prev"), ("qkv", "linear"), ("qkv", "zero")]
)
def test_output_is_the_definition(grid, mode, fill):
    length = math.prod(grid)
    query, key, value = random_qkv(length, batch=2)
    # Without the tokens that are always kept, so that the smallest grids drop something too.
    generator = torch.Generator().manual_seed(1)
    ranking = torch.rand(2, 2, length, generator=generator).argsort(-1)
    selection = select_tokens(ranking, -(-length // 2))
    previous = random_qkv(length, batch=2, seed=5)[2]
    found = compressed_attention(
        query, key, value, selection, sdpa,
        mode=mode, fill=fill, dropped_output=gather_tokens(previous, selection.dropped),
    )  # fmt: skip
    expected = expected_output(query, key, value, selection, mode, fill, previous, grid)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("ordered", [False, True], ids=["raster", "hilbert"])
@grids
def test_dropped_queries_get_the_output_of_a_nearest_kept_one(grid, ordered):
    order = hilbert_order(grid) if ordered else torch.arange(math.prod(grid))
    query, key, value = random_qkv(math.prod(grid), batch=2)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 2, math.prod(grid), generator=generator)
    always = always_kept(grid)[order]
    count = min(math.prod(grid), int(always.sum()) + math.prod(grid) // 4)
    selection = select_tokens(rank_tokens(scores, always), count)
    nearest = nearest_kept(selection, grid, order=order)
    found = compressed_attention(
        query, key, value, selection, sdpa, mode="qkv", fill="neighbor", nearest=nearest
    )
    # [L, 3]
    places = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 3)[order].double()
    distances = torch.cdist(places, places)
    for b, h in itertools.product(range(2), range(2)):
        kept = selection.kept[b, h]
        chosen = kept[nearest[b, h]]
        assert torch.equal(chosen[kept], kept)
        ours = distances[torch.arange(len(places)), chosen]
        torch.testing.assert_close(ours, distances[:, kept].min(1).values)
        torch.testing.assert_close(found[b, :, h], found[b, chosen, h])


@grids
def test_the_first_frame_and_a_lattice_are_kept_however_low_they_score(grid):
    kept = always_kept(grid).view(grid)
    for t, h, w in itertools.product(*map(range, grid)):
        assert bool(kept[t, h, w]) == (t == 0 or t % 2 == h % 2 == w % 2 == 0)
    always = kept.flatten()
    scores = torch.rand(1, 2, math.prod(grid)).masked_fill(always, 0.0)
    for row in select_tokens(rank_tokens(scores, always), int(always.sum())).kept[0]:
        assert torch.equal(row, always.nonzero().flatten())


def naive_count(scores, always, tau):
    """Drop one token of each head at a time while the mean of what is dropped allows it."""
    heads = [
        sorted((float(x), i) for i, x in enumerate(row) if not always[i])
        for row in scores.flatten(0, 1)
    ]
    dropped, count = 0.0, scores.shape[-1]
    for step in range(len(heads[0])):
        dropped += sum(row[step][0] for row in heads) / len(heads)
        if dropped > tau:
            break
        count -= 1
    return min(-(-count // 128) * 128, scores.shape[-1])


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.1, 0.3, 0.99])
def test_coverage_counts_as_a_loop_does(tau):
    grid = (5, 12, 13)
    generator = torch.Generator().manual_seed(2)
    scores = torch.softmax(2 * torch.randn(2, 3, 780, generator=generator), -1)
    always = always_kept(grid)
    ranking = rank_tokens(scores, always)
    count = coverage_count(scores, ranking, always, tau)
    assert int(count) == naive_count(scores, always, tau)
    assert int(count) % 128 == 0 or int(count) == 780
    # What is beyond the rounding is the promise: dropped mass of at most tau.
    dropped = select_tokens(ranking, int(count)).dropped
    assert float(scores.gather(-1, dropped).sum(-1).mean()) <= tau + 1e-6


def test_shares_are_rounded_up_to_whole_blocks():
    assert share_count(7168, 1000, 0.5) == 3584
    assert share_count(7168, 1000, 0.5001) == 3712
    assert share_count(7168, 4000, 0.5) == 4096
    assert share_count(75600, 10000, 1.0) == 75600
    assert share_count(1, 1, 0.1) == 1


def test_scores_are_the_mean_softmax_of_probes_pooled_over_the_grid():
    grid = (3, 5, 7)
    query, key, _ = random_qkv(105)
    rows = probe_places(grid, 20)
    weights = torch.softmax(torch.einsum("blhd,bmhd->bhlm", query, key) / 4, -1)
    raw = weights[:, :, rows].mean(2).view(1, 2, *grid)
    pooled = torch.empty_like(raw)
    for t, h, w in itertools.product(*map(range, grid)):
        around = [slice(max(0, i - 1), i + 2) for i in (t, h, w)]
        pooled[:, :, t, h, w] = raw[(..., *around)].mean((-3, -2, -1))
    expected = pooled.flatten(2) / pooled.flatten(2).sum(-1, keepdim=True)
    torch.testing.assert_close(token_scores(query, key, grid, probes=20), expected)


@pytest.mark.parametrize("grid", [(21, 30, 52), (7, 32, 32), (3, 5, 7)], ids=str)
def test_probes_are_spread_over_every_axis(grid):
    places = probe_places(grid, 128)
    assert len(places) == min(128, math.prod(grid))
    t, rest = places // (grid[1] * grid[2]), places % (grid[1] * grid[2])
    for axis, size in zip((t, rest // grid[2], rest % grid[2]), grid, strict=True):
        thirds = torch.bincount(axis * 3 // size, minlength=3) / len(places)
        expected = torch.bincount(torch.arange(size) * 3 // size, minlength=3) / size
        assert (thirds - expected).abs().max() < 0.05


def test_compression_in_another_order_keeps_the_same_tokens_and_gives_the_same():
    grid = (4, 6, 8)
    order = hilbert_order(grid)
    parts = random_qkv(192)

    def run(parts, order):
        query, key, value = parts
        always = always_kept(grid) if order is None else always_kept(grid)[order]
        scores = token_scores(query, key, grid, order=order, probes=30)
        ranking = rank_tokens(scores, always)
        count = coverage_count(scores, ranking, always, 0.45)
        assert int(count) == 128
        selection = select_tokens(ranking, int(count))
        nearest = nearest_kept(selection, grid, order=order)
        outputs = [
            compressed_attention(query, key, value, selection, sdpa, mode=mode, fill="linear")
            for mode in ("kv", "qkv")
        ]
        return selection, torch.stack(outputs), nearest

    selection, outputs, _ = run(parts, None)
    moved, moved_outputs, _ = run([part[:, order] for part in parts], order)
    for head in range(2):
        assert set(order[moved.kept[0, head]].tolist()) == set(selection.kept[0, head].tolist())
    torch.testing.assert_close(moved_outputs, outputs[:, :, order])


@pytest.mark.parametrize("fill", FILLS)
def test_gradients_are_those_of_the_definition(fill):
    grid = (3, 3, 3)
    parts = [part.requires_grad_() for part in random_qkv(27)]
    selection = choose(grid, 19, batch=1)
    previous = random_qkv(27, seed=5)[2]
    weight = random_qkv(27, seed=6)[0]
    nearest = nearest_kept(selection, grid)
    found = compressed_attention(
        *parts, selection, sdpa, mode="qkv", fill=fill,
        dropped_output=gather_tokens(previous, selection.dropped), nearest=nearest,
    )  # fmt: skip
    gradients = torch.autograd.grad((found * weight).sum(), parts)
    if fill == "neighbor":
        # Which of equal neighbours is free: take the choice as it is.
        expected = expected_output(*parts, selection, "qkv", "zero", previous, grid)
        places = selection.kept.gather(-1, nearest)
        expected = expected.gather(1, places.transpose(1, 2)[..., None].expand_as(expected))
    else:
        expected = expected_output(*parts, selection, "qkv", fill, previous, grid)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weight).sum(), parts))


@pytest.mark.parametrize("length", [100, 64, 97, 20])
def test_sla2_of_fewer_keys_is_that_of_each_query_block(length):
    """Keys repeated to as many as there are queries change no block of them but their number."""
    blocks = {"sparsity": 0.5, "block_q": 16, "block_k": 8, "impl": "reference"}
    router = random_router()
    query, key, value = random_qkv(length)
    key, value = key[:, :16].repeat(1, 2, 1, 1), value[:, :16].repeat(1, 2, 1, 1)

    def inner(*parts):
        return sla2_attention(*parts, router, **blocks)

    found = fewer_keys(inner, query, key, value, 16)
    rows = []
    for block in query.split(16, 1):
        # A block alone, beside one of no consequence.
        mean = block.mean(1, keepdim=True).expand(-1, 32 - block.shape[1], -1, -1)
        rows.append(inner(torch.cat((block, mean), 1), key, value)[:, : block.shape[1]])
    torch.testing.assert_close(found, torch.cat(rows, 1))
    everything = {**blocks, "sparsity": 0.0}
    torch.testing.assert_close(
        fewer_keys(lambda *p: sla2_attention(*p, **everything), query, key, value, 16),
        sdpa(query, key, value),
    )


def test_linear_attention_is_sla2_where_nothing_is_selected():
    query, key, value = random_qkv(60)
    phi_k = torch.softmax(key - key.mean(1, keepdim=True), -1)
    weights = torch.einsum("blhd,bmhd->bhlm", torch.softmax(query, -1), phi_k)
    expected = torch.einsum("bhlm,bmhd->blhd", weights / weights.sum(-1, keepdim=True), value)
    torch.testing.assert_close(linear_attention(query, key, value), expected)


def test_every_fill_and_the_residual_are_better_than_nothing_on_the_embedded_model():
    """In relative L1 against full attention, at half of the query-key pairs."""
    grid, layer = (7, 32, 32), 0
    # Two of four heads are enough, and half the time.
    before, now = (
        [part[:, :, :2] for part in capture((layer,), steps=steps, schedule=20)[layer]]
        for steps in (1, 2)
    )
    earlier, full = sdpa(*before), sdpa(*now)
    always = always_kept(grid)
    ranking = rank_tokens(token_scores(*before[:2], grid), always)

    def error(mode, fill="zero", *, residual=False):
        share = 0.5 if mode == "kv" else 0.5**0.5
        selection = select_tokens(ranking, share_count(7168, int(always.sum()), share))
        extra = {
            "dropped_output": gather_tokens(earlier, selection.dropped),
            "nearest": nearest_kept(selection, grid),
        }
        if residual:
            whole = earlier if mode == "kv" else gather_tokens(earlier, selection.kept)
            extra["residual"] = whole - short_attention(*before, selection, sdpa, mode=mode)
        output = compressed_attention(*now, selection, sdpa, mode=mode, fill=fill, **extra)
        return float((output - full).abs().sum() / full.abs().sum())

    errors = {fill: error("qkv", fill) for fill in FILLS}
    assert max(errors[fill] for fill in FILLS if fill != "zero") < errors["zero"], errors
    for mode, fill in (("kv", "zero"), ("qkv", "prev")):
        assert error(mode, fill, residual=True) < 0.7 * error(mode, fill)


@pytest.mark.parametrize("fill", FILLS)
def test_the_dtype_is_that_of_the_inner_attention(fill):
    """Under autocast it gives another than it takes."""
    parts = random_qkv(27, dtype=torch.float32)
    selection = choose((3, 3, 3), 19, batch=1)

    def inner(*qkv):
        return sdpa(*qkv).bfloat16()

    dropped = gather_tokens(parts[2], selection.dropped)
    nearest = nearest_kept(selection, (3, 3, 3))
    output = compressed_attention(
        *parts, selection, inner, mode="qkv", fill=fill, dropped_output=dropped, nearest=nearest
    )
    assert output.dtype == torch.bfloat16


def test_bad_input_is_refused():
    query, key, value = random_qkv(24)
    selection = choose((2, 3, 4), 20, batch=1)
    with pytest.raises(ValueError, match="24 tokens do not fit a grid of"):
        token_scores(query, key, (2, 3, 5))
    with pytest.raises(ValueError, match=r"and an order of \[5\]"):
        token_scores(query, key, (2, 3, 4), order=torch.arange(5))
    with pytest.raises(ValueError, match="of at least 1 each, got"):
        always_kept((2, 0, 4))
    with pytest.raises(ValueError, match="`probes` must be at least 1, got 0"):
        probe_places((2, 3, 4), 0)
    with pytest.raises(ValueError, match=r"`share` must be in \(0, 1\], got 0"):
        share_count(24, 1, 0)
    scores = torch.rand(1, 2, 24)
    with pytest.raises(ValueError, match=r"`tau` must be in \[0, 1\), got 1"):
        coverage_count(scores, scores.argsort(-1), always_kept((2, 3, 4)), 1)
    with pytest.raises(ValueError, match="`count` must be from 1 to 24 tokens, got 25"):
        select_tokens(scores.argsort(-1), 25)
    with pytest.raises(ValueError, match="`mode` must be one of 'kv', 'qkv', got 'q'"):
        compressed_attention(query, key, value, selection, sdpa, mode="q")
    with pytest.raises(ValueError, match="needs `dropped_output`"):
        compressed_attention(query, key, value, selection, sdpa, mode="qkv", fill="prev")
    with pytest.raises(ValueError, match="needs `nearest`"):
        compressed_attention(query, key, value, selection, sdpa, mode="qkv", fill="neighbor")
    with pytest.raises(ValueError, match="the 20 keys that are kept are no multiple of the 16"):
        fewer_keys(sdpa, query, key[:, :20], value[:, :20], 16)
