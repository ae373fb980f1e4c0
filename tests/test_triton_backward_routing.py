"""Gradients of block means, and of the mass that is selected, against autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from operator_inputs import random_qkv

pytest.importorskip("triton", reason="Triton has no build for this platform")

from backward_cases import make_case, selected_blocks
from triton_cases import DEVICE, inside_nan, needs_triton, poisoned_memory, relative

from sla_video.kernels.routing import block_means, mass_logit, num_blocks
from sla_video.kernels.triton_backward_routing import mass_logit_backward, with_block_means

pytestmark = needs_triton


@pytest.mark.parametrize("smooth", [False, True], ids=["raw", "smoothed"])
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("ragged", [False, True], ids=["top_k", "ragged"])
@pytest.mark.parametrize("length", [64, 300, 777])
def test_gradient_of_the_selected_mass(length, ragged, spread, smooth):
    case = make_case(length, batch=2, head_dim=32, ragged=ragged)
    block_q, block_k = case.settings["block_q"], case.settings["block_k"]
    num_q, num_k = num_blocks(length, block_q), num_blocks(length, block_k)
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(2, 2, n, 32, generator=generator).to(DEVICE) for n in (num_q, num_k)]
    features[0] *= spread
    # The same for all keys of a head.
    offset = torch.randn(2, 2, 1, 32, generator=generator).to(DEVICE) * (20 if smooth else 1)
    log_tail = math.log((length - (num_k - 1) * block_k) / block_k)

    queries, keys = (x.double().requires_grad_() for x in features)
    scores = queries @ keys.mT / 32**0.5
    tail = torch.zeros(num_k, dtype=torch.float64, device=DEVICE)
    tail[-1] = log_tail
    dropped = (~selected_blocks(case.indices, case.counts, num_k)).double()
    logit = mass_logit(scores + tail, dropped)
    grad_logit = torch.randn(logit.shape, generator=generator).to(DEVICE)
    wanted = torch.autograd.grad((logit * grad_logit).sum(), (queries, keys))
    if ragged:
        # The first row of each head drops nothing.
        assert (logit[..., 0] == 0).all()
        assert (wanted[0][..., 0, :] == 0).all()

    with poisoned_memory(warn_only=True):
        got = mass_logit_backward(
            features[0],
            features[1] + offset,
            offset[:, :, 0] if smooth else None,
            case.indices,
            case.counts,
            grad_logit,
            length,
            block_k,
        )
    for mine, exact in zip(got, wanted, strict=True):
        assert relative(mine, exact) <= 1e-4
    if ragged:
        assert (got[0][..., 0, :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("uses", ["both", "means", "tokens"])
@pytest.mark.parametrize(("length", "block"), [(1, 16), (100, 32), (300, 128)])
def test_tokens_get_the_gradient_of_the_means_of_their_blocks(length, block, uses, dtype):
    x, weight, _ = random_qkv(length, batch=2, heads=3, head_dim=40, dtype=dtype)
    x = inside_nan(x.to(DEVICE)).requires_grad_()
    weight = weight.to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2)
    means = block_means(x.detach().double(), block).float()
    mean_weight = torch.randn(means.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def loss(tokens, means):
        total = 0
        if uses != "means":
            total = total + (tokens * weight).sum()
        if uses != "tokens":
            total = total + (means * mean_weight).sum()
        return total

    with poisoned_memory(warn_only=True):
        same, same_means = with_block_means(x, means, block)
        (got,) = torch.autograd.grad(loss(same, same_means), x)
    assert torch.equal(same, x) and torch.equal(same_means, means)
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(exact, block_means(exact, block)), exact)
    assert got.dtype == dtype and got.shape == x.shape
    assert relative(got, wanted) <= (1e-6 if dtype == torch.float32 else 0.003)
