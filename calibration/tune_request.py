"""What to tune: the caller's settings, checked, and completed with the model's defaults.

Nothing in this file imports torch or diffusers: a bad setting is refused at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sla_video.calibration.calibration_request import (
    CalibrationPlan,
    CalibrationRequest,
    CaptureRequest,
    plan_calibration,
)
from sla_video.config import SLAConfig, SparseDtype
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.generation_request import NO_ROUTERS, check_token_order

DEFAULT_RECALL = 0.95
# Static orders that are tried; the cheapest first, which wins where several are equal.
TOKEN_ORDERS = ("raster", "tile:4,4,4", "tile:2,8,8", "hilbert", "morton", "axes:hwt")
_GOALS = ("target_recall", "mean_sparsity", "seconds_per_step", "time_ratio")


@dataclass(frozen=True, kw_only=True)
class TuneRequest(CaptureRequest):
    """Settings of `tune`, besides those of the base. `None` means the model's own default.

    One goal of four; without any it is a `target_recall` of 0.95. The calls of the last of several
    prompts judge. With `overwrite` it begins anew.

    Attributes:
        out: the recipe, a JSON file.
        target_recall: the mean share of the softmax mass that selected tokens are to hold, in
            (0, 1]; each transformer gets as sparse as this allows.
        mean_sparsity: over the layers of each transformer, in (0, 1), at the least error.
        seconds_per_step: that a denoising step may take on this machine, at the least error.
        time_ratio: the same as a share of the time with full attention, in (0, 1).
        token_orders: static orders to try; empty for `TOKEN_ORDERS`, or that of the routers.
        routers: a folder or hub id; None or "none" is the training-free mode.
        key_orders: whether heads may get an order of their keys.
        compression: whether layers may attend among fewer tokens.
        sparse_dtype: of the recipe, as in `SLAConfig`.
        max_minutes: when to stop with the best so far; None for no end.

    Raises:
        InputError: a setting out of range, or two that contradict each other.
    """

    out: Path
    target_recall: float | None = None
    mean_sparsity: float | None = None
    seconds_per_step: float | None = None
    time_ratio: float | None = None
    token_orders: tuple[str, ...] = ()
    routers: str | None = None
    key_orders: bool = True
    compression: bool = True
    sparse_dtype: SparseDtype = "bf16"
    max_minutes: float | None = None
    capture_steps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in _GOALS if getattr(self, name) is not None]
        if len(given) > 1:
            names = " and ".join(f"`{name}`" for name in given)
            raise InputError(f"{names} exclude each other: give one of them")
        if not given:
            object.__setattr__(self, "target_recall", DEFAULT_RECALL)
        _check_share("target_recall", self.target_recall, most=1)
        _check_share("mean_sparsity", self.mean_sparsity)
        _check_share("time_ratio", self.time_ratio)
        for name in ("seconds_per_step", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"`{name}` must be a positive number, got {value}")
        for order in self.token_orders:
            check_token_order(order)
        if len(set(self.token_orders)) != len(self.token_orders):
            raise InputError(f"`token_order` is given twice: {', '.join(self.token_orders)}")
        if self.sparse_dtype not in get_args(SparseDtype):
            choices = ", ".join(get_args(SparseDtype))
            raise InputError(f"`sparse_dtype` must be one of {choices}, got {self.sparse_dtype!r}")
        if self.routers == NO_ROUTERS:
            object.__setattr__(self, "routers", None)

    @property
    def goal(self) -> tuple[str, float]:
        """Name and value of what is to be reached."""
        return next((n, v) for n in _GOALS if (v := getattr(self, n)) is not None)

    @property
    def captures(self) -> CalibrationRequest:
        """How the model is run and looked at."""
        shared: dict[str, Any] = {
            item.name: getattr(self, item.name) for item in dataclasses.fields(CaptureRequest)
        }
        return CalibrationRequest(out=self.out, **shared)


@dataclass(frozen=True, kw_only=True)
class TunePlan:
    """A request that has passed every check that needs no weights, with all defaults filled in.

    Attributes:
        captures: sizes, prompts and steps.
        token_orders: empty for that of the routers.
        out: the recipe; state: where measurements are kept until it is complete.
    """

    captures: CalibrationPlan
    token_orders: tuple[str, ...]
    out: Path
    state: Path


def plan_tuning(request: TuneRequest) -> TunePlan:
    """Find the model and check the request against it.

    Raises:
        InputError: no such model, sizes that it cannot make, layers it does not have, or an output
            that is taken.
    """
    out = request.out.expanduser()
    state = state_of(out)
    if out.suffix != ".json":
        raise InputError(f"`out` must be a .json file, got {str(request.out)!r}")
    if out.is_dir() or not out.parent.is_dir():
        what = "it is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise InputError(f"cannot write {out}: {what}")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"cannot write {out}: no permission to write in {out.parent}")
    if out.exists() and not (request.overwrite or state.exists()):
        raise InputError(f"{out} exists: give another --out, or --overwrite to replace it")
    orders = request.token_orders
    if not orders and request.routers is None:
        orders = TOKEN_ORDERS
    # One name for one order.
    orders = tuple(dict.fromkeys(SLAConfig(token_order=order).token_order for order in orders))
    captures = plan_calibration(request.captures, name_folders=False)
    return TunePlan(captures=captures, token_orders=orders, out=out, state=state)


def state_of(out: Path) -> Path:
    """Where the measurements for a recipe are kept until it is complete."""
    return out.expanduser().with_name(f"{out.stem}.tuning.json")


def measured_settings(request: TuneRequest, plan: TunePlan) -> dict[str, Any]:
    """What measurements depend on, as JSON can hold it. A goal is none of it."""
    captures = plan.captures
    filled = ("denoising_steps", "dense_steps", "guidance_scale", "frames", "height", "width")
    return {
        **{name: getattr(request, name) for name in ("model", "routers", "capture_steps")},
        **{name: getattr(request, name) for name in ("negative_prompt", "seed", "dtype")},
        **{name: getattr(captures, name) for name in filled},
        "dense_layers": list(request.dense_layers),
        "prompts": list(captures.prompts),
        "token_orders": list(plan.token_orders),
    }


def _check_share(name: str, value: float | None, most: float | None = None) -> None:
    if value is not None and not (0 < value < 1 or value == most):
        interval = "(0, 1]" if most == 1 else "(0, 1)"
        raise InputError(f"`{name}` must be in {interval}, got {value:g}")
