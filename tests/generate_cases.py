"""Models and files that the tests of `sla-video generate` give it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import imageio.v2 as imageio
import numpy as np
import tiny_families_joint as joint
import tiny_families_other as other
import tiny_families_wan as wan
from cli_tools import SMALL, call
from family_cases import clip, picture
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from tiny_models import TEXT_DIM, build_tiny_pipeline, build_tiny_tokenizer, seeded

PROMPT = "a red circle moves left"
SIDE = 32
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
    "cogvideox": joint.CASES["cogvideox"].build,
    "cogvideox i2v": joint.CASES["cogvideox i2v"].build,
    "mochi": joint.mochi,
    "hunyuan": lambda: hunyuan(),
}
# Options that give the files of `write_inputs`.
GIVEN = {
    "image": ["--image", "first.png"],
    "last_image": ["--last-image", "last.png"],
    "video": ["--video", "clip.avi"],
    "mask": ["--mask", "mask.png"],
}


def hunyuan() -> Any:
    """HunyuanVideo with text encoders."""
    parts = joint.hunyuan().components
    names = ("vae", "transformer", "scheduler")
    tokenizer = build_tiny_tokenizer()
    heads = {"vocab_size": len(tokenizer), "num_attention_heads": 2}
    llama = LlamaConfig(
        hidden_size=TEXT_DIM, intermediate_size=32, num_hidden_layers=3, num_key_value_heads=2,
        **heads,
    )  # fmt: skip
    clip = CLIPTextConfig(
        hidden_size=joint.POOLED_DIM, intermediate_size=16, num_hidden_layers=1, eos_token_id=1,
        **heads,
    )  # fmt: skip
    return joint.silent(
        diffusers.HunyuanVideoPipeline(
            **{name: parts[name] for name in names},
            tokenizer=tokenizer,
            tokenizer_2=build_tiny_tokenizer(),
            text_encoder=seeded(LlamaModel, {"config": llama}, 0),
            text_encoder_2=seeded(CLIPTextModel, {"config": clip}, 0),
        )
    )


def write_inputs(folder: Path) -> None:
    """Two pictures, a video and a mask of its right half; every pixel survives the file."""
    for name, seed in (("first.png", 0), ("last.png", 1)):
        picture(seed, SIDE).save(folder / name)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, SIDE // 2 :] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    write_clip(folder / "clip.avi", clip(5, SIDE))


def write_clip(path: Path, frames: list[Image.Image], fps: int = 10) -> None:
    """Without loss, by a codec for RGB."""
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
