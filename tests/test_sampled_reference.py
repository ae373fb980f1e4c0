"""A few query blocks of the reference against all of them."""

from __future__ import annotations

import pytest
import torch
from operator_inputs import dense_attention, options, random_qkv, random_router

from sla_video.kernels.reference import sla2_reference
from sla_video.kernels.sampled_reference import clear_error, sampled_reference, spread_blocks

ROUTERS = {
    "none": None,
    "adaptive": {},
    "per_head": {"per_head": True},
    "per_block": {"alpha": "per_block", "num_query_blocks": 3},
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
@pytest.mark.parametrize(
    "changes",
    [{}, {"phi_k": "raw"}, {"sparsity": 0.0}, {"sparse_dtype": "int8_fp8"}],
    ids=["default", "raw", "everything", "low_bit"],
)
@pytest.mark.parametrize("length", [3, 75])
def test_sampled_rows_are_those_of_the_reference(length, changes, router):
    qkv = random_qkv(length, batch=2)
    router = None if router is None else random_router(**router)
    chosen = options(**changes)
    blocks = spread_blocks(length, chosen.block_q, 3)
    found = sampled_reference(*qkv, router, chosen, blocks, need_dense=True)
    out, lse = sla2_reference(*qkv, router, chosen, need_lse=True)
    assert blocks == ([0] if length == 3 else [0, 2, 4])
    assert found.rows.tolist() == [i for i in range(length) if i // chosen.block_q in blocks]
    torch.testing.assert_close(found.output, out[:, found.rows], atol=1e-12, rtol=0)
    torch.testing.assert_close(found.lse, lse[..., found.rows], atol=1e-12, rtol=0)
    dense = dense_attention(*qkv)[:, found.rows]
    torch.testing.assert_close(found.dense, dense, atol=1e-12, rtol=0)


def test_gradients_are_those_of_the_whole_for_a_loss_on_the_sampled_rows():
    router, chosen = random_router(), options()
    gradients = []
    for sampled in (True, False):
        qkv = [x.requires_grad_() for x in random_qkv(75)]
        if sampled:
            out = sampled_reference(*qkv, router, chosen, [1, 4]).output
        else:
            rows = [i for i in range(75) if i // 16 in (1, 4)]
            out = sla2_reference(*qkv, router, chosen, need_lse=False)[0][:, rows]
        weight = random_qkv(75, seed=9)[0][:, : out.shape[1]]
        leaves = [*qkv, *router.parameters()]
        gradients.append(torch.autograd.grad((out * weight).sum(), leaves))
    for got, wanted in zip(*gradients, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_an_error_is_noticed_where_the_selection_is_clear_and_only_there():
    query, key, value = random_qkv(64, heads=1)
    chosen = options(block_q=16, block_k=8, sparsity=0.5)
    # In the first query block all key blocks score alike: which are kept is a matter of rounding.
    query[:, :16] = 0
    wanted = sampled_reference(query, key, value, None, chosen, range(4))
    out, _ = sla2_reference(query, key, value, None, chosen, need_lse=False)
    assert not (wanted.margin[..., :16] > 1e-3).any() and (wanted.margin[..., 16:] > 1e-3).all()
    assert clear_error(out, wanted) < 1e-12
    out[:, 3] += 1
    assert clear_error(out, wanted) < 1e-12
    out[:, 30] += 1
    assert clear_error(out, wanted) > 0.1
    everything = sampled_reference(query, key, value, None, options(sparsity=0), range(4))
    assert everything.margin.isinf().all()


def test_bad_arguments():
    qkv = random_qkv(64)
    with pytest.raises(ValueError, match="`blocks` must be from 0 to 3, got 4"):
        sampled_reference(*qkv, None, options(), [4])
    with pytest.raises(ValueError, match="`selection` must be 'top_k', got 'top_p'"):
        sampled_reference(*qkv, None, options(selection="top_p"), [0])
