"""The public operator: one function, several implementations behind it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, get_args, overload

import torch
from torch import Tensor

from sla_video.kernels.context import Context, check_context
from sla_video.kernels.key_places import KeyOrder, check_key_order
from sla_video.kernels.options import Options, PhiK, Selection, SparseDtype, num_selected
from sla_video.kernels.reference import sla2_reference
from sla_video.kernels.router import Router
from sla_video.kernels.routing import compute_dtype
from sla_video.kernels.torch_impl import sla2_torch
from sla_video.kernels.triton_support import interpreted, why_not, why_unavailable

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["available_implementations", "exact_recall", "num_selected", "sla2_attention"]

Implementation = Literal["auto", "reference", "torch", "triton"]

_LOGGER = logging.getLogger("sla_video")
_ANNOUNCED: set[str] = set()
# Scores of one chunk of `exact_recall`, in elements: 64 MiB in float32.
_RECALL_CHUNK_ELEMENTS = 16 * 2**20


def available_implementations() -> dict[str, str]:
    """Name of each implementation -> `"available"`, or the reason why it is not."""
    triton = why_unavailable() or "available"
    return {"reference": "available", "torch": "available", "triton": triton}


class _Implementation(Protocol):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        router: Router | None,
        options: Options,
        *,
        need_lse: bool,
        context: Context | None = None,
        key_order: KeyOrder | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...


class _Settings(TypedDict, total=False):
    """Keyword arguments of `sla2_attention` that do not decide what it returns."""

    sparsity: float
    block_q: int
    block_k: int
    sparse_dtype: SparseDtype
    impl: Implementation
    phi_k: PhiK
    selection: Selection
    top_p: float
    min_selected: int
    max_selected: int | None
    tau: float
    context: tuple[Tensor, Tensor] | None
    context_mask: Tensor | None
    key_order: KeyOrder | None


@overload
def sla2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    router: Router | None = None,
    *,
    return_lse: Literal[False] = ...,
    **settings: Unpack[_Settings],
) -> Tensor: ...


@overload
def sla2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    router: Router | None = None,
    *,
    return_lse: Literal[True],
    **settings: Unpack[_Settings],
) -> tuple[Tensor, Tensor]: ...


@overload
def sla2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    router: Router | None = None,
    *,
    return_lse: bool,
    **settings: Unpack[_Settings],
) -> Tensor | tuple[Tensor, Tensor]: ...


def sla2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    router: Router | None = None,
    *,
    sparsity: float = 0.95,
    block_q: int = 128,
    block_k: int = 64,
    sparse_dtype: SparseDtype = "bf16",
    impl: Implementation = "auto",
    return_lse: bool = False,
    phi_k: PhiK = "smoothed",
    selection: Selection = "top_k",
    top_p: float = 0.9,
    min_selected: int = 1,
    max_selected: int | None = None,
    tau: float = 0.1,
    context: tuple[Tensor, Tensor] | None = None,
    context_mask: Tensor | None = None,
    key_order: KeyOrder | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse-linear self-attention with a learned router (SLA2, arXiv 2602.12675).

    Each block of queries attends exactly to the key blocks its router row selects, linearly to
    all others, and mixes the two. With `sparsity=0` this is full attention.

    Args:
        query, key, value: `[B, L, H, D]`, any strides, any L >= 1, one floating dtype. Under
            autocast they are cast as `scaled_dot_product_attention` would cast them.
        router: learned projections and mix weights; None is the training-free mode.
        sparsity: share of key blocks that a query block does not attend to exactly, in [0, 1).
        block_q, block_k: tokens per query block and per key block.
        sparse_dtype: arithmetic of the sparse branch. `"bf16"`: the dtype of the inputs, nothing
            quantized; `"int8"`: Q and smoothed K in INT8; `"int8_fp8"`: also P and V in FP8 E4M3;
            `"int8_int8"`: also P and V in INT8. `"reference"` and `"torch"` simulate low-bit
            values (same result, no gain in speed). Gradients are those of the unquantized branch.
        impl: `"reference"`, `"torch"` or `"triton"` (CUDA, compute capability 8.0 and newer);
            `"auto"` picks the fastest proven one that can do what is asked and says once, at INFO
            on the logger `sla_video`, what it chose.
        return_lse: also return the log-sum-exp of the selected part.
        phi_k: feature map of the linear branch on keys with their mean over tokens removed
            (`"smoothed"`), or on the keys as they are (`"raw"`).
        selection: `"top_k"`: the same count for each row. `"top_p"`: as few blocks as hold a
            router mass of `top_p`. `"soft_top_k"`: the differentiable relaxation, for training a
            router; costs as much as dense attention. Not with `impl="torch"`.
        top_p: mass to reach with `selection="top_p"`, in (0, 1].
        min_selected, max_selected: fewest and most key blocks per row with `selection="top_p"`.
            `max_selected=None` is the count `"top_k"` would keep, so `sparsity` bounds the cost.
        tau: temperature of `selection="soft_top_k"`.
        context: key and value `[B, C, H, D]` outside the sequence that every query attends to
            exactly, text tokens for instance. The share of the sequence is estimated as its mix
            weight says. With `sparsity=0` this is full attention to sequence and context.
        context_mask: `[B, C]` boolean, False on tokens of the context that are not there.
        key_order: which keys of a head are together in a block, and how many leading blocks all of
            its queries keep. Query and output stay in their order. Not with "soft_top_k".

    Returns:
        `[B, L, H, D]` in the dtype of `query`. With `return_lse`, also `[B, H, L]` in float32
        (float64 for float64 inputs): the log-sum-exp of `q.k / sqrt(D)` over the selected tokens
        of the sequence (of a `context` nothing), in terms of the keys as given.

    Raises:
        TypeError: inputs that are not floating-point tensors of one dtype.
        ValueError: shapes or options that do not fit, or an implementation that is not available.
    """
    options = Options(
        sparsity=sparsity,
        block_q=block_q,
        block_k=block_k,
        sparse_dtype=sparse_dtype,
        phi_k=phi_k,
        selection=selection,
        top_p=top_p,
        min_selected=min_selected,
        max_selected=max_selected,
        tau=tau,
    )
    return attend(
        query,
        key,
        value,
        router,
        options,
        impl,
        return_lse,
        context=context,
        mask=context_mask,
        key_order=key_order,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    router: Router | None,
    options: Options,
    impl: Implementation,
    return_lse: bool,
    *,
    context: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    key_order: KeyOrder | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`sla2_attention` with its options put together; raises what it raises."""
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check_tensors(query, key, value, router)
    extra = check_context(context, mask, query, cast=torch.is_autocast_enabled(device))
    order = check_key_order(key_order, query, options.selection)
    run = _choose(impl, query, options)
    # The operator picks the precision of each step itself.
    with torch.autocast(device, enabled=False):
        out, lse = run(
            query, key, value, router, options, need_lse=return_lse, context=extra, key_order=order
        )
    return out if lse is None else (out, lse)


@torch.no_grad()
def exact_recall(query: Tensor, key: Tensor, lse_selected: Tensor) -> Tensor:
    """Share of the full softmax mass that the selected part holds, per query token.

    `exp(lse_selected - lse_full)`: 1 minus the dropped mass, and the best mix weight there is for
    that selection. Costs a full pass over the scores, in chunks of bounded memory.

    Args:
        query, key: `[B, L, H, D]`.
        lse_selected: `[B, H, L]` as returned by `sla2_attention(..., return_lse=True)`.

    Returns:
        `[B, H, L]` in float32 (float64 for float64 inputs), in [0, 1] up to rounding.

    Raises:
        ValueError: shapes that do not fit.
    """
    if query.dim() != 4 or query.shape != key.shape:
        raise ValueError(
            "`query` and `key` must have one shape [B, L, H, D], got "
            f"{list(query.shape)} and {list(key.shape)}"
        )
    batch, length, heads, head_dim = query.shape
    if lse_selected.shape != (batch, heads, length):
        raise ValueError(
            f"`lse_selected` must be [B, H, L] = {[batch, heads, length]}, "
            f"got {list(lse_selected.shape)}"
        )
    dtype = compute_dtype(query.dtype)
    keys = key.transpose(1, 2).to(dtype).mT
    rows = max(1, _RECALL_CHUNK_ELEMENTS // (batch * heads * length))
    full = [
        ((chunk.to(dtype) * head_dim**-0.5) @ keys).logsumexp(-1)
        for chunk in query.transpose(1, 2).split(rows, 2)
    ]
    return torch.exp(lse_selected.to(dtype) - torch.cat(full, -1))


def _choose(impl: str, query: Tensor, options: Options) -> _Implementation:
    """Resolve `"auto"`; refuse what the implementation asked for cannot do."""
    if impl not in get_args(Implementation):
        known = ", ".join(repr(name) for name in get_args(Implementation))
        raise ValueError(f"`impl` must be one of {known}, got {impl!r}")
    soft = options.selection == "soft_top_k"
    if impl == "torch" and soft:
        raise ValueError(
            "selection='soft_top_k' forms all scores, which impl='torch' does not; "
            "use impl='reference', 'triton' or 'auto'"
        )
    if impl == "auto":
        impl = "reference" if soft else "torch"
        # Interpreted kernels run anywhere, but are for tests.
        if query.is_cuda and not interpreted() and why_not(query, options) is None:
            impl = "triton"
        if impl not in _ANNOUNCED and not torch.compiler.is_compiling():
            _ANNOUNCED.add(impl)
            _LOGGER.info("impl='auto' chose %r for selection=%r", impl, options.selection)
    if impl == "triton":
        reason = why_unavailable()
        if reason is not None:
            raise ValueError(f"impl='triton' is {reason}")
        # Not imported before it is known to be there: not every platform has Triton.
        from sla_video.kernels.triton_impl import sla2_triton

        return sla2_triton
    return sla2_reference if impl == "reference" else sla2_torch


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, router: Router | None) -> None:
    if query.dim() != 4 or 0 in query.shape:
        raise ValueError(
            f"`query` must be [B, L, H, D] without empty dimensions, got {list(query.shape)}"
        )
    for name, x in (("key", key), ("value", value)):
        if x.shape != query.shape:
            raise ValueError(
                f"`{name}` must have the shape of `query`, {list(query.shape)} (self-attention), "
                f"got {list(x.shape)}"
            )
        if x.dtype != query.dtype or x.device != query.device:
            raise TypeError(
                f"`{name}` must have the dtype and device of `query`, {query.dtype} on "
                f"{query.device}, got {x.dtype} on {x.device}"
            )
    if not query.is_floating_point():
        raise TypeError(f"`query`, `key` and `value` must be floating point, got {query.dtype}")
    if router is None:
        return
    heads, head_dim = query.shape[2:]
    if (router.heads, router.head_dim) != (heads, head_dim):
        raise ValueError(
            f"`router` is for {router.heads} heads of {router.head_dim}, "
            f"but `query` has {heads} heads of {head_dim}"
        )
    if router.query_proj.device != query.device:
        raise ValueError(
            f"`router` is on {router.query_proj.device} and `query` on {query.device}; "
            "move one of them"
        )
