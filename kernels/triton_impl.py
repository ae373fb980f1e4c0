"""SLA2 with Triton kernels, for NVIDIA GPUs of compute capability 8.0 and newer.

    triton_statistics   block means of Q and K, largest magnitudes of V, low-bit Q
    triton_routing      scores, selected blocks, alpha
    triton_prepare      low-bit K and V, states of key blocks
    triton_attend       O_s and its log-sum-exp (`triton_sparse`), and in the same kernel the mix
                        O = alpha O_s + (1 - alpha) O_l (`triton_linear`)
    triton_autograd     the last two and their gradients, `triton_backward`, as one operator
    triton_key_order    the forward alone, where heads have an order of their keys
    triton_in_place     the same two with the output in place of Q, where nobody asks for gradients
    triton_context      attention to a context, where there is one and nobody asks for gradients
    triton_soft         in its place, and that of routing, where the selection is soft

Means, selection and attention are custom operators with gradients of their own; what lies between
them, the projections of the router and alpha, is plain torch. Nothing synchronises with the host,
and L is a run-time value of every kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla_video.kernels.context import Context, needs_gradients, with_context
from sla_video.kernels.key_places import KeyOrder
from sla_video.kernels.options import Options, most_selected
from sla_video.kernels.router import Router
from sla_video.kernels.triton_autograd import mixed_attention
from sla_video.kernels.triton_backward_routing import with_block_means
from sla_video.kernels.triton_bounded import wants_norms
from sla_video.kernels.triton_context import mix_context
from sla_video.kernels.triton_in_place import attention_in_query, rows_apart
from sla_video.kernels.triton_key_order import ordered_attention, places_or_move
from sla_video.kernels.triton_routing import plan_blocks
from sla_video.kernels.triton_soft import soft_attention
from sla_video.kernels.triton_statistics import block_statistics
from sla_video.kernels.triton_support import why_not


def sla2_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    router: Router | None,
    options: Options,
    *,
    need_lse: bool,
    context: Context | None = None,
    key_order: KeyOrder | None = None,
) -> tuple[Tensor, Tensor | None]:
    """SLA2 (arXiv 2602.12675) on `[B, L, H, D]`; see `sla2_attention`, which checks arguments.

    A tensor that is not contiguous along D is copied; other strides are used as they are.

    Returns:
        the output `[B, L, H, D]` in the dtype of `query`, and the log-sum-exp of the selected
        part `[B, H, L]` in float32 (None unless `need_lse`).

    Raises:
        ValueError: a device, dtype, size or option that the kernels are not made for.
    """
    reason = why_not(query, options)
    if reason is not None:
        raise ValueError(f"impl='triton' is {reason}")
    places = always = None
    if key_order is not None:
        key, value, places = places_or_move(query, key, value, router, key_order)
        always = key_order.always.to(torch.int32)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    block_q, block_k = options.block_q, options.block_k
    statistics = block_statistics(
        query,
        key,
        value,
        block_q=block_q,
        block_k=block_k,
        # Channels of low-bit values, and of float16 states, are scaled by their largest value.
        need_value_max=options.sparse_dtype in ("int8_fp8", "int8_int8")
        or value.dtype == torch.float16,
        need_low_query=options.sparse_dtype != "bf16",
        need_query_norm=wants_norms(query, options),
        places=places,
    )
    # One pass for the gradient of a tensor and that of its means.
    query, query_means = with_block_means(query, statistics.query_means, block_q)
    key, key_means = with_block_means(key, statistics.key_means, block_k)
    statistics = statistics._replace(query_means=query_means, key_means=key_means)
    num_k = key_means.shape[2]
    want_lse = need_lse or context is not None
    alpha: Tensor | None
    if options.selection == "soft_top_k" and most_selected(options, num_k) < num_k:
        out, lse, alpha = soft_attention(
            query, key, value, statistics, router, options, need_lse=want_lse
        )
    else:
        plan = plan_blocks(
            statistics.query_means,
            statistics.key_means,
            statistics.key_mean,
            query.shape[1],
            router,
            options,
            value.dtype,
            always,
        )
        alpha = plan.alpha
        # A context is attended to after that, by the queries as they were.
        over_query = (
            options.overwrite_query
            and context is None
            and rows_apart(query)
            and not needs_gradients(query, key, value, alpha)
        )
        if places is not None:
            out, lse = ordered_attention(
                query, key, value, places, statistics, plan, options, need_lse=want_lse
            )
        else:
            attention = attention_in_query if over_query else mixed_attention
            out, lse = attention(query, key, value, statistics, plan, options, need_lse=want_lse)
    if context is not None and lse is not None:
        if needs_gradients(query, out, lse, alpha, context.key, context.value):
            out = with_context(query, out, lse, alpha, block_q, context)
        else:
            others = (x if x.stride(-1) == 1 else x.contiguous() for x in context[:2])
            mix_context(query, out, lse, alpha, *others, context.mask, block_q)
    return out, lse if need_lse else None
