"""Simulated low-bit arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_inputs import dense_attention, random_qkv, rms, stable

from sla_video.kernels.api import sla2_attention
from sla_video.kernels.quantize import (
    quantize_fp8,
    quantize_int8,
    quantize_value,
    quantize_weights,
)

LOW_BIT = ["int8", "int8_fp8", "int8_int8"]


def values(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@stable
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000))
def test_int8_is_within_half_a_step_and_on_the_grid(scale, seed):
    x = scale * values(3, 16, 8, seed=seed)
    out = quantize_int8(x, (-2, -1))
    step = x.abs().amax((-2, -1), keepdim=True) / 127
    assert ((out - x).abs() <= 0.5 * step * (1 + 1e-9)).all()
    levels = out / step
    torch.testing.assert_close(levels, levels.round(), atol=1e-9, rtol=0)
    assert levels.abs().max().round() == 127
    torch.testing.assert_close(quantize_int8(out, (-2, -1)), out)


@stable
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000))
def test_fp8_is_within_half_a_unit_of_its_three_mantissa_bits(scale, seed):
    x = scale * values(3, 16, 8, seed=seed)
    out = quantize_fp8(x, -2)
    smallest = x.abs().amax(-2, keepdim=True) / 448 * 2.0**-9  # of the subnormals
    assert ((out - x).abs() <= torch.maximum(x.abs() / 16, 0.5 * smallest) * (1 + 1e-6)).all()


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_fp8])
def test_one_block_does_not_touch_another(quantize):
    x = values(4, 16, 8)
    x[1] *= 1e6
    x[2] = 0
    out = quantize(x, (-2, -1))
    for block, wanted in zip(out, x, strict=True):
        assert torch.equal(block, quantize(wanted[None], (-2, -1))[0])
    assert torch.equal(out[2], x[2])


def test_values_are_scaled_per_channel():
    x = values(1, 32, 4)
    x[..., 2] *= 1e4
    for sparse_dtype, worst in (("int8_fp8", 0.05), ("int8_int8", 0.02)):
        error = (quantize_value(x, sparse_dtype) - x).pow(2).mean(-2).sqrt()
        assert (error / x.pow(2).mean(-2).sqrt() < worst).all()
    for sparse_dtype in ("bf16", "int8"):
        assert quantize_value(x, sparse_dtype) is x


def test_softmax_weights():
    weights = torch.linspace(0, 1, 1001, dtype=torch.float64)
    int8 = quantize_weights(weights, "int8_int8")
    assert (int8 - weights).abs().max() <= 0.5 / 127 + 1e-12
    fp8 = quantize_weights(weights, "int8_fp8")
    assert ((fp8 - weights).abs() <= weights / 16 + 1e-6).all()
    for out in (int8, fp8):
        assert out[0] == 0 and out[-1] == 1
    assert quantize_weights(weights, "int8") is weights


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("sparse_dtype", LOW_BIT)
def test_error_of_the_operator_is_that_of_eight_bits(impl, sparse_dtype):
    query, key, value = random_qkv(200, head_dim=64)
    settings = {"sparsity": 0.5, "block_q": 64, "block_k": 32, "impl": impl, "return_lse": True}
    exact, exact_lse = sla2_attention(query, key, value, **settings)
    low, low_lse = sla2_attention(query, key, value, sparse_dtype=sparse_dtype, **settings)
    error = rms(low - exact) / rms(exact)
    assert 1e-4 < error < (0.02 if sparse_dtype == "int8" else 0.06)
    assert 1e-5 < (low_lse - exact_lse).abs().max() < 0.1


@pytest.mark.parametrize("sparse_dtype", LOW_BIT)
def test_smoothing_removes_the_error_of_a_common_key_offset(sparse_dtype):
    query, key, value = random_qkv(200, head_dim=64)
    settings = {"sparsity": 0, "block_q": 64, "block_k": 32, "sparse_dtype": sparse_dtype}
    full = dense_attention(query, key, value)
    errors = [
        rms(sla2_attention(query, key + offset, value, **settings) - full) for offset in (0, 100)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)


@pytest.mark.parametrize("length", [1, 33, 70])
def test_absent_tokens_do_not_set_a_scale(length):
    """With keys far from zero, zero padding would look like an outlier after smoothing."""
    query, key, value = random_qkv(length)
    settings = {"sparsity": 0, "block_q": 16, "block_k": 32, "sparse_dtype": "int8"}
    out = sla2_attention(query, key + 1000, value, impl="torch", **settings)
    wanted = sla2_attention(query, key + 1000, value, impl="reference", **settings)
    torch.testing.assert_close(out, wanted, atol=1e-9, rtol=0)
    assert rms(out - dense_attention(query, key, value)) < 0.02
