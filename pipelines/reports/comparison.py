"""Two videos compared: their distance, and a video of both side by side with what differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.errors import InputError
from sla_video.pipelines.progress import NoProgress, Progress
from sla_video.pipelines.reports.video_distance import (
    VideoDistance,
    measure_distance,
    why_no_lpips,
)
from sla_video.pipelines.reports.video_source import VideoSource
from sla_video.pipelines.video_files import OutputFolder, check_video_writer, write_clip

if TYPE_CHECKING:
    import numpy as np

METRICS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare_videos` found."""

    first: VideoSource
    second: VideoSource
    distance: VideoDistance

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that there are."""
        return tuple(name for name in METRICS if getattr(self.distance, name) is not None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "videos": [str(self.first.path), str(self.second.path)],
            "frames": self.first.frames,
            "height": self.first.height,
            "width": self.first.width,
            **{
                name: {
                    "mean": self.distance.mean(name),
                    "worst_frame": self.distance.worst(name)[0],
                    "frames": list(getattr(self.distance, name)),
                }
                for name in self.metrics
            },
            "left_out": [] if "lpips" in self.metrics else [f"LPIPS: {why_no_lpips()}"],
        }


def compare_videos(
    first: Path,
    second: Path,
    *,
    out: Path | None = None,
    amplify: float = 4.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two videos frame by frame.

    Args:
        out: an .mp4 file for first | second | `amplify` times their difference.
        overwrite: replace it if it exists.

    Raises:
        InputError: a file that is missing or no video, videos of different size or length, or
            `out` cannot be written.
    """
    progress = progress or NoProgress()
    if not 0 < amplify < float("inf"):
        raise InputError(f"`amplify` must be a number above 0, got {amplify}")
    if out is not None:
        _check_out(out, (first, second), overwrite=overwrite)
    sources = VideoSource.open(first), VideoSource.open(second)
    sources[0].check_pairs_with(sources[1])
    distance = measure_distance(*sources, progress=progress)
    if out is not None:
        progress.stage("writing", sources[0].frames)
        with OutputFolder(out.parent):
            write_clip(out, _side_by_side(*sources, amplify, progress), sources[0].fps)
    return Comparison(first=sources[0], second=sources[1], distance=distance)


def _check_out(out: Path, inputs: tuple[Path, Path], *, overwrite: bool) -> None:
    if out.suffix.lower() != ".mp4" or out.is_dir():
        raise InputError(f"`out` must be a file that ends in .mp4, got {out}")
    if out.exists() and out.resolve() in [path.resolve() for path in inputs]:
        raise InputError(f"`out` is {out}, which is one of the videos to compare: name another")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists: give another --out, or --overwrite to replace it")
    check_video_writer()


def _side_by_side(
    first: VideoSource, second: VideoSource, amplify: float, progress: Progress
) -> Iterator[np.ndarray[Any, Any]]:
    import numpy as np

    for a, b in zip(first.read(), second.read(), strict=True):
        difference = np.abs(a.astype(np.float32) - b) * amplify
        yield np.concatenate([a, b, difference.clip(0, 255).round().astype(np.uint8)], 1)
        progress.advance()
