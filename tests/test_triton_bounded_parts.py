"""Attention to INT8 keys without a running maximum: its parts, and when it is chosen.

Letters: B batch, H heads, L tokens, D head dimension, M query blocks, N key blocks.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import DEVICE, SMALL, inputs, needs_triton, relative, triton

from sla_video.kernels import launch_choice, triton_forward, triton_impl
from sla_video.kernels.api import sla2_attention
from sla_video.kernels.launch_lists import launch_list
from sla_video.kernels.triton_attend import attend
from sla_video.kernels.triton_bounded import BOUND, beyond_bound
from sla_video.kernels.triton_prepare import prepare_keys
from sla_video.kernels.triton_statistics import _block_statistics, block_statistics
from sla_video.kernels.triton_tiles import LOG2E

pytest_plugins = ["bounded_cases"]
pytestmark = [needs_triton, pytest.mark.usefixtures("no_grad")]
INT8 = SMALL | {"sparse_dtype": "int8"}


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


def test_the_operator_of_norms_is_registered_correctly():
    args = (*inputs(100), 64, 32, False, True, True, None)
    torch.library.opcheck(_block_statistics, args)


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
