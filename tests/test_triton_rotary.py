"""RMSNorm and rotary embedding in one kernel: its values, and when Wan's processor uses it.

Letters: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanRotaryPosEmbed

pytest.importorskip("triton", reason="Triton has no build for this platform")

from torch._dynamo.testing import CompileCounterWithBackend
from triton_cases import DEVICE, inside_nan, needs_triton, relative

from sla_video.config import SLAConfig
from sla_video.kernels import triton_rotary
from sla_video.kernels.triton_rotary import norm_rotate
from sla_video.kernels.triton_support import rotary_refusal
from sla_video.pipelines.families.rotary import norm_and_rotate
from sla_video.pipelines.patching import enable_sla
from tiny_models import build_tiny_transformer

pytestmark = needs_triton
EVERYTHING = SLAConfig(sparsity=0.0, block_q=32, block_k=32, impl="triton")


def rotary(length, head_dim, dtype=torch.float32):
    """cos, sin `[1, L, 1, D]` of random angles, each number twice."""
    angle = 6.3 * torch.rand(1, length, 1, head_dim // 2, device=DEVICE)
    return [table.repeat_interleave(2, -1).to(dtype) for table in (angle.cos(), angle.sin())]


def formula(x, weight, cos, sin, heads, eps):
    """The formulas of `triton_rotary`, in float64."""
    x, weight, cos, sin = (t.double() for t in (x, weight, cos, sin))
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    pairs = torch.view_as_complex(x.unflatten(2, (heads, -1)).unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos[..., 0::2], sin[..., 1::2])
    return torch.view_as_real(pairs * turn).flatten(-2)


def attention(heads, head_dim, dtype, *, eps=1e-6):
    """Wan's self-attention with norm weights that are not one, and only those."""
    attn = WanAttention(dim=8, heads=heads, dim_head=head_dim, eps=eps).to(DEVICE, dtype)
    for norm in (attn.norm_q, attn.norm_k):
        torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    return attn.requires_grad_(False)


@pytest.fixture
def launches(monkeypatch):
    """Shapes that the kernel was called with."""
    found = []
    real = triton_rotary._launch

    def record(query, *arguments, **settings):
        found.append(tuple(query.shape))
        return real(query, *arguments, **settings)

    monkeypatch.setattr(triton_rotary, "_launch", record)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "head_dim"),
    [(1, 1, 1, 16), (2, 37, 3, 24), (1, 19, 12, 128), (1, 5, 40, 128), (2, 63, 4, 64)],
)
def test_values(poisoned, batch, length, heads, head_dim, dtype):
    torch.manual_seed(length)
    attn = attention(heads, head_dim, dtype)
    # Rows of very different size, in the layout of fused projections, between NaN.
    states = torch.randn(batch, length, 3, heads * head_dim, device=DEVICE)
    states *= torch.logspace(-3, 2, length, device=DEVICE)[:, None, None]
    query, key = inside_nan(states.to(dtype)).unbind(2)[:2]
    cos, sin = rotary(length, head_dim)
    weights = attn.norm_q.weight, attn.norm_k.weight
    got = norm_rotate(query, key, *weights, cos, sin, heads=heads, eps=1e-6)
    modules = norm_and_rotate(attn, query, key, (cos, sin), "torch")
    for x, weight, ours, theirs in zip((query, key), weights, got, modules, strict=True):
        wanted = formula(x, weight, cos, sin, heads, 1e-6)
        assert ours.shape == (batch, length, heads, head_dim) and ours.dtype == dtype
        assert ours.is_contiguous()
        # One rounding, where the modules have two or more.
        bound = 1e-6 if dtype == torch.float32 else relative(theirs, wanted)
        assert relative(ours, wanted) <= bound
        assert relative(theirs, wanted) < 1e-2
    own = inside_nan(states.to(dtype)).unbind(2)
    value = own[2].clone()
    turned = norm_rotate(*own[:2], *weights, cos, sin, heads=heads, eps=1e-6, in_place=True)
    for x, y, ours in zip(own[:2], turned, got, strict=True):
        # Code for other strides may add in another order on a GPU.
        bound = 0.0 if DEVICE == "cpu" else torch.finfo(dtype).eps
        torch.testing.assert_close(y, ours, rtol=2 * bound, atol=bound)
        assert y.data_ptr() == x.data_ptr()
    assert torch.equal(own[2], value), "what lies between the rows stays"


def test_the_pairs_are_those_of_the_stock_rotary_embedding():
    attn = attention(2, 16, torch.float32)
    rope = [t.to(DEVICE) for t in WanRotaryPosEmbed(16, (1, 1, 1), 32)(torch.zeros(1, 1, 3, 5, 7))]
    query, key = torch.randn(2, 1, 105, 32, device=DEVICE)
    ours = norm_and_rotate(attn, query, key, rope, "triton")
    theirs = norm_and_rotate(attn, query, key, rope, "torch")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_eps_is_that_of_the_norm():
    attn = attention(2, 16, torch.float32, eps=0.5)
    query, key = 0.1 * torch.randn(2, 1, 9, 32, device=DEVICE)
    ours = norm_and_rotate(attn, query, key, rotary(9, 16), "triton")
    assert ours[0].square().mean() < 0.1


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused_projections"])
def test_a_patched_transformer_uses_it_in_every_layer(launches, fused):
    model = build_tiny_transformer().to(DEVICE)
    if fused:
        model.fuse_qkv_projections()
    call = {
        "hidden_states": torch.randn(1, 4, 1, 5, 8, device=DEVICE),
        "timestep": torch.tensor([500], device=DEVICE),
        "encoder_hidden_states": torch.randn(1, 16, 16, device=DEVICE),
        "return_dict": False,
    }
    with torch.no_grad():
        stock = model(**call)[0]
        with enable_sla(model, config=EVERYTHING):
            torch.testing.assert_close(model(**call)[0], stock, rtol=1e-4, atol=1e-5)
        assert launches == [(1, 40, 32)] * 3
        assert torch.equal(model(**call)[0], stock)
    enable_sla(model, config=EVERYTHING)
    # Weights that want gradients, and no `no_grad`: it has none, so the modules do it.
    model(**call)[0].sum().backward()
    assert len(launches) == 3
    assert model.blocks[0].attn1.norm_q.weight.grad.norm() > 0


def hooked(attn):
    attn.norm_k.register_forward_pre_hook(lambda module, args: None)


def replaced(attn):
    forward = attn.norm_q.forward
    attn.norm_q.forward = lambda x: forward(x)


def in_another_dtype(attn):
    attn.norm_q.double()


def with_another_eps(attn):
    attn.norm_k.eps = 1e-3


def trained(attn):
    attn.norm_q.weight.requires_grad_(True)


@pytest.mark.parametrize("change", [hooked, replaced, in_another_dtype, with_another_eps, trained])
def test_norms_that_are_more_than_their_weights_are_called(launches, change):
    attn = attention(2, 16, torch.float32)
    change(attn)
    query, key = torch.randn(2, 1, 9, 32, device=DEVICE)
    ours = norm_and_rotate(attn, query, key, rotary(9, 16), "triton")
    assert not launches
    for x, norm, got in zip((query, key), (attn.norm_q, attn.norm_k), ours, strict=True):
        assert got.grad_fn is not None or change is not trained or norm is attn.norm_k
        assert got.shape == (1, 9, 2, 16) and x.shape == (1, 9, 32)


@pytest.mark.parametrize("impl", ["torch", "reference", *(["auto"] if DEVICE == "cpu" else [])])
def test_other_implementations_stay_without_triton(launches, impl):
    query, key = torch.randn(2, 1, 9, 32, device=DEVICE)
    norm_and_rotate(attention(2, 16, torch.float32), query, key, rotary(9, 16), impl)
    assert not launches


def test_without_rotation_and_under_autocast_the_modules_do_it(launches):
    attn = attention(2, 16, torch.float32)
    query, key = torch.randn(2, 1, 9, 32, device=DEVICE)
    norm_and_rotate(attn, query, key, None, "triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        norm_and_rotate(attn, query, key, rotary(9, 16), "triton")
    assert not launches


@pytest.mark.parametrize(
    ("dtype", "channels", "heads", "message"),
    [
        (torch.float64, 32, 2, "got torch.float64"),
        (torch.float32, 2 * 160, 2, "got 160 and 2"),
        (torch.float32, 2 * 15, 2, "got 15 and 2"),
        (torch.float32, 65 * 16, 65, "got 16 and 65"),
    ],
)
def test_what_the_kernel_cannot_do_goes_to_the_modules(launches, dtype, channels, heads, message):
    query, key = torch.randn(2, 1, 3, channels, device=DEVICE, dtype=dtype)
    assert message in rotary_refusal(query, heads)
    assert rotary_refusal(query[..., :16].float(), 1) is None
    if channels // heads % 2 == 0:
        attn = attention(heads, channels // heads, dtype)
        norm_and_rotate(attn, query, key, rotary(3, channels // heads), "triton")
        assert not launches


def test_compiled_blocks_are_one_graph_with_the_kernel_in_it():
    model = build_tiny_transformer(num_layers=2).to(DEVICE).requires_grad_(False)
    call = [torch.randn(1, 4, 1, 4, 8), torch.tensor([500]), torch.randn(1, 16, 16)]
    call = [x.to(DEVICE) for x in call]
    enable_sla(model, config=EVERYTHING)
    eager = model(*call).sample
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(model(*call).sample, eager)
    assert counter.frame_count == 1
    assert "norm_rotate" in counter.graphs[0].code
    torch._dynamo.reset()
