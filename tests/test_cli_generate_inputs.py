"""`sla-video generate` from pictures and videos, and with models that are not text to video."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import tiny_families_other as other
import tiny_families_wan as wan
import torch
from cli_tools import SMALL, call
from family_cases import assemble, clip, picture
from PIL import Image

from tiny_models import build_tiny_pipeline, build_tiny_transformer

PROMPT = "a red circle moves left"
SIDE = 32
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
MODELS: dict[str, Callable[[], Any]] = {
    "t2v": build_tiny_pipeline,
    "t2v a14b": lambda: build_tiny_pipeline(two_transformers=True),
    "i2v": wan.wan_i2v,
    "flf2v": lambda: wan.wan_i2v(last=True),
    "i2v a14b": wan.wan22_i2v,
    "5b": lambda: wan.ti2v("WanPipeline"),
    "5b saved for pictures": lambda: wan.ti2v("WanImageToVideoPipeline"),
    "vace": wan.vace,
    "vace a14b": lambda: wan.vace(two=True),
    "skyreels": lambda: wan.skyreels("SkyReelsV2Pipeline"),
    "skyreels i2v": lambda: wan.skyreels("SkyReelsV2ImageToVideoPipeline", image=True),
    "ltx": lambda: other.ltx("LTXPipeline"),
    "ltx i2v": lambda: other.ltx("LTXImageToVideoPipeline"),
    "allegro": other.allegro,
}
_folders: dict[str, Path] = {}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one of `MODELS`."""

    def folder(name: str) -> Path:
        if name not in _folders:
            _folders[name] = tmp_path_factory.mktemp("model") / name.replace(" ", "-")
            MODELS[name]().save_pretrained(_folders[name])
        return _folders[name]

    return folder


@pytest.fixture
def files(here: Path) -> Path:
    """A folder with pictures, videos and masks, of which every pixel survives the file."""
    for name, seed in (("first.png", 0), ("last.png", 1)):
        picture(seed, SIDE).save(name)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, SIDE // 2 :] = 255
    Image.fromarray(mask).save("mask.png")
    write_clip(here / "clip.avi", clip(5, SIDE))
    return here


def write_clip(path: Path, frames: list[Image.Image], fps: int = 10) -> None:
    """Lossless, with an RGB codec, so that frames can be compared."""
    writer = imageio.get_writer(
        path, format="FFMPEG", fps=fps, codec="ffv1", pixelformat="bgr0", quality=None,
        macro_block_size=1,
    )  # fmt: skip
    with writer:
        for frame in frames:
            writer.append_data(np.asarray(frame))


def generate(folder: Path, *arguments: object) -> dict[str, Any]:
    """Generate, and read the sidecar."""
    outcome = call("generate", PROMPT, "--model", folder, *SMALL, "--seed", 3, *arguments)
    assert outcome.code == 0, outcome.err
    record: dict[str, Any] = json.loads(Path(outcome.out.strip()).with_suffix(".json").read_text())
    return record


def stock(kind: str, pipe: Any, **arguments: Any) -> np.ndarray[Any, Any]:
    """The frames that Diffusers' pipeline class `kind` makes itself."""
    assert type(pipe).__name__ == kind
    arguments = {name: value for name, value in {**CALL, **arguments}.items() if value is not None}
    images = pipe(**arguments, generator=torch.Generator().manual_seed(3)).frames[0]
    return (np.asarray(images) * 255).round().astype(np.uint8)


FIRST = {"image": picture(0, SIDE)}
BOTH = {**FIRST, "last_image": picture(1, SIDE)}
CLIP = {"video": clip(5, SIDE)}
GIVEN = {
    "image": ["--image", "first.png"],
    "last_image": ["--last-image", "last.png"],
    "video": ["--video", "clip.avi"],
    "mask": ["--mask", "mask.png"],
}
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
    ("allegro", [], [], "AllegroPipeline", None, {"guidance_scale": 7.5}),
]  # fmt: skip


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
    np.testing.assert_array_equal(frames_written[0], expected)
    # And SLA attention runs in it: 90% of few blocks leaves one of them.
    sparse = generate(model(name), *options, *given)
    assert sparse["attention"]["kind"] == "sla2"
    assert all(layer["calls"] > 0 for layer in sparse["attention"]["layers"])
    assert frames_written[1].shape == expected.shape
