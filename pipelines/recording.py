"""What attention lost in every call: per layer, head and denoising step.

While a recording runs nothing waits for the device; each call leaves a few numbers per head there.
Letters: S denoising steps, H heads, m measured query blocks.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla_video.kernels.measures import Losses
from sla_video.pipelines.errors import InputError, one_line

logger = logging.getLogger("sla_video")
_FORMAT = "1"
# Calls kept of one layer: 20 videos of 50 steps with guidance.
_MOST_CALLS = 2000
_FIELDS = ("recall", "error", "magnitude", "oracle_density", "router_density")


class ForwardClock:
    """Forward pre-hook of the transformers of one pipeline: counts calls and keeps timesteps."""

    def __init__(self) -> None:
        self.forwards = 0
        self.timestep: Tensor | None = None
        self._warned = False

    def warn_of_full(self) -> None:
        """Say once that some calls are not kept."""
        if not self._warned:
            self._warned = True
            logger.warning("the recording is full: it holds the first %d calls", _MOST_CALLS)

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.forwards += 1
        given = kwargs.get("timestep")
        if given is None:
            given = inspect.signature(module.forward).bind_partial(*args).arguments.get("timestep")
        # Where each token has its own, the noisiest counts: the others are given frames.
        self.timestep = None if given is None else torch.as_tensor(given).detach().float().max()


@dataclass
class _Call:
    forward: int
    timestep: Tensor | None
    sparsity: Tensor | float = 0.0
    # [5, H], in the order of `_FIELDS`; None for a dense call.
    losses: Tensor | None = None


class CallLog:
    """The calls of one layer within a recording.

    Args:
        clock: shared by all layers.
        coverage, most_blocks: of `measure_losses`.
    """

    def __init__(self, clock: ForwardClock, *, coverage: float, most_blocks: int | None) -> None:
        self.clock = clock
        self.coverage = coverage
        self.most_blocks = most_blocks
        self.reset()

    def reset(self) -> None:
        """Forget all calls."""
        self.calls: list[_Call] = []
        self._full = False
        # [H, m]
        self._recall: Tensor | None = None
        self._count = 0

    def begin(self) -> None:
        """A call begins. What it loses is noted later, unless it is dense."""
        self._full = len(self.calls) >= _MOST_CALLS
        if self._full:
            self.clock.warn_of_full()
            return
        self.calls.append(_Call(self.clock.forwards, self.clock.timestep))

    def note_sparsity(self, value: Tensor | float) -> None:
        """Share of the key blocks that this call leaves out."""
        if not self._full and self.calls:
            self.calls[-1].sparsity = value

    def note(self, losses: Losses) -> None:
        """What this call loses."""
        if self._full or not self.calls:
            return
        # Means over the batch, and over query blocks: [H] each.
        rows = [part.mean((0, 2)) if part.dim() == 3 else part.mean(0) for part in losses]
        self.calls[-1].losses = torch.stack(rows).float()
        recall = losses.recall.mean(0).float()
        if self._recall is None or self._recall.shape != recall.shape:  # another resolution
            self._recall, self._count = torch.zeros_like(recall), 0
        self._recall += recall
        self._count += 1

    def recall_by_block(self) -> Tensor:
        """`[H, m]`, mean over the calls of the last resolution; empty if all were dense."""
        return torch.zeros(0, 0) if self._recall is None else (self._recall / self._count).cpu()


@dataclass(frozen=True, kw_only=True)
class LayerRecording:
    """One layer. Means over the batch, over guidance and over the measured query blocks.

    NaN where attention was dense or, with two transformers, the layer did not run.

    Attributes:
        name: for instance "transformer.blocks.0.attn1".
        sparsity: `[S]`, 0 where attention was dense, NaN where the layer did not run.
        recall: `[S, H]`; see `sla_video.kernels.measures.Losses` for this and the next ones.
        error, magnitude: `[S, H]`.
        oracle_density, router_density: `[S, H]`.
        recall_by_block: `[H, m]`, mean over the steps.
    """

    name: str
    sparsity: Tensor
    recall: Tensor
    error: Tensor
    magnitude: Tensor
    oracle_density: Tensor
    router_density: Tensor
    recall_by_block: Tensor

    @property
    def relative_l1(self) -> Tensor:
        """`[S, H]`: |SLA2 - full| / |full| of each head."""
        return self.error / self.magnitude

    @property
    def relative_l1_by_step(self) -> Tensor:
        """`[S]`, of all heads together, so that heads that say little weigh little."""
        return self.error.sum(1) / self.magnitude.sum(1)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """All layers over the denoising steps.

    Attributes:
        timesteps: of the S steps, as the transformers were told; NaN where they were not.
        coverage: softmax mass that the densities reach.
        most_blocks: query blocks measured of each call, evenly spread; None is all.
    """

    timesteps: tuple[float, ...]
    coverage: float
    most_blocks: int | None
    layers: tuple[LayerRecording, ...]

    def save(self, path: Path) -> None:
        """Write one safetensors file. Not atomic: give a temporary name and rename it."""
        from safetensors.torch import save_file

        tensors = {
            f"{field.name}/{layer.name}": getattr(layer, field.name).contiguous()
            for layer in self.layers
            for field in fields(layer)
            if field.name != "name"
        }
        tensors["timesteps"] = torch.tensor(self.timesteps, dtype=torch.float64)
        about = {
            "coverage": self.coverage,
            "most_blocks": self.most_blocks,
            "layers": [layer.name for layer in self.layers],
        }
        save_file(tensors, path, {"format": _FORMAT, "recording": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read what `save` wrote.

        Raises:
            InputError: it is missing, damaged, or something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call,unused-ignore]
                metadata = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != _FORMAT:
                raise InputError(
                    f"{path} is not a recording of this version: its format is "
                    f"{metadata.get('format')!r}, {_FORMAT!r} was expected; record it anew"
                )
            about = json.loads(metadata["recording"])
            layers = tuple(
                LayerRecording(
                    name=name,
                    **{
                        field.name: found[f"{field.name}/{name}"]
                        for field in fields(LayerRecording)
                        if field.name != "name"
                    },
                )
                for name in about["layers"]
            )
            recording = cls(
                timesteps=tuple(found["timesteps"].tolist()),
                coverage=float(about["coverage"]),
                most_blocks=about["most_blocks"],
                layers=layers,
            )
        except FileNotFoundError as error:
            raise InputError(f"there is no recording {path}") from error
        except InputError:
            raise
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"cannot read the recording {path}: {one_line(error)}") from error
        return recording


def read_logs(logs: Mapping[str, CallLog]) -> Recording:
    """Put the calls of all layers together. Waits for the device.

    Calls that follow each other at the same timestep are one step: with guidance there are two.
    """
    timesteps: dict[int, Tensor | None] = {
        call.forward: call.timestep for log in logs.values() for call in log.calls
    }
    step_of: dict[int, int] = {}
    steps: list[float] = []
    for forward in sorted(timesteps):
        value = timesteps[forward]
        now = float("nan") if value is None else float(value)
        if not steps or now != steps[-1]:
            steps.append(now)
        step_of[forward] = len(steps) - 1
    first = next(iter(logs.values()))
    return Recording(
        timesteps=tuple(steps),
        coverage=first.coverage,
        most_blocks=first.most_blocks,
        layers=tuple(_layer(name, log, step_of, len(steps)) for name, log in logs.items()),
    )


def _layer(name: str, log: CallLog, step_of: Mapping[int, int], steps: int) -> LayerRecording:
    sparsity: list[list[float]] = [[] for _ in range(steps)]
    losses: list[list[Tensor]] = [[] for _ in range(steps)]
    for call in log.calls:
        step = step_of[call.forward]
        sparsity[step].append(float(call.sparsity))
        if call.losses is not None:
            losses[step].append(call.losses.cpu())
    heads = next((part[0].shape[1] for part in losses if part), 0)
    nothing = torch.full((len(_FIELDS), heads), torch.nan)
    # [S, 5, H]
    table = torch.stack([torch.stack(p).mean(0) if p else nothing for p in losses])
    return LayerRecording(
        name=name,
        sparsity=torch.tensor([sum(p) / len(p) if p else torch.nan for p in sparsity]),
        **dict(zip(_FIELDS, table.unbind(1), strict=True)),
        recall_by_block=log.recall_by_block(),
    )
