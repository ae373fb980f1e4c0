"""Where captured calls wait for the fit: in memory up to a budget, or in a folder of shards.

Q, K and V of all layers are too much for memory from some model size on. Without a folder the
pipeline is run once for each group of layers that fits the budget; with one it is run once, and
the fit reads one layer at a time. Shards are written atomically and survive an interruption, so
the same command goes on where it was cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from sla_video.calibration.capture import (
    CallKey,
    Capture,
    CapturePlan,
    plan_calls,
    run_captures,
    sequence_length,
)
from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.progress import Progress

DESCRIPTION_FILE = "captures.json"
_FORMAT_VERSION = 1


class MemoryStore:
    """Captures in host memory."""

    def __init__(self) -> None:
        self._captures: dict[tuple[str, CallKey], Capture] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for capture in self._captures.values() for x in capture)

    def has(self, layer: str, key: CallKey) -> bool:
        """Whether the capture is there."""
        return (layer, key) in self._captures

    def put(self, layer: str, key: CallKey, capture: Capture) -> None:
        """Keep a copy of it."""
        self._captures[layer, key] = Capture(*(_on_host(x) for x in capture))

    def get(self, layer: str, key: CallKey) -> Capture:
        """The capture."""
        return self._captures[layer, key]


class SpillStore:
    """Captures in a folder: one safetensors file each, and a JSON file that says what of.

    Raises:
        InputError: the folder cannot be written, holds other files, or captures of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder.expanduser()
        # Through JSON, so that a tuple equals the list that comes back from the file.
        wanted = json.loads(json.dumps({"format_version": _FORMAT_VERSION, **settings}))
        description = self.folder / DESCRIPTION_FILE
        try:
            self._made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            if description.exists():
                _check_same(self.folder, json.loads(description.read_text("utf-8")), wanted)
            elif any(self.folder.iterdir()):
                raise InputError(
                    f"{self.folder} is not empty and holds no captures: give --spill a new folder"
                )
            else:
                text = json.dumps(wanted, indent=2) + "\n"
                _write_atomically(description, text.encode())
        except OSError as error:
            raise InputError(f"cannot use {self.folder} for captures: {one_line(error)}") from error
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{description} is corrupt: remove {self.folder}") from error

    def has(self, layer: str, key: CallKey) -> bool:
        """Whether the capture is there."""
        return self._path(layer, key).is_file()

    def put(self, layer: str, key: CallKey, capture: Capture) -> None:
        """Write it, whole or not at all.

        Raises:
            InputError: no room.
        """
        path = self._path(layer, key)
        content = safetensors.torch.save({n: _on_host(x) for n, x in capture._asdict().items()})
        try:
            path.parent.mkdir(exist_ok=True)
            _write_atomically(path, content)
        except OSError as error:
            raise InputError(
                f"cannot write captures to {self.folder}: {one_line(error)}; what is there is "
                "complete, and the same command goes on from it"
            ) from error

    def get(self, layer: str, key: CallKey) -> Capture:
        """Read a capture.

        Raises:
            InputError: the file is gone or corrupt.
        """
        path = self._path(layer, key)
        try:
            return Capture(**safetensors.torch.load_file(path))
        except Exception as error:  # safetensors has no public base class of its errors
            raise InputError(f"cannot read {path}: {one_line(error)}; remove it") from error

    def remove(self) -> None:
        """Delete the captures, and the folder if it is empty then and was made here."""
        for path in self.folder.glob("*/*.safetensors"):
            path.unlink()
        (self.folder / DESCRIPTION_FILE).unlink(missing_ok=True)
        folders = [path for path in self.folder.iterdir() if path.is_dir()]
        for folder in [*folders, *([self.folder] if self._made else [])]:
            with contextlib.suppress(OSError):  # someone else's files are in it
                folder.rmdir()

    def _path(self, layer: str, key: CallKey) -> Path:
        name = f"prompt{key.prompt:03d}-step{key.step:03d}-branch{key.branch}.safetensors"
        return self.folder / layer / name


class CaptureSource:
    """Hands out the captured calls of each layer, and runs the pipeline when it has to.

    Args:
        layers: "transformer.blocks.0.attn1" -> the attention module.
        memory: bytes that captures may take in host memory at any time.
        spill: keep them in this folder instead.

    Raises:
        InputError: the calls of a single layer are more than `memory`.
    """

    def __init__(
        self,
        pipe: Any,
        layers: Mapping[str, nn.Module],
        plan: CapturePlan,
        *,
        memory: int,
        spill: SpillStore | None,
        progress: Progress,
    ) -> None:
        self._pipe = pipe
        self._layers = dict(layers)
        self._plan = plan
        self._progress = progress
        self._spill = spill
        self.calls = plan_calls(pipe, plan)
        self._groups = [list(layers)] if spill is not None else self._split(memory)
        self._kept: MemoryStore | SpillStore | None = None

    @property
    def passes(self) -> int:
        """How often the pipeline runs over all prompts for one round through the layers."""
        return len(self._groups)

    def calls_of(self, layer: str) -> tuple[CallKey, ...]:
        """The captured calls of a layer."""
        return self.calls[layer.partition(".")[0]]

    def __iter__(self) -> Iterator[tuple[str, list[Capture]]]:
        """Each layer and its calls, in host memory, in the order of `calls_of`."""
        return self.only(self._layers)

    def only(self, names: Container[str]) -> Iterator[tuple[str, list[Capture]]]:
        """The same for some of the layers."""
        for number, group in enumerate(self._groups):
            wanted = [layer for layer in group if layer in names]
            store = self._captured(group, number) if wanted else MemoryStore()
            for layer in wanted:
                yield layer, [store.get(layer, key) for key in self.calls_of(layer)]

    def _captured(self, group: Sequence[str], number: int) -> MemoryStore | SpillStore:
        if self._kept is not None:
            return self._kept
        store = MemoryStore() if self._spill is None else self._spill
        count = f" (group {number + 1} of {self.passes})" if self.passes > 1 else ""
        run_captures(
            self._pipe,
            {name: self._layers[name] for name in group},
            self._plan,
            self.calls,
            store,
            self._progress,
            label=f"capturing{count}",
        )
        if self.passes == 1:
            self._kept = store
        return store

    def _split(self, memory: int) -> list[list[str]]:
        """Groups of neighbouring layers whose captures fit into `memory` together."""
        groups: list[list[str]] = [[]]
        used = 0
        for name in self._layers:
            needed = len(self.calls_of(name)) * self._bytes_of_call(name)
            if needed > memory:
                raise InputError(
                    f"the {len(self.calls_of(name))} captured calls of one layer take "
                    f"{needed / 2**30:.2f} GiB, more than --memory {memory / 2**30:.2f}: raise it, "
                    "give --spill FOLDER, or fewer prompts or --capture-steps"
                )
            if groups[-1] and used + needed > memory:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += needed
        return groups

    def _bytes_of_call(self, name: str) -> int:
        plan, component = self._plan, name.partition(".")[0]
        transformer = getattr(self._pipe, component)
        length = sequence_length(self._pipe, plan.frames, plan.height, plan.width, component)
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        itemsize = torch.empty((), dtype=transformer.dtype).element_size()
        return int(3 * length * width * itemsize)


def _on_host(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to("cpu", copy=True).contiguous()


def _check_same(folder: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    if not isinstance(found, dict):
        raise ValueError("not an object")
    different = [
        f"{name} {found.get(name)!r} against {wanted.get(name)!r} here"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise InputError(
            f"{folder} holds captures of another run: {one_line(', '.join(different), limit=250)}; "
            "give --spill another folder, or remove this one"
        )


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
