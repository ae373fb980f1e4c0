"""Training checkpoints without pickle: a folder of safetensors files and one JSON.

A checkpoint is written beside its place and renamed into it, so that a run that is killed at any
moment leaves either the previous checkpoint or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

JSON_NAME = "state.json"


def save_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Any) -> None:
    """Write `{name}.safetensors` for each group of tensors, and `state` as JSON, atomically."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name, group in tensors.items():
        plain = {key: value.detach().contiguous().cpu() for key, value in group.items()}
        save_file(plain, new / f"{name}.safetensors")
    (new / JSON_NAME).write_text(json.dumps(state, indent=1))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """The folder to resume from; the one set aside, where a kill came between the two renames."""
    for candidate in (folder, folder.with_name(folder.name + ".old")):
        if (candidate / JSON_NAME).is_file():
            return candidate
    return None


def load_group(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def load_state(folder: Path) -> Any:
    return json.loads((folder / JSON_NAME).read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's per-parameter state as flat tensors, `"{parameter}.{name}"`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entry in state.items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
