"""Videos on disk, read frame by frame."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.errors import InputError, one_line

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class VideoSource:
    """A video that can be decoded.

    Attributes:
        frames: how many it has.
        height, width: in pixels.
        fps: frames a second.
    """

    path: Path
    frames: int
    height: int
    width: int
    fps: float

    @classmethod
    def open(cls, path: Path) -> VideoSource:
        """Look at the video at `path`.

        Raises:
            InputError: there is none, or it cannot be decoded.
        """
        import imageio.v2 as imageio

        if not path.is_file():
            kind = "a folder" if path.is_dir() else "missing"
            raise InputError(f"{path} is {kind}: give a video file")
        try:
            # Without a format other plugins would take what is no video.
            with imageio.get_reader(str(path), format="FFMPEG") as reader:  # type: ignore[arg-type,unused-ignore]
                about = reader.get_meta_data()  # type: ignore[attr-defined,unused-ignore]
                frames = int(reader.count_frames())  # type: ignore[attr-defined,unused-ignore]
            width, height = about["size"]
            fps = float(about["fps"])
        except Exception as error:  # imageio passes on whatever its plugins raise
            raise InputError(
                f"cannot read {path} as a video: {one_line(error, limit=120)}"
            ) from error
        return cls(path=path, frames=frames, height=height, width=width, fps=fps)

    def read(self) -> Iterator[np.ndarray[Any, Any]]:
        """Its frames, `[H, W, 3]` uint8.

        Raises:
            InputError: it is damaged from some frame on.
        """
        import imageio.v2 as imageio

        done = 0
        try:
            with imageio.get_reader(str(self.path), format="FFMPEG") as reader:  # type: ignore[arg-type,unused-ignore]
                for frame in reader:  # type: ignore[attr-defined,unused-ignore]
                    yield frame
                    done += 1
        except (OSError, RuntimeError, IndexError) as error:
            raise InputError(
                f"{self.path} is damaged after frame {done}: {one_line(error, limit=120)}"
            ) from error

    def check_pairs_with(self, other: VideoSource) -> None:
        """Raise `InputError`, naming both, unless frames can be compared one by one."""
        mine, theirs = (f"{v.frames} frames of {v.width}x{v.height}" for v in (self, other))
        if mine != theirs:
            raise InputError(
                f"{self.path} has {mine} and {other.path} has {theirs}: "
                "only videos of one size and length can be compared frame by frame"
            )
