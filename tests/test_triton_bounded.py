"""Attention to INT8 keys without a running maximum, where logits are bounded, and its choice.

Letters: B batch, H heads, L tokens, D head dimension, M query blocks, N key blocks.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import DEVICE, SMALL, inputs, needs_triton, reference, relative, triton

from sla_video.kernels import launch_choice, triton_attend, triton_forward, triton_impl
from sla_video.kernels.api import sla2_attention
from sla_video.kernels.key_places import KeyOrder
from sla_video.kernels.launch_lists import LaunchConfig, launch_list
from sla_video.kernels.launch_tuning import _ALLOWED_DISTANCE, _distance
from sla_video.kernels.over_query import attention_over_query
from sla_video.kernels.triton_attend import attend
from sla_video.kernels.triton_bounded import BOUND, beyond_bound
from sla_video.kernels.triton_prepare import prepare_keys
from sla_video.kernels.triton_statistics import block_statistics
from sla_video.kernels.triton_tiles import LOG2E

pytestmark = [needs_triton, pytest.mark.usefixtures("no_grad")]
INT8 = SMALL | {"sparse_dtype": "int8"}


@pytest.fixture
def choose(monkeypatch):
    """Tell whether attention is to be launched for bounded logits; other launches are the same."""

    def launches(kernel, *_):
        plain = LaunchConfig(4, 1, None, 32, 32)
        bounded = (plain._replace(bounded=True),) if choice[0] and kernel == "attend" else ()
        return (*bounded, plain)

    def change(bounded):
        choice[0] = bounded
        monkeypatch.setattr(launch_choice, "_chosen", {})

    choice = [False]
    monkeypatch.setattr(launch_choice, "launch_list", launches)
    change(True)
    return change


@pytest.fixture
def marks(monkeypatch):
    """What each attention launch found to be beyond the bound, `[B, H, M]` each."""
    found = []

    def record(*args):
        found.append(beyond_bound(*args))
        return found[-1]

    monkeypatch.setattr(triton_attend, "beyond_bound", record)
    return found


def both(choose, run):
    """Results of `run` without and with the bounded launch."""
    choose(False)
    plain = run()
    choose(True)
    return plain, run()


def assert_close(got, wanted):
    """Outputs and log-sum-exps of float32 inputs but for rounding."""
    for x, y in zip(got, wanted, strict=True):
        assert relative(x, y) <= 1e-5


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    ("length", "head_dim"), [(1, 64), (64, 40), (100, 64), (300, 64), (129, 128), (257, 128)]
)
def test_budgets_are_those_of_the_other_loop(poisoned, choose, marks, length, head_dim, sparsity):
    qkv = inputs(length, head_dim=head_dim, batch=2)
    settings = {"sparsity": sparsity, "block_k": 32}
    out, lse = triton(qkv, sparse_dtype="int8", **settings)
    simulated, simulated_lse = reference(qkv, sparse_dtype="int8", **settings)
    exact, exact_lse = reference(qkv, **settings)
    assert marks and not any(x.any() for x in marks)
    assert relative(out, simulated) <= 2e-3
    assert relative(out, exact) <= 0.02
    assert relative(out, exact) <= 1.05 * relative(simulated, exact) + 1e-5
    assert relative(lse, simulated_lse) <= 1e-3
    torch.testing.assert_close(lse.double(), exact_lse, atol=0.1, rtol=0)


@pytest.mark.parametrize("block_k", [32, 64, 128])
@pytest.mark.parametrize("block_q", [32, 128])
def test_bfloat16_differs_from_the_other_loop_by_less_than_tuning_allows(
    choose, marks, block_q, block_k
):
    qkv = inputs(300, head_dim=128, dtype=torch.bfloat16)
    settings = {"sparsity": 0.5, "block_q": block_q, "block_k": block_k, "sparse_dtype": "int8"}
    (plain, plain_lse), (out, lse) = both(choose, lambda: triton(qkv, **settings))
    assert len(marks) == 1 and not marks[0].any()
    assert 0 < _distance(out, plain) <= _ALLOWED_DISTANCE[torch.bfloat16]
    torch.testing.assert_close(lse, plain_lse, atol=4e-3, rtol=0)
    exact, exact_lse = reference(qkv, **settings | {"sparse_dtype": "bf16"})
    assert relative(out, exact) <= 1.05 * relative(plain, exact)
    torch.testing.assert_close(lse.double(), exact_lse, atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_beyond_the_bound_take_the_other_loop(poisoned, choose, marks, dtype):
    query, key, value = inputs(200, dtype=dtype)
    large = torch.tensor([False, True, False, True, True, False, True], device=DEVICE)
    query[:, 40] *= 1000
    query[:, 96:160, 1] *= 1000
    query[:, 199] *= 1000
    wanted = torch.stack([large, large]).int()[None]
    wanted[0, 0, 3:5] = 0
    settings = INT8 | {"sparsity": 0.4}
    (plain, plain_lse), (out, lse) = both(choose, lambda: triton((query, key, value), **settings))
    assert torch.equal(marks[0], wanted)
    rows = wanted.bool().repeat_interleave(32, 2)[:, :, :200]
    assert torch.equal(out[rows.mT], plain[rows.mT])
    assert torch.equal(lse[rows], plain_lse[rows])
    assert not torch.equal(out, plain)
    within = out[~rows.mT], plain[~rows.mT]
    assert relative(*within) <= (1e-5 if dtype == torch.float32 else 4e-3)
    simulated, simulated_lse = reference((query, key, value), **settings)
    # Nearly hard maxima: what rounds the other way in the simulation counts.
    assert relative(out, simulated) <= 0.01
    assert relative(out, simulated) <= 1.05 * relative(plain, simulated)
    assert relative(lse, simulated_lse) <= 1e-3


def test_with_all_blocks_beyond_it_is_the_other_loop(choose, marks):
    query, key, value = inputs(200, dtype=torch.bfloat16)
    plain, got = both(choose, lambda: triton((100 * query, 100 * key, value), **INT8))
    assert marks[0].all()
    assert torch.equal(got[0], plain[0]) and torch.equal(got[1], plain[1])


def test_a_common_offset_of_keys_does_not_count(choose, marks):
    query, key, value = inputs(200)
    key = key + 200 * torch.randn(64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (plain, plain_lse), (out, lse) = both(choose, lambda: triton((query, key, value), **INT8))
    assert not marks[0].any()
    assert_close((out, lse), (plain, plain_lse))
    exact, exact_lse = reference((query, key, value), **SMALL)
    assert relative(out, exact) <= 0.025
    assert relative(lse, exact_lse) <= 0.02


@pytest.mark.parametrize("sign", [1, -1], ids=["largest", "smallest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_at_the_bound(poisoned, marks, choose, sign, dtype):
    """All selected logits are 2^70 or 2^-70, and values are large, too."""
    length, head_dim = 96, 64
    direction = torch.ones(head_dim, device=DEVICE)
    signs = torch.ones(length, device=DEVICE)
    signs[32:64] = -1
    # Sixteen of the last block: smoothing is to find a mean of zero.
    signs[64:80] = -1
    size = 70 / LOG2E.value / head_dim**0.5
    query = (size * direction).expand(1, length, 1, -1).to(dtype).contiguous()
    key = (signs[:, None] * direction)[None, :, None].to(dtype).contiguous()
    value = 2.0**24 * inputs(length, dtype=dtype, heads=1)[2]
    statistics = block_statistics(
        query,
        key,
        value,
        block_q=32,
        block_k=32,
        need_value_max=False,
        need_low_query=True,
        need_query_norm=True,
    )
    mean = torch.zeros_like(statistics.key_mean)
    operands = prepare_keys(
        key,
        value,
        mean,
        None,
        block_k=32,
        sparse_dtype="int8",
        phi_k="smoothed",
        need_states=False,
        need_key_norm=True,
    )
    block = 0 if sign > 0 else 1
    indices = torch.full((1, 1, 3, 1), block, dtype=torch.int32, device=DEVICE)
    out, lse = torch.empty_like(query), mean.new_empty(1, 1, length)
    attend(
        query,
        key,
        value,
        indices,
        None,
        mean,
        operands=operands,
        block_q=32,
        block_k=32,
        out=out,
        lse=lse,
        sparse_dtype="int8",
        low_query=statistics.low_query,
        query_scale=statistics.query_scale,
        query_norm=statistics.query_norm,
    )
    assert not marks[0].any()
    wanted = value[:, 32 * block : 32 * block + 32].double().mean(1, keepdim=True)
    assert relative(out, wanted.expand_as(out)) <= (1e-5 if dtype == torch.float32 else 4e-3)
    logit = sign * 70 / LOG2E.value + math.log(32)
    torch.testing.assert_close(lse, torch.full_like(lse, logit), rtol=5e-3, atol=0)


def test_marks_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    query_norm, key_norm = 20 * torch.rand(2, 3, 5, generator=generator), torch.rand(2, 3, 300)
    query_norm, key_norm = query_norm + 10, 20 * key_norm
    query_norm[0, 0, 0], query_norm[1, 2, 4] = math.inf, math.nan
    indices = torch.rand(2, 3, 5, 300, generator=generator).argsort(-1)[..., :150].int()
    counts = torch.randint(1, 150, (2, 3, 5), generator=generator).int()
    norms = key_norm[:, :, None].expand(-1, -1, 5, -1).gather(-1, indices.long())
    for given in (None, counts):
        visited = torch.arange(150) < (150 if given is None else counts[..., None])
        largest = torch.where(visited, norms, 0.0).amax(-1)
        wanted = ~(query_norm * largest * LOG2E.value / 8 < BOUND.value)
        on_device = (x if x is None else x.to(DEVICE) for x in (query_norm, key_norm, indices))
        got = beyond_bound(*on_device, None if given is None else given.to(DEVICE), 64)
        assert torch.equal(got.bool().cpu(), wanted)
        assert 0 < wanted.sum() < wanted.numel()


@pytest.mark.parametrize("length", [1, 64, 200])
@pytest.mark.parametrize("ordered", [False, True])
def test_norms(poisoned, length, ordered):
    query, key, value = inputs(length, head_dim=40, batch=2)
    key = key + 3
    places = None
    if ordered:
        places = torch.rand(2, 2, length).argsort(-1).int().to(DEVICE)
    statistics = block_statistics(
        query,
        key,
        value,
        block_q=64,
        block_k=32,
        need_value_max=False,
        need_low_query=True,
        need_query_norm=True,
        places=places,
    )
    operands = prepare_keys(
        key,
        value,
        statistics.key_mean,
        None,
        block_k=32,
        sparse_dtype="int8",
        phi_k="smoothed",
        need_states=False,
        need_key_norm=True,
        places=places,
    )
    rows = (key - key.mean(1, keepdim=True)).norm(dim=-1).transpose(1, 2)
    if places is not None:
        rows = rows.gather(-1, places.long())
    for got, each, size in (
        (statistics.query_norm, query.norm(dim=-1).transpose(1, 2), 64),
        (operands.key_norm, rows, 32),
    ):
        wanted = torch.stack([x.amax(-1) for x in each.split(size, -1)], -1)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


CALLS = {
    "top_p": {"selection": "top_p", "top_p": 0.6},
    "everything": {"sparsity": 0.0},
    "raw_features": {"phi_k": "raw"},
    "long_blocks": {"block_q": 128, "block_k": 128},
    "short_blocks": {"block_q": 16, "block_k": 16},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS.keys())
def test_options(poisoned, choose, marks, options):
    qkv = inputs(300, batch=2)
    plain, got = both(choose, lambda: triton(qkv, **INT8 | options))
    assert len(marks) == 1 and not marks[0].any()
    assert_close(got, plain)


def test_strides_do_not_matter(choose):
    qkv = inputs(77, batch=2)
    wanted = triton(qkv, **INT8)
    got = triton([torch.stack([x] * 3, 2)[:, :, 1] for x in qkv], **INT8)
    assert_close(got, wanted)


@pytest.mark.parametrize("scale", [1, 1000])
def test_keys_in_another_order(choose, marks, scale):
    query, key, value = inputs(200)
    query[:, 64:96] *= scale
    places = torch.rand(1, 2, 200, generator=torch.Generator().manual_seed(0)).argsort(-1)
    order = KeyOrder(places.to(DEVICE), torch.tensor([0, 1], device=DEVICE))
    plain, got = both(choose, lambda: triton((query, key, value), key_order=order, **INT8))
    assert marks[0].sum() == (0 if scale == 1 else 2)
    assert_close(got, plain)


@pytest.mark.parametrize("scale", [1, 1000])
def test_output_over_the_query(choose, marks, scale):
    query, key, value = inputs(200)
    query[:, 64:96] *= scale
    wanted = sla2_attention(query, key, value, impl="triton", **INT8)
    taken = query.clone()
    got = attention_over_query(taken, key, value, impl="triton", **INT8)
    assert got.data_ptr() == taken.data_ptr() and len(marks) == 2
    assert torch.equal(got, wanted)


def test_heads_a_few_at_a_time(choose, marks, monkeypatch):
    qkv = inputs(200, batch=2, heads=3)
    wanted = triton(qkv, **INT8)
    monkeypatch.setattr(triton_forward, "_STATE_BYTES", 1)
    got = triton(qkv, **INT8)
    assert len(marks) == 1 + 6
    assert_close(got, wanted)


def test_gradients(choose, marks):
    qkv = inputs(200)
    qkv[0][:, 64:96] *= 1000

    def gradients():
        with torch.enable_grad():
            leaves = [x.clone().requires_grad_() for x in qkv]
            out = sla2_attention(*leaves, impl="triton", **INT8)
            return torch.autograd.grad((out * qkv[2].cos()).sum(), leaves)

    plain, got = both(choose, gradients)
    assert marks[0].sum() == 2
    for x, y in zip(got, plain, strict=True):
        assert relative(x, y) <= 1e-4


def test_equal_inputs_give_equal_bits(choose):
    query, key, value = inputs(200, dtype=torch.bfloat16)
    query[:, 64:96] *= 1000
    first, second = (triton((query, key, value), **INT8) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"sparse_dtype": "bf16"}, torch.bfloat16),
        ({"sparse_dtype": "int8_fp8"}, torch.bfloat16),
        ({"sparse_dtype": "int8_int8"}, torch.bfloat16),
        ({"sparse_dtype": "int8"}, torch.float16),
        ({"sparse_dtype": "int8", "selection": "soft_top_k"}, torch.float32),
    ],
    ids=["bf16", "int8_fp8", "int8_int8", "float16", "soft_top_k"],
)
def test_what_has_no_bound_takes_the_other_loop(choose, marks, options, dtype):
    qkv = inputs(100, dtype=dtype)
    plain, got = both(choose, lambda: triton(qkv, **SMALL | options))
    assert not marks
    assert torch.equal(got[0], plain[0]) and torch.equal(got[1], plain[1])


class TestChoice:
    def test_where_it_is_not_chosen_nothing_is_done_for_it(self, choose, marks, monkeypatch):
        seen = []

        def statistics(*args, **keywords):
            seen.append(block_statistics(*args, **keywords).query_norm)
            return block_statistics(*args, **keywords)

        def keys(*args, **keywords):
            seen.append(prepare_keys(*args, **keywords).key_norm)
            return prepare_keys(*args, **keywords)

        monkeypatch.setattr(triton_impl, "block_statistics", statistics)
        monkeypatch.setattr(triton_forward, "prepare_keys", keys)
        choose(False)
        triton(inputs(100), **INT8)
        assert seen == [None, None] and not marks
        choose(True)
        triton(inputs(100), **INT8)
        assert [x.shape[-1] for x in seen[2:]] == [4, 4] and len(marks) == 1

    def test_hopper_may_choose_it_and_does_not_by_itself(self):
        found = launch_list("attend", "int8", "broad", "9.0")
        bounded = [config.bounded for config in found]
        assert not bounded[0] and bounded[-1] and bounded == sorted(bounded)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_it_is_no_choice_in_float16(self, dtype, monkeypatch):
        monkeypatch.setattr(launch_choice, "capability", lambda _: (9, 0))
        case = launch_choice.LaunchCase("attend", "int8", torch.device("cpu"), dtype, 128, 128, 64)
        chosen = [config.bounded for config in case.candidates()]
        assert any(chosen) == (dtype == torch.bfloat16) and not chosen[0]

    @pytest.mark.parametrize("first", [False, True])
    def test_a_compiled_graph_stays_right_when_the_choice_changes(self, choose, marks, first):
        qkv = inputs(100)
        torch.compiler.reset()
        run = torch.compile(
            lambda *x: sla2_attention(*x, impl="triton", **INT8), backend="eager", fullgraph=True
        )
        choose(first)
        wanted = run(*qkv)
        assert len(marks) == first
        assert torch.equal(wanted, sla2_attention(*qkv, impl="triton", **INT8))
        choose(not first)
        got = run(*qkv)
        # Norms are made or not as when it was compiled; without them there is no bound.
        assert len(marks) == 2 * first
        assert relative(got, wanted) <= 1e-5
