"""Attention by other packages, where they are installed, for the benchmark to time beside ours.

Each adapter takes query, key, value `[B, L, H, D]`, brings them into the layout its package wants
(which is not timed) and returns a call without arguments. No package is imported before that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.kernels.options import num_selected

Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another package's attention.

    Attributes:
        name: what the table calls it.
        package: the distribution that has it.
        sparse: whether it takes a sparsity; a dense one is timed once.
        prepare: (query, key, value, sparsity) -> a call; raises `ImportError` if it is not there.
    """

    name: str
    package: str
    sparse: bool
    prepare: Callable[[Tensor, Tensor, Tensor, float], Call]

    def installed(self) -> str | None:
        """The version at hand; None if there is none."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def _sage(query: Tensor, key: Tensor, value: Tensor, _: float) -> Call:
    attend = import_module("sageattention").sageattn
    return lambda: attend(query, key, value, tensor_layout="NHD", is_causal=False)


def _flash(query: Tensor, key: Tensor, value: Tensor, _: float) -> Call:
    attend = import_module("flash_attn").flash_attn_func
    return lambda: attend(query, key, value)


def _flash3(query: Tensor, key: Tensor, value: Tensor, _: float) -> Call:
    attend = import_module("flash_attn_interface").flash_attn_func
    return lambda: attend(query, key, value)


_FASTVIDEO_BLOCK = 64


def _fastvideo(query: Tensor, key: Tensor, value: Tensor, sparsity: float) -> Call:
    """Its video sparse attention: block means route, 64 x 64 blocks, a coarse branch added."""
    attend = import_module("fastvideo_kernel").video_sparse_attn
    length = query.shape[1]
    blocks = -(-length // _FASTVIDEO_BLOCK)
    padding = (0, 0, 0, blocks * _FASTVIDEO_BLOCK - length)
    # It wants whole blocks, [B, H, L, D].
    padded = [F.pad(x.transpose(1, 2), padding).contiguous() for x in (query, key, value)]
    sizes = torch.full((blocks,), _FASTVIDEO_BLOCK, dtype=torch.int32, device=query.device)
    sizes[-1] = length - (blocks - 1) * _FASTVIDEO_BLOCK
    kept = num_selected(sparsity, blocks)
    # A block of 4 x 4 x 4 tokens of a video; here they are already in order.
    return lambda: attend(*padded, sizes, sizes, kept, block_size=(4, 4, 4))


PEERS = (
    Peer(name="SageAttention", package="sageattention", sparse=False, prepare=_sage),
    Peer(name="flash_attn", package="flash-attn", sparse=False, prepare=_flash),
    Peer(name="flash_attn_interface", package="flash-attn-3", sparse=False, prepare=_flash3),
    Peer(name="FastVideo VSA", package="fastvideo-kernel", sparse=True, prepare=_fastvideo),
)


def describe_peers() -> dict[str, str]:
    """Package -> version, or "not installed"."""
    return {peer.package: peer.installed() or "not installed" for peer in PEERS}
