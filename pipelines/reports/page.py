"""The report as one HTML page that needs nothing else: tables, and pictures within it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from sla_video import __version__
from sla_video.pipelines.reports.runs import Run
from sla_video.pipelines.reports.video_distance import VideoDistance

_NOTHING = "–"  # noqa: RUF001
# Field of a layer -> its heading.
_LAYER_COLUMNS = {
    "sparsity": "sparsity",
    "recall": "recall",
    "relative_l1": "relative L1",
    "router_density": "density needed, router",
    "oracle_density": "density needed, best",
    "seconds": "seconds",
}
_LOST = ("recall", "relative_l1", "router_density", "oracle_density")
# File name of a picture, up to the label of its run -> the heading above it, and what it shows.
SECTIONS = {
    "frames": ("Frames", ""),
    "recall": (
        "Recall by layer and step",
        "Share of the softmax mass that the selected key blocks hold: exact, from two "
        "log-sum-exps. 1 minus it is the mass left to the linear branch.",
    ),
    "heads": ("Recall by layer and head", ""),
    "sparsity": ("Sparsity by layer", ""),
    "error": (
        "Error over the denoising steps",
        "Of the attention, against full attention on the same query, key and value.",
    ),
    "density": (
        "Density needed by layer",
        "A gap between the router's order and the best one is what a better router could save.",
    ),
}


def render_page(
    runs: Sequence[Run],
    pictures: Mapping[str, bytes],
    distances: Mapping[str, tuple[str, VideoDistance]],
    notes: Sequence[str],
) -> str:
    """The page.

    Args:
        pictures: name -> PNG; a name is one of `SECTIONS`, or that and the label of a run.
        distances: label of a run -> label of the dense one and the distance to it.
        notes: what is missing, and why.
    """
    from jinja2 import Environment, StrictUndefined

    source = (files("sla_video") / "assets" / "report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(source).render(
        runs=[run.label for run in runs],
        summary=_summary(runs, distances),
        notes=notes,
        sections=_sections(pictures),
        layers=[_layers(run) for run in runs if run.layers],
        settings=_settings(runs),
        version=__version__,
    )


def _sections(pictures: Mapping[str, bytes]) -> list[dict[str, Any]]:
    found = []
    for kind, (title, text) in SECTIONS.items():
        names = [name for name in pictures if name.partition("-")[0] == kind]
        if names:
            shown = [
                {
                    "id": name,
                    "alt": f"{title} {name.partition('-')[2]}".strip(),
                    "data": base64.b64encode(pictures[name]).decode(),
                }
                for name in names
            ]
            found.append({"title": title, "text": text, "pictures": shown})
    return found


def _summary(
    runs: Sequence[Run], distances: Mapping[str, tuple[str, VideoDistance]]
) -> dict[str, Any]:
    columns = ["run", "video", "attention", "sparsity", *(_LAYER_COLUMNS[name] for name in _LOST)]
    columns += ["denoise, s", "all, s"]
    if distances:
        columns += ["PSNR, dB", "SSIM"]
    rows = []
    for run in runs:
        seconds = run.record["seconds"]
        attention = run.record["attention"]
        row = [
            run.label,
            run.video.path.name,
            "dense" if run.is_dense else "SLA2",
            _number(attention.get("achieved_sparsity")),
            *(_number(run.mean(name)) for name in _LOST),
            _number(seconds.get("denoise"), 1),
            _number(sum(seconds.values()), 1),
        ]
        if distances:
            to, distance = distances.get(run.label, ("", None))
            row += (
                [_NOTHING] * 2
                if distance is None
                else [f"{distance.mean('psnr'):.2f} to {to}", f"{distance.mean('ssim'):.4f}"]
            )
        rows.append(row)
    return {"columns": columns, "rows": rows}


def _layers(run: Run) -> dict[str, Any]:
    shown = {
        field: heading
        for field, heading in _LAYER_COLUMNS.items()
        if any(layer[field] is not None for layer in run.layers)
    }
    rows = [
        [layer["name"], *(_number(layer[f], 2 if f == "seconds" else 4) for f in shown)]
        for layer in run.layers
    ]
    return {"label": run.label, "columns": list(shown.values()), "rows": rows}


def _settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each setting of any run, in the order of the sidecars."""
    columns = [
        _flat(
            {
                "prompt": run.record["prompt"],
                "seed": run.record["seed"],
                **run.record["settings"],
                "attention": run.record["attention"].get("config", {}),
                "device_name": run.record.get("device_name"),
                "versions": run.record.get("versions", {}),
            }
        )
        for run in runs
    ]
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [column.get(name, _NOTHING) for column in columns]
        rows.append({"name": name, "cells": cells, "differs": len(set(cells)) > 1})
    return rows


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = _NOTHING if value in (None, {}, []) else str(value)
    return found


def _number(value: float | None, digits: int = 4) -> str:
    return _NOTHING if value is None else f"{value:.{digits}f}"
