"""Lists of the query blocks that selected each key block, for the backward of keys and values.

The router lists key blocks per query block; gradients of a key block need the opposite. One stable
sort inverts the lists: no atomics, so they are the same on every run, and nothing travels to the
host, so they can be built inside a CUDA graph.

Letters: B batch, H heads, M query blocks, N key blocks, K blocks listed per query block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class InverseLists(NamedTuple):
    """Query blocks per key block, in one flat list.

    Attributes:
        query_blocks: `[B * H * M * K]` int32. The query blocks that selected one key block stand
            together, in ascending order.
        offsets: `[B, H, N + 1]` int32. Key block n of batch b and head h owns the entries
            `offsets[b, h, n]` up to, not including, `offsets[b, h, n + 1]`.
        order: `[B * H * N]` int32, the key blocks, counted through heads and batches, in the order
            to work on them.
    """

    query_blocks: Tensor
    offsets: Tensor
    order: Tensor


# A list this many times longer than they are on average is long.
_LONG = 4


def invert_selection(indices: Tensor, counts: Tensor | None, num_k: int) -> InverseLists:
    """Invert lists of selected key blocks.

    Args:
        indices: `[B, H, M, K]` integers in [0, N), distinct within the part of a row that counts.
        counts: `[B, H, M]`, how many entries of each row count; None when all do.
        num_k: N.
    """
    batch, heads, num_q, kept = indices.shape
    block = indices
    if counts is not None:
        rank = torch.arange(kept, device=indices.device)
        # One group after the last key block takes the entries that do not count.
        block = torch.where(rank < counts[..., None], indices, num_k)
    groups = batch * heads * (num_k + 1)
    first = torch.arange(0, groups, num_k + 1, dtype=torch.int32, device=indices.device)
    group = (block.to(torch.int32).flatten(0, 1) + first[:, None, None]).flatten()
    group, order = torch.sort(group, stable=True)
    query_blocks = (order // kept % num_q).to(torch.int32)
    every = torch.arange(groups, dtype=torch.int32, device=indices.device)
    offsets = torch.searchsorted(group, every, out_int32=True)
    offsets = offsets.view(batch, heads, num_k + 1)
    # Some key blocks are selected by nearly every query block. Started last, one of them would keep
    # the whole GPU waiting. The others stay in order, since those of one head share a cache.
    short = offsets.diff(dim=-1) * num_k < _LONG * kept * num_q
    order = torch.sort(short.flatten().to(torch.uint8), stable=True).indices.to(torch.int32)
    return InverseLists(query_blocks, offsets, order)
