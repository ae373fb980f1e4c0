"""What `sla-video generate` left on disk of each run: video, sidecar and recording."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.recording import Recording
from sla_video.pipelines.reports.video_source import VideoSource
from sla_video.pipelines.video_files import sidecar_of

# Two runs that have all other settings in common differ in their attention and numerics only.
_OF_ATTENTION = {"dense", "sparsity", "routers", "dense_steps", "record"}
_OF_THE_RUN = {"num_videos", "overwrite", "resume", "offload", "device", "dtype", "fps"}
_LAYER_FIELDS = ("sparsity", "recall", "relative_l1", "oracle_density", "router_density", "seconds")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One video and what is known of it.

    Attributes:
        label: "A", "B", …
        record: the sidecar.
        recording: `None` unless it was made with `--record`.
    """

    label: str
    video: VideoSource
    record: Mapping[str, Any]
    recording: Recording | None

    @property
    def is_dense(self) -> bool:
        """Whether all of its attention was the model's own."""
        return str(self.record["attention"]["kind"]) == "dense"

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Name and means over the calls of each layer, None where something was not measured."""
        return [
            {"name": layer["name"], **{field: layer.get(field) for field in _LAYER_FIELDS}}
            for layer in self.record["attention"].get("layers", [])
        ]

    def mean(self, field: str) -> float | None:
        """Mean of a field of `layers` over those that have it."""
        values = [layer[field] for layer in self.layers if layer[field] is not None]
        return sum(values) / len(values) if values else None

    def same_but_dense(self, runs: Iterable[Run]) -> Run | None:
        """The run with dense attention that this one is to be compared with."""
        return next((run for run in runs if run.is_dense and self._key() == run._key()), None)

    def _key(self) -> dict[str, Any]:
        names = self.record["settings"].keys() - _OF_ATTENTION - _OF_THE_RUN
        return {
            **{name: self.record["settings"][name] for name in names},
            "prompt": self.record["prompt"],
            "seed": self.record["seed"],
        }


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Read all runs that `paths` name: videos, their sidecars, or folders of videos.

    Raises:
        InputError: something is missing, damaged, or was not made by `sla-video generate`.
    """
    videos: dict[Path, Path] = {}
    for path in paths:
        for video in _videos_of(path):
            videos.setdefault(video.resolve(), video)
    return [_read(_label(index), video) for index, video in enumerate(videos.values())]


def _videos_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = [p for p in sorted(path.glob("*.mp4")) if sidecar_of(p).is_file()]
        if not found:
            raise InputError(
                f"{path} holds no videos of `sla-video generate` (an .mp4 with a .json beside it)"
            )
        return found
    if not path.exists():
        raise InputError(f"there is no run {path}: give a video or a folder of videos")
    if path.suffix.lower() not in (".mp4", ".json"):
        raise InputError(f"{path} is no run: give an .mp4 of `sla-video generate` or a folder")
    return [path.with_suffix(".mp4") if path.suffix.lower() == ".json" else path]


def _label(index: int) -> str:
    """A … Z, then AA, AB, …"""
    letter = chr(ord("A") + index % 26)
    return letter if index < 26 else _label(index // 26 - 1) + letter


def _read(label: str, path: Path) -> Run:
    video = VideoSource.open(path)
    sidecar = sidecar_of(path)
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        named = record.get("recording")
        _check(record)
    except FileNotFoundError as error:
        raise InputError(
            f"{path} has no {sidecar.name} beside it, which `sla-video generate` writes"
        ) from error
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"{sidecar} is not what `sla-video generate` writes beside a video: {one_line(error)}"
        ) from error
    # A name alone: what a file says must not lead elsewhere.
    recording = None if named is None else Recording.load(path.parent / Path(named).name)
    return Run(label=label, video=video, record=record, recording=recording)


def _check(record: Any) -> None:
    """Raise what a wrong type raises, now rather than while the page is made."""
    for field, kind in (("prompt", str), ("seed", int), ("settings", dict), ("seconds", dict)):
        if not isinstance(record[field], kind):
            raise TypeError(f"{field} is {record[field]!r}")
    if record["attention"]["kind"] not in ("dense", "sla2"):
        raise ValueError(f"attention is {record['attention']['kind']!r}")
    for layer in record["attention"].get("layers", []):
        if not isinstance(layer["name"], str):
            raise TypeError(f"the name of a layer is {layer['name']!r}")
        for field in _LAYER_FIELDS:
            if layer.get(field) is not None:
                float(layer[field])
    for value in record["seconds"].values():
        float(value)
    if not isinstance(record.get("recording", ""), str):
        raise TypeError(f"recording is {record['recording']!r}")
