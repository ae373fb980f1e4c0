"""The lists of query blocks that selected each key block."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from backward_cases import make_case, selected_blocks
from triton_cases import DEVICE, needs_triton

from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_inverse import dropped_table, invert_selection

pytestmark = needs_triton


def invert(indices, counts, num_k):
    table = dropped_table(indices, counts, num_k)[:, : indices.shape[2], :num_k]
    return invert_selection(table, indices.shape[-1])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=["int8", "bf16"])
@pytest.mark.parametrize("ragged", [False, True], ids=["top_k", "ragged"])
@pytest.mark.parametrize("length", [1, 100, 300])
def test_table_of_what_is_dropped(length, ragged, dtype):
    case = make_case(length, batch=2, heads=3, head_dim=16, ragged=ragged)
    num_k = num_blocks(length, case.settings["block_k"])
    table = dropped_table(case.indices, case.counts, num_k, dtype)
    selected = selected_blocks(case.indices, case.counts, num_k).flatten(0, 1)
    num_q = selected.shape[1]
    assert table.dtype == dtype and torch.equal(table[:, :num_q, :num_k] != 0, ~selected)
    assert ((table == 0) | (table == 1)).all()
    # As matrix units want it, with as little as that takes.
    assert table.shape[1:] == (num_q + -num_q % 16, num_k + -num_k % 16)


@pytest.mark.parametrize("ragged", [False, True], ids=["top_k", "ragged"])
@pytest.mark.parametrize("length", [1, 100, 300])
def test_inverse_lists(length, ragged):
    case = make_case(length, batch=2, heads=3, head_dim=16, ragged=ragged)
    num_k = num_blocks(length, case.settings["block_k"])
    lists = invert(case.indices, case.counts, num_k)
    assert lists.counts.shape == (6, num_k)
    assert lists.order.sort().values.tolist() == list(range(6 * num_k))
    selected = selected_blocks(case.indices, case.counts, num_k)
    for b in range(2):
        for h in range(3):
            for n in range(num_k):
                bh = 3 * b + h
                count = lists.counts[bh, n].item()
                wanted = selected[b, h, :, n].nonzero().flatten().tolist()
                assert lists.query_blocks[bh, n, :count].tolist() == wanted


def test_key_blocks_with_long_lists_come_first():
    # 8 query blocks and 32 key blocks per head; everybody selects block 9 of the second head.
    indices = torch.arange(32, dtype=torch.int32, device=DEVICE).view(1, 1, 8, 4).repeat(1, 2, 1, 1)
    indices[0, 1, :, 0] = 9
    order = invert(indices, None, 32).order.tolist()
    assert order == [32 + 9, *(n for n in range(64) if n != 32 + 9)]


def test_long_lists_come_first_among_many():
    # One list of eight entries, the last of 5,000; the other query blocks select two blocks each.
    indices = torch.arange(16, dtype=torch.int32, device=DEVICE).view(1, 1, 8, 2)
    indices = torch.cat([indices, torch.full_like(indices[..., :1], 4999)], -1)
    lists = invert(indices, None, 5000)
    assert lists.counts[0].tolist() == [1] * 16 + [0] * 4983 + [8]
    long = [*range(16), 4999]
    assert lists.order.tolist() == [*long, *range(16, 4999)]


def test_more_query_blocks_than_16_bits_count():
    rows = 2**15 + 1
    indices = torch.zeros(1, 1, rows, 1, dtype=torch.int32, device=DEVICE)
    indices[0, 0, 5] = indices[0, 0, rows - 1] = 1
    lists = invert(indices, None, 2)
    assert lists.counts.tolist() == [[rows - 2, 2]]
    assert lists.query_blocks[0, 1, :2].tolist() == [5, rows - 1]
    assert lists.query_blocks[0, 0, rows - 3] == rows - 2
