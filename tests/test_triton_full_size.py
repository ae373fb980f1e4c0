"""The Triton operator at the sizes of real models, and samples of that grid in the interpreter.

On a GPU the whole grid runs, in about a minute with `pytest -n 12`. Letters: B batch, H heads, L
tokens, D head dimension.
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from captured import capture
from e4m3_bound import e4m3_bound, round_e4m3
from full_size import (
    LAYOUTS,
    chosen_options,
    forward_failures,
    gaussian,
    gradient_failures,
    operator,
    with_outliers,
)
from triton_cases import DEVICE, needs_triton, relative

from sla_video.kernels.api import sla2_attention
from sla_video.kernels.sampled_reference import clear_error, sampled_reference
from sla_video.kernels.triton_support import why_not

pytestmark = needs_triton
ON_GPU = DEVICE == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="takes a GPU: minutes in the interpreter")
LOW_BIT = ["int8", "int8_fp8"]
FORMATS = {
    "bf16": (torch.bfloat16, "bf16"),
    "fp16": (torch.float16, "bf16"),
    "int8": (torch.bfloat16, "int8"),
    "int8_fp8": (torch.bfloat16, "int8_fp8"),
}
# B, H, sparsity.
GRID = list(itertools.product((1, 2), (1, 12), (0.0, 0.5, 0.9, 0.97)))
SOME = {1: [(1, 1, 0.5)], 63: [(2, 1, 0.97)], 100: [(1, 12, 0.5)]}
each_format = pytest.mark.parametrize(("dtype", "sparse_dtype"), FORMATS.values(), ids=FORMATS)


def lengths(small, large):
    """Lengths for any machine, and those for a GPU."""
    return pytest.mark.parametrize(
        "length", [*small, *(pytest.param(length, marks=needs_gpu) for length in large)]
    )


def skip_without_fp8(sparse_dtype):
    """GPUs before Ada have no FP8."""
    reason = why_not(gaussian(8)[0], chosen_options(0.5, sparse_dtype))
    if reason is not None:
        pytest.skip(reason)


# The topmost varies fastest: processes that start side by side then compile different kernels.
@each_format
@pytest.mark.parametrize("head_dim", [64, 128])
@lengths((1, 63, 100), (64, 777, 4096, 7168, 32760))
def test_forward(length, head_dim, dtype, sparse_dtype):
    skip_without_fp8(sparse_dtype)
    failures = []
    for batch, heads, sparsity in GRID if ON_GPU else SOME[length]:
        qkv = gaussian(length, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype)
        name = f"B={batch}, H={heads}, sparsity {sparsity}"
        failures += forward_failures(qkv, sparsity, sparse_dtype, name)
    assert not failures


@each_format
@pytest.mark.parametrize(
    "layout",
    # The interpreter meets the others in test_triton_forward.
    [name if name == "fused_qkv" else pytest.param(name, marks=needs_gpu) for name in LAYOUTS],
)
def test_strides(layout, dtype, sparse_dtype):
    skip_without_fp8(sparse_dtype)
    length, heads = (4096, 4) if ON_GPU else (200, 1)
    qkv = [LAYOUTS[layout](x) for x in gaussian(length, heads=heads, dtype=dtype)]
    assert not forward_failures(qkv, 0.8, sparse_dtype, layout)


@each_format
@lengths((200,), (4096, 32760))
def test_offsets_and_outliers(length, dtype, sparse_dtype):
    skip_without_fp8(sparse_dtype)
    failures = []
    for sparsity in (0.5, 0.9, 0.97) if ON_GPU else (0.5,):
        qkv = gaussian(length, heads=12 if ON_GPU else 1, dtype=dtype)
        qkv = with_outliers(qkv)
        name = f"sparsity {sparsity}"
        failures += forward_failures(qkv, sparsity, sparse_dtype, name, low_bit_limit=0.03)
    assert not failures


@pytest.fixture(scope="module")
def captured():
    """By layer."""
    return capture((0, 3, 6), steps=4) if ON_GPU else capture((0, 3))


class TestCaptured:
    """Q, K and V of the embedded model, at most 2% off in every format at every sparsity."""

    def test_kernels(self, captured):
        """All of it on a GPU; a stretch of one head in the interpreter."""
        failures = []
        for (layer, qkv), (name, (dtype, sparse_dtype)) in itertools.product(
            captured.items(), FORMATS.items()
        ):
            if why_not(qkv[0].to(dtype), chosen_options(0.5, sparse_dtype)) is not None:
                continue
            qkv = [x.to(dtype) if ON_GPU else x[:, 1000:1300, 1:2].to(dtype) for x in qkv]
            for sparsity in (0.0, 0.5, 0.9, 0.97) if ON_GPU else (0.5,):
                where = f"layer {layer}, {name}, sparsity {sparsity}"
                failures += forward_failures(qkv, sparsity, sparse_dtype, where)
        assert not failures

    @pytest.mark.parametrize("sparse_dtype", ["bf16", *LOW_BIT])
    def test_torch(self, captured, sparse_dtype):
        """The formats as simulated, whole sequences, a few query blocks compared."""
        for qkv in captured.values():
            wanted = sampled_reference(*qkv, None, chosen_options(0.9), [0, 27, 55])
            with torch.no_grad():
                out = sla2_attention(*qkv, sparsity=0.9, sparse_dtype=sparse_dtype, impl="torch")
            # Dense attention in float32 rounds more on a GPU.
            exact = 1e-3 if ON_GPU else 1e-5
            assert clear_error(out, wanted) <= (exact if sparse_dtype == "bf16" else 0.02)


@pytest.mark.parametrize(
    ("dtype", "sparse_dtype", "limit"),
    [
        (torch.bfloat16, "bf16", 0.01),
        (torch.float16, "bf16", 0.01),
        (torch.bfloat16, "int8_fp8", 0.01),
        # Nothing but the format is rounded: the straight-through gradients themselves.
        (torch.float32, "int8", 1e-4),
    ],
    ids=["bf16", "fp16", "bf16-int8_fp8", "fp32-int8"],
)
@pytest.mark.parametrize("head_dim", [64, 128])
@lengths((200,), (777, 7168, 32760))
def test_gradients(length, head_dim, dtype, sparse_dtype, limit):
    skip_without_fp8(sparse_dtype)
    if dtype == torch.float32 and (length > 7168 or head_dim > 64):
        pytest.skip("float32 is for checks: its full size is L = 7,168 and D = 64")
    heads = 12 if ON_GPU else 1
    qkv = gaussian(length, heads=heads, head_dim=head_dim, dtype=dtype)
    failures = []
    for sparsity in (0.5, 0.9, 0.97) if ON_GPU else (0.5,):
        name = f"sparsity {sparsity}"
        failures += gradient_failures(qkv, sparsity, sparse_dtype, limit, name)
    assert not failures


@needs_gpu
@pytest.mark.parametrize("sparse_dtype", ["bf16", "int8_fp8"])
@pytest.mark.parametrize("backward", [False, True])
def test_equal_inputs_give_equal_bits(backward, sparse_dtype):
    skip_without_fp8(sparse_dtype)
    qkv = [x.requires_grad_(backward) for x in gaussian(32760, heads=12, head_dim=128)]
    found = []
    for _ in range(3):
        out = operator(qkv, 0.95, sparse_dtype)
        gradients = torch.autograd.grad(out, qkv, torch.ones_like(out)) if backward else ()
        found.append((out.detach(), *gradients))
    for again in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], again, strict=True))


@needs_gpu
@pytest.mark.parametrize("selection", ["top_k", "top_p"])
@pytest.mark.parametrize("sparse_dtype", ["bf16", "int8_fp8"])
@torch.no_grad()
def test_in_a_cuda_graph(sparse_dtype, selection):
    """Captured on one input, replayed on another."""
    skip_without_fp8(sparse_dtype)
    given = gaussian(2000, heads=12, head_dim=128)
    settings = {"selection": selection, "return_lse": True}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and lets cuBLAS take its workspace
        operator(given, 0.9, sparse_dtype, **settings)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = operator(given, 0.9, sparse_dtype, **settings)
    others = gaussian(2000, heads=12, head_dim=128, seed=5)
    for mine, other in zip(given, others, strict=True):
        mine.copy_(other)
    graph.replay()
    wanted, wanted_lse = operator(others, 0.9, sparse_dtype, **settings)
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


class TestTheBudgetItself:
    """Tests of the tests: a budget that everything meets would say nothing."""

    def test_e4m3_rounds_by_what_three_bits_round(self):
        x = torch.rand(4000, 8, dtype=torch.float64) + 0.5
        assert 0.02 < relative(round_e4m3(x, 0), x) < 0.03
        # Values of the format, whatever the scale of a channel.
        exact = torch.tensor([1.0, -1.75, 0.875, 0.25], dtype=torch.float64)[:, None]
        channels = exact * torch.tensor([3.0, 1e-5], dtype=torch.float64)
        torch.testing.assert_close(round_e4m3(channels, 0), channels, atol=0, rtol=1e-12)

    def test_the_bound_is_that_of_both_factors_together(self):
        qkv = [x.cpu() for x in gaussian(512, head_dim=64, dtype=torch.float64)]
        bounds = []
        for sparsity in (0.0, 0.75):
            chosen = chosen_options(sparsity)
            exact = sampled_reference(*qkv, None, chosen, [0, 3])
            bounds.append(e4m3_bound(qkv, chosen, exact))
        assert 0.03 < bounds[0] < 0.04
        # The sparse branch is a part of the output, then.
        assert 0.4 < bounds[1] / bounds[0] < 0.8
        # E4M3 holds ones and weights of 1/64 exactly.
        even = [torch.zeros(1, 64, 1, 64), torch.zeros(1, 64, 1, 64), torch.ones(1, 64, 1, 64)]
        exact = sampled_reference(*even, None, chosen_options(0.0), [0])
        assert e4m3_bound(even, chosen_options(0.0), exact) < 1e-12

    @pytest.mark.parametrize("sparse_dtype", ["bf16", *LOW_BIT])
    def test_a_wrong_output_is_noticed(self, sparse_dtype, monkeypatch):
        import full_size

        skip_without_fp8(sparse_dtype)
        qkv = gaussian(200, heads=1)
        right = full_size.operator
        assert not forward_failures(qkv, 0.5, sparse_dtype, "right")
        monkeypatch.setattr(full_size, "operator", lambda *a, **k: 1.05 * right(*a, **k))
        (line,) = forward_failures(qkv, 0.5, sparse_dtype, "wrong")
        assert line.startswith("wrong: relative error 0.0")
        assert len(gradient_failures(qkv, 0.5, sparse_dtype, 0.01, "wrong")) == 3
