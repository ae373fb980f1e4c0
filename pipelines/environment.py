"""What is here: versions, devices, implementations of the operator, models and routers."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "diffusers", "transformers")


def versions() -> dict[str, str]:
    """Versions of all that shapes a video."""
    from sla_video import __version__

    return {
        "sla-video": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def device_name(device: torch.device) -> str:
    """The name of the hardware behind `device`."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor_name()


def _processor_name() -> str:
    try:  # only Linux has this file, and only there `platform` does not know the name
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe_environment() -> dict[str, Any]:
    """All of it, as JSON can hold it.

    Returns:
        `versions`, `devices` (name -> hardware), `implementations` (name -> "available" or why
        not), `models` and `routers` (each name -> folder, size in bytes and files).
    """
    from sla_video.kernels.api import available_implementations
    from sla_video.pipelines.model_source import EMBEDDED_MODEL, embedded_folder

    folder = embedded_folder()
    models = {EMBEDDED_MODEL: _describe_folder(folder)} if folder.is_dir() else {}
    found = sorted(folder.parent.rglob("routers.json")) if folder.parent.is_dir() else []
    return {
        "versions": versions(),
        "devices": _devices(),
        "implementations": available_implementations(),
        "models": models,
        "routers": {
            str(path.parent.relative_to(folder.parent)): _describe_folder(path.parent)
            for path in found
        },
    }


def _devices() -> dict[str, str]:
    import torch

    devices = {"cpu": f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"}
    # Asking whether CUDA is there first keeps drivers that fail to start from printing.
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def _describe_folder(folder: Path) -> dict[str, Any]:
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {"folder": os.fspath(folder), "bytes": sum(files.values()), "files": files}


def environment_lines(found: Mapping[str, Any]) -> list[str]:
    """The result of `describe_environment` as lines to read."""
    lines = [f"{name} {number}" for name, number in found["versions"].items()]
    for title in ("devices", "implementations"):
        lines += ["", f"{title}:"]
        lines += [f"  {name}: {text}" for name, text in found[title].items()]
    for title in ("models", "routers"):
        lines += ["", f"{title}:"]
        for name, about in found[title].items():
            lines.append(f"  {name}: {about['bytes'] / 1e6:.1f} MB in {about['folder']}")
            lines += [f"    {file}: {size / 1e6:.2f} MB" for file, size in about["files"].items()]
        if not found[title]:
            lines.append("  none come with this installation")
    return lines
