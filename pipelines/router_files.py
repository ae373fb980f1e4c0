"""Routers on disk: a folder with one safetensors file and one JSON file. Never pickle.

`routers.safetensors` holds the tensors, named "transformer.blocks.0.attn1.query_proj", and those of
LoRA, where there is any, as "transformer.lora.blocks.0.attn1.to_q.lora_A.weight".
`routers.json` says what they are, and holds the SHA-256 of the other file, so that a truncated
file and a folder that was left half written are told from a good one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

import sla_video
from sla_video.config import SLAConfig
from sla_video.kernels.router import Router
from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.lora import LoraAdapter
from sla_video.pipelines.router_set import ModelIdentity, RouterSet

if TYPE_CHECKING:
    from sla_video.pipelines.handle import SLAHandle

# Version 2 is written only where there is LoRA, which readers of version 1 would leave out.
FORMAT_VERSIONS = (1, 2)
WEIGHTS_FILE = "routers.safetensors"
DESCRIPTION_FILE = "routers.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def save_routers(
    path: str | os.PathLike[str],
    source: SLAHandle | RouterSet,
    *,
    resolution: tuple[int, int, int] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Write routers into the folder `path`, which is made if need be.

    Each of the two files appears complete or not at all. Routers already there are replaced.

    Args:
        source: a handle of `enable_sla` or a set of routers.
        resolution: (frames, height, width) in pixels of the training; default what `source` says.
        metrics: anything that JSON can hold; default what `source` says.

    Raises:
        ValueError: there are no routers in `source`, or the folder cannot be written.
        TypeError: `metrics` holds something that JSON cannot.
    """
    routers = source if isinstance(source, RouterSet) else source.router_set()
    if not routers.routers:
        raise ValueError("there is nothing to save: all layers are dense")
    tensors = {
        f"{name}.{key}": tensor.detach().to("cpu", copy=True).contiguous()
        for name, router in routers.routers.items()
        for key, tensor in router.state_dict().items()
    }
    for component, adapter in routers.lora.items():
        for key, tensor in adapter.tensors.items():
            tensors[f"{component}.lora.{key}"] = tensor.detach().cpu().contiguous()
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    description = {
        "format_version": FORMAT_VERSIONS[bool(routers.lora)],
        "library_version": sla_video.__version__,
        "models": {
            component: {
                "family": model.family,
                "config_hash": model.config_hash,
                "config": dict(model.fields),
            }
            for component, model in routers.models.items()
        },
        "layers": sorted(routers.routers),
        "sla": routers.config.to_dict(),
        **({"lora": _describe_lora(routers.lora)} if routers.lora else {}),
        "resolution": resolution if resolution is not None else routers.resolution,
        "metrics": dict(routers.metrics if metrics is None else metrics),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    text = json.dumps(description, indent=2) + "\n"
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(folder / WEIGHTS_FILE, weights)
        _write_atomically(folder / DESCRIPTION_FILE, text.encode())
    except OSError as error:
        raise InputError(f"cannot write routers to {folder}: {one_line(error)}") from error
    return folder


def load_routers(source: str | os.PathLike[str]) -> RouterSet:
    """Read routers from a folder that `save_routers` wrote, or from the hub.

    Args:
        source: a folder, or a hub id such as "someone/wan-routers".

    Raises:
        ValueError: there are no routers there, or the files are corrupt, truncated, or of a
            version that this library does not know. The message is one line.
    """
    folder = _find_folder(source)
    description = _read_description(folder / DESCRIPTION_FILE)
    try:
        config = SLAConfig.from_dict(description["sla"])
        models = {
            component: ModelIdentity(family=model["family"], fields=model["config"])
            for component, model in description["models"].items()
        }
        for component, model in models.items():
            if model.config_hash != description["models"][component]["config_hash"]:
                raise ValueError(f"the configuration hash of {component!r} does not match")
        layers = [str(name) for name in description["layers"]]
        resolution = description["resolution"]
        resolution = None if resolution is None else tuple(map(int, resolution))
        digest = description["weights_sha256"]
        metrics = dict(description["metrics"])
        lora = {name: dict(fields) for name, fields in description.get("lora", {}).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{folder / DESCRIPTION_FILE} is corrupt: {type(error).__name__} {one_line(error)}; "
            "save or download the routers again"
        ) from error
    tensors = _read_weights(folder / WEIGHTS_FILE, digest)
    return RouterSet(
        routers=_build_routers(folder / WEIGHTS_FILE, layers, tensors, config, models),
        config=config,
        models=models,
        lora=_build_lora(folder / WEIGHTS_FILE, lora, tensors),
        resolution=resolution,
        metrics=metrics,
    )


def _find_folder(source: str | os.PathLike[str]) -> Path:
    folder = Path(source).expanduser()
    if folder.exists():
        for file in (DESCRIPTION_FILE, WEIGHTS_FILE):
            if not (folder / file).is_file():
                raise InputError(
                    f"{folder} holds no routers: {file} is missing there "
                    "(give the folder that `save_routers` wrote)"
                )
        return folder
    if not (isinstance(source, str) and _HUB_ID.fullmatch(source)):
        raise InputError(
            f"no routers at {str(source)!r}: it is not a folder, nor a hub id such as "
            "'someone/wan-routers'"
        )
    from huggingface_hub import hf_hub_download

    try:
        files = [hf_hub_download(source, file) for file in (DESCRIPTION_FILE, WEIGHTS_FILE)]
    except Exception as error:  # each HTTP library of each hub version raises its own types
        raise InputError(
            f"no routers at {source!r}: it is not a folder, and the hub did not give its "
            f"{DESCRIPTION_FILE} and {WEIGHTS_FILE} ({one_line(error, limit=160)})"
        ) from error
    return Path(files[0]).parent


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from error
    except ValueError as error:
        raise InputError(f"{path} is corrupt or truncated: {one_line(error)}") from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if version is None:
        raise InputError(f"{path} does not describe routers: it has no `format_version`")
    if version not in FORMAT_VERSIONS:
        raise InputError(
            f"{path} has format version {version!r}, but sla-video {sla_video.__version__} reads "
            f"versions {FORMAT_VERSIONS[0]} to {FORMAT_VERSIONS[-1]}: update sla-video, or save "
            "the routers again"
        )
    return dict(description)


def _read_weights(path: Path, digest: str) -> dict[str, torch.Tensor]:
    try:
        weights = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from error
    if hashlib.sha256(weights).hexdigest() != digest:
        raise InputError(
            f"{path} is corrupt, truncated or not the file that {DESCRIPTION_FILE} describes: "
            "save or download the routers again"
        )
    try:
        return safetensors.torch.load(weights)
    except Exception as error:  # safetensors has no public base class of its errors
        raise InputError(f"{path} is corrupt: {one_line(error)}") from error


def _build_routers(
    path: Path,
    layers: list[str],
    tensors: Mapping[str, torch.Tensor],
    config: SLAConfig,
    models: Mapping[str, ModelIdentity],
) -> dict[str, Router]:
    routers = {}
    try:
        for name in layers:
            fields = models[name.partition(".")[0]].fields
            router = Router(
                fields["num_attention_heads"],
                fields["attention_head_dim"],
                per_head=config.router_per_head,
                alpha=config.alpha,
                num_query_blocks=config.num_query_blocks,
            )
            router.load_state_dict(
                {key: tensors[f"{name}.{key}"] for key in router.state_dict()}, strict=True
            )
            routers[name] = router
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{path} does not hold what {DESCRIPTION_FILE} describes: {one_line(error)}"
        ) from error
    return routers


def _describe_lora(lora: Mapping[str, LoraAdapter]) -> dict[str, Any]:
    return {
        component: {
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "targets": list(adapter.targets),
            "layers": len(adapter.tensors) // 2,
        }
        for component, adapter in lora.items()
    }


def _build_lora(
    path: Path, description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, LoraAdapter]:
    lora = {}
    try:
        for component, fields in description.items():
            prefix = f"{component}.lora."
            part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if len(part) != 2 * fields["layers"]:
                raise ValueError(f"{len(part)} LoRA tensors, not {2 * fields['layers']}")
            lora[component] = LoraAdapter(
                rank=int(fields["rank"]),
                alpha=float(fields["alpha"]),
                targets=tuple(fields["targets"]),
                tensors=part,
            )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not hold what {DESCRIPTION_FILE} describes: {one_line(error)}"
        ) from error
    return lora


def _write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and move it there, so that no reader ever meets half a file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
