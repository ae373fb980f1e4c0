"""What the settings have in common: numbers that are of the right type and in range."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


def check_fields(kind: Any, values: object, what: str) -> None:
    """Raise TypeError unless `values` are a mapping, ValueError unless a dataclass has its keys."""
    if not isinstance(values, Mapping):
        raise TypeError(f"the {what} must be a mapping, got {values!r}")
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"unknown {what} {', '.join(unknown)}; known ones are {', '.join(sorted(known))}"
        )


def check_number(name: str, value: object, interval: str, within: Callable[[float], bool]) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is in the `interval`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number {interval}, got {value!r}")
    if not within(value):
        raise ValueError(f"`{name}` must be {interval}, got {value}")


def check_integer(name: str, value: object, *, minimum: int | None = None) -> None:
    """Raise TypeError unless `value` is an integer, ValueError if it is below `minimum`."""
    bound = "" if minimum is None else f" of at least {minimum}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer{bound}, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}")
