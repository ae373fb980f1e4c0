"""The lists of query blocks that selected each key block."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from backward_cases import make_case, selected_blocks
from triton_cases import DEVICE, needs_triton

from sla_video.kernels.routing import num_blocks
from sla_video.kernels.triton_inverse import invert_selection

pytestmark = needs_triton


@pytest.mark.parametrize("ragged", [False, True], ids=["top_k", "ragged"])
@pytest.mark.parametrize("length", [1, 100, 300])
def test_inverse_lists(length, ragged):
    case = make_case(length, batch=2, heads=3, head_dim=16, ragged=ragged)
    num_k = num_blocks(length, case.settings["block_k"])
    lists = invert_selection(case.indices, case.counts, num_k)
    assert lists.query_blocks.dtype == lists.offsets.dtype == torch.int32
    assert lists.offsets.shape == (2, 3, num_k + 1)
    selected = selected_blocks(case.indices, case.counts, num_k)
    for b in range(2):
        for h in range(3):
            for n in range(num_k):
                first, last = lists.offsets[b, h, n : n + 2].tolist()
                wanted = selected[b, h, :, n].nonzero().flatten().tolist()
                assert lists.query_blocks[first:last].tolist() == wanted


def test_key_blocks_with_long_lists_come_first():
    # 8 query blocks and 32 key blocks per head; everybody selects block 9 of the second head.
    indices = torch.arange(32, dtype=torch.int32, device=DEVICE).view(1, 1, 8, 4).repeat(1, 2, 1, 1)
    indices[0, 1, :, 0] = 9
    order = invert_selection(indices, None, 32).order.tolist()
    assert order == [32 + 9, *(n for n in range(64) if n != 32 + 9)]
