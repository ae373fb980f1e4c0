"""`sla-video compare`: its numbers against numpy and scipy, its video, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
from cli_tools import assert_refused, call, files_below
from scipy.ndimage import gaussian_filter

from sla_video.pipelines.reports import video_distance
from sla_video.pipelines.video_files import write_clip


def clip(seed: int, frames: int = 4, height: int = 48, width: int = 64) -> np.ndarray[Any, Any]:
    """Smooth random pictures, which compression leaves nearly as they are."""
    noise = np.random.default_rng(seed).normal(size=(frames, height, width, 3))
    smooth = gaussian_filter(noise, (0, 6, 6, 0))
    return (128 + 400 * smooth).clip(0, 255).astype(np.uint8)


@pytest.fixture
def videos(here: Path) -> Path:
    """a.mp4 and b.mp4, of which frame 2 is the same but for compression; the folder is current."""
    a, b = clip(0), clip(1)
    b[2] = a[2]
    for name, frames in (("a", a), ("b", b)):
        write_clip(here / f"{name}.mp4", frames, 8)
    return here


def decoded(path: Path) -> list[np.ndarray[Any, Any]]:
    return [frame.astype(float) for frame in imageio.get_reader(path)]


def ssim(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Of one channel, by the paper: Gaussian window of 11 pixels, mirrored at the edges."""

    def blur(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return gaussian_filter(x, 1.5, truncate=5 / 1.5, mode="mirror")

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def test_metrics_are_those_of_the_definitions(videos: Path) -> None:
    outcome = call("compare", "a.mp4", "b.mp4", "--json", "-")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (found["frames"], found["height"], found["width"]) == (4, 48, 64)
    a, b = (decoded(videos / name) for name in ("a.mp4", "b.mp4"))
    psnr = [10 * np.log10(255**2 / ((x - y) ** 2).mean()) for x, y in zip(a, b, strict=True)]
    assert found["psnr"]["frames"] == pytest.approx(psnr, abs=1e-3)
    assert found["psnr"]["mean"] == pytest.approx(np.mean(psnr), abs=1e-3)
    assert found["psnr"]["worst_frame"] == int(np.argmin(psnr)) != 2
    similar = [
        np.mean([ssim(x[..., c] / 255, y[..., c] / 255) for c in range(3)])
        for x, y in zip(a, b, strict=True)
    ]
    assert found["ssim"]["frames"] == pytest.approx(similar, abs=2e-3)
    assert found["ssim"]["mean"] == pytest.approx(np.mean(similar), abs=2e-3)
    assert similar[2] > 0.9 > max(similar[:2]), "the test tells frames apart"
    assert files_below(videos) == ["a.mp4", "b.mp4"]


def test_a_video_is_equal_to_itself(videos: Path) -> None:
    outcome = call("compare", "a.mp4", "a.mp4", "--json", "same.json")
    assert "PSNR, dB" in outcome.out and "SSIM" in outcome.out
    found = json.loads((videos / "same.json").read_text())
    assert found["psnr"]["frames"] == pytest.approx([96.02] * 4, abs=0.01)
    assert found["ssim"]["frames"] == pytest.approx([1] * 4)


@pytest.mark.skipif(
    video_distance.why_no_lpips() is None, reason="the weights of LPIPS are at hand here"
)
def test_lpips_is_left_out_in_one_line(videos: Path) -> None:
    outcome = call("compare", "a.mp4", "b.mp4", "--json", "d.json")
    assert outcome.err == f"left out: LPIPS: {video_distance.why_no_lpips()}\n"
    assert "lpips" not in json.loads((videos / "d.json").read_text())


def test_lpips_is_used_where_it_is_at_hand(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_distance, "why_no_lpips", lambda: None)
    monkeypatch.setattr(video_distance, "_lpips_network", lambda: lambda a, b: (a - b).abs().mean())
    found = json.loads(call("compare", "a.mp4", "b.mp4", "--json", "-").out)
    a, b = (decoded(videos / name) for name in ("a.mp4", "b.mp4"))
    wanted = [np.abs(x - y).mean() / 255 for x, y in zip(a, b, strict=True)]
    assert found["lpips"]["frames"] == pytest.approx(wanted, abs=1e-5)
    assert found["lpips"]["worst_frame"] == int(np.argmax(wanted))
    assert found["left_out"] == []


def test_side_by_side(videos: Path) -> None:
    outcome = call("compare", "a.mp4", "b.mp4", "--out", "new/side.mp4", "--amplify", 2)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "new/side.mp4"
    both = decoded(videos / "new" / "side.mp4")
    a, b = (decoded(videos / name) for name in ("a.mp4", "b.mp4"))
    assert len(both) == 4 and imageio.get_reader("new/side.mp4").get_meta_data()["fps"] == 8
    for frame, x, y in zip(both, a, b, strict=True):
        wanted = np.concatenate([x, y, (2 * abs(x - y)).clip(0, 255)], 1)
        assert frame.shape == wanted.shape == (48, 192, 3)
        assert abs(frame - wanted).mean() < 4, "compressed once more"
    assert_refused(
        call("compare", "a.mp4", "b.mp4", "--out", "new/side.mp4"), "side.mp4 exists", "--overwrite"
    )
    assert call("compare", "a.mp4", "a.mp4", "--out", "new/side.mp4", "--overwrite").code == 0
    assert decoded(videos / "new" / "side.mp4")[0][:, 130:].max() < 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.mp4"], ["Missing argument", "--help"]),
        (["a.mp4", "gone.mp4"], ["gone.mp4 is missing"]),
        (["a.mp4", "."], [". is a folder"]),
        (["a.mp4", "text.mp4"], ["cannot read text.mp4 as a video"]),
        (["a.mp4", "long.mp4"], ["a.mp4 has 4 frames of 64x48", "long.mp4 has 6 frames of 64x48"]),
        (["wide.mp4", "a.mp4"], ["wide.mp4 has 4 frames of 80x48", "a.mp4 has 4 frames of 64x48"]),
        (["low.mp4", "low.mp4"], ["low.mp4 has frames of 64x8", "at least 11 pixels"]),
        (["a.mp4", "b.mp4", "--amplify", "0"], ["`amplify` must be a number above 0, got 0"]),
        (["a.mp4", "b.mp4", "--amplify", "nan"], ["`amplify`"]),
        (["a.mp4", "b.mp4", "--out", "side.gif"], ["ends in .mp4, got side.gif"]),
        (["a.mp4", "b.mp4", "--out", "b.mp4", "--overwrite"], ["one of the videos to compare"]),
        (["a.mp4", "b.mp4", "--out", "a.mp4/x.mp4"], ["cannot write to a.mp4"]),
        (["a.mp4", "b.mp4", "--json", "no/d.json"], ["there is no folder no"]),
    ],
    ids=" ".join,
)
def test_bad_input(arguments: list[str], words: list[str], videos: Path) -> None:
    write_clip(videos / "long.mp4", clip(0, frames=6), 8)
    write_clip(videos / "wide.mp4", clip(0, width=80), 8)
    write_clip(videos / "low.mp4", clip(0, height=8), 8)
    (videos / "text.mp4").write_text("no video")
    before = files_below(videos)
    assert_refused(call("compare", *arguments), *words)
    assert files_below(videos) == before


def test_a_missing_library_is_named(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_distance.importlib.util, "find_spec", lambda name: None)
    assert_refused(call("compare", "a.mp4", "b.mp4"), "torchmetrics", "sla-video[report]")


def test_a_failure_while_writing_leaves_nothing(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sla_video.pipelines.video_files.os.replace", fail)
    assert_refused(call("compare", "a.mp4", "b.mp4", "--out", "new/side.mp4"), "No space left")
    assert files_below(videos) == ["a.mp4", "b.mp4"]
