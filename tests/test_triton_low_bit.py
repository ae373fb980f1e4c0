"""Low-bit formats of the Triton operator against their simulation and against exact attention."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton_cases import DEVICE, SMALL, inputs, needs_triton, reference, relative, triton

from sla_video.kernels.quantize import quantize_int8

pytestmark = [needs_triton, pytest.mark.usefixtures("no_grad")]
LOW_BIT = ["int8", "int8_fp8", "int8_int8"]


# Against the simulation, and against exact attention. The simulation rounds P relative to the
# maximum of a whole row, a kernel relative to the maximum so far, so where P is low-bit they differ
# by about as much as each differs from exact attention.
LOW_BIT_BUDGET = {"int8": (2e-3, 0.02), "int8_fp8": (0.03, 0.04), "int8_int8": (0.02, 0.025)}


@pytest.mark.parametrize("sparse_dtype", LOW_BIT)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize(("length", "head_dim"), [(64, 40), (100, 64), (300, 64), (129, 128)])
def test_low_bit(poisoned, length, head_dim, sparsity, sparse_dtype):
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
