"""SLA (arXiv 2509.24006) in the place of SLA2, for comparison.

    O = O_s + O_l W,    O_l = phi(q) (sum_j phi(k_j)^T v_j) / (phi(q) sum_j phi(k_j))

over all keys j; O_s is exact attention to the selected blocks, W `[D, D]` belongs to a layer and is
zero at the start. Selection and O_s are those of SLA2 with routers whose mix weight is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from sla_video.pipelines.handle import SLAHandle

_NAME = "linear_proj"


def install_sla(handle: SLAHandle, projections: Mapping[str, Tensor] | None = None) -> None:
    """Turn every layer of `handle` into SLA, with W from `projections` or zero.

    W is a parameter of the layer's router, so that whoever trains the mix trains it.
    """
    for name, processor in handle.processors.items():
        router = processor.router
        if router is None:
            continue
        start = torch.zeros(router.head_dim, router.head_dim)
        weight = start if projections is None else projections[name]
        router.register_parameter(_NAME, nn.Parameter(weight.to(router.query_proj.device)))
        for method in ("_operator", "sla2"):
            setattr(processor, method, partial(_attend, router, getattr(processor, method)))


def save_projections(handle: SLAHandle, path: Path) -> None:
    """W of every layer as safetensors."""
    tensors = {
        name: getattr(router, _NAME).detach().cpu().contiguous()
        for name, router in handle.routers.items()
    }
    safetensors.torch.save_file(tensors, path)


def load_projections(path: Path) -> dict[str, Tensor]:
    """The inverse of `save_projections`."""
    return safetensors.torch.load_file(path)


def _attend(
    router: nn.Module,
    sparse_attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **changes: object,
) -> Tensor:
    sparse = sparse_attention(query, key, value, **changes)
    weight = getattr(router, _NAME)
    # [B, L, H, D]
    phi_q, phi_k = query.float().softmax(-1), key.float().softmax(-1)
    state = torch.einsum("blhd,blhe->bhde", phi_k, value.float())
    total = torch.einsum("blhd,bhd->blh", phi_q, phi_k.sum(1))
    linear = torch.einsum("blhd,bhde->blhe", phi_q, state) / total[..., None]
    return sparse + (linear @ weight).to(sparse.dtype)
