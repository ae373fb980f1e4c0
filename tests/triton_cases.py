"""What the tests of the Triton kernels share: device, inputs, poisoned memory, errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from operator_inputs import random_qkv

from sla_video.kernels.api import sla2_attention
from sla_video.kernels.triton_support import why_unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"sparsity": 0.5, "block_q": 32, "block_k": 32}
needs_triton = pytest.mark.skipif(
    why_unavailable() is not None, reason=f"Triton is {why_unavailable()}"
)


@contextmanager
def poisoned_memory(*, warn_only: bool = False) -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that reading it shows; refuse what is random.

    With `warn_only`, operations without a deterministic form only warn.
    """
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before)


def inside_nan(x):
    """The values of x as a view into a larger storage full of NaN."""
    storage = x.new_full([size + 8 for size in x.shape], torch.nan)
    view = storage[tuple(slice(4, 4 + size) for size in x.shape)]
    view.copy_(x)
    return view


def relative(got, wanted):
    """||got - wanted|| / ||wanted||; where nothing is wanted, ||got||."""
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).norm() / (wanted.norm() if wanted.norm() > 0 else 1)).item()


def inputs(length, *, head_dim=64, dtype=torch.float32, batch=1, heads=2, seed=0):
    """Query, key, value `[B, L, H, D]` on the device, drawn in float32."""
    qkv = random_qkv(
        length, batch=batch, heads=heads, head_dim=head_dim, dtype=torch.float32, seed=seed
    )
    return [x.to(DEVICE, dtype) for x in qkv]


def random_lists(batch, heads, num_q, num_k, kept, *, seed=0):
    """`kept` distinct key blocks for each query block, `[B, H, M, kept]` int32."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, heads, num_q, num_k, generator=generator)
    return noise.topk(kept).indices.int().to(DEVICE)


def reference(qkv, router=None, **settings):
    """Output and LSE of the reference in float64."""
    router = None if router is None else router.double()
    settings |= {"impl": "reference", "return_lse": True}
    return sla2_attention(*(x.double() for x in qkv), router, **settings)


def triton(qkv, router=None, **settings):
    """Output and LSE of the kernels."""
    return sla2_attention(*qkv, router, impl="triton", return_lse=True, **settings)
