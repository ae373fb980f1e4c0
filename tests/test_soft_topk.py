"""SoftTop-k: rows that sum to k, and the implicit gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_inputs import stable
from torch.autograd import gradcheck, gradgradcheck

from sla_video.kernels.soft_topk import soft_topk, soft_topk_logits


def scores(rows, columns, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@stable
@given(
    columns=st.integers(1, 200),
    share=st.floats(0, 1),
    tau=st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 100),
)
def test_rows_sum_to_k(columns, share, tau, scale, dtype, seed):
    k = max(1, round(share * columns))
    mask = soft_topk(scores(3, columns, seed, scale).to(dtype), k, tau)
    assert mask.min() >= 0 and mask.max() <= 1
    # Between two scores far apart the sum is a step of z + threshold's rounding.
    largest = scale * 10 / tau
    tolerance = columns * max(1.0, largest) * 4 * torch.finfo(dtype).eps
    assert (mask.sum(-1) - k).abs().max() <= tolerance


def test_order_of_scores_is_kept():
    x = scores(5, 40)
    mask = soft_topk(x, 7)
    assert torch.equal(mask.argsort(-1), x.argsort(-1))


def test_small_tau_is_the_hard_top_k():
    x = scores(5, 40)
    hard = torch.zeros_like(x).scatter(-1, x.topk(7, -1).indices, 1.0)
    torch.testing.assert_close(soft_topk(x, 7, 1e-5), hard, atol=1e-9, rtol=0)


def test_shifting_a_row_changes_nothing():
    x = scores(4, 30)
    torch.testing.assert_close(soft_topk(x + 5, 3), soft_topk(x, 3), atol=1e-12, rtol=0)


def test_equal_scores_share_equally():
    mask = soft_topk(torch.zeros(2, 8, dtype=torch.float64), 2)
    torch.testing.assert_close(mask, torch.full_like(mask, 0.25))


def test_all_selected():
    assert torch.equal(soft_topk(scores(2, 6), 6), torch.ones(2, 6, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_gradcheck_twice(k):
    x = scores(3, 9, seed=k, scale=0.3).requires_grad_()
    assert gradcheck(lambda s: soft_topk(s, k, 0.5), (x,))
    assert gradgradcheck(lambda s: soft_topk(s, k, 0.5), (x,))


def test_gradient_keeps_the_sum():
    x = scores(3, 9).requires_grad_()
    (gradient,) = torch.autograd.grad(soft_topk(x, 4).sum(), x)
    torch.testing.assert_close(gradient, torch.zeros_like(x), atol=1e-12, rtol=0)


def test_saturated_rows_have_finite_gradients():
    x = torch.tensor([[-1e6, 0.0, 1e6]], requires_grad=True)
    logits = soft_topk_logits(x, 1)
    logits.sum().backward()
    assert logits.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("k", [0, 5, 6])
def test_bad_k(k):
    with pytest.raises(ValueError, match=rf"`k` must be in \[1, 5\) for 5 scores, got {k}"):
        soft_topk_logits(scores(1, 5), k)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_bad_tau(tau):
    with pytest.raises(ValueError, match="`tau` must be positive"):
        soft_topk_logits(scores(1, 5), 2, tau)
