"""The parts of the Triton forward pass: statistics, selection, preparation, the mix.

Letters: B batch, H heads, L tokens, D head dimension, N key blocks.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import DEVICE, inputs, needs_triton, random_lists, relative

from sla_video.kernels import triton_prepare
from sla_video.kernels.quantize import quantize_int8, quantize_value
from sla_video.kernels.routing import block_means, mass_logit, num_blocks
from sla_video.kernels.triton_attend import attend
from sla_video.kernels.triton_linear import sum_dropped_states
from sla_video.kernels.triton_prepare import prepare_keys
from sla_video.kernels.triton_selection import block_scores, select_rows
from sla_video.kernels.triton_statistics import block_statistics
from sla_video.kernels.triton_tiles import blocks_per_program, padded_row

pytestmark = [needs_triton, pytest.mark.usefixtures("no_grad")]


def prepared(key, value, key_mean, value_max=None, **options):
    """The operands of blocks of 32 keys, with states."""
    options = {"sparse_dtype": "bf16", "phi_k": "smoothed", "need_states": True} | options
    return prepare_keys(key, value, key_mean, value_max, block_k=32, **options)


@pytest.mark.parametrize("block_q", [32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_drop_nothing_keep_their_sparse_output(poisoned, dtype, block_q):
    query, key, value = inputs(300, dtype=dtype)
    num_q, num_k = num_blocks(300, block_q), num_blocks(300, 32)
    indices = random_lists(1, 2, num_q, num_k, num_k)
    counts = torch.full((1, 2, num_q), num_k, dtype=torch.int32, device=DEVICE)
    counts[:, 1, 1] = 2
    dropped = torch.zeros(1, 2, num_q, 16, dtype=dtype, device=DEVICE)
    dropped[:, 1, 1, :num_k] = 1
    dropped[:, 1, 1].scatter_(-1, indices[:, 1, 1, :2].long(), 0)
    key_mean = key.float().mean(1)
    operands = prepared(key, value, key_mean)
    sparse, out = torch.empty_like(query), torch.empty_like(query)
    attend(
        query,
        key,
        value,
        indices,
        counts,
        key_mean,
        operands=operands,
        block_q=block_q,
        block_k=32,
        out=out,
        out_sparse=sparse,
        alpha=torch.full((1, 2, num_q), 0.3, device=DEVICE),
        sums=sum_dropped_states(operands.states, dropped),
    )
    changed = (out != sparse).any(-1)
    assert changed[:, block_q : 2 * block_q, 1].all()
    changed[:, block_q : 2 * block_q, 1] = False
    assert not changed.any()
    assert out.isfinite().all()


def in_key_order(x):
    """Transposed tiles `[..., D, block_k]` as float `[..., block_k, D]`, keys from the first on."""
    # Of every 16, positions 0 to 3 hold keys 0, 1, 8, 9, and so on.
    order = torch.arange(16).view(2, 4, 2).transpose(0, 1).flatten()
    order = (torch.arange(0, x.shape[-1], 16)[:, None] + order).flatten().to(x.device)
    x = x.float().mT
    return torch.empty_like(x).index_copy_(-2, order, x)


@pytest.mark.parametrize("length", [1, 64, 200])
def test_preparation(poisoned, length):
    query, key, value = inputs(length, head_dim=40, batch=2)
    statistics = block_statistics(query, key, value, block_q=64, block_k=32, need_value_max=True)
    close = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(statistics.query_means, block_means(query, 64), **close)
    torch.testing.assert_close(statistics.key_means, block_means(key, 32), **close)
    torch.testing.assert_close(statistics.key_mean, key.mean(1), **close)
    assert torch.equal(statistics.value_max, value.abs().amax(1))

    smooth = (key - key.mean(1, keepdim=True)).transpose(1, 2)
    num_k = num_blocks(length, 32)
    for sparse_dtype in ("int8_fp8", "int8_int8"):
        means = statistics.key_mean, statistics.value_max
        operands = prepared(key, value, *means, sparse_dtype=sparse_dtype)
        # [B, H, L, D] of blocks [B, H, N, block_k, D_PAD]
        keys = operands.low_keys * operands.key_scale[..., None, None]
        wanted = torch.cat([quantize_int8(x, (-2, -1)) for x in smooth.split(32, 2)], 2)
        torch.testing.assert_close(keys.flatten(2, 3)[:, :, :length, :40], wanted, **close)
        # Padding must be zero: the kernels read it.
        assert not keys.flatten(2, 3)[:, :, length:].any() and not keys[..., 40:].any()
        values, exact = in_key_order(operands.low_values), value.transpose(1, 2)
        values *= operands.value_scale[:, :, None, None]
        wanted = quantize_value(exact, sparse_dtype)
        torch.testing.assert_close(values.flatten(2, 3)[:, :, :length, :40], wanted, **close)
        assert not values.flatten(2, 3)[:, :, length:].any() and not values[..., 40:].any()
        assert operands.low_keys.shape == (2, 2, num_k, 32, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("programs", [1, 6, 100])
@pytest.mark.parametrize("phi_k", ["smoothed", "raw"])
def test_states_are_products_of_features_and_values(poisoned, monkeypatch, programs, dtype, phi_k):
    _, key, value = inputs(7 * 32 + 5, head_dim=40, dtype=dtype)
    value = value * 1e-3 if dtype == torch.float16 else value
    key_mean, value_max = key.float().mean(1), value.float().abs().amax(1)
    # However the blocks are shared out among programs.
    monkeypatch.setattr(triton_prepare, "multiprocessors", lambda _: programs)
    operands = prepared(key, value, key_mean, value_max, phi_k=phi_k)
    smooth = key.double() - (key_mean.double()[:, None] if phi_k == "smoothed" else 0)

    def in_blocks(x):
        return torch.nn.functional.pad(x, (0, 0, 0, 27)).unflatten(2, (8, 32))

    # [B, H, N, 32, D]
    phi = in_blocks(smooth.transpose(1, 2).softmax(-1))
    wanted = phi.mT @ in_blocks(value.double().transpose(1, 2))
    states = operands.states.double()
    assert states.shape == (1, 2, 16, 65, 64)
    if dtype == torch.float16:
        states[..., :64, :] *= operands.state_unit[:, :, None, None]
    error = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert relative(states[:, :, :8, :40, :40], wanted) <= error
    assert relative(states[:, :, :8, 64, :40], phi.sum(3)) <= error
    assert not states[:, :, 8:].any() and not states[..., 40:].any()


def test_states_of_what_is_dropped_are_summed():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 16, 5, 4, generator=generator)
    dropped = (torch.rand(2, 3, 7, 16, generator=generator) > 0.5).float()
    wanted = torch.einsum("bhmn,bhnde->bhmde", dropped, states)
    torch.testing.assert_close(sum_dropped_states(states, dropped), wanted)


@pytest.mark.parametrize("length", [1, 200])
def test_low_bit_queries(poisoned, length):
    query, key, value = inputs(length, head_dim=40, batch=2)
    statistics = block_statistics(
        query, key, value, need_value_max=False, need_low_query=True, block_q=64, block_k=32
    )
    low, scale = statistics.low_query, statistics.query_scale
    got = (low * scale[..., None, None]).flatten(2, 3)
    wanted = [quantize_int8(x, (-2, -1)) for x in query.transpose(1, 2).split(64, 2)]
    torch.testing.assert_close(got[:, :, :length, :40], torch.cat(wanted, 2), atol=1e-6, rtol=1e-6)
    assert not got[:, :, length:].any() and not got[..., 40:].any()


def select_top_k(scores, kept, log_tail=0.0):
    """`select_rows` of scores `[B, H, M, N]`: indices and logits."""
    num_k = scores.shape[-1]
    padding = (0, padded_row(num_k) - num_k)
    rows = torch.nn.functional.pad(scores, padding, value=-math.inf).contiguous()
    return select_rows(rows, num_k, kept, log_tail)[:2]


@pytest.mark.parametrize(
    ("num_k", "kept"),
    [(2, 1), (5, 4), (33, 7), (64, 63), (100, 1), (513, 16)],
    ids=lambda n: str(n),
)
def test_selection_is_that_of_top_k(poisoned, num_k, kept):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 2, 3, num_k, generator=generator).to(DEVICE)
    scores[0] = 5 * scores[0] - 20  # one sign
    indices, logit = select_top_k(scores, kept, math.log(0.25))
    wanted = scores.topk(kept).indices.sort(-1).values
    assert torch.equal(indices.long(), wanted)
    dropped = torch.ones_like(scores).scatter(-1, wanted, 0.0)
    scores[..., -1] += math.log(0.25)
    torch.testing.assert_close(logit, mass_logit(scores, dropped), atol=1e-5, rtol=1e-5)


def test_equal_scores_are_taken_from_the_left():
    scores = torch.zeros(1, 1, 5, 40, device=DEVICE)
    scores[0, 0, 1, 30] = 1
    scores[0, 0, 2] = torch.arange(40, device=DEVICE) // 3
    scores[0, 0, 3, ::2] = -0.0
    # Neighbouring floats, far apart from the rest.
    scores[0, 0, 4, 5], scores[0, 0, 4, 6:10] = 1e30, 1.0
    scores[0, 0, 4, 20:22] = 1.0 + 2**-23
    indices, _ = select_top_k(scores, 4)
    assert indices[0, 0].tolist() == [
        [0, 1, 2, 3],
        [0, 1, 2, 30],
        [36, 37, 38, 39],
        [0, 1, 2, 3],
        [5, 6, 20, 21],
    ]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("kept", [1, 7, 39])
def test_scores_that_are_no_numbers_give_lists_of_existing_blocks(poisoned, bad, kept):
    scores = torch.randn(1, 1, 4, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scores[0, 0, 0] = bad
    scores[0, 0, 1, ::2] = bad
    scores[0, 0, 2, 39] = bad
    indices, _ = select_top_k(scores, kept)
    assert indices.min() >= 0 and indices.max() < 40
    assert (indices.diff(dim=-1) > 0).all()
    assert torch.equal(indices[:, :, 3].long(), scores[:, :, 3].topk(kept).indices.sort(-1).values)


@pytest.mark.parametrize("smoothed", [False, True], ids=["", "smoothed"])
@pytest.mark.parametrize(("num_q", "num_k", "head_dim"), [(3, 5, 40), (130, 144, 64)], ids=str)
def test_scores_are_products_and_rows_end_in_minus_infinity(
    poisoned, num_q, num_k, head_dim, smoothed
):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 2, num_q, head_dim), (2, 2, num_k, head_dim), (2, 2, head_dim)
    queries, keys, mean = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    mean = 20 * mean if smoothed else None
    if smoothed:
        keys += mean[:, :, None]
    scores = block_scores(queries, keys, mean)
    assert scores.shape[-1] % 16 == 0
    assert (scores[..., num_k:] == -math.inf).all()
    wanted = keys.double() - (mean.double()[:, :, None] if smoothed else 0)
    wanted = queries.double() @ wanted.mT * head_dim**-0.5
    assert relative(scores[..., :num_k], wanted) <= 2e-6


def test_selection_comes_with_alpha_and_a_table_of_what_is_dropped(poisoned):
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, 2, n, 32, generator=generator).to(DEVICE) for n in (4, 40))
    scores = block_scores(queries, keys, None)
    indices, logit, alpha, table = select_rows(scores, 40, 5, dtype=torch.bfloat16)
    torch.testing.assert_close(alpha, logit.sigmoid(), atol=1e-6, rtol=1e-6)
    wanted = torch.zeros(1, 2, 4, 48, dtype=torch.bfloat16, device=DEVICE)
    wanted[..., :40] = 1
    assert torch.equal(table, wanted.scatter(-1, indices.long(), 0))


@pytest.mark.parametrize("programs", [1, 132, 396])
@pytest.mark.parametrize(("num_k", "heads"), [(1, 1), (7, 2), (512, 12), (1182, 40), (112, 5000)])
def test_runs_of_blocks_keep_programs_busy(num_k, heads, programs):
    run = blocks_per_program(num_k, heads, programs)
    assert 1 <= run <= num_k
    if num_k * heads >= 100 * programs:
        rounds = -(-(-(-num_k // run) * heads) // programs)
        assert num_k * heads / (rounds * run * programs) >= 0.9
