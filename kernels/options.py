"""Validated options of one call of the operator, as its implementations receive them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

SparseDtype = Literal["bf16", "int8", "int8_fp8", "int8_int8"]
PhiK = Literal["smoothed", "raw"]
Selection = Literal["top_k", "top_p", "soft_top_k"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Arguments of `sla2_attention` that are not tensors, with its defaults; see there.

    Attributes:
        overwrite_query: nobody reads the query after the call, and it shares no memory with key
            and value: an implementation may write the output over it.

    Raises:
        TypeError: a count that is not an integer.
        ValueError: an option out of range, or not one of the choices.
    """

    sparsity: float = 0.95
    block_q: int = 128
    block_k: int = 64
    sparse_dtype: SparseDtype = "bf16"
    phi_k: PhiK = "smoothed"
    selection: Selection = "top_k"
    top_p: float = 0.9
    min_selected: int = 1
    max_selected: int | None = None
    tau: float = 0.1
    overwrite_query: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"`sparsity` must be in [0, 1), got {self.sparsity}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}")
        if not self.tau > 0:
            raise ValueError(f"`tau` must be positive, got {self.tau}")
        _check_choice("sparse_dtype", self.sparse_dtype, get_args(SparseDtype))
        _check_choice("phi_k", self.phi_k, get_args(PhiK))
        _check_choice("selection", self.selection, get_args(Selection))
        _check_count("block_q", self.block_q)
        _check_count("block_k", self.block_k)
        _check_count("min_selected", self.min_selected)
        if self.max_selected is not None:
            _check_count("max_selected", self.max_selected)
            if self.max_selected < self.min_selected:
                raise ValueError(
                    f"`max_selected` must be at least `min_selected` ({self.min_selected}), "
                    f"got {self.max_selected}"
                )


def num_selected(sparsity: float, num_key_blocks: int) -> int:
    """Key blocks kept per query block, `max(1, round((1 - sparsity) N))`.

    Raises:
        ValueError: `sparsity` outside [0, 1) or no key blocks.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"`sparsity` must be in [0, 1), got {sparsity}")
    if num_key_blocks < 1:
        raise ValueError(f"`num_key_blocks` must be at least 1, got {num_key_blocks}")
    return max(1, round((1 - sparsity) * num_key_blocks))


def most_selected(options: Options, num_key_blocks: int) -> int:
    """Most key blocks a query block may keep: the count of top-k, or the cap of top-p."""
    budget = num_selected(options.sparsity, num_key_blocks)
    if options.selection != "top_p":
        return budget
    if options.max_selected is None:
        budget = max(budget, options.min_selected)
    else:
        budget = options.max_selected
    return min(budget, num_key_blocks)


def _check_choice(name: str, given: object, choices: tuple[str, ...]) -> None:
    if given not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {known}, got {given!r}")


def _check_count(name: str, given: object) -> None:
    if not isinstance(given, int) or isinstance(given, bool):
        raise TypeError(f"`{name}` must be an integer, got {given!r}")
    if given < 1:
        raise ValueError(f"`{name}` must be at least 1, got {given}")
