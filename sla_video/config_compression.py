"""Settings of token compression. A leaf of the package: imports neither torch nor diffusers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sla_video.config_checks import check_fields, check_integer, check_number

Mode = Literal["kv", "qkv"]
Fill = Literal["prev", "neighbor", "linear", "zero"]


@dataclass(frozen=True, kw_only=True)
class TokenCompression:
    """Which tokens attention leaves out, where and when (after Token Sparse Attention, 2602.03216).

    Of every `refresh_every` steps one is full: all tokens take part, each head chooses the ones to
    keep, and what the other steps need is put aside. Those run on the kept tokens alone.

    Attributes:
        mode: "kv" keeps all queries and fewer keys, "qkv" fewer of both.
        pairs: share of the query-key pairs to keep, in (0, 1]; None to go by `tau`.
        tau: softmax mass that may be dropped, in [0, 1), mean over the heads of a layer; for
            `pairs=None`. How many tokens that keeps is counted in one full step and used from the
            next on.
        fill: what dropped queries get with mode="qkv": "prev", the output of the last full step;
            "neighbor", that of the nearest kept query; "linear", the linear branch of SLA2 over
            all tokens; "zero", nothing, as published.
        residual: whether to add what the output of the last full step had beyond that of the
            same short attention. Costs memory: B L H D numbers for each layer and branch of
            guidance (with mode="qkv" those of the queries that are kept), until the video is
            done. At half of the pairs it takes away most of the error.
        layers: that compress; -1 is the last. None takes those whose hidden state changes least,
            measured in the first step of each video.
        quantile: how large a share of the layers that is, in (0, 1]; for `layers=None`.
        full_steps: steps at the start without compression, at least 1, and 2 where something has
            to be counted first (`pairs=None` or `layers=None`).
        refresh_every: one step in so many is full.
        probes: queries that the scores of tokens are made from.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.
    """

    mode: Mode = "kv"
    pairs: float | None = None
    tau: float = 0.005
    fill: Fill = "prev"
    residual: bool = True
    layers: Sequence[int] | None = None
    quantile: float = 0.5
    full_steps: int = 2
    refresh_every: int = 4
    probes: int = 128

    def __post_init__(self) -> None:
        for name, choices in (("mode", get_args(Mode)), ("fill", get_args(Fill))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.pairs is not None:
            check_number("pairs", self.pairs, "in (0, 1]", lambda x: 0 < x <= 1)
        check_number("tau", self.tau, "in [0, 1)", lambda x: 0 <= x < 1)
        check_number("quantile", self.quantile, "in (0, 1]", lambda x: 0 < x <= 1)
        if not isinstance(self.residual, bool):
            raise TypeError(f"`residual` must be a bool, got {self.residual!r}")
        check_integer("full_steps", self.full_steps, minimum=1)
        check_integer("refresh_every", self.refresh_every, minimum=2)
        check_integer("probes", self.probes, minimum=1)
        self._freeze_layers()
        if self.full_steps < 2 and (self.pairs is None or self.layers is None):
            raise ValueError(
                "`full_steps` must be at least 2 where tokens are counted (`pairs` is None) or "
                f"layers are chosen (`layers` is None) in the first of them, got {self.full_steps}"
            )

    def _freeze_layers(self) -> None:
        if self.layers is None:
            return
        if isinstance(self.layers, str) or not isinstance(self.layers, Sequence):
            raise TypeError(
                "`layers` must be a list of layer numbers, for instance [3, -1], or None, "
                f"got {self.layers!r}"
            )
        for layer in self.layers:
            check_integer("layers", layer)
        object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def share(self) -> float | None:
        """The share of the tokens to keep; None to go by `tau`."""
        if self.pairs is None:
            return None
        return self.pairs if self.mode == "kv" else self.pairs**0.5

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return values | {"layers": None if self.layers is None else list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenCompression:
        """The inverse of `to_dict`; fields that are missing take their defaults.

        Raises:
            TypeError, ValueError: a field is unknown, of the wrong type or out of range.
        """
        check_fields(cls, values, "settings of token compression")
        return cls(**values)
