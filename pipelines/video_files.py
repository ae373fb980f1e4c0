"""Names of result files, and writing a video with its JSON sidecar so that no half of it is left.

Frames are `[F, H, W, 3]` uint8 arrays in RGB.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.errors import InputError, one_line

if TYPE_CHECKING:
    import numpy as np

    from sla_video.pipelines.earlier_videos import EarlierVideos

_SUFFIX = ".mp4"
_SLUG_LENGTH = 48
_SLUG_BYTES = 160
_NAME_BYTES = 255  # the most that file systems take
# x264 at a quality that shows no loss; the colour tags keep players from guessing the matrix.
_BT709 = "color_primaries=bt709:color_trc=bt709:colorspace=bt709"
_X264 = ["-crf", "16", "-movflags", "+faststart"]
_X264 += ["-vf", f"scale=out_color_matrix=bt709,setparams={_BT709}"]


def slug(prompt: str) -> str:
    """A prompt as a file name: lower case, words joined by hyphens, cut at a word's end."""
    text = unicodedata.normalize("NFKC", prompt).lower()
    words = re.findall(r"\w+", text)
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word[:_SLUG_LENGTH]
        # File systems limit names to 255 bytes, not characters.
        if len(longer) > _SLUG_LENGTH or len(longer.encode()) > _SLUG_BYTES:
            break
        name = longer
    return name or "video"


def plan_outputs(
    out: Path | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    overwrite: bool,
    earlier: EarlierVideos | None = None,
) -> list[Path]:
    """The file of each video: `out` itself if it ends in .mp4, else names made up in folder `out`.

    Names in a folder are `<prompt>-seed<seed>.mp4`; a name that is taken gets `-2`, `-3`, …, so
    nothing is replaced. A file given by name is refused if it exists, unless `overwrite`.
    What an `earlier` run has made of the same video keeps its name.

    Args:
        out: a file, a folder (made when writing), or `None` for the current folder.
        prompts, seeds: of each video, in order.
        earlier: to go on with an interrupted run.

    Raises:
        InputError: one file for several videos, a name that is taken, or not an .mp4 file.
    """
    out = Path() if out is None else out.expanduser()
    if out.suffix.lower() == _SUFFIX and not out.is_dir():
        if len(prompts) != 1:
            raise InputError(
                f"`out` names one file, {out}, for {len(prompts)} videos: give a folder instead"
            )
        if len(os.fsencode(recording_of(out).name)) > _NAME_BYTES:
            raise InputError(f"`out` leaves no room for the names of files beside it: {out}")
        if not overwrite and _is_taken(out, prompts[0], seeds[0], earlier):
            taken = out if out.exists() else sidecar_of(out)
            raise InputError(f"{taken} exists: give another --out, or --overwrite to replace it")
        return [out]
    if out.exists() and not out.is_dir():
        raise InputError(f"`out` must be a folder or end in {_SUFFIX}, got the file {out}")
    paths: list[Path] = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        stem, number = f"{slug(prompt)}-seed{seed}", 1
        path = out / (stem + _SUFFIX)
        while path in paths or (not overwrite and _is_taken(path, prompt, seed, earlier)):
            number += 1
            path = out / f"{stem}-{number}{_SUFFIX}"
        paths.append(path)
    return paths


def _is_taken(path: Path, prompt: str, seed: int, earlier: EarlierVideos | None) -> bool:
    """Whether a file or its sidecar is there, unless both are of this very video."""
    if not (path.exists() or sidecar_of(path).exists()):
        return False
    return earlier is None or not earlier.made(sidecar_of(path), prompt, seed)


def sidecar_of(path: Path) -> Path:
    """The JSON file that belongs to a video."""
    return path.with_suffix(".json")


def recording_of(path: Path) -> Path:
    """The file with what attention lost in each step of a video."""
    return path.with_suffix(".recording.safetensors")


class OutputFolder:
    """Folders that are known to be writable before hours are spent on what goes into them.

    Entering makes them, their parents included; leaving removes what was made and stayed empty.
    Enter by `with`: between `ExitStack.enter_context` and what it registers, an interruption would
    leave a folder behind.

    Args:
        shared: other processes may be about to write there: nothing is removed.

    Raises:
        InputError: on entering, when one cannot be made or written to.
    """

    def __init__(self, *folders: Path, shared: bool = False) -> None:
        self.folders = folders
        self._shared = shared
        self._made: list[Path] = []

    def __enter__(self) -> OutputFolder:
        try:
            for folder in self.folders:
                self._make(folder)
        except BaseException:  # an interruption too
            self.__exit__()
            raise
        return self

    def _make(self, folder: Path) -> None:
        missing = [p for p in (folder, *folder.parents) if not p.exists()]
        try:
            for path in reversed(missing):
                # Noted first: an interruption right after `mkdir` has to find it.
                self._made.append(path)
                path.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(
                f"cannot write to {folder}: {error.strerror or error}; give another --out"
            ) from error

    def __exit__(self, *_: object) -> None:
        if self._shared:
            return
        for path in reversed(self._made):
            with contextlib.suppress(OSError):  # it holds results now, or never came to be
                path.rmdir()


def check_video_writer() -> None:
    """Raise `InputError` now, rather than after the video is made, if there is no ffmpeg."""
    import imageio_ffmpeg

    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise InputError(
            "no ffmpeg to write videos with: `pip install imageio-ffmpeg` on this platform, "
            "or set IMAGEIO_FFMPEG_EXE to an ffmpeg of yours"
        ) from error


def write_video(
    path: Path,
    frames: np.ndarray[Any, Any],
    fps: float,
    sidecar: Callable[[], Mapping[str, Any]],
    save_recording: Callable[[Path], None] | None = None,
) -> None:
    """Write an H.264 MP4 and what belongs to it: all, or nothing.

    All are written under temporary names in the same folder and then renamed. An interruption
    at any point leaves no file that looks finished and is not.

    Args:
        path: the MP4 file; an existing one is replaced.
        frames: `[F, H, W, 3]` uint8, H and W even.
        fps: frames a second.
        sidecar: called once the video is encoded; returns what the JSON file holds.
        save_recording: writes the recording to the path that it is given. Without one, that of a
            video which is replaced is removed.

    Raises:
        InputError: the folder cannot be written to, for instance because the disk is full.
    """
    video_part, json_part, recording_part = None, None, None
    try:
        video_part = _temporary(path, _SUFFIX)
        _encode(video_part, frames, fps)
        json_part = _temporary(path, ".json")
        json_part.write_text(json.dumps(sidecar(), indent=2) + "\n", encoding="utf-8")
        if save_recording is not None:
            recording_part = _temporary(path, ".safetensors")
            save_recording(recording_part)
            _set_plain_permissions(recording_part)  # safetensors makes the file anew
            os.replace(recording_part, recording_of(path))
        os.replace(json_part, sidecar_of(path))
        os.replace(video_part, path)
        if save_recording is None:
            recording_of(path).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {one_line(error)}; give another --out") from error
    finally:
        for part in (video_part, json_part, recording_part):
            if part is not None:
                part.unlink(missing_ok=True)


def write_clip(path: Path, frames: Iterable[np.ndarray[Any, Any]], fps: float) -> None:
    """Write an H.264 MP4 alone, from frames as they come: the whole of it, or nothing.

    Args:
        path: an existing file is replaced.
        frames: `[H, W, 3]` uint8 each.

    Raises:
        InputError: the folder cannot be written to.
    """
    part = None
    try:
        part = _temporary(path, _SUFFIX)
        _encode(part, frames, fps)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {one_line(error)}; give another --out") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _temporary(path: Path, suffix: str) -> Path:
    """A new hidden file beside `path`, with the permissions that a plain `open` would give it."""
    handle, name = tempfile.mkstemp(
        suffix=suffix, prefix=f".{path.stem[:_SLUG_LENGTH]}.part-", dir=path.parent
    )
    os.close(handle)
    _set_plain_permissions(name)
    return Path(name)


def _set_plain_permissions(path: str | Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def _encode(path: Path, frames: Iterable[np.ndarray[Any, Any]], fps: float) -> None:
    import imageio.v2 as imageio
    import imageio_ffmpeg

    writer = imageio.get_writer(
        str(path),
        format="FFMPEG",
        mode="I",
        fps=fps,
        codec="libx264",
        pixelformat="yuv420p",
        quality=None,
        macro_block_size=2,
        ffmpeg_log_level="error",
        output_params=_X264,
    )
    written = 0
    with writer:
        for frame in frames:
            writer.append_data(frame)
            written += 1
    # The writer does not look at how ffmpeg ended: on a full disk it leaves a file without an end.
    try:
        readable, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    except RuntimeError:
        readable = 0
    if readable < written:
        raise OSError(f"ffmpeg wrote {readable} of {written} frames (is the disk full?)")
