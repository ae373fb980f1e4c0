"""Rotary embeddings as Diffusers' processors apply them, in fewer passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sla_video.kernels.triton_support import interpreted, rotary_refusal


def norm_and_rotate(
    attn: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    impl: str,
    *,
    own: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attn.norm_q` and `norm_k` over all heads, head split, rotary embedding.

    Query and key `[B, L, H*D]` become `[B, L, H, D]`; `rotary_emb` is (cos, sin), each
    `[1, L, 1, D]`. One kernel does it where SLA attention runs in Triton, nothing is
    differentiated and the norms are plain; it rounds once, where modules round twice.

    Args:
        impl: of SLA attention, as its user chose it.
        own: the caller made query and key, by projections, and reads neither after, so the result
            may be written over them.
    """
    if rotary_emb is not None and _one_kernel(attn, query, key, rotary_emb, impl):
        # Not every platform has Triton.
        from sla_video.kernels.triton_rotary import norm_rotate

        weights = attn.norm_q.weight, attn.norm_k.weight
        return norm_rotate(
            query,
            key,
            *weights,
            *rotary_emb,
            heads=attn.heads,
            eps=attn.norm_q.eps,
            in_place=own and query.stride(-1) == key.stride(-1) == 1,
        )
    query = attn.norm_q(query).unflatten(2, (attn.heads, -1))
    key = attn.norm_k(key).unflatten(2, (attn.heads, -1))
    return (query, key) if rotary_emb is None else rotate(query, key, *rotary_emb)


def _one_kernel(
    attn: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    rotary_emb: tuple[torch.Tensor, torch.Tensor],
    impl: str,
) -> bool:
    # As the operator decides for itself: interpreted kernels are for tests that name them.
    if impl != "triton" and (impl != "auto" or not query.is_cuda or interpreted()):
        return False
    # The same for both, since the kernel has one of each.
    if attn.norm_q.eps is None or attn.norm_q.eps != attn.norm_k.eps:
        return False
    states = (query, attn.norm_q), (key, attn.norm_k)
    return (
        all(_plain_norm(norm, x) for x, norm in states)
        and all(table.shape[:3] == (1, query.shape[1], 1) for table in rotary_emb)
        and query.shape == key.shape
        and not torch.is_autocast_enabled(query.device.type)
        and rotary_refusal(query, attn.heads) is None
    )


def _plain_norm(norm: nn.Module, states: torch.Tensor) -> bool:
    """Whether the weights of `norm` are all there is to it: no hooks, no gradients, no casts.

    Offloading and layerwise casting put hooks on modules, which bring weights only when called.
    """
    if type(norm) is not nn.RMSNorm or norm.weight is None:
        return False
    if norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__:
        return False
    if norm.weight.dtype != states.dtype or norm.weight.device != states.device:
        return False
    return not (torch.is_grad_enabled() and (states.requires_grad or norm.weight.requires_grad))


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of neighbouring pairs. query, key `[B, L, H, D]`; cos, sin `[1, L, 1, D]`.

    A pair (x1, x2) is the complex number x1 + i x2, turned by cos + i sin. As one complex product
    it reads and writes the tensors once; Diffusers' formula takes eight times as long on a CPU.
    """
    return turn_pairs(query, key, cos[..., 0::2], sin[..., 1::2])


def turn_pairs(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotate` by one angle a pair: cos, sin `[1, L, 1, D/2]`, or `[L, H, D/2]` for each head."""
    if torch.compiler.is_compiling():
        # The compiler fuses real arithmetic by itself, and has no code for complex numbers.
        return _rotate_real(query, cos, sin), _rotate_real(key, cos, sin)
    turn = torch.complex(cos.float(), sin.float())
    return _rotate_complex(query, turn), _rotate_complex(key, turn)


def _rotate_real(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = states.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)
    return rotated.flatten(-2).type_as(states)


def _rotate_complex(states: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(states)
