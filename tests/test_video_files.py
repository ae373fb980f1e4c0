"""Names of result files, and MP4s that are written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from functools import partial
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest

from sla_video.pipelines import video_files
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.video_files import OutputFolder, plan_outputs, slug, write_video


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red circle, moving left!", "a-red-circle-moving-left"),
        ("  /etc/../passwd\n", "etc-passwd"),
        ("...", "video"),
        ("x" * 300, "x" * 48),
        ("word " * 40, "word-word-word-word-word-word-word-word-word"),
        ("Ein grüner Würfel", "ein-grüner-würfel"),
    ],
)
def test_slug(prompt: str, name: str) -> None:
    assert slug(prompt) == name


@pytest.mark.parametrize("prompt", ["円" * 300, "\U0001d535" * 200, "ü " * 300])
def test_names_fit_into_255_bytes(prompt: str) -> None:
    longest = f".{slug(prompt)}-seed{2**63}-9999.part-abcdefgh.json"
    assert len(longest.encode()) <= 255


def plan(out: Path | None, *, prompts: Any = ("a b",), overwrite: bool = False) -> list[str]:
    seeds = [7] * len(prompts)
    return [str(path) for path in plan_outputs(out, prompts, seeds, overwrite=overwrite)]


def test_names_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan(None) == ["a-b-seed7.mp4"]
    assert plan(Path("new")) == ["new/a-b-seed7.mp4"]
    assert plan(Path("new"), prompts=("a b", "A, b")) == [
        "new/a-b-seed7.mp4",
        "new/a-b-seed7-2.mp4",
    ]
    assert list(tmp_path.iterdir()) == [], "planning makes nothing"


@pytest.mark.parametrize("taken", ["a-b-seed7.mp4", "a-b-seed7.json"])
def test_taken_names_are_numbered(taken: str, tmp_path: Path) -> None:
    (tmp_path / taken).touch()
    assert plan(tmp_path) == [str(tmp_path / "a-b-seed7-2.mp4")]
    assert plan(tmp_path, overwrite=True) == [str(tmp_path / "a-b-seed7.mp4")]


@pytest.mark.parametrize("taken", ["clip.mp4", "clip.json"])
def test_a_named_file_is_refused_if_it_exists(taken: str, tmp_path: Path) -> None:
    (tmp_path / taken).touch()
    with pytest.raises(InputError, match=rf"{taken} exists.*--overwrite"):
        plan(tmp_path / "clip.mp4")
    assert plan(tmp_path / "clip.mp4", overwrite=True) == [str(tmp_path / "clip.mp4")]


def test_a_folder_may_end_in_mp4(tmp_path: Path) -> None:
    (tmp_path / "odd.mp4").mkdir()
    assert plan(tmp_path / "odd.mp4") == [str(tmp_path / "odd.mp4" / "a-b-seed7.mp4")]


def test_output_folder_is_removed_if_nothing_came(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), OutputFolder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_output_folder_is_removed_when_interrupted_right_after_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def interrupted(path: Path, **options: Any) -> None:
        make(path, **options)
        if path.name == "c":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        OutputFolder(tmp_path / "a" / "b", tmp_path / "a" / "c"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_output_folder_stays_if_something_came(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "video").touch()
    assert (tmp_path / "a" / "b" / "video").exists()
    (tmp_path / "c").mkdir()
    with OutputFolder(tmp_path / "c"):
        pass
    assert (tmp_path / "c").is_dir(), "what was there before stays"


def moving_square() -> np.ndarray[Any, Any]:
    """`[9, 48, 64, 3]`: a saturated square on a coloured ground."""
    frames = np.empty((9, 48, 64, 3), np.uint8)
    frames[:] = (30, 90, 200)
    for index, frame in enumerate(frames):
        frame[8:24, 4 + 4 * index : 20 + 4 * index] = (230, 40, 30)
    return frames


def test_colours_and_frames_survive(tmp_path: Path) -> None:
    frames = moving_square()
    write_video(tmp_path / "clip.mp4", frames, 24, lambda: {"seed": 1})
    reader = imageio.get_reader(tmp_path / "clip.mp4")
    read = np.stack([frame for frame in reader])  # `list` asks for a length it has not
    assert read.shape == frames.shape
    error = np.abs(read.astype(int) - frames)
    assert np.median(error) <= 3
    # Colour has half the resolution, so edges are off by more; flat parts are not.
    assert np.percentile(error, 90) <= 6
    assert json.loads((tmp_path / "clip.json").read_text()) == {"seed": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.json", "clip.mp4"]


def test_a_single_frame_is_a_video_too(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", moving_square()[:1], 16, dict)
    assert sum(1 for _ in imageio.get_reader(tmp_path / "clip.mp4")) == 1


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_video(tmp_path / "clip.mp4", moving_square()[:1], 16, dict)
    finally:
        os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o640}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_failing_sidecar_leaves_the_old_files(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("old")

    def fail() -> dict[str, Any]:
        raise error

    with pytest.raises(error):
        write_video(tmp_path / "clip.mp4", moving_square(), 16, fail)
    assert (tmp_path / "clip.mp4").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_missing_ffmpeg_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio_ffmpeg

    def absent() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    video_files.check_video_writer()
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", absent)
    with pytest.raises(InputError, match="IMAGEIO_FFMPEG_EXE"):
        video_files.check_video_writer()


def test_a_video_that_ffmpeg_could_not_finish_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: here ffmpeg may write no file of more than a few blocks."""
    real = imageio_ffmpeg.get_ffmpeg_exe()
    limited = tmp_path / "limited"
    limited.write_text(f'#!/bin/sh\nulimit -f 4\nexec "{real}" "$@"\n')
    limited.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(limited))
    noise = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(InputError, match=r"cannot write .*of 9 frames"):
        write_video(tmp_path / "clip.mp4", noise, 8, dict)
    assert list(tmp_path.iterdir()) == [limited]


def test_long_names_are_written_or_refused_before_the_work(tmp_path: Path) -> None:
    longest = "x" * (255 - len(".recording.safetensors"))
    assert plan(tmp_path / f"{longest}.mp4") == [str(tmp_path / f"{longest}.mp4")]
    save = partial(Path.write_bytes, data=b"recording")
    write_video(tmp_path / f"{longest}.mp4", moving_square(), 8, dict, save)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(InputError, match="leaves no room"):
        plan(tmp_path / f"{longest}x.mp4")
