"""Videos with captions: which there are, and how one is read.

A folder of videos each with a text file of the same name beside it, or a CSV or JSONL file with
the columns `video` and `caption`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sla_video.pipelines.errors import InputError, one_line

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")


@dataclass(frozen=True)
class CaptionedVideo:
    """A video file and what it shows; the caption may turn out to be empty."""

    path: Path
    caption: str


class BadVideo(Exception):
    """A file that cannot be used, and why. Such files are skipped and listed."""


def find_videos(data: str) -> tuple[list[CaptionedVideo], dict[str, str]]:
    """The videos that `data` names, and those that have no usable caption, with the reason.

    Raises:
        InputError: there is no such folder or file, it cannot be read, or it names no video.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        rows: Iterable[tuple[Path, str | None]] = _from_folder(path)
    elif path.suffix.lower() in (".csv", ".jsonl") and path.is_file():
        rows = _from_table(path)
    else:
        raise InputError(
            f"no data at {data!r}: give a folder of videos with captions, a .csv or .jsonl file "
            "with columns video and caption, or 'world'"
        )
    videos, skipped = [], {}
    for video, caption in rows:
        if caption is None:
            skipped[str(video)] = f"no caption: {video.with_suffix('.txt').name} is missing"
        elif not caption.strip():
            skipped[str(video)] = "the caption is empty"
        else:
            videos.append(CaptionedVideo(video, " ".join(caption.split())))
    if not videos and not skipped:
        raise InputError(f"{path} holds no videos ({', '.join(SUFFIXES)})")
    return videos, skipped


def _from_folder(folder: Path) -> list[tuple[Path, str | None]]:
    found: list[tuple[Path, str | None]] = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() not in SUFFIXES or hidden or not path.is_file():
            continue
        text = path.with_suffix(".txt")
        try:
            found.append((path, text.read_text(encoding="utf-8") if text.is_file() else None))
        except (OSError, UnicodeDecodeError):
            found.append((path, ""))
    return found


def _from_table(table: Path) -> list[tuple[Path, str | None]]:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {table}: {one_line(error)}") from error
    rows: list[Mapping[str, Any]] = []
    if table.suffix.lower() == ".csv":
        try:
            # As a file, not as lines: a caption in quotes may go over several.
            rows.extend(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise InputError(f"cannot read {table}: {one_line(error)}") from error
    else:
        # Not `splitlines`, which also cuts at separators that JSON allows within a string.
        for number, line in enumerate(text.split("\n"), 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise InputError(
                    f"{table}, line {number} is not JSON: {one_line(error)}"
                ) from error
            if row is not None:
                rows.append(row if isinstance(row, dict) else {})
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("video"), str) or "caption" not in row:
            raise InputError(
                f"{table}, row {number} has no `video` and `caption`, but {sorted(map(str, row))}"
            )
    return [(table.parent / row["video"], str(row["caption"] or "")) for row in rows]


def read_clip(path: Path, *, frames: int, height: int, width: int) -> Tensor:
    """The first `frames` frames of a video as `[1, 3, T, H, W]` in [-1, 1].

    Scaled to cover `height` x `width` and cropped around the centre.

    Raises:
        BadVideo: it cannot be decoded, or is too short.
    """
    import imageio.v2 as imageio

    if not path.is_file():
        raise BadVideo("there is no such file")
    pictures: list[Tensor] = []
    try:
        with imageio.get_reader(str(path)) as reader:
            for picture in reader:  # type: ignore[attr-defined,unused-ignore]
                pictures.append(_fit(torch.as_tensor(picture), height, width))
                if len(pictures) == frames:
                    break
    except Exception as error:  # each plugin and codec of imageio raises its own types
        if not pictures:
            raise BadVideo(f"it cannot be decoded: {one_line(error, limit=120)}") from error
    if len(pictures) < frames:
        raise BadVideo(f"it has {len(pictures)} frames, fewer than {frames}")
    return torch.stack(pictures, 1)[None]


def _fit(picture: Tensor, height: int, width: int) -> Tensor:
    """`[3, H, W]` in [-1, 1] of a picture `[h, w]` or `[h, w, 1, 3 or 4]`, 8 bits a channel."""
    if picture.ndim == 2:
        picture = picture[..., None]
    channels = picture[..., :3].expand(*picture.shape[:2], 3).permute(2, 0, 1)[None].float()
    scale = max(height / channels.shape[2], width / channels.shape[3])
    size = [
        max(height, round(channels.shape[2] * scale)),
        max(width, round(channels.shape[3] * scale)),
    ]
    scaled = torch.nn.functional.interpolate(
        channels, size=size, mode="bilinear", antialias=True, align_corners=False
    )[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[:, top : top + height, left : left + width].clamp(0, 255) / 127.5 - 1
