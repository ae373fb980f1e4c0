"""The parts of the Triton forward pass: statistics, selection, preparation, the mix.

Letters: B batch, H heads, L tokens, D head dimension, N key blocks.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import DEVICE, inputs, needs_triton, random_lists, relative

from sla_video.kernels.quantize import quantize_int8, quantize_value
from sla_video.kernels.routing import block_means, mass_logit, num_blocks
from sla_video.kernels.triton_linear import linear_forward_mix
from sla_video.kernels.triton_prepare import prepare_keys
from sla_video.kernels.triton_routing import select_top_k
from sla_video.kernels.triton_sparse import sparse_forward
from sla_video.kernels.triton_statistics import block_statistics

pytestmark = [needs_triton, pytest.mark.usefixtures("no_grad")]


def prepared(key, value, key_mean, value_max=None, **options):
    """The operands of blocks of 32 keys, with features."""
    options = {"sparse_dtype": "bf16", "phi_k": "smoothed", "need_features": True} | options
    return prepare_keys(key, value, key_mean, value_max, block_k=32, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_drop_nothing_keep_their_sparse_output(poisoned, dtype):
    query, key, value = inputs(200, dtype=dtype)
    num_k = num_blocks(200, 32)
    indices = random_lists(1, 2, 7, num_k, num_k)
    counts = torch.full((1, 2, 7), num_k, dtype=torch.int32, device=DEVICE)
    counts[:, 1, 3] = 2
    key_mean = key.float().mean(1)
    alpha = torch.full((1, 2, 7), 0.3, device=DEVICE)
    operands = prepared(key, value, key_mean)
    blocks = {"operands": operands, "block_q": 32, "block_k": 32}
    sparse, _ = sparse_forward(query, key, value, indices, counts, key_mean, **blocks)
    out = linear_forward_mix(query, key, value, key_mean, indices, counts, alpha, sparse, **blocks)
    changed = (out != sparse).any(-1)
    assert changed[:, 96:128, 1].all()
    changed[:, 96:128, 1] = False
    assert not changed.any()
    assert out.isfinite().all()


@pytest.mark.parametrize("phi_k", ["smoothed", "raw"])
@pytest.mark.parametrize("storage", ["none", "fp8"])
def test_features_recomputed_or_in_fp8(storage, phi_k):
    query, key, value = inputs(200, dtype=torch.bfloat16)
    blocks = {"block_q": 32, "block_k": 32}
    statistics = block_statistics(query, key, value, need_value_max=True, **blocks)
    indices = random_lists(1, 2, 7, 7, 3)
    alpha = torch.zeros(1, 2, 7, device=DEVICE)
    outputs = []
    for feature_storage in ("value", storage):
        operands = prepared(
            key,
            value,
            statistics.key_mean,
            statistics.value_max,
            sparse_dtype="int8_fp8",
            phi_k=phi_k,
            feature_storage=feature_storage,
        )
        out = linear_forward_mix(
            query,
            key,
            value,
            statistics.key_mean,
            indices,
            None,
            alpha,
            torch.full_like(query, math.inf).nan_to_num(),
            phi_k=phi_k,
            operands=operands,
            **blocks,
        )
        outputs.append(out.double())
    assert relative(outputs[1], outputs[0]) <= {"none": 1e-3, "fp8": 0.05}[storage]


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

    for sparse_dtype in ("int8_fp8", "int8_int8"):
        means = statistics.key_mean, statistics.value_max
        operands = prepared(key, value, *means, sparse_dtype=sparse_dtype, feature_storage="value")
        num_k = num_blocks(length, 32)
        # [B, H, L, D] of blocks [B, H, N, block_k, D_PAD]
        keys = operands.low_keys * operands.key_scale[..., None, None]
        smooth = (key - key.mean(1, keepdim=True)).transpose(1, 2)
        wanted = torch.cat([quantize_int8(x, (-2, -1)) for x in smooth.split(32, 2)], 2)
        torch.testing.assert_close(keys.flatten(2, 3)[:, :, :length, :40], wanted, **close)
        # Padding must be zero: the kernels read it.
        assert not keys.flatten(2, 3)[:, :, length:].any() and not keys[..., 40:].any()
        values = in_key_order(operands.low_values) * operands.value_scale[:, :, None, None]
        wanted = quantize_value(value.transpose(1, 2), sparse_dtype)
        torch.testing.assert_close(values.flatten(2, 3)[:, :, :length, :40], wanted, **close)
        assert not values.flatten(2, 3)[:, :, length:].any() and not values[..., 40:].any()
        features = operands.features.flatten(2, 3)
        torch.testing.assert_close(features[:, :, :length, :40], smooth.softmax(-1), **close)
        assert not features[:, :, length:].any() and not features[..., 40:].any()
        torch.testing.assert_close(
            operands.feature_sums, operands.features.sum(3), atol=1e-5, rtol=1e-5
        )
        total = smooth.softmax(-1).mT @ value.transpose(1, 2)
        torch.testing.assert_close(operands.totals[:, :, :40, :40], total, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            operands.totals[:, :, 64, :40], smooth.softmax(-1).sum(2), atol=1e-4, rtol=1e-4
        )
        assert operands.low_keys.shape == (2, 2, num_k, 32, 64)


@pytest.mark.parametrize("length", [1, 200])
def test_low_bit_values_bring_features_in_fp8(poisoned, length):
    query, key, value = inputs(length, head_dim=40)
    statistics = block_statistics(query, key, value, block_q=32, block_k=32, need_value_max=True)
    operands = prepare_keys(
        key,
        value,
        statistics.key_mean,
        statistics.value_max,
        block_k=32,
        sparse_dtype="int8_fp8",
        phi_k="smoothed",
        need_features=True,
    )
    features = in_key_order(operands.features)
    phi = (key - key.mean(1, keepdim=True)).transpose(1, 2).softmax(-1)
    assert relative(features.flatten(2, 3)[:, :, :length, :40] / 448, phi) <= 0.03
    assert not features.flatten(2, 3)[:, :, length:].any() and not features[..., 40:].any()
    # FP8 is for what is selected: sums over everything are exact.
    assert relative(operands.feature_sums.sum(2)[..., :40], phi.sum(2)) <= 1e-6
    assert relative(operands.totals[:, :, 64, :40], phi.sum(2)) <= 1e-6
    total = phi.mT @ value.transpose(1, 2)
    assert relative(operands.totals[:, :, :40, :40], total) <= 1e-5
    values = in_key_order(operands.low_values) * operands.value_scale[:, :, None, None]
    assert relative(values.flatten(2, 3)[:, :, :length, :40], value.transpose(1, 2)) <= 0.03


@pytest.mark.parametrize("sparse_dtype", ["int8", "int8_fp8", "int8_int8"])
@pytest.mark.parametrize("length", [1, 200])
def test_queries_quantized_beforehand(poisoned, length, sparse_dtype):
    query, key, value = inputs(length, head_dim=40, batch=2)
    blocks = {"block_q": 64, "block_k": 32}
    low_values = sparse_dtype != "int8"
    statistics = block_statistics(
        query, key, value, need_value_max=low_values, need_low_query=True, **blocks
    )
    low, scale = statistics.low_query, statistics.query_scale
    got = (low * scale[..., None, None]).flatten(2, 3)
    wanted = [quantize_int8(x, (-2, -1)) for x in query.transpose(1, 2).split(64, 2)]
    torch.testing.assert_close(got[:, :, :length, :40], torch.cat(wanted, 2), atol=1e-6, rtol=1e-6)
    assert not got[:, :, length:].any() and not got[..., 40:].any()

    operands = prepare_keys(
        key,
        value,
        statistics.key_mean,
        statistics.value_max,
        block_k=32,
        sparse_dtype=sparse_dtype,
        phi_k="smoothed",
        need_features=False,
    )
    num_q, num_k = num_blocks(length, 64), num_blocks(length, 32)
    indices = random_lists(2, 2, num_q, num_k, max(1, num_k // 2))
    settings = {"operands": operands, "sparse_dtype": sparse_dtype, **blocks}
    first, second = (
        sparse_forward(query, key, value, indices, None, statistics.key_mean, **settings, **queries)
        for queries in ({}, {"low_query": low, "query_scale": scale})
    )
    assert relative(second[0], first[0]) <= 1e-6
    assert relative(second[1], first[1]) <= 1e-6


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
    scores = torch.zeros(1, 1, 3, 40, device=DEVICE)
    scores[0, 0, 1, 30] = 1
    scores[0, 0, 2] = torch.arange(40, device=DEVICE) // 3
    indices, _ = select_top_k(scores, 4)
    assert indices[0, 0].tolist() == [[0, 1, 2, 3], [0, 1, 2, 30], [36, 37, 38, 39]]
