"""Find a model by name, and learn all that can be known of it before its weights are loaded.

A model is the embedded `tiny-wan`, a local Diffusers folder, or a hub id. Only JSON files and
safetensors headers are read here, so that bad input is refused in a fraction of a second.
Nothing in this file imports torch or diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.hub import hub_file, is_hub_id
from sla_video.pipelines.model_defaults import (
    Geometry,
    ModelDefaults,
    defaults_of,
    wan_geometry,
)
from sla_video.pipelines.pipeline_kinds import PIPELINE_KINDS

EMBEDDED_MODEL = "tiny-wan"
_TEXT_TO_VIDEO = ("WanPipeline",)
_WITH_WEIGHTS = (
    "transformer",
    "transformer_2",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "image_encoder",
)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that exists, is a pipeline of a supported class and has readable configurations.

    Attributes:
        name: what the caller asked for.
        folder: where it lies, `None` for a hub id whose weights may not be here yet.
        index: its `model_index.json`.
        transformer_config: the `config.json` of its transformer.
    """

    name: str
    folder: Path | None
    index: Mapping[str, Any]
    defaults: ModelDefaults
    geometry: Geometry
    transformer_config: Mapping[str, Any]


def embedded_folder() -> Path:
    """The folder of the model that ships with the package."""
    return Path(str(files("sla_video") / "assets" / EMBEDDED_MODEL))


def find_model(name: str, pipelines: Sequence[str] = _TEXT_TO_VIDEO) -> ModelSource:
    """Find `name`: the embedded model, else a local folder, else a hub id.

    Args:
        pipelines: classes, of those in `PIPELINE_KINDS`, that the caller can use.

    Raises:
        InputError: no such model, of another class, unreadable files, or the hub out of reach.
    """
    if name == EMBEDDED_MODEL:
        folder = embedded_folder()
        if not folder.is_dir():
            raise InputError(
                f"the embedded model {name!r} is missing from this installation ({folder}): "
                "give a Wan pipeline with --model FOLDER-OR-HUB-ID"
            )
        return _from_folder(name, folder, pipelines)
    path = Path(name).expanduser()
    if path.exists():
        return _from_folder(name, path, pipelines)
    if is_hub_id(name):
        return _from_hub(name, pipelines)
    raise InputError(
        f"unknown model {name!r}: not {EMBEDDED_MODEL!r} (the embedded model), not a folder here, "
        "and not a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )


def _from_folder(name: str, folder: Path, pipelines: Sequence[str]) -> ModelSource:
    if not folder.is_dir():
        raise InputError(f"model {name!r} is not a folder: give the folder of a Diffusers pipeline")
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder} is not a Diffusers pipeline: it has no model_index.json "
            "(give the folder that `save_pretrained` wrote)"
        )
    index = read_json(folder / "model_index.json")
    check_pipeline_class(name, index, pipelines)
    components = [key for key, value in index.items() if _is_component(value)]
    for component in components:
        if not (folder / component).is_dir():
            raise InputError(f"{folder} is incomplete: the folder {component} is missing")
        check_weights(folder / component)
    return _describe(name, folder, index, lambda file: folder / file)


def _from_hub(name: str, pipelines: Sequence[str]) -> ModelSource:
    """Look only at the small JSON files: gigabytes of weights wait until everything is checked."""
    index = read_json(hub_file(name, "model_index.json"))
    check_pipeline_class(name, index, pipelines)
    return _describe(name, None, index, lambda file: hub_file(name, file))


def _describe(
    name: str, folder: Path | None, index: Mapping[str, Any], locate: Callable[[str], Path]
) -> ModelSource:
    kind = PIPELINE_KINDS[index["_class_name"]]
    transformer = read_json(locate("transformer/config.json"))
    geometry = kind.geometry or wan_geometry(read_json(locate("vae/config.json")), transformer)
    defaults = kind.defaults
    if folder is not None and (file := folder / "defaults.json").is_file():
        defaults = defaults_of(read_json(file), file, defaults)
    return ModelSource(
        name=name,
        folder=folder,
        index=index,
        defaults=defaults,
        geometry=geometry,
        transformer_config=transformer,
    )


def check_pipeline_class(
    name: str, index: Mapping[str, Any], pipelines: Sequence[str] = _TEXT_TO_VIDEO
) -> None:
    """Raise `InputError` unless a `model_index.json` describes one of `pipelines`."""
    found = index.get("_class_name")
    if found not in pipelines:
        supported = ", ".join(pipelines)
        if tuple(pipelines) == _TEXT_TO_VIDEO:
            supported += " (Wan text to video in Diffusers format)"
        raise InputError(
            f"model {name!r} holds a {found or 'pipeline of unknown class'}; this command "
            f"supports {supported}"
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
