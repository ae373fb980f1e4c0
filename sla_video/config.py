"""Settings of SLA2 in a transformer. A leaf of the package: imports neither torch nor diffusers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sla_video.config_checks import check_fields, check_integer, check_number
from sla_video.config_compression import TokenCompression

SparseDtype = Literal["bf16", "int8", "int8_fp8", "int8_int8"]
Implementation = Literal["auto", "reference", "torch", "triton"]
AlphaKind = Literal["adaptive", "per_block"]
PhiKey = Literal["smoothed", "raw"]
Selection = Literal["top_k", "top_p"]
KeyOrderKind = Literal["identity", "segment_sort", "hot_peel"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "sparse_dtype": get_args(SparseDtype),
    "impl": get_args(Implementation),
    "alpha": get_args(AlphaKind),
    "phi_k": get_args(PhiKey),
    "selection": get_args(Selection),
}

_TOKEN_ORDER = re.compile(
    r"raster|morton|hilbert|tile:[1-9]\d*,[1-9]\d*,[1-9]\d*|axes:(thw|twh|htw|hwt|wth|wht)"
)


@dataclass(frozen=True, kw_only=True)
class SLAConfig:
    """How the self-attention of a transformer is replaced (SLA2, arXiv 2602.12675).

    Layers are counted from 0 over `blocks` and then over `vace_blocks`, where the model has them;
    negative numbers count from the end. Each of two transformers is counted on its own.

    Attributes:
        sparsity: share of the key blocks that each query block leaves to the linear branch,
            in [0, 1). 0.95 keeps 5% of them. At least one block is always kept.
        layer_sparsity: layer -> sparsity, for the layers that differ from `sparsity`.
        dense_layers: layers that keep Diffusers' own attention.
        dense_steps: how many of the first denoising steps run with Diffusers' own attention.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        sparse_dtype: number format of the sparse branch.
        impl: implementation of the operator; "auto" takes the fastest that is available.
        alpha: "adaptive" or "per_block": how the two branches are mixed (see `Router`).
        num_query_blocks: length of the table of alpha="per_block"; None with alpha="adaptive".
        router_per_head: one pair of router projections per head instead of one per layer.
        phi_k: whether the linear branch reads the keys with their mean removed ("smoothed").
        selection: "top_k" keeps a fixed number of key blocks, "top_p" as many as hold `top_p` of
            the router's softmax mass.
        top_p: the mass that selection="top_p" keeps, in (0, 1].
        min_selected: key blocks that selection="top_p" keeps at least.
        max_selected: key blocks that selection="top_p" keeps at most; None for as many as "top_k"
            would keep at the same sparsity.
        token_order: the order of the tokens, which decides what is together in a block: "raster"
            (frame by frame, row by row), "tile:4,4,4" (frames, rows and columns of a tile),
            "morton", "hilbert", or "axes:hwt" (the axes from the slowest to the fastest).
        key_orders: layer, for instance "transformer.blocks.0.attn1" -> for each head what is done
            about the order of its keys: "identity", nothing; "segment_sort", important keys first
            in every 512; "hot_peel", the most important 2% in blocks that every query keeps.
            Layers that are not named leave their keys in place.
        key_order_refresh: denoising steps for which an order of keys is kept. Without a pipeline,
            whose scheduler counts them, it is made anew in each call.
        compression: attention among fewer tokens in some layers and steps; None is none.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.
    """

    sparsity: float = 0.95
    layer_sparsity: Mapping[int, float] = field(default_factory=dict, hash=False)
    dense_layers: Sequence[int] = ()
    dense_steps: int = 0
    block_q: int = 128
    block_k: int = 64
    sparse_dtype: SparseDtype = "bf16"
    impl: Implementation = "auto"
    alpha: AlphaKind = "adaptive"
    num_query_blocks: int | None = None
    router_per_head: bool = False
    phi_k: PhiKey = "smoothed"
    selection: Selection = "top_k"
    top_p: float = 0.9
    min_selected: int = 1
    max_selected: int | None = None
    token_order: str = "raster"
    key_orders: Mapping[str, Sequence[KeyOrderKind]] = field(default_factory=dict, hash=False)
    key_order_refresh: int = 4
    compression: TokenCompression | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}")
        check_number("sparsity", self.sparsity, "in [0, 1)", lambda x: 0 <= x < 1)
        check_number("top_p", self.top_p, "in (0, 1]", lambda x: 0 < x <= 1)
        check_integer("dense_steps", self.dense_steps, minimum=0)
        check_integer("block_q", self.block_q, minimum=1)
        check_integer("block_k", self.block_k, minimum=1)
        check_integer("min_selected", self.min_selected, minimum=1)
        if self.max_selected is not None:
            check_integer("max_selected", self.max_selected, minimum=self.min_selected)
        if not isinstance(self.router_per_head, bool):
            raise TypeError(f"`router_per_head` must be a bool, got {self.router_per_head!r}")
        if not isinstance(self.compression, (TokenCompression, type(None))):
            raise TypeError(
                f"`compression` must be a TokenCompression or None, got {self.compression!r}"
            )
        self._check_alpha()
        self._check_token_order()
        self._freeze_key_orders()
        self._freeze_layers()

    def _check_alpha(self) -> None:
        if self.num_query_blocks is not None:
            check_integer("num_query_blocks", self.num_query_blocks, minimum=1)
        if (self.alpha == "per_block") != (self.num_query_blocks is not None):
            raise ValueError(
                "`num_query_blocks` must be given with alpha='per_block' and only then, "
                f"got alpha={self.alpha!r} and num_query_blocks={self.num_query_blocks}"
            )

    def _check_token_order(self) -> None:
        order = self.token_order
        if not isinstance(order, str) or not _TOKEN_ORDER.fullmatch(order):
            raise ValueError(
                "`token_order` must be raster, morton, hilbert, a tile such as tile:4,4,4 (frames, "
                f"rows, columns), or axes such as axes:hwt, got {order!r}"
            )
        # One name for one order: routers ask whether theirs is used.
        if order in ("axes:thw", "tile:1,1,1"):
            object.__setattr__(self, "token_order", "raster")

    def _freeze_key_orders(self) -> None:
        check_integer("key_order_refresh", self.key_order_refresh, minimum=1)
        if not isinstance(self.key_orders, Mapping):
            raise TypeError(
                "`key_orders` must map names of layers to a kind for each head, "
                f"got {self.key_orders!r}"
            )
        known = get_args(KeyOrderKind)
        frozen = {}
        for layer, kinds in self.key_orders.items():
            listed = isinstance(kinds, Sequence) and not isinstance(kinds, str)
            listed = listed and len(kinds) > 0 and all(kind in known for kind in kinds)
            if not isinstance(layer, str) or not listed:
                raise ValueError(
                    f"`key_orders` must have {', '.join(known)} for each head of a layer, "
                    f"got {kinds!r} for {layer!r}"
                )
            frozen[layer] = tuple(kinds)
        object.__setattr__(self, "key_orders", frozen)

    def _freeze_layers(self) -> None:
        """Check the fields that speak of single layers, and keep copies of our own."""
        if not isinstance(self.layer_sparsity, Mapping):
            raise TypeError(
                "`layer_sparsity` must map layers to sparsities, for instance {0: 0.8}, "
                f"got {self.layer_sparsity!r}"
            )
        for layer, value in self.layer_sparsity.items():
            check_integer("layer_sparsity", layer)
            check_number(f"layer_sparsity[{layer}]", value, "in [0, 1)", lambda x: 0 <= x < 1)
        if isinstance(self.dense_layers, str) or not isinstance(self.dense_layers, Sequence):
            raise TypeError(
                "`dense_layers` must be a list of layer numbers, for instance [0, -1], "
                f"got {self.dense_layers!r}"
            )
        for layer in self.dense_layers:
            check_integer("dense_layers", layer)
        object.__setattr__(self, "layer_sparsity", dict(self.layer_sparsity))
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))

    def layer_plan(self, num_layers: int) -> list[float | None]:
        """The sparsity of each of `num_layers` layers, None for a dense one.

        Raises:
            ValueError: a layer that the model does not have is named, or one is named twice.
        """
        plan: list[float | None] = [self.sparsity] * num_layers
        for layer, given in _resolve_layers("layer_sparsity", self.layer_sparsity, num_layers):
            plan[layer] = self.layer_sparsity[given]
        for layer, _ in _resolve_layers("dense_layers", self.dense_layers, num_layers):
            plan[layer] = None
        return plan

    def replace(self, **changes: Any) -> SLAConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["layer_sparsity"] = {str(k): v for k, v in self.layer_sparsity.items()}
        values["dense_layers"] = list(self.dense_layers)
        values["key_orders"] = {layer: list(kinds) for layer, kinds in self.key_orders.items()}
        values["compression"] = self.compression and self.compression.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SLAConfig:
        """The inverse of `to_dict`; fields that are missing take their defaults.

        Raises:
            TypeError, ValueError: a field is unknown, of the wrong type or out of range.
        """
        check_fields(cls, values, "settings")
        fields = dict(values)
        layers = fields.get("layer_sparsity")
        if isinstance(layers, Mapping):
            fields["layer_sparsity"] = {_layer_from_key(key): v for key, v in layers.items()}
        if fields.get("compression") is not None:
            fields["compression"] = TokenCompression.from_dict(fields["compression"])
        return cls(**fields)


def _layer_from_key(key: object) -> object:
    """JSON turns the layer numbers of a mapping into text: turn them back."""
    try:
        return int(key) if isinstance(key, str) else key
    except ValueError:
        return key


def _resolve_layers(name: str, layers: Iterable[int], num_layers: int) -> list[tuple[int, int]]:
    """(layer from the start, layer as given) for each, all different and within the model."""
    resolved: dict[int, int] = {}
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"`{name}` names layer {layer}, but the transformer has {num_layers} layers "
                f"(0 to {num_layers - 1}, or -{num_layers} to -1)"
            )
        index = layer % num_layers
        if index in resolved:
            raise ValueError(
                f"`{name}` names layer {index} twice, as {resolved[index]} and {layer}"
            )
        resolved[index] = layer
    return list(resolved.items())
