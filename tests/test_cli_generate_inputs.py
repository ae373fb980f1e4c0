"""`sla-video generate` from pictures and videos: what Diffusers' own pipelines make of them."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from cli_tools import SMALL, call, files_below
from diffusers import AutoencoderKLWan
from family_cases import assemble, clip, picture
from generate_cases import GIVEN, MODELS, PROMPT, SIDE, generate, write_clip
from PIL import Image, ImageDraw

from sla_video.pipelines.model_source import embedded_folder
from sla_video.pipelines.pipeline_kinds import PIPELINE_KINDS
from tiny_models import build_tiny_transformer

# What `SMALL` and `generate` set, as a pipeline's call names it.
CALL: dict[str, Any] = {
    "prompt": PROMPT,
    "num_frames": 5,
    "height": SIDE,
    "width": SIDE,
    "num_inference_steps": 2,
    "guidance_scale": 5.0,
    "output_type": "np",
}


def stock(kind: str, pipe: Any, **arguments: Any) -> np.ndarray[Any, Any]:
    """The frames that Diffusers' pipeline class `kind` makes itself."""
    assert type(pipe).__name__ == kind
    arguments = {name: value for name, value in {**CALL, **arguments}.items() if value is not None}
    images = pipe(**arguments, generator=torch.Generator().manual_seed(3)).frames[0]
    return (np.asarray(images) * 255).round().astype(np.uint8)


FIRST = {"image": picture(0, SIDE)}
BOTH = {**FIRST, "last_image": picture(1, SIDE)}
CLIP = {"video": clip(5, SIDE)}
HALF = [Image.fromarray(np.repeat([[0] * 16 + [255] * 16], SIDE, 0).astype(np.uint8))] * 5
GRAY = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
BLACK, WHITE = (Image.new("L", (SIDE, SIDE), value) for value in (0, 255))
VACE_FIRST = {"video": [FIRST["image"], *[GRAY] * 4], "mask": [BLACK, *[WHITE] * 4]}
VACE_BOTH = {
    "video": [BOTH["image"], *[GRAY] * 3, BOTH["last_image"]],
    "mask": [BLACK, *[WHITE] * 3, BLACK],
}


def video_to_video() -> Any:
    return assemble("WanVideoToVideoPipeline", build_tiny_transformer())


LTX = {"frame_rate": 25, "guidance_scale": 3.0, "num_frames": 9}
LTX_SIZE = ("--frames", 9)
COG = {"num_frames": 9, "height": 64, "width": 64, "guidance_scale": 6.0}
COG |= {"max_sequence_length": 16}
COG_SIZE = ("--frames", 9, "--height", 64, "--width", 64)
# model, inputs, further options, class, the stock pipeline, further arguments of its call.
CASES = [
    ("t2v", [], [], "WanPipeline", None, {}),
    ("t2v", ["video"], [], "WanVideoToVideoPipeline", video_to_video,
     {**CLIP, "num_frames": None, "strength": 0.8}),
    ("t2v", ["video"], ["--strength", 0.5], "WanVideoToVideoPipeline", video_to_video,
     {**CLIP, "num_frames": None, "strength": 0.5}),
    ("t2v a14b", [], [], "WanPipeline", None, {}),
    ("i2v", ["image"], [], "WanImageToVideoPipeline", None, FIRST),
    ("flf2v", ["image", "last_image"], [], "WanImageToVideoPipeline", None, BOTH),
    ("i2v a14b", ["image"], [], "WanImageToVideoPipeline", None, FIRST),
    ("i2v a14b", ["image", "last_image"], [], "WanImageToVideoPipeline", None, BOTH),
    ("5b", [], [], "WanPipeline", None, {}),
    ("5b", ["image"], [], "WanImageToVideoPipeline", MODELS["5b saved for pictures"], FIRST),
    ("5b saved for pictures", [], [], "WanPipeline", MODELS["5b"], {}),
    ("5b saved for pictures", ["image"], [], "WanImageToVideoPipeline", None, FIRST),
    ("vace", [], [], "WanVACEPipeline", None, {}),
    ("vace", ["image"], [], "WanVACEPipeline", None, VACE_FIRST),
    ("vace", ["image", "last_image"], [], "WanVACEPipeline", None, VACE_BOTH),
    ("vace", ["video"], [], "WanVACEPipeline", None, CLIP),
    ("vace", ["video", "mask"], [], "WanVACEPipeline", None, {**CLIP, "mask": HALF}),
    ("vace a14b", ["video", "mask"], [], "WanVACEPipeline", None, {**CLIP, "mask": HALF}),
    ("skyreels", [], [], "SkyReelsV2Pipeline", None, {"guidance_scale": 6.0}),
    ("skyreels i2v", ["image"], [], "SkyReelsV2ImageToVideoPipeline", None,
     {**FIRST, "guidance_scale": 6.0}),
    ("ltx", [], LTX_SIZE, "LTXPipeline", None, LTX),
    ("ltx i2v", ["image"], LTX_SIZE, "LTXImageToVideoPipeline", None, {**LTX, **FIRST}),
    ("cogvideox", [], COG_SIZE, "CogVideoXPipeline", None, COG),
    ("cogvideox i2v", ["image"], COG_SIZE, "CogVideoXImageToVideoPipeline", None,
     {**COG, **FIRST}),
    ("hunyuan", [], [], "HunyuanVideoPipeline", None, {"guidance_scale": 6.0}),
    ("mochi", [], ("--frames", 7), "MochiPipeline", None,
     {"num_frames": 7, "guidance_scale": 4.5}),
]  # fmt: skip

# One of each class.
SPARSE = [(name, inputs) for name, inputs, *_ in {case[3]: case for case in CASES}.values()]


@pytest.mark.parametrize(
    ("name", "inputs", "options", "kind", "build", "arguments"),
    CASES,
    ids=[" ".join(map(str, [name, *given, *more])) for name, given, more, *_ in CASES],
)
def test_equals_the_stock_pipeline(
    name: str,
    inputs: list[str],
    options: list[object],
    kind: str,
    build: Callable[[], Any] | None,
    arguments: dict[str, Any],
    model: Callable[[str], Path],
    files: Path,
    frames_written: list[np.ndarray[Any, Any]],
) -> None:
    given = [word for one in inputs for word in GIVEN[one]]
    dense = generate(model(name), *options, *given, "--dense")
    assert dense["pipeline"] == kind
    expected = stock(kind, (build or MODELS[name])(), **arguments)
    assert expected.std() > 1
    np.testing.assert_array_equal(frames_written[0], expected)
    if (name, inputs) not in SPARSE:
        return
    # And SLA attention runs in it: 90% of few blocks leaves one of them.
    sparse = generate(model(name), *options, *given)
    assert sparse["attention"]["kind"] == "sla2"
    assert all(layer["calls"] > 0 for layer in sparse["attention"]["layers"])
    assert frames_written[1].shape == expected.shape


def test_pipelines_take_what_they_are_given() -> None:
    """Those of other families too: their calls name all that `generate` gives them."""
    import diffusers

    for kind in PIPELINE_KINDS.values():
        taken = set(inspect.signature(getattr(diffusers, kind.name).__call__).parameters)
        given = {*kind.needs, "prompt", "negative_prompt", "height", "width", "generator"}
        given |= {"num_inference_steps", "guidance_scale", "output_type", "callback_on_step_end"}
        given |= {"video"} if kind.fixed_length else {"num_frames"}
        given |= {"prompt_embeds", "max_sequence_length"} if kind.like_wan else set()
        given |= {kind.frame_rate} if kind.frame_rate else set()
        assert given <= taken, kind.name


def test_the_first_frame_shows_the_picture(
    here: Path, frames_written: list[np.ndarray[Any, Any]]
) -> None:
    """With a trained VAE, upright and in its colours: TI2V-5B keeps the first latent as it is."""
    channels = 8
    transformer = build_tiny_transformer(
        patch_size=(1, 2, 2), in_channels=channels, out_channels=channels
    )
    vae = AutoencoderKLWan.from_pretrained(embedded_folder() / "vae")
    assemble("WanPipeline", transformer, vae=vae, expand_timesteps=True).save_pretrained("model")
    scene = Image.new("RGB", (96, 64), (245, 245, 245))
    draw = ImageDraw.Draw(scene)
    draw.ellipse((8, 8, 40, 40), fill=(220, 40, 40))
    draw.rectangle((60, 36, 84, 60), fill=(40, 80, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a quarter turn to the right makes it upright
    scene.transpose(Image.Transpose.ROTATE_90).save("photo.png", exif=exif)
    size = ("--frames", 5, "--height", 64, "--width", 96, "--steps", 1)
    call("generate", PROMPT, "--model", "model", *size, "--image", "photo.png")
    first = frames_written[0][0].astype(float)
    error = abs(first - np.asarray(scene)).mean()
    flips = {"up": first[::-1], "left": first[:, ::-1], "colours": first[..., ::-1]}
    assert error < 12
    assert all(abs(wrong - np.asarray(scene)).mean() > 3 * error for wrong in flips.values())


def test_the_embedded_model_makes_videos_of_videos(
    here: Path, frames_written: list[np.ndarray[Any, Any]]
) -> None:
    """Little strength leaves the scene as it is. This VAE patches, and Wan 2.1's does not."""
    scene = np.full((5, 64, 96, 3), 245, np.uint8)
    scene[:, 16:48, 16:48] = (220, 40, 40)
    write_clip(here / "clip.avi", [Image.fromarray(frame) for frame in scene])
    arguments = ("--steps", 12, "--strength", 0.1, "--seed", 1, "--height", 64, "--width", 96)
    call("generate", PROMPT, "--video", "clip.avi", *arguments)
    (found,) = frames_written
    assert abs(found.astype(float) - scene).mean() < 12


def test_the_size_follows_the_picture(
    model: Callable[[str], Path], here: Path, frames_written: list[np.ndarray[Any, Any]]
) -> None:
    folder = Path(shutil.copytree(model("5b"), here / "model"))
    (folder / "defaults.json").write_text('{"num_frames": 5, "height": 64, "width": 64}')
    Image.new("RGB", (300, 150)).save("wide.png")
    settings = []
    for size in ([], ["--width", 64], ["--height", 64]):
        arguments = ("--model", folder, "--image", "wide.png", "--steps", 1, *size)
        outcome = call("generate", PROMPT, *arguments)
        assert outcome.code == 0, outcome.err
        assert "warning" not in outcome.err, "next to nothing is cut off"
        record = json.loads(Path(outcome.out.strip()).with_suffix(".json").read_text())
        settings.append((record["settings"]["height"], record["settings"]["width"]))
    # As many pixels as 64 x 64, or as asked for, and twice as wide as high.
    assert settings == [(48, 96), (32, 64), (64, 128)]
    assert frames_written[0].shape[1:3] == (48, 96)


def test_what_is_cut_off_is_said_and_recorded(
    model: Callable[[str], Path], here: Path, frames_written: list[np.ndarray[Any, Any]]
) -> None:
    """Scaled to cover the video, the middle stays; as when the picture is cropped beforehand."""
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste(picture(0, SIDE), (16, 0))
    wide.save("wide.png")
    picture(0, SIDE).save("square.png")
    outcome = call(
        "generate", PROMPT, "--model", model("5b"), *SMALL, "--seed", 3, "--image", "wide.png"
    )
    assert outcome.code == 0
    assert "wide.png is 64x32, the video 32x32: 50% of its width is cut off" in outcome.err
    record = json.loads(Path(outcome.out.strip()).with_suffix(".json").read_text())
    digest = hashlib.sha256((here / "wide.png").read_bytes()).hexdigest()
    settings = record["settings"]
    assert (settings["image"], settings["image_sha256"]) == ("wide.png", digest)
    assert settings["video"] is None and "video_sha256" not in settings
    generate(model("5b"), "--image", "square.png")
    np.testing.assert_array_equal(*frames_written)


def test_a_video_brings_its_length_and_pace(model: Callable[[str], Path], here: Path) -> None:
    write_clip(here / "clip.avi", clip(8, 64), fps=12)
    arguments = ("--model", model("vace"), "--video", "clip.avi", "--steps", 1, "--device", "cpu")
    outcome = call("generate", PROMPT, *arguments, "--width", 32, "--out", "made.mp4")
    assert outcome.code == 0, outcome.err
    assert "of clip.avi only the first 5 frames are used" in outcome.err
    settings = json.loads(Path("made.json").read_text())["settings"]
    wanted = {"frames": 5, "fps": 12, "height": 32, "width": 32}
    assert {name: settings[name] for name in wanted} == wanted
    about = imageio.get_reader("made.mp4").get_meta_data()
    assert (about["fps"], about["size"]) == (12, (32, 32))


def test_resume_knows_inputs_by_their_content(model: Callable[[str], Path], files: Path) -> None:
    command = ("generate", PROMPT, "--model", model("5b"), *SMALL, "--seed", 3, "--image")
    assert call(*command, "first.png").code == 0
    Path("first.png").rename("same.png")
    assert "1 finished by an earlier run" in call(*command, "same.png", "--resume").err
    assert "finished" not in call(*command, "last.png", "--resume").err
    made = [name for name in files_below(files) if name.endswith(".mp4")]
    assert made == ["a-red-circle-moves-left-seed3-2.mp4", "a-red-circle-moves-left-seed3.mp4"]
