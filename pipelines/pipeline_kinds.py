"""The pipelines of Diffusers that `generate` drives, and which one a model and its inputs call for.

Nothing in this file imports torch or diffusers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sla_video.pipelines.errors import InputError
from sla_video.pipelines.model_defaults import Geometry, ModelDefaults

# The option of each input besides the prompt, and what it holds.
INPUTS = {
    "image": "the picture that the video starts with",
    "last_image": "the picture that the video ends with",
    "video": "the video to start from",
    "mask": "white where that video is to be made anew",
}


@dataclass(frozen=True, kw_only=True)
class PipelineKind:
    """How a pipeline class is called.

    Attributes:
        name: of the class in `diffusers`.
        needs: inputs that it cannot do without, names of `INPUTS`.
        takes: inputs that it can be given besides.
        defaults: settings where neither caller nor model give any.
        geometry: sizes that it makes; `None` for Wan's, which the configurations tell.
        like_wan: text is encoded by Wan's `encode_prompt`, and padded to `max_sequence_length`.
        frame_rate: what its call names the frames a second, where the model wants to know.
        fixed_length: the video is as long as the one it is given, which its call isn't told.
        tiled: videos are decoded in tiles, as the whole of the usual size takes too much memory.
    """

    name: str
    needs: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()
    defaults: ModelDefaults = field(default_factory=ModelDefaults)
    geometry: Geometry | None = None
    like_wan: bool = True
    frame_rate: str | None = None
    fixed_length: bool = False
    tiled: bool = False


def _other(
    name: str,
    temporal: int,
    multiple: int,
    *needs: str,
    frame_rate: str | None = None,
    tiled: bool = False,
    **own: Any,
) -> PipelineKind:
    """A pipeline that is not Wan's; `own` are its settings, as its call has them."""
    return PipelineKind(
        name=name,
        needs=frozenset(needs),
        defaults=ModelDefaults(**own),
        geometry=Geometry(multiple=(multiple, multiple), temporal=temporal),
        like_wan=False,
        frame_rate=frame_rate,
        tiled=tiled,
    )


_SKYREELS: dict[str, Any] = {
    "defaults": ModelDefaults(frames=97, height=544, width=960, guidance_scale=6.0, fps=24)
}
_LTX: dict[str, Any] = {"frames": 161, "height": 512, "width": 704, "guidance_scale": 3.0}
_LTX |= {"fps": 25, "frame_rate": "frame_rate"}
_COG: dict[str, Any] = {"frames": 49, "height": 480, "width": 720, "guidance_scale": 6.0, "fps": 8}

PIPELINE_KINDS = {
    kind.name: kind
    for kind in (
        PipelineKind(name="WanPipeline"),
        PipelineKind(
            name="WanImageToVideoPipeline",
            needs=frozenset({"image"}),
            takes=frozenset({"last_image"}),
        ),
        PipelineKind(
            name="WanVACEPipeline", takes=frozenset({"image", "last_image", "video", "mask"})
        ),
        PipelineKind(
            name="WanVideoToVideoPipeline", needs=frozenset({"video"}), fixed_length=True
        ),
        PipelineKind(name="SkyReelsV2Pipeline", **_SKYREELS),
        PipelineKind(
            name="SkyReelsV2ImageToVideoPipeline", needs=frozenset({"image"}), **_SKYREELS
        ),
        _other("LTXPipeline", 8, 32, **_LTX),
        _other("LTXImageToVideoPipeline", 8, 32, "image", **_LTX),
        _other("CogVideoXPipeline", 4, 16, **_COG),
        _other("CogVideoXImageToVideoPipeline", 4, 16, "image", **_COG),
        _other(
            "HunyuanVideoPipeline", 4, 16,
            frames=129, height=720, width=1280, guidance_scale=6.0, fps=24, tiled=True,
        ),
        _other(
            "MochiPipeline", 6, 16,
            frames=85, height=480, width=848, steps=64, guidance_scale=4.5, fps=30, tiled=True,
        ),
    )
}  # fmt: skip


def choose_pipeline(
    model: str, index: Mapping[str, Any], transformer: Mapping[str, Any], given: Collection[str]
) -> PipelineKind:
    """The pipeline that makes a video from `given`, which are names of `INPUTS`.

    Args:
        model: its name, for messages.
        index, transformer: its `model_index.json` and the `config.json` of its transformer.

    Raises:
        InputError: an input that the model needs is not given, or one is that it does not take.
    """
    kind = _choose_kind(index, transformer, given)
    for name in sorted(kind.needs - set(given)):
        raise InputError(f"{model} needs {option(name)}: {INPUTS[name]}")
    for name in [name for name in INPUTS if name in given]:
        if name not in kind.needs | kind.takes:
            raise InputError(f"{option(name)} given, but {model} {_what_it_takes(kind, name)}")
    if "last_image" in given and "image" not in given:
        raise InputError(f"--last-image needs --image: {INPUTS['image']}")
    if "mask" in given and "video" not in given:
        raise InputError("--mask needs --video: the video of which it shows the parts to make anew")
    if "video" in given and "image" in given:
        raise InputError("give --image or --video, not both")
    return kind


def option(name: str) -> str:
    """An input's option on the command line."""
    return "--" + name.replace("_", "-")


def _choose_kind(
    index: Mapping[str, Any], transformer: Mapping[str, Any], given: Collection[str]
) -> PipelineKind:
    kind = PIPELINE_KINDS[index["_class_name"]]
    if kind.name not in ("WanPipeline", "WanImageToVideoPipeline"):
        return kind
    if index.get("expand_timesteps"):
        # TI2V-5B is one model for both pipelines, and sees a first picture only.
        name = "WanImageToVideoPipeline" if "image" in given else "WanPipeline"
        return replace(PIPELINE_KINDS[name], takes=frozenset({"image"}))
    if kind.name == "WanPipeline":
        one = not (index.get("transformer_2") or [None])[0]
        return PIPELINE_KINDS["WanVideoToVideoPipeline"] if "video" in given and one else kind
    if transformer.get("image_dim") is None:
        return kind
    if transformer.get("pos_embed_seq_len") is None:
        # Wan2.1 tells apart its attention to one picture and to two.
        return replace(kind, takes=frozenset())
    return replace(kind, needs=frozenset({"image", "last_image"}), takes=frozenset())


def _what_it_takes(kind: PipelineKind, refused: str) -> str:
    taken = [option(name) for name in INPUTS if name in kind.needs | kind.takes]
    if not taken:
        advice = {
            "image": "image-to-video models such as Wan-AI/Wan2.1-I2V-14B-480P-Diffusers do",
            "last_image": "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers does",
        }
        return f"takes text only: {advice.get(refused, 'models such as VACE do')}"
    return f"takes {', '.join(taken)} only"
