"""`sla-video report`: read runs, draw, and write one page and its pictures, all or nothing."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.progress import NoProgress, Progress
from sla_video.pipelines.reports.page import render_page
from sla_video.pipelines.reports.runs import Run, find_runs
from sla_video.pipelines.reports.video_distance import (
    VideoDistance,
    measure_distance,
    why_no_metrics,
)
from sla_video.pipelines.video_files import OutputFolder

PAGE = "report.html"
_MOST_FRAMES = 20


def write_report(
    paths: Sequence[Path],
    *,
    out: Path,
    frames: int = 5,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a report on the runs that `paths` name into the folder `out`, and return its page.

    Args:
        paths: videos of `sla-video generate`, or folders of them.
        frames: shown of each video.
        overwrite: replace the report that is in `out`.

    Raises:
        InputError: a run is missing or damaged, `out` cannot be written, holds a report, or a
            library is missing.
    """
    progress = progress or NoProgress()
    if not 1 <= frames <= _MOST_FRAMES:
        raise InputError(f"`frames` must be from 1 to {_MOST_FRAMES}, got {frames}")
    for library in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(library) is None:
            raise InputError(f"reports need {library}: pip install 'sla-video[report]'")
    if out.exists() and not out.is_dir():
        raise InputError(f"`out` must be a folder, got the file {out}")
    if (out / PAGE).exists() and not overwrite:
        raise InputError(f"{out / PAGE} exists: give another --out, or --overwrite to replace it")
    progress.stage("reading")
    runs = find_runs(paths)
    with OutputFolder(out):
        distances, notes = _distances(runs, progress)
        pictures = _draw(runs, frames, progress)
        notes += _missing(runs)
        page = render_page(runs, pictures, distances, notes)
        contents = {f"{name}.png": data for name, data in pictures.items()}
        _write_all(out, {**contents, PAGE: page.encode()})
    return out / PAGE


def _distances(
    runs: Sequence[Run], progress: Progress
) -> tuple[dict[str, tuple[str, VideoDistance]], list[str]]:
    """Of each run to the dense one of the same prompt, seed and size, if there is one."""
    pairs = [
        (run, dense) for run in runs if not run.is_dense and (dense := run.same_but_dense(runs))
    ]
    reason = why_no_metrics()
    if pairs and reason is not None:
        return {}, [f"PSNR and SSIM to the dense run are left out: {reason}."]
    found = {
        run.label: (
            dense.label,
            measure_distance(dense.video, run.video, progress=progress, lpips=False),
        )
        for run, dense in pairs
    }
    return found, []


def _missing(runs: Sequence[Run]) -> list[str]:
    without = [run.label for run in runs if not run.is_dense and run.recording is None]
    notes = []
    if without:
        notes.append(
            f"Recall, error and density are not known of {', '.join(without)}: "
            "`sla-video generate --record` measures them."
        )
    recorded = [run for run in runs if run.recording is not None]
    if recorded:
        labels = ", ".join(run.label for run in recorded)
        notes.append(f"The times of {labels} include what recording took.")
    for run in recorded:
        assert run.recording is not None
        if run.recording.most_blocks is not None:
            notes.append(
                f"{run.label}: measured on {run.recording.most_blocks} query blocks of each call, "
                "evenly spread, or all if there are fewer."
            )
    return notes


def _draw(runs: Sequence[Run], frames: int, progress: Progress) -> dict[str, bytes]:
    from sla_video.pipelines.reports import pictures

    recorded = [run for run in runs if run.recording is not None]
    sparse = [run for run in runs if run.layers]
    progress.stage("drawing", 1 + 2 * len(recorded) + bool(sparse) + 2 * bool(recorded))
    found: dict[str, bytes] = {}

    def add(name: str, picture: bytes) -> None:
        found[name] = picture
        progress.advance()

    add("frames", pictures.frames_side_by_side(runs, frames))
    for run in recorded:
        add(f"recall-{run.label}", pictures.recall_by_step(run))
        add(f"heads-{run.label}", pictures.recall_by_head(run))
    if sparse:
        add("sparsity", pictures.sparsity_by_layer(sparse))
    if recorded:
        add("error", pictures.error_by_step(recorded))
        add("density", pictures.density_by_layer(recorded))
    return found


def _write_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files under other names, and only then give them theirs; the page comes last."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as parts:
        try:
            for name, data in contents.items():
                (Path(parts) / name).write_bytes(data)
            # Of a report that is replaced, which may have had more runs.
            for kind in ("recall", "heads"):
                for old in folder.glob(f"{kind}-*.png"):
                    if old.name not in contents:
                        old.unlink()
            for name in contents:
                os.replace(Path(parts) / name, folder / name)
        except OSError as error:
            raise InputError(
                f"cannot write to {folder}: {one_line(error)}; give another --out"
            ) from error
