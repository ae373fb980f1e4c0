"""What `enable_sla` has to know of a family of Diffusers transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


class Operate(Protocol):
    """What stands in for a processor's attention function."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        context: tuple[torch.Tensor, torch.Tensor] | None = None,
        context_mask: torch.Tensor | None = None,
        own_query: bool = False,
    ) -> torch.Tensor:
        """Self-attention of `[B, L, H, D]`, to the same shape.

        `own_query`: nobody else holds the query, nor reads it after, so the output may be written
        over it.

        `context` are key and value `[B, C, H, D]` of further tokens, which all queries attend to
        exactly where `context_mask` `[B, C]` is not False.
        """
        ...


def _heads_and_dim(attn: Any) -> tuple[int, int]:
    return attn.heads, attn.inner_dim // attn.heads


@dataclass(frozen=True, kw_only=True)
class TokenPlaces:
    """Where the tokens of a transformer come from and go to, for those who reorder them.

    The transformer takes `hidden_states` `[B, C, T', H', W']` and `timestep` `[B]`, or `[B, L]` of
    each token, and nothing between the modules named here knows where a token is.

    Attributes:
        patches: modules whose outputs `[B, C, T, H, W]` become tokens in raster order.
        rotary: the module whose output is a tuple of tables `[1, L, 1, D]`.
        output: the module whose output `[B, L, C]` becomes a video again.
    """

    patches: tuple[str, ...]
    rotary: str
    output: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """Transformers whose self-attention is computed in the same steps.

    Attributes:
        name: for humans.
        transformers: names of the classes in `diffusers`. A release that lacks one lacks it here.
        processors: names of the stock processor classes that SLA attention stands in for.
        layers: transformer -> its self-attention modules by name, in the order of `dense_layers`.
            The names are those of router files, so they must not change.
        identity_fields: fields of a transformer's configuration that make its attention what it
            is. A fixed list: releases of Diffusers add fields, and routers have to outlive that.
        attend: `attend(attn, operate, *args, **kwargs)` with the arguments of the stock processor
            after `attn`. Follows it step by step, with `operate` for the attention function.
        why_dense: `why_dense(attn, *args, **kwargs)`, same arguments: None, or what keeps SLA
            attention from this call, to follow "was called with". Such calls go to the stock
            processor, which a warning says once for each reason.
        heads_and_dim: attention module -> (H, D).
        shardable: whether context parallelism, which gives each device a piece of the tokens,
            leaves all else in the transformer as it is, and self-attention has no other tokens.
        token_places: what it takes to have the tokens in another order; None where that cannot be.
    """

    name: str
    transformers: tuple[str, ...]
    processors: tuple[str, ...]
    layers: Callable[[nn.Module], dict[str, Any]]
    identity_fields: tuple[str, ...]
    attend: Callable[..., Any]
    why_dense: Callable[..., str | None]
    heads_and_dim: Callable[[Any], tuple[int, int]] = _heads_and_dim
    shardable: bool = False
    token_places: TokenPlaces | None = None

    def __reduce__(self) -> Any:
        # Copies of a patched model, pickled ones too, share the family.
        from sla_video.pipelines.families.registry import family_named

        return family_named, (self.name,)


def mask_or_other_keys(
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *others: Any,
    **more: Any,
) -> str | None:
    """The `why_dense` of plain self-attention: masks, and the keys of another sequence."""
    if attention_mask is not None:
        return "an attention mask"
    if encoder_hidden_states is not None:
        return "keys of another sequence"
    return None


def layers_named(*places: str) -> Callable[[nn.Module], dict[str, Any]]:
    """The `layers` of transformers that keep them as "list of blocks.attribute".

    `layers_named("blocks.attn1")` finds "blocks.0.attn1", "blocks.1.attn1" and so on. Lists that a
    transformer lacks are passed over.
    """

    def layers(transformer: nn.Module) -> dict[str, Any]:
        return {
            f"{blocks}.{index}.{attribute}": getattr(block, attribute)
            for blocks, _, attribute in (place.partition(".") for place in places)
            for index, block in enumerate(getattr(transformer, blocks, ()))
        }

    return layers
