"""Lists of the query blocks that selected each key block, for the backward of keys and values.

The router lists key blocks per query block; gradients of a key block need the opposite. A table of
pairs is made from the lists, which also says what the linear branch sums over, and is read column
by column: no atomics, so the new lists are the same on every run, and nothing travels to the host,
so they can be built inside a CUDA graph.

Letters: B batch, H heads, M query blocks, N key blocks, K blocks listed per query block.
Hardware: compute capability 8.0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_video.kernels.triton_tiles import padded_row


class InverseLists(NamedTuple):
    """Query blocks per key block.

    Attributes:
        query_blocks: `[B * H, N, M]` int16 (int32 from 2^15 query blocks on), the query blocks that
            selected key block n in ascending order. Entries that do not count hold anything.
        counts: `[B * H, N]` int32, how many entries of each row count.
        order: `[B * H * N]` int32, the key blocks, counted through heads and batches, in the order
            to work on them.
    """

    query_blocks: Tensor
    counts: Tensor
    order: Tensor


@triton.jit(do_not_specialize=["num_q", "num_selected", "rows", "row_stride"])
def _mark_selected_kernel(
    indices_ptr, counts_ptr, table_ptr, num_q, num_selected, rows, row_stride, ENTRIES: tl.constexpr
):
    """Set table `[B * H, M', N']` to 0 at the pairs that the lists of one head name."""
    bh = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    m = entry // num_selected
    valid = m < num_q
    if counts_ptr is not None:
        count = tl.load(counts_ptr + bh * num_q + m, mask=valid, other=0)
        valid = valid & (entry % num_selected < count)
    n = tl.load(indices_ptr + bh * num_q * num_selected + entry, mask=valid, other=0)
    row = bh * rows + m
    zeros = tl.zeros([ENTRIES], table_ptr.dtype.element_ty)
    tl.store(table_ptr + row * row_stride + n, zeros, mask=valid)


@triton.jit(do_not_specialize=["num_q", "num_k", "head_stride", "row_stride"])
def _list_columns_kernel(
    table_ptr,
    query_blocks_ptr,
    counts_ptr,
    num_q,
    num_k,
    head_stride,
    row_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Lists and counts of some key blocks: the rows in which their columns of the table hold 0."""
    bh = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = n < num_k
    rows = tl.arange(0, ROWS)
    list_ptr = query_blocks_ptr + (bh * num_k + n).to(tl.int64) * num_q
    table_ptr += bh * head_stride
    count = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, num_q, ROWS):
        m = start + rows
        offset = m.to(tl.int64)[:, None] * row_stride + n[None, :]
        mask = (m < num_q)[:, None] & exists[None, :]
        # [ROWS, COLUMNS]
        selected = (tl.load(table_ptr + offset, mask=mask, other=1) == 0).to(tl.int32)
        position = count[None, :] + tl.cumsum(selected, 0) - 1
        block = tl.broadcast_to(m[:, None], [ROWS, COLUMNS])
        block = block.to(query_blocks_ptr.dtype.element_ty)
        tl.store(list_ptr[None, :] + position, block, mask=selected > 0)
        count += tl.sum(selected, 0)
    tl.store(counts_ptr + bh * num_k + n, count, mask=exists)


@triton.jit(do_not_specialize=["num_lists", "long"])
def _long_lists_first_kernel(counts_ptr, order_ptr, num_lists, long, LISTS: tl.constexpr):
    """Numbers of the lists of at least `long` entries, then the others, each in ascending order."""
    offs = tl.arange(0, LISTS)
    num_long = 0
    for start in range(0, num_lists, LISTS):
        # Lists that do not exist have no entries, and `long` is positive.
        count = tl.load(counts_ptr + start + offs, mask=start + offs < num_lists, other=0)
        num_long += tl.sum((count >= long).to(tl.int32), 0)
    before = 0
    for start in range(0, num_lists, LISTS):
        index = start + offs
        exists = index < num_lists
        count = tl.load(counts_ptr + index, mask=exists, other=0)
        is_long = (count >= long).to(tl.int32)
        rank = before + tl.cumsum(is_long, 0) - is_long
        position = tl.where(is_long > 0, rank, num_long + index - rank)
        tl.store(order_ptr + position, index, mask=exists)
        before += tl.sum(is_long, 0)


# A list this many times longer than they are on average is long.
_LONG = 4


def dropped_table(
    indices: Tensor, counts: Tensor | None, num_k: int, dtype: torch.dtype = torch.int8
) -> Tensor:
    """Table `[B * H, M', N']`: 0 where a query block selected a key block, 1 elsewhere.

    M' and N' are M and N up to a multiple of 16, as matrix units want it.

    Args:
        indices: `[B, H, M, K]` int32 in [0, N), contiguous.
        counts: `[B, H, M]` int32, contiguous, how many entries of each row count; None when all do.
        num_k: N.
    """
    batch, heads, num_q, kept = indices.shape
    rows, width = padded_row(num_q), padded_row(num_k)
    table = indices.new_ones(batch * heads, rows, width, dtype=dtype)
    _mark_selected_kernel[(triton.cdiv(num_q * kept, 1024), batch * heads)](
        indices_ptr=indices,
        counts_ptr=counts,
        table_ptr=table,
        num_q=num_q,
        num_selected=kept,
        rows=rows,
        row_stride=width,
        ENTRIES=1024,
        num_warps=4,
    )
    return table


def invert_selection(dropped: Tensor, kept: int) -> InverseLists:
    """Query blocks per key block.

    Args:
        dropped: `[B * H, M, N]` of what `dropped_table` returns.
        kept: entries of a list of key blocks, at most.
    """
    heads, num_q, num_k = dropped.shape
    small = torch.int16 if num_q < 2**15 else torch.int32
    lengths = torch.empty(heads, num_k, dtype=torch.int32, device=dropped.device)
    query_blocks = lengths.new_empty(heads, num_k, num_q, dtype=small)
    _list_columns_kernel[(triton.cdiv(num_k, 32), heads)](
        table_ptr=dropped,
        query_blocks_ptr=query_blocks,
        counts_ptr=lengths,
        num_q=num_q,
        num_k=num_k,
        head_stride=dropped.stride(0),
        row_stride=dropped.stride(1),
        ROWS=64,
        COLUMNS=32,
        num_warps=4,
    )
    # Some key blocks are selected by nearly every query block. Started last, one of them would keep
    # the whole GPU waiting. The others stay in order, since those of one head share a cache.
    order = lengths.new_empty(heads * num_k)
    _long_lists_first_kernel[(1,)](
        counts_ptr=lengths,
        order_ptr=order,
        num_lists=heads * num_k,
        long=triton.cdiv(_LONG * kept * num_q, num_k),
        LISTS=4096,
        num_warps=8,
    )
    return InverseLists(query_blocks, lengths, order)
