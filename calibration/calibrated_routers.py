"""What a calibration leaves on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video.calibration.calibration_request import (
    CalibrationPlan,
    CalibrationRequest,
    settings_of,
)
from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError, one_line

if TYPE_CHECKING:
    from sla_video.calibration.fit import LayerFit
    from sla_video.pipelines.router_set import ModelIdentity


@dataclass(frozen=True, kw_only=True)
class CalibratedRouters:
    """The routers of one sparsity, on disk.

    Attributes:
        folder: for `enable_sla`.
        config: their settings, with the sparsity of each layer.
        layers: "transformer.blocks.0.attn1" -> what its fit gave.
    """

    folder: Path
    config: SLAConfig
    layers: Mapping[str, LayerFit]


def save_all(
    request: CalibrationRequest,
    plan: CalibrationPlan,
    identities: Mapping[str, ModelIdentity],
    configs: Sequence[SLAConfig],
    fits: Sequence[Mapping[str, LayerFit]],
) -> tuple[CalibratedRouters, ...]:
    """Write all folders beside their place first, and move them there when all are complete.

    Raises:
        InputError: the disk is full or not writable; what was there before is intact.
    """
    from sla_video.pipelines.router_files import save_routers
    from sla_video.pipelines.router_set import RouterSet

    out = request.out.expanduser()
    settings = settings_of(request, plan)
    saved = []
    try:
        staging = Path(tempfile.mkdtemp(prefix=".routers.", dir=out))
    except OSError as error:
        raise InputError(f"cannot write routers to {out}: {one_line(error)}") from error
    try:
        for folder, config, layers in zip(plan.folders, configs, fits, strict=True):
            routers = RouterSet.snapshot(
                {name: fit.router.cpu() for name, fit in layers.items()},
                config=config,
                models=identities,
                resolution=(plan.frames, plan.height, plan.width),
                metrics=metrics_of(layers, settings),
            )
            save_routers(staging / folder.relative_to(out), routers)
            saved.append(CalibratedRouters(folder=folder, config=config, layers=layers))
        # Weights first: a description whose weights do not match is noticed.
        for path in sorted(staging.rglob("routers.*"), reverse=True):
            target = out / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    except OSError as error:
        raise InputError(f"cannot write routers to {out}: {one_line(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return tuple(saved)


def metrics_of(layers: Mapping[str, LayerFit], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into the JSON file of the routers: per layer, their means, and the settings."""
    fields = ("error", "rel_l1", "rel_l2", "recall")
    mean = {
        when: {
            field: sum(getattr(getattr(fit, when), field) for fit in layers.values()) / len(layers)
            for field in fields
        }
        for when in ("before", "after")
    }
    each = {
        name: {
            "sparsity": fit.sparsity,
            "chosen": fit.chosen,
            "before": asdict(fit.before),
            "after": asdict(fit.after),
        }
        for name, fit in layers.items()
    }
    return {"stage": "calibrate", "mean": mean, "layers": each, "settings": dict(settings)}
