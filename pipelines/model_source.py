"""Find a model by name, and learn all that can be known of it before its weights are loaded.

A model is the embedded `tiny-wan`, a local Diffusers folder, or a hub id. Only JSON files and
safetensors headers are read here, so that bad input is refused in a fraction of a second.
Nothing in this file imports torch or diffusers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.hub import hub_file, is_hub_id

EMBEDDED_MODEL = "tiny-wan"
_PIPELINE_CLASS = "WanPipeline"
# `WanPipeline` itself refuses anything but multiples of 16 pixels.
_PIPELINE_MULTIPLE = 16
_WITH_WEIGHTS = ("transformer", "transformer_2", "vae", "text_encoder")


@dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """Settings used where the caller gives none: `defaults.json` of the model, or Wan 2.1's own.

    `max_sequence_length` is the number of text tokens that the model was trained with; Wan pads to
    it and attends to the padding, so that it is no matter of taste. `routers` is a folder of the
    model's own, trained for sparsities of `routers_sparsity` and more and used for these.
    """

    frames: int = 81
    height: int = 480
    width: int = 832
    steps: int = 50
    guidance_scale: float = 5.0
    fps: float = 16
    sparsity: float = 0.9
    dense_steps: int = 0
    max_sequence_length: int = 512
    routers: str | None = None
    routers_sparsity: float = 0.0


# Names of a model's `defaults.json` (those of a Diffusers call) and ours.
_DEFAULTS_KEYS = {
    "num_frames": "frames",
    "height": "height",
    "width": "width",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance_scale",
    "fps": "fps",
    "sparsity": "sparsity",
    "dense_steps": "dense_steps",
    "max_sequence_length": "max_sequence_length",
    "routers_sparsity": "routers_sparsity",
}


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes a model can generate. All in pixels and frames of the video, not of its latents.

    Attributes:
        multiple: `(height, width)` have to be multiples of these.
        temporal: frames have to be `temporal * k + 1`.
        maximum: the largest `(frames, height, width)` that the position embedding covers.
    """

    multiple: tuple[int, int]
    temporal: int
    maximum: tuple[int, int, int]

    def check(self, frames: int, height: int, width: int) -> None:
        """Raise `InputError` naming the nearest valid sizes unless all three are valid."""
        nearest_frames = _nearest(frames - 1, self.temporal, 0, self.maximum[0] - 1) + 1
        if frames != nearest_frames:
            raise InputError(
                f"`frames` must be {self.temporal}k+1 and at most {self.maximum[0]} for this "
                f"model, got {frames}; the nearest valid number is {nearest_frames}"
            )
        nearest = tuple(
            _nearest(size, multiple, multiple, maximum)
            for size, multiple, maximum in zip(
                (height, width), self.multiple, self.maximum[1:], strict=True
            )
        )
        if (height, width) != nearest:
            multiples = " and ".join(str(m) for m in dict.fromkeys(self.multiple))
            raise InputError(
                f"`height` and `width` must be multiples of {multiples}, at most "
                f"{self.maximum[1]} and {self.maximum[2]}, for this model, got {height} and "
                f"{width}; the nearest valid size is --height {nearest[0]} --width {nearest[1]}"
            )


def _nearest(value: int, multiple: int, low: int, high: int) -> int:
    """The multiple of `multiple` nearest to `value` in `[low, high]`; ties go up."""
    return min(max((2 * value + multiple) // (2 * multiple) * multiple, low), high)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that exists, is a Wan pipeline and has readable configurations.

    Attributes:
        name: what the caller asked for.
        folder: where it lies, `None` for a hub id whose weights may not be here yet.
        transformer_config: the `config.json` of its transformer.
    """

    name: str
    folder: Path | None
    defaults: ModelDefaults
    geometry: Geometry
    transformer_config: Mapping[str, Any]


def embedded_folder() -> Path:
    """The folder of the model that ships with the package."""
    return Path(str(files("sla_video") / "assets" / EMBEDDED_MODEL))


def find_model(name: str) -> ModelSource:
    """Find `name`: the embedded model, else a local folder, else a hub id.

    Raises:
        InputError: no such model, not a Wan pipeline, unreadable files, or the hub out of reach.
    """
    if name == EMBEDDED_MODEL:
        folder = embedded_folder()
        if not folder.is_dir():
            raise InputError(
                f"the embedded model {name!r} is missing from this installation ({folder}): "
                "give a Wan pipeline with --model FOLDER-OR-HUB-ID"
            )
        return _from_folder(name, folder)
    path = Path(name).expanduser()
    if path.exists():
        return _from_folder(name, path)
    if is_hub_id(name):
        return _from_hub(name)
    raise InputError(
        f"unknown model {name!r}: not {EMBEDDED_MODEL!r} (the embedded model), not a folder here, "
        "and not a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )


def _from_folder(name: str, folder: Path) -> ModelSource:
    if not folder.is_dir():
        raise InputError(f"model {name!r} is not a folder: give the folder of a Diffusers pipeline")
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder} is not a Diffusers pipeline: it has no model_index.json "
            "(give the folder that `save_pretrained` wrote)"
        )
    index = read_json(folder / "model_index.json")
    check_pipeline_class(name, index)
    components = [key for key, value in index.items() if _is_component(value)]
    for component in components:
        if not (folder / component).is_dir():
            raise InputError(f"{folder} is incomplete: the folder {component} is missing")
        check_weights(folder / component)
    optional = folder / "defaults.json"
    return ModelSource(
        name=name,
        folder=folder,
        defaults=_read_defaults(optional) if optional.is_file() else ModelDefaults(),
        geometry=_geometry(
            read_json(folder / "vae" / "config.json"),
            transformer := read_json(folder / "transformer" / "config.json"),
        ),
        transformer_config=transformer,
    )


def _from_hub(name: str) -> ModelSource:
    """Look only at the small JSON files: gigabytes of weights wait until everything is checked."""
    index = read_json(hub_file(name, "model_index.json"))
    check_pipeline_class(name, index)
    transformer = read_json(hub_file(name, "transformer/config.json"))
    return ModelSource(
        name=name,
        folder=None,
        defaults=ModelDefaults(),
        geometry=_geometry(read_json(hub_file(name, "vae/config.json")), transformer),
        transformer_config=transformer,
    )


def check_pipeline_class(name: str, index: Mapping[str, Any]) -> None:
    """Raise `InputError` unless a `model_index.json` describes a text-to-video Wan pipeline."""
    found = index.get("_class_name")
    if found != _PIPELINE_CLASS:
        raise InputError(
            f"model {name!r} holds a {found or 'pipeline of unknown class'}; "
            f"generation supports {_PIPELINE_CLASS} (Wan text to video in Diffusers format)"
        )


def _is_component(value: Any) -> bool:
    # ["diffusers", "AutoencoderKLWan"]; an absent optional component is [null, null].
    return isinstance(value, list) and len(value) == 2 and value[0] is not None


def check_weights(folder: Path) -> None:
    """Raise `InputError` if a safetensors file of a component is missing, corrupt or truncated.

    Reads headers only: the format states its own length, so a truncated file shows.
    """
    from safetensors import SafetensorError, safe_open

    for index_file in folder.glob("*.safetensors.index.json"):
        for shard in sorted(set(read_json(index_file).get("weight_map", {}).values())):
            if not (folder / shard).is_file():
                raise InputError(f"{folder / shard} is missing: download the model again")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and folder.name in _WITH_WEIGHTS:
        raise InputError(
            f"{folder} holds no safetensors file: download the model again, or save it with "
            "`save_pretrained`"
        )
    for path in weights:
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is corrupt or truncated ({one_line(error, limit=120)}): "
                "download or save the model again"
            ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise `InputError` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {one_line(error, limit=120)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def _read_defaults(path: Path) -> ModelDefaults:
    stored = read_json(path)
    known: dict[str, Any] = {
        ours: stored[key] for key, ours in _DEFAULTS_KEYS.items() if key in stored
    }
    for ours, value in known.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{path}: `{ours}` must be a number, got {value!r}")
    if "routers" in stored:
        if not isinstance(stored["routers"], str):
            raise InputError(
                f"{path}: `routers` must be the name of a folder, got {stored['routers']!r}"
            )
        known["routers"] = str(path.parent / stored["routers"])
    return ModelDefaults(**known)


def _geometry(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> Geometry:
    spatial = int(vae.get("scale_factor_spatial") or 8)
    temporal = int(vae.get("scale_factor_temporal") or 4)
    patch = transformer.get("patch_size") or (1, 2, 2)
    positions = int(transformer.get("rope_max_seq_len") or 1024)
    multiple = (
        math.lcm(_PIPELINE_MULTIPLE, spatial * int(patch[1])),
        math.lcm(_PIPELINE_MULTIPLE, spatial * int(patch[2])),
    )
    return Geometry(
        multiple=multiple,
        temporal=temporal,
        maximum=(
            (positions * int(patch[0]) - 1) * temporal + 1,
            positions * spatial * int(patch[1]) // multiple[0] * multiple[0],
            positions * spatial * int(patch[2]) // multiple[1] * multiple[1],
        ),
    )
