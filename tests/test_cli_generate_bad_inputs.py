"""Pictures, videos and masks that `sla-video generate` cannot use, and how it reads others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_tools import SMALL, assert_refused, call, files_below
from family_cases import clip
from generate_cases import GIVEN, PROMPT, SIDE, write_clip
from PIL import Image

from sla_video.pipelines.input_files import as_mask, fit, read_clip, read_picture
from sla_video.pipelines.video_files import write_video

MODEL_NEEDS = [
    ("i2v", [], ["i2v needs --image: the picture that the video starts with"]),
    ("i2v a14b", [], ["needs --image"]),
    ("i2v", ["image", "last_image"], ["--last-image given, but", "takes --image only"]),
    ("flf2v", ["image"], ["needs --last-image: the picture that the video ends with"]),
    ("flf2v", [], ["needs --image"]),
    ("5b", ["image", "last_image"], ["--last-image given, but", "takes --image only"]),
    ("5b", ["video"], ["--video given, but", "takes --image only"]),
    ("t2v", ["image"], ["--image given, but", "takes text only", "image-to-video models"]),
    ("t2v", ["last_image"], ["--last-image given, but", "takes text only", "FLF2V"]),
    ("t2v", ["video", "mask"], ["--mask given, but", "takes --video only"]),
    ("t2v a14b", ["video"], ["--video given, but", "takes text only", "VACE"]),
    ("vace", ["mask"], ["--mask needs --video"]),
    ("vace", ["last_image"], ["--last-image needs --image"]),
    ("vace", ["image", "video"], ["--image or --video, not both"]),
    ("ltx", ["image"], ["--image given, but", "takes text only"]),
]


@pytest.mark.usefixtures("nothing_is_loaded", "files")
@pytest.mark.parametrize(
    ("name", "inputs", "words"),
    MODEL_NEEDS,
    ids=[" ".join([name, *given]) for name, given, _ in MODEL_NEEDS],
)
def test_what_is_missing_or_too_much(
    name: str, inputs: list[str], words: list[str], model: Callable[[str], Path], files: Path
) -> None:
    before = files_below(files)
    given = [word for one in inputs for word in GIVEN[one]]
    assert_refused(call("generate", PROMPT, "--model", model(name), *SMALL, *given), *words)
    assert files_below(files) == before


@pytest.fixture
def bad_files(files: Path) -> None:
    """Files that cannot be used, beside those that can."""
    Path("text.png").write_text("no picture")
    Path("text.mp4").write_text("no video")
    Path("empty.mp4").write_bytes(b"")
    whole = Path("first.png").read_bytes()
    Path("half.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (SIDE, SIDE), 1).save("ones.png")
    Image.new("L", (SIDE, SIDE // 2), 255).save("small.png")
    write_clip(Path("short.avi"), clip(4, SIDE))
    write_clip(Path("long.avi"), clip(9, SIDE))


BAD_FILES = [
    ("5b", ["--image", "nowhere.png"], ["--image: there is no file nowhere.png"]),
    ("5b", ["--image", "."], ["--image: . is not a file"]),
    ("5b", ["--image", "text.png"], ["cannot read a picture from text.png", "PNG, JPEG"]),
    ("5b", ["--image", "half.png"], ["cannot read a picture from half.png", "truncated"]),
    ("5b", ["--image", "clip.avi"], ["cannot read a picture from clip.avi"]),
    ("vace", ["--video", "nowhere.mp4"], ["--video: there is no file nowhere.mp4"]),
    ("vace", ["--video", "text.mp4"], ["cannot read a video from text.mp4", "MP4, WebM"]),
    ("vace", ["--video", "empty.mp4"], ["cannot read a video from empty.mp4"]),
    ("vace", ["--video", "first.png"], ["--video takes a video, but first.png is a picture"]),
    ("vace", ["--video", "short.avi"], ["`frames` is 5, but short.avi has 4", "--frames 1"]),
    ("vace", ["--video", "clip.avi", "--mask", "small.png"],
     ["mask small.png is 32x16, but clip.avi is 32x32"]),
    ("vace", ["--video", "clip.avi", "--mask", "ones.png"], ["ones.png is black throughout"]),
    ("vace", ["--video", "long.avi", "--mask", "clip.avi"],
     ["mask clip.avi has 5 frames, but long.avi has 6 or more", "one picture for all"]),
    ("vace", ["--video", "clip.avi", "--strength", "0.5"], ["`strength`", "text-to-video"]),
    ("t2v", ["--strength", "0.5"], ["`strength`", "leave it out"]),
    ("t2v", ["--video", "clip.avi", "--strength", "0.1"], ["`strength` 0.1 of 2 steps"]),
    ("t2v", ["--video", "clip.avi", "--strength", "1.5"], ["at most 1, got 1.5"]),
    ("i2v a14b", ["--image", "first.png", "--last-image", "last.png", "--frames", "1"],
     ["--last-image need more than one"]),
]  # fmt: skip


@pytest.mark.usefixtures("nothing_is_loaded", "bad_files")
@pytest.mark.parametrize(
    ("name", "options", "words"), BAD_FILES, ids=[" ".join(given) for _, given, _ in BAD_FILES]
)
def test_inputs_that_cannot_be_used(
    name: str, options: list[str], words: list[str], model: Callable[[str], Path], here: Path
) -> None:
    before = files_below(here)
    assert_refused(call("generate", PROMPT, "--model", model(name), *SMALL, *options), *words)
    assert files_below(here) == before


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_transformer_that_sla_does_not_know_is_named(
    model: Callable[[str], Path], here: Path
) -> None:
    folder = Path(shutil.copytree(model("ltx"), here / "model"))
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace("LTXVideoTransformer3DModel", "Strange"))
    outcome = call("generate", PROMPT, "--model", folder, *SMALL, "--frames", 9)
    assert_refused(outcome, "holds a Strange, which", "WanTransformer3DModel", "--dense")


def test_what_an_image_encoder_lacks_is_noticed(model: Callable[[str], Path], files: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(model("i2v"), files / "model"))
    path = folder / "image_encoder" / "model.safetensors"
    tensors = load_file(path)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    outcome = call("generate", PROMPT, "--model", folder, *SMALL, *GIVEN["image"])
    assert_refused(outcome, "image_encoder are incomplete", lost)


# What files hold, and how it is read.

COLOURS = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 255), (0, 0, 0), (128, 64, 32)]]
ROTATIONS = {1: 0, 3: 2, 6: 3, 8: 1}  # EXIF orientation -> quarter turns to the left


@pytest.mark.parametrize("orientation", ROTATIONS)
def test_pictures_are_upright(orientation: int, here: Path) -> None:
    pixels = np.array(COLOURS, np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save("photo.png", exif=exif)
    found = np.asarray(read_picture(Path("photo.png"), "--image"))
    np.testing.assert_array_equal(found, np.rot90(pixels, ROTATIONS[orientation]))


def test_transparency_becomes_white(here: Path) -> None:
    for name, mode, colour, seen in (
        ("opaque.png", "RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("clear.png", "RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("half.png", "RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("gray.png", "LA", (50, 0), (255, 255, 255)),
    ):
        Image.new(mode, (2, 2), colour).save(name)
        found = read_picture(Path(name), "--image")
        assert (found.mode, found.getpixel((0, 0))) == ("RGB", seen), name
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9])
    palette.save("palette.gif", transparency=0)
    assert read_picture(Path("palette.gif"), "--image").getpixel((0, 0)) == (255, 255, 255)


def test_gray_pictures_of_any_depth_become_colour_pictures(here: Path) -> None:
    Image.new("L", (2, 2), 77).save("eight.png")
    Image.new("1", (2, 2), 1).save("one.png")
    Image.fromarray(np.full((2, 2), 200 * 257, np.uint16)).save("sixteen.png")
    for name, value in (("eight.png", 77), ("one.png", 255), ("sixteen.png", 200)):
        assert read_picture(Path(name), "--image").getpixel((1, 1)) == (value,) * 3, name


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (48, 48), (20, 31)])
def test_fit_covers_and_keeps_the_middle(width: int, height: int) -> None:
    """A disc in the middle of a picture stays a disc there."""
    row, column = np.mgrid[:96, :96] - 47.5
    disc = np.where(row**2 + column**2 < 20**2, 255, 0).astype(np.uint8)
    found = np.asarray(fit(Image.fromarray(disc).convert("RGB"), height, width))[..., 0] > 127
    assert found.shape == (height, width)
    scale = max(height, width) / 96
    rows, columns = np.nonzero(found)
    assert np.allclose((np.ptp(rows) + 1, np.ptp(columns) + 1), 40 * scale, atol=1.5)
    assert np.allclose((rows.mean(), columns.mean()), ((height - 1) / 2, (width - 1) / 2), atol=0.6)


def test_masks_have_no_shades_after_they_are_scaled() -> None:
    gray = Image.fromarray(np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8))
    (mask,) = as_mask([gray.convert("RGB")], Path("mask.png"))
    found = np.asarray(fit(mask, 48, 48, sharp=True))
    assert set(np.unique(found)) == {0, 255}
    assert found.mean() == pytest.approx(127.5, abs=4)


def test_videos_of_ours_are_read_with_their_colours_and_frames(here: Path) -> None:
    frames = np.zeros((6, 32, 48, 3), np.uint8)
    frames[:, :, :16], frames[:, :, 32:] = (200, 30, 30), (20, 60, 180)
    frames[3:, 16:] = (30, 160, 40)
    write_video(Path("made.mp4"), frames, 8, dict)
    clip = read_clip(Path("made.mp4"), "--video", 5)
    assert (clip.size, clip.fps, len(clip.frames)) == ((48, 32), 8, 5)
    found = np.stack([np.asarray(frame) for frame in clip.frames]).astype(int)
    # Colour has half the resolution, so that edges run.
    inner = np.ones((32, 48), bool)
    inner[:, [14, 15, 16, 17, 30, 31, 32, 33]] = inner[14:18] = False
    assert abs(found - frames[:5])[:, inner].max() <= 12


def test_videos_filmed_on_the_side_are_upright(here: Path) -> None:
    import subprocess

    import imageio_ffmpeg

    top = Image.new("RGB", (64, 32))
    top.paste("red", (0, 0, 64, 16))
    write_clip(Path("clip.mp4"), [top] * 3)
    turn = ["-display_rotation", "90", "-i", "clip.mp4", "-c", "copy", "turned.mp4"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *turn], check=True)
    clip = read_clip(Path("turned.mp4"), "--video", 9)
    assert (clip.size, len(clip.frames)) == ((32, 64), 3)
    found = np.asarray(clip.frames[0]).astype(int)
    # A quarter turn to the left brings the top to the left.
    assert found[:, :14, 0].min() > 200 and found[:, 18:, 0].max() < 50


def test_a_gif_is_a_video(here: Path) -> None:
    first, *others = (Image.new("RGB", (32, 16), colour) for colour in ("red", "lime", "blue"))
    first.save("clip.gif", save_all=True, append_images=others, duration=100)
    clip = read_clip(Path("clip.gif"), "--video", 9)
    assert (clip.size, len(clip.frames), clip.fps) == ((32, 16), 3, 10)
    assert [int(np.asarray(frame)[8, 16].argmax()) for frame in clip.frames] == [0, 1, 2]
