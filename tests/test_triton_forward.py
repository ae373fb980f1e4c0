"""The Triton forward pass against the float64 reference; interpreted where there is no GPU.

Letters: B batch, H heads, L tokens, D head dimension, M query blocks, N key blocks.
"""

from __future__ import annotations

import logging
import math

import pytest
import torch
from operator_inputs import dense_attention, random_qkv, random_router
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton has no build for this platform")

from sla_video.kernels import api, triton_support
from sla_video.kernels.api import available_implementations, sla2_attention
from sla_video.kernels.quantize import quantize_int8, quantize_value
from sla_video.kernels.routing import block_means, mass_logit, num_blocks
from sla_video.kernels.triton_linear import linear_forward_mix
from sla_video.kernels.triton_prepare import prepare_keys
from sla_video.kernels.triton_routing import select_top_k
from sla_video.kernels.triton_sparse import _sparse_forward_kernel, sparse_forward
from sla_video.kernels.triton_statistics import block_statistics
from sla_video.kernels.triton_support import why_unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW_BIT = ["int8", "int8_fp8", "int8_int8"]
SMALL = {"sparsity": 0.5, "block_q": 32, "block_k": 32}
pytestmark = [
    pytest.mark.skipif(why_unavailable() is not None, reason=f"Triton is {why_unavailable()}"),
    pytest.mark.usefixtures("no_grad"),
]


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def poisoned_memory():
    """Fill uninitialised memory with NaN, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)


def inputs(length, *, head_dim=64, dtype=torch.float32, batch=1, heads=2, seed=0):
    qkv = random_qkv(
        length, batch=batch, heads=heads, head_dim=head_dim, dtype=torch.float32, seed=seed
    )
    return [x.to(DEVICE, dtype) for x in qkv]


def reference(qkv, router=None, **settings):
    """Output and LSE of the reference in float64."""
    router = None if router is None else router.double()
    settings |= {"impl": "reference", "return_lse": True}
    return sla2_attention(*(x.double() for x in qkv), router, **settings)


def triton(qkv, router=None, **settings):
    """Output and LSE of the kernels."""
    return sla2_attention(*qkv, router, impl="triton", return_lse=True, **settings)


def relative(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def random_lists(batch, heads, num_q, num_k, kept, *, seed=0):
    """`kept` distinct key blocks for each query block, `[B, H, M, kept]` int32."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, heads, num_q, num_k, generator=generator)
    return noise.topk(kept).indices.int().to(DEVICE)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("selection", ["top_k", "top_p"])
@pytest.mark.parametrize(
    ("length", "head_dim"),
    [(1, 64), (63, 64), (64, 64), (100, 40), (129, 128), (300, 64)],
    ids=lambda n: str(n),
)
def test_float32_is_the_reference(poisoned_memory, length, head_dim, selection, sparsity):
    qkv = inputs(length, head_dim=head_dim, batch=2)
    settings = {"sparsity": sparsity, "selection": selection, "top_p": 0.7}
    out, lse = triton(qkv, **settings)
    wanted, wanted_lse = reference(qkv, **settings)
    assert relative(out, wanted) <= 1e-5
    assert relative(lse, wanted_lse) <= 1e-5


@pytest.mark.parametrize(
    ("block_q", "block_k"), [(16, 16), (32, 64), (64, 128), (128, 32)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("phi_k", ["smoothed", "raw"])
def test_block_sizes_and_features(block_q, block_k, phi_k):
    qkv = inputs(140, head_dim=32)
    settings = {"sparsity": 0.6, "block_q": block_q, "block_k": block_k, "phi_k": phi_k}
    out, lse = triton(qkv, **settings)
    wanted, wanted_lse = reference(qkv, **settings)
    assert relative(out, wanted) <= 1e-5
    assert relative(lse, wanted_lse) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_head": True},
        {"alpha": "per_block", "num_query_blocks": 5},
        {"alpha": "per_block", "num_query_blocks": 3},
    ],
    ids=["adaptive", "per_head", "per_block", "per_block_interpolated"],
)
@pytest.mark.parametrize("selection", ["top_k", "top_p"])
def test_routers(options, selection):
    qkv = inputs(150, head_dim=40)
    router = random_router(2, 40, dtype=torch.float32, **options).to(DEVICE)
    settings = SMALL | {"selection": selection}
    out, lse = triton(qkv, router, **settings)
    wanted, wanted_lse = reference(qkv, router, **settings)
    assert relative(out, wanted) <= 1e-5
    assert relative(lse, wanted_lse) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
class TestErrorBudget:
    """At most twice the error of torch's own attention, or of `impl="torch"`, in the same dtype."""

    @pytest.mark.parametrize("length", [63, 300])
    def test_everything_selected(self, dtype, length):
        qkv = inputs(length, dtype=dtype)
        wanted = dense_attention(*(x.double() for x in qkv))
        out, _ = triton(qkv, sparsity=0)
        assert out.dtype == dtype
        assert relative(out, wanted) <= 2 * relative(dense_attention(*qkv), wanted)

    @pytest.mark.parametrize(("length", "head_dim"), [(300, 64), (129, 128)])
    @pytest.mark.parametrize("phi_k", ["smoothed", "raw"])
    def test_whole_operator(self, dtype, length, head_dim, phi_k):
        qkv = inputs(length, dtype=dtype, head_dim=head_dim)
        router = random_router(2, head_dim, dtype=torch.float32).to(DEVICE)
        settings = SMALL | {"sparsity": 0.8, "phi_k": phi_k}
        wanted, wanted_lse = reference(qkv, router.float(), **settings)
        out, lse = triton(qkv, router.float(), **settings)
        theirs = sla2_attention(*qkv, router, impl="torch", **settings)
        assert lse.dtype == torch.float32
        assert relative(out, wanted) <= 2 * relative(theirs, wanted)
        torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5, rtol=0)

    def test_linear_branch_alone(self, dtype):
        qkv = inputs(300, dtype=dtype)
        router = random_router(2, 64, alpha="per_block", num_query_blocks=1, dtype=torch.float32)
        router.alpha_table.fill_(-math.inf)
        router.to(DEVICE)
        wanted, _ = reference(qkv, router, **SMALL)
        router = router.float()
        theirs = sla2_attention(*qkv, router, impl="torch", **SMALL)
        # Features, the state and the weights of the state are rounded as well as the output.
        assert relative(triton(qkv, router, **SMALL)[0], wanted) <= 3 * relative(theirs, wanted)


# Against the simulation, and against exact attention. The simulation rounds P relative to the
# maximum of a whole row, a kernel relative to the maximum so far, so where P is low-bit they differ
# by about as much as each differs from exact attention.
LOW_BIT_BUDGET = {"int8": (2e-3, 0.02), "int8_fp8": (0.03, 0.04), "int8_int8": (0.02, 0.025)}


@pytest.mark.parametrize("sparse_dtype", LOW_BIT)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize(("length", "head_dim"), [(64, 40), (100, 64), (300, 64), (129, 128)])
def test_low_bit(poisoned_memory, length, head_dim, sparsity, sparse_dtype):
    qkv = inputs(length, head_dim=head_dim)
    settings = {"sparsity": sparsity, "block_k": 32}
    out, lse = triton(qkv, sparse_dtype=sparse_dtype, **settings)
    simulated, simulated_lse = reference(qkv, sparse_dtype=sparse_dtype, **settings)
    exact, exact_lse = reference(qkv, **settings)
    to_simulation, to_exact = LOW_BIT_BUDGET[sparse_dtype]
    assert relative(out, simulated) <= to_simulation
    assert relative(out, exact) <= to_exact
    assert relative(out, exact) <= 1.05 * relative(simulated, exact) + 1e-5
    assert relative(lse, simulated_lse) <= 1e-3
    torch.testing.assert_close(lse.double(), exact_lse, atol=0.1, rtol=0)


@pytest.mark.parametrize("sparse_dtype", LOW_BIT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_bit_of_16_bit_inputs_with_offsets(dtype, sparse_dtype):
    """Smoothing takes offsets that all keys share, which would else use up the range of INT8."""
    query, key, value = inputs(200, dtype=dtype)
    key = key + 20 * torch.randn(
        64, dtype=torch.float32, generator=torch.Generator().manual_seed(1)
    ).to(DEVICE, dtype)
    qkv = query, key, value
    exact, exact_lse = reference(qkv, **SMALL)
    out, lse = triton(qkv, sparse_dtype=sparse_dtype, **SMALL)
    assert relative(out, exact) <= LOW_BIT_BUDGET[sparse_dtype][1] + 0.005
    assert relative(lse, exact_lse) <= 0.02
    # Not met by keys quantized as they are.
    low = quantize_int8(key.double().transpose(1, 2).unflatten(2, (-1, 20)), (-2, -1))
    low = low.flatten(2, 3).transpose(1, 2)
    unsmoothed, _ = reference((query, low, value), **SMALL)
    assert relative(unsmoothed, exact) > 2 * relative(out, exact)


def test_low_bit_top_p():
    qkv = inputs(200, dtype=torch.bfloat16)
    settings = SMALL | {"selection": "top_p", "top_p": 0.6, "sparse_dtype": "int8"}
    out, _ = triton(qkv, **settings)
    assert relative(out, reference(qkv, **settings)[0]) <= 5e-3


LAYOUTS = {
    "heads_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "fused_qkv": lambda x: torch.stack([x] * 3, 2)[:, :, 1],
    "every_other_token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "head_dim_strided": lambda x: x.mT.contiguous().mT,
    "expanded_batch": lambda x: x[:1].expand(2, -1, -1, -1),
    "off_by_one": lambda x: F.pad(x, (1, 2))[..., 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("sparse_dtype", ["bf16", "int8_int8"])
def test_strides_do_not_matter(layout, sparse_dtype):
    qkv = [layout(x) for x in inputs(77, batch=2)]
    settings = SMALL | {"sparse_dtype": sparse_dtype}
    out, lse = triton(qkv, **settings)
    wanted, wanted_lse = triton(
        [x.clone(memory_format=torch.contiguous_format) for x in qkv], **settings
    )
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


@pytest.mark.parametrize("sparse_dtype", ["bf16", *LOW_BIT])
@pytest.mark.parametrize("length", [1, 63, 100])
def test_nan_around_the_inputs_never_leaks(poisoned_memory, length, sparse_dtype):
    def inside_nan(x):
        storage = x.new_full([n + 5 for n in x.shape], math.nan)
        view = storage[1:-4, 2:-3, 3:-2, 4:-1]
        return view.copy_(x)

    qkv = inputs(length)
    settings = SMALL | {"sparse_dtype": sparse_dtype}
    out, lse = triton([inside_nan(x) for x in qkv], **settings)
    wanted, wanted_lse = triton(qkv, **settings)
    assert out.isfinite().all() and lse.isfinite().all()
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


@pytest.mark.parametrize("sparse_dtype", ["bf16", "int8_fp8"])
def test_equal_inputs_give_equal_bits(sparse_dtype):
    qkv = inputs(200, dtype=torch.bfloat16)
    first, second = (triton(qkv, sparse_dtype=sparse_dtype, **SMALL) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    without_lse = sla2_attention(*qkv, impl="triton", sparse_dtype=sparse_dtype, **SMALL)
    assert torch.equal(without_lse, first[0])


@pytest.mark.parametrize("sparse_dtype", ["bf16", *LOW_BIT])
def test_extreme_scores_stay_finite(sparse_dtype):
    query, key, value = inputs(150)
    out, lse = triton((100 * query, 100 * key, value), sparse_dtype=sparse_dtype, **SMALL)
    assert out.isfinite().all() and lse.isfinite().all()
    assert out.abs().max() <= 1.1 * value.abs().max()


def test_states_do_not_overflow_float16():
    """Summed over tokens, the state would be 300 times these values."""
    query, key, value = inputs(300, dtype=torch.float16)
    key, value = key * 0, value.abs() * 1000
    key[..., 3] = 30  # all features in one channel
    settings = SMALL | {"phi_k": "raw"}
    out, _ = triton((query, key, value), **settings)
    assert relative(out, reference((query, key, value), **settings)[0]) <= 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_drop_nothing_keep_their_sparse_output(poisoned_memory, dtype):
    query, key, value = inputs(200, dtype=dtype)
    num_k = num_blocks(200, 32)
    indices = random_lists(1, 2, 7, num_k, num_k)
    counts = torch.full((1, 2, 7), num_k, dtype=torch.int32, device=DEVICE)
    counts[:, 1, 3] = 2
    key_mean = key.float().mean(1)
    alpha = torch.full((1, 2, 7), 0.3, device=DEVICE)
    blocks = {"block_q": 32, "block_k": 32}
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
        operands = prepare_keys(
            key,
            value,
            statistics.key_mean,
            statistics.value_max,
            block_k=32,
            sparse_dtype="int8_fp8",
            phi_k=phi_k,
            need_features=True,
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


@pytest.mark.parametrize("length", [1, 64, 200])
def test_preparation(poisoned_memory, length):
    query, key, value = inputs(length, head_dim=40, batch=2)
    statistics = block_statistics(query, key, value, block_q=64, block_k=32, need_value_max=True)
    close = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(statistics.query_means, block_means(query, 64), **close)
    torch.testing.assert_close(statistics.key_means, block_means(key, 32), **close)
    torch.testing.assert_close(statistics.key_mean, key.mean(1), **close)
    assert torch.equal(statistics.value_max, value.abs().amax(1))

    for sparse_dtype in ("int8_fp8", "int8_int8"):
        operands = prepare_keys(
            key,
            value,
            statistics.key_mean,
            statistics.value_max,
            block_k=32,
            sparse_dtype=sparse_dtype,
            phi_k="smoothed",
            need_features=True,
        )
        num_k = num_blocks(length, 32)
        # [B, H, L, D] of blocks [B, H, N, block_k, D_PAD]
        keys = operands.low_keys * operands.key_scale[..., None, None]
        smooth = (key - key.mean(1, keepdim=True)).transpose(1, 2)
        wanted = torch.cat([quantize_int8(x, (-2, -1)) for x in smooth.split(32, 2)], 2)
        torch.testing.assert_close(keys.flatten(2, 3)[:, :, :length, :40], wanted, **close)
        # Padding must be zero: the kernels read it.
        assert not keys.flatten(2, 3)[:, :, length:].any() and not keys[..., 40:].any()
        values = operands.low_values.float().mT * operands.value_scale[:, :, None, None]
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
        torch.testing.assert_close(operands.total[..., :40, :40], total, atol=1e-4, rtol=1e-4)
        assert operands.low_keys.shape == (2, 2, num_k, 32, 64)


@pytest.mark.parametrize(
    ("num_k", "kept"),
    [(2, 1), (5, 4), (33, 7), (64, 63), (100, 1), (513, 16)],
    ids=lambda n: str(n),
)
def test_selection_is_that_of_top_k(poisoned_memory, num_k, kept):
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


REFUSALS = {
    "float64": ({}, torch.float64, "for float16, bfloat16 and float32, got torch.float64"),
    "block_q": ({"block_q": 48}, None, "for `block_q` in 16, 32, 64, 128 .* got 48"),
    "block_k": ({"block_k": 256}, None, "for `block_k` in 16, 32, 64, 128 .* got 256"),
    "block_k_8_bit": (
        {"block_k": 16, "sparse_dtype": "int8_int8"},
        None,
        "for `block_k` in 32, 64, 128 with sparse_dtype='int8_int8', got 16",
    ),
    "soft_top_k": ({"selection": "soft_top_k"}, None, "without selection='soft_top_k'"),
}


@pytest.mark.parametrize(("options", "dtype", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(options, dtype, message):
    qkv = inputs(8, dtype=dtype or torch.float32)
    with pytest.raises(ValueError, match=f"impl='triton' is {message}"):
        triton(qkv, **options)


def test_refuses_wide_heads():
    with pytest.raises(ValueError, match="for head dimensions up to 128, got 160; use 'torch'"):
        triton(inputs(8, head_dim=160))


def test_auto_waits_until_the_kernels_are_measured(monkeypatch, caplog):
    monkeypatch.setattr(api, "_ANNOUNCED", set())
    with caplog.at_level(logging.INFO, logger="sla_video"):
        sla2_attention(*inputs(8))
    assert "chose 'torch'" in caplog.text


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU can be waited for")
@pytest.mark.parametrize("selection", ["top_k", "top_p"])
def test_nothing_waits_for_the_device(selection):
    qkv = inputs(300, dtype=torch.bfloat16)
    settings = SMALL | {"selection": selection, "sparse_dtype": "int8"}
    triton(qkv, **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton(qkv, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing")
def test_lengths_share_compiled_kernels():
    def compiled():
        return sum(len(cache[0]) for cache in _sparse_forward_kernel.device_caches.values())

    triton(inputs(300, dtype=torch.bfloat16))
    before = compiled()
    assert before
    for length in (1, 16, 64, 301, 1000, 1024):
        triton(inputs(length, dtype=torch.bfloat16))
    assert compiled() == before


def test_reasons_are_given_in_words(monkeypatch):
    assert available_implementations()["triton"] == "available"
    monkeypatch.setattr(triton_support, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available_implementations()["triton"].startswith("not available: there is no CUDA GPU")
    with pytest.raises(ValueError, match="impl='triton' is not available: there is no CUDA GPU"):
        triton(inputs(8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    reason = "it needs compute capability 8.0 or newer, and Old GPU has 7.5; use 'torch' instead"
    assert reason in available_implementations()["triton"]
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda _: None)
    assert "package 'triton' is not installed" in available_implementations()["triton"]
