"""SLA2 as an attention processor of Diffusers' self-attention.

The steps around the attention are those of the stock processor and differ from family to family of
models (`families/`). Only the attention itself is ours. Letters: B batch, H heads, L tokens, D head
dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from sla_video.config import SLAConfig
from sla_video.kernels.api import num_selected, sla2_attention
from sla_video.kernels.key_places import KeyOrder
from sla_video.kernels.over_query import attention_over_query
from sla_video.kernels.router import Router, router_heads
from sla_video.kernels.routing import num_blocks
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.families.family import Family
from sla_video.pipelines.key_order import LayerKeyOrder
from sla_video.pipelines.layer_compression import NOT_PARALLEL, LayerCompression
from sla_video.pipelines.layer_recorder import LayerRecorder
from sla_video.pipelines.lora import check_not_fused
from sla_video.pipelines.parallel import Ulysses
from sla_video.pipelines.stats import router_estimate

logger = logging.getLogger("sla_video")

# (processor, query, key, value) -> output, all `[B, L, H, D]`.
Attention = Callable[
    ["SLAAttnProcessor", torch.Tensor, torch.Tensor, torch.Tensor],
    torch.Tensor,
]


class DenseSwitch:
    """Shared by the processors of one transformer: whether all of them run dense just now."""

    def __init__(self) -> None:
        self.first_steps = False
        self.warned_of: set[str] = set()
        self._forced = 0

    @property
    def dense(self) -> bool:
        """Set by the denoising step, or by `forced`."""
        return self.first_steps or self._forced > 0

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Dense within the block; blocks may be nested."""
        self._forced += 1
        try:
            yield
        finally:
            self._forced -= 1


class SLAAttnProcessor(nn.Module):
    """Replaces the processor of one self-attention; everything that is not SLA2 goes to `original`.

    The router is deliberately not a submodule. So it is in none of the transformer's
    `parameters()` and `state_dict()`: `add_adapter` and `requires_grad_(False)` do not freeze it,
    `save_pretrained` writes a checkpoint that stock Diffusers reads, and offloading hooks do not
    take its weights away. It follows the transformer to other devices, but never to another dtype.

    Args:
        family: how models of this kind compute self-attention.
        original: the stock processor, used for dense calls and put back afterwards.
        router: learned parameters of the layer; unused when `sparsity` is None.
        config: settings of the operator.
        sparsity: of this layer, None for a layer that stays dense.
        switch: shared by the layers of one transformer.

    Attributes:
        impl: implementation of the operator, as chosen.
    """

    def __init__(
        self,
        family: Family,
        original: Any,
        router: Router | None,
        config: SLAConfig,
        *,
        sparsity: float | None,
        switch: DenseSwitch,
    ) -> None:
        super().__init__()
        if router is None and sparsity is not None:
            raise ValueError("a layer that is not dense needs a router")
        self.family = family
        self.original = original
        # Some attention modules drop what the signature of `processor.__call__` does not name. They
        # look at this one; a call of the processor goes to the one of the class.
        self.__call__ = original.__call__
        # A tuple hides the module from `nn.Module.__setattr__`, which would register it.
        self._held_router = (router,)
        self.sparsity = sparsity
        self.switch = switch
        self._ulysses = self._check_parallel(self._parallel_config)
        self.recorder = LayerRecorder()
        # Set by the patch where heads have an order of their keys.
        self.key_order: LayerKeyOrder | None = None
        # Training puts its own between the projections, for instance to see both kinds of
        # attention. Calls that run dense never reach it.
        self.attention: Attention | None = None
        self.compression: LayerCompression | None = None
        self.impl = config.impl
        self._options: dict[str, Any] = {
            "block_q": config.block_q,
            "block_k": config.block_k,
            "sparse_dtype": config.sparse_dtype,
            "phi_k": config.phi_k,
            "selection": config.selection,
            "top_p": config.top_p,
            "min_selected": config.min_selected,
            "max_selected": config.max_selected,
        }

    @property
    def router(self) -> Router | None:
        """The router of this layer, fp32, on the device of the layer; None for a dense layer."""
        return self._held_router[0]

    @property
    def local_router(self) -> Router | None:
        """The router of the heads that are computed here: all, or a rank's share of them."""
        router = self.router
        if router is None or self._ulysses is None:
            return router
        return router_heads(router, *self._ulysses.own_heads(router.heads))

    @property
    def operator_options(self) -> dict[str, Any]:
        """Keyword arguments of `sla2_attention` for this layer."""
        return {"sparsity": self.sparsity, "impl": self.impl, **self._options}

    @property
    def _attention_backend(self) -> Any:
        """Diffusers' choice of kernel for dense calls (`set_attention_backend`)."""
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        """Diffusers sets this to shard the tokens; a processor without it is wrong in silence."""
        return getattr(self.original, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        if config is not None and not hasattr(self.original, "_parallel_config"):
            raise ValueError(
                f"Diffusers' {type(self.original).__name__} does not support context parallelism, "
                "which calls that run dense would need: run on one device"
            )
        if self.compression is not None and Ulysses.of(config) is not None:
            raise ValueError(NOT_PARALLEL)
        self._ulysses = self._check_parallel(config)
        self.original._parallel_config = config

    def _check_parallel(self, config: Any) -> Ulysses | None:
        ulysses = Ulysses.of(config)
        if ulysses is not None and not self.family.shardable:
            raise ValueError(
                f"SLA attention does not run in context parallelism in {self.family.name}: run it "
                "on one device"
            )
        if ulysses is not None and self.router is not None:
            ulysses.check_heads(self.router.heads)
        return ulysses

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`.to()`, `.half()`, `.cuda()`…: the router follows to the device and stays fp32."""
        router = self.router
        if recurse and router is not None:

            def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
                moved = fn(tensor)
                # From `tensor`, not from `moved`, which has been rounded.
                return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

            router._apply(keep_dtype)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forward(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the stock processor takes, and in the same shapes what it gives.

        Calls that SLA attention does not support go to the stock processor.
        """
        reason = self.family.why_dense(attn, hidden_states, *args, **kwargs)
        if reason is not None:
            self._warn_of(reason)
        check_not_fused(attn)
        compresses = self.compression is not None and self.compression.engaged
        dense = self.sparsity is None and not compresses
        dense = dense or self.switch.dense or reason is not None
        # Compiled code cannot count: its graph would break, or be made anew for each number.
        recording = (
            nullcontext()
            if torch.compiler.is_compiling()
            else self.recorder.call(hidden_states.device, dense=dense)
        )
        with recording:
            if dense:
                return self.original(attn, hidden_states, *args, **kwargs)
            return self.family.attend(attn, self._operate, hidden_states, *args, **kwargs)

    def _operate(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any
    ) -> torch.Tensor:
        """An `Operate`, `how` being its keyword arguments."""
        self._follow(query.device)
        if self._ulysses is None:
            return self._run(query, key, value, **how)
        assert not how.keys() - {"own_query"}, "families with a context are not shardable"
        return self._ulysses.attend(partial(self._run, **how), query, key, value)

    def _run(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any
    ) -> torch.Tensor:
        """Attention of whole sequences `[B, L, H, D]`; in context parallelism, of some heads."""
        if self.attention is None:
            if self.compression is not None and self.compression.engaged:
                output: torch.Tensor = self.compression.attend(query, key, value)
                return output
            return self._operator(query, key, value, **how)
        if how.keys() - {"own_query"}:
            raise InputError(
                f"routers of {self.family.name} cannot be trained yet: its video and text tokens "
                "attend to each other, and training knows video alone"
            )
        return self.attention(self, query, key, value)

    def sla2(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **changes: Any
    ) -> torch.Tensor:
        """SLA2 of `[B, L, H, D]` as this layer has it, unrecorded; `changes` of its options."""
        if "key_order" not in changes:
            changes["key_order"] = self._order_keys(query, key)
        options = {**self.operator_options, **changes}
        output: torch.Tensor = sla2_attention(query, key, value, self.local_router, **options)
        return output

    def _order_keys(self, query: torch.Tensor, key: torch.Tensor) -> KeyOrder | None:
        """The order of the keys of the heads that are computed here."""
        if self.key_order is None:
            return None
        heads = None
        if self._ulysses is not None:
            heads = self._ulysses.own_heads(len(self.key_order.kinds))
        return self.key_order(query, key, heads)

    def _operator(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        own_query: bool = False,
        **context: Any,
    ) -> torch.Tensor:
        """SLA2 on `[B, L, H, D]`; outside compiled code, with what the recorder asks for."""
        assert self.sparsity is not None
        observe = not torch.compiler.is_compiling()
        context["key_order"] = self._order_keys(query, key)
        if observe:
            self._observe(query, key, context["key_order"])
        # The recorder compares the output with that of the query; an order of keys has its own way.
        alone = not any(extra is not None for extra in context.values())
        if own_query and alone and not (observe and self.recorder.needs_lse):
            router, options = self.local_router, self.operator_options
            return attention_over_query(query, key, value, router, **options)
        result = sla2_attention(
            query,
            key,
            value,
            self.local_router,
            return_lse=observe and self.recorder.needs_lse,
            **context,
            **self.operator_options,
        )
        if not isinstance(result, tuple):
            return result
        output, lse = result
        self.recorder.observe_output(
            query, key, value, output, lse, self.local_router, **context, **self._options
        )
        return output

    @torch.no_grad()
    def _observe(self, query: torch.Tensor, key: torch.Tensor, order: KeyOrder | None) -> None:
        """Record which share of the blocks this call leaves out, without waiting for the device."""
        assert self.sparsity is not None
        if self._options["selection"] == "top_k" and not self.recorder.router_recall:
            total = num_blocks(key.shape[1], self._options["block_k"])
            self.recorder.add("sparsity", 1 - num_selected(self.sparsity, total) / total)
            return
        dropped, recall = router_estimate(
            query, key, self.local_router, order, sparsity=self.sparsity, **self._options
        )
        self.recorder.add("sparsity", dropped)
        if self.recorder.router_recall:
            self.recorder.add("router_recall", recall)

    def _follow(self, device: torch.device) -> None:
        """Offloading moves single weights, not modules: bring the router to where the data is."""
        router = self.router
        if router is not None and router.query_proj.device != device:
            router.to(device)

    def _warn_of(self, reason: str) -> None:
        if reason in self.switch.warned_of or torch.compiler.is_compiling():
            return
        self.switch.warned_of.add(reason)
        logger.warning(
            "self-attention was called with %s, which SLA attention does not support: such calls "
            "run dense",
            reason,
        )

    def extra_repr(self) -> str:
        return f"sparsity={self.sparsity}, router={self.router}"
