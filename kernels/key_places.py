"""Keys in another order for each head, as the operator takes it.

Softmax attention does not care about the order of its keys, so each head may have its own, and what
lies together in a block with it. `key_order` says which orders are worth having. Letters: B batch,
H heads, L tokens, D head dimension, M query blocks, N key blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sla_video.kernels.options import Selection


class KeyOrder(NamedTuple):
    """Where the keys of each head are.

    Attributes:
        places: `[B, H, L]`, int32 or int64; block n of a head holds the tokens
            `places[b, h, n * block_k:]`. Each row is a permutation, which is not checked.
        always: `[H]`, int32 or int64: leading blocks that every query keeps before any others, as
            far as the selection has room for them.
    """

    places: Tensor
    always: Tensor


def check_key_order(order: object, query: Tensor, selection: Selection) -> KeyOrder | None:
    """The order of a call with `query` `[B, L, H, D]`, None if it has none.

    Raises:
        TypeError: not a pair of integer tensors on the device of `query`.
        ValueError: shapes that do not fit, or a selection that knows no leading blocks.
    """
    if order is None:
        return None
    if selection == "soft_top_k":
        raise ValueError("`key_order` is not for selection='soft_top_k': leave it out")
    if not isinstance(order, tuple) or len(order) != 2:
        raise TypeError(f"`key_order` must be a KeyOrder or None, got {type(order).__name__}")
    batch, length, heads, _ = query.shape
    shapes = {"places": (batch, heads, length), "always": (heads,)}
    for (name, shape), x in zip(shapes.items(), order, strict=True):
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"`{name}` of `key_order` must be a tensor of int32 or int64, got {got}"
            )
        if x.device != query.device:
            raise TypeError(f"`{name}` of `key_order` is on {x.device}, `query` on {query.device}")
        if x.shape != shape:
            raise ValueError(
                f"`{name}` of `key_order` must be {list(shape)} for this `query`, "
                f"got {list(x.shape)}"
            )
    return KeyOrder(*order)


def take_tokens(x: Tensor, places: Tensor) -> Tensor:
    """x `[B, L, H, D]` with the tokens of each head in the order of places `[B, H, L]`: a copy."""
    return x.gather(1, places.transpose(1, 2).long()[..., None].expand_as(x))


def leading_first(scores: Tensor, always: Tensor, most: int) -> Tensor:
    """Scores `[B, H, M, N]` with those of each head's leading blocks above all others.

    Args:
        always: `[H]`, how many blocks lead.
        most: at most so many do, for no more can be selected.
    """
    block = torch.arange(scores.shape[-1], device=scores.device)
    # [H, 1, N]
    leading = (block < always.clamp(max=most)[:, None])[:, None]
    return scores.masked_fill(leading, torch.inf)
