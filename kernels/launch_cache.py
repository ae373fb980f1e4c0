"""The file that remembers which launches were fastest: one for each kind of GPU and version.

It lies in the folder that `SLA_VIDEO_CACHE` names, else in `$XDG_CACHE_HOME/sla_video`, else in
`~/.cache/sla_video`, and holds

    {"format": 1, "environment": {...}, "launches": {NAME OF A CASE: {"num_warps": 4, ...}}}

Written whole or not at all. A file that is damaged, or was made elsewhere, is ignored, and that is
said once at INFO on the logger `sla_video`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_LOGGER = logging.getLogger("sla_video")
_FORMAT = 1


def cache_folder() -> Path:
    """Where the files are.

    Raises:
        RuntimeError: no variable says it and there is no home.
    """
    if chosen := os.environ.get("SLA_VIDEO_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "sla_video"
    return Path.home() / ".cache" / "sla_video"


@functools.cache
def environment(device: torch.device) -> dict[str, str]:
    """What decides which launch is fastest: the GPU, torch, Triton, and our kernels.

    The driver is not part of it: it neither compiles kernels nor schedules what they do.
    """
    gpu, capability = "cpu", "0.0"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "unknown"
    return {
        "gpu": gpu,
        "capability": capability,
        "torch": torch.__version__,
        "triton": triton,
        "kernels": _kernels_hash(),
    }


@functools.cache
def _kernels_hash() -> str:
    """Of the text of all kernels and of the lists."""
    found = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("triton_*.py"), folder / "launch_lists.py"]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def cache_file(device: torch.device) -> Path:
    """The file for a device; it need not exist."""
    text = json.dumps(environment(device), sort_keys=True)
    return cache_folder() / f"launches-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


@functools.cache
def read_launches(device: torch.device) -> dict[str, dict[str, Any]]:
    """Fields of the launches by name of the case; empty without a file. Read once."""
    path = None
    try:
        path = cache_file(device)
        return _read(path, environment(device))
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError) as error:
        where = "the cache of launches" if path is None else str(path)
        _LOGGER.info("%s is ignored: %s; kernels run as usual", where, _reason(error))
        return {}


def _read(path: Path, wanted: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Raises ValueError for a file that is not one of ours, for this environment."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it is not of format {_FORMAT}")
    if content.get("environment") != wanted:
        raise ValueError("it was made for another GPU, or by other versions")
    launches = content.get("launches")
    if not isinstance(launches, dict):
        raise ValueError("it holds no launches")
    return launches


def write_launches(device: torch.device, launches: Mapping[str, Mapping[str, Any]]) -> Path | None:
    """Add to the file, or replace what it says of the same cases.

    Each write is whole: a reader sees the file before it or after it. Of two processes that write
    at the same moment one may miss what the other added, which then counts as not tuned.

    Returns:
        the file; None where none can be written, which is said at INFO.
    """
    part = None
    try:
        path = cache_file(device)
        try:
            known = _read(path, environment(device))
        except (OSError, ValueError, RecursionError):
            known = {}
        content = {
            "format": _FORMAT,
            "environment": environment(device),
            "launches": known | {name: dict(fields) for name, fields in launches.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        if part is not None:
            part.unlink(missing_ok=True)
        _LOGGER.info("launches are not kept for the next process: %s", _reason(error))
        return None
    return path


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
