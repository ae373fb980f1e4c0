"""Checkpoints of stage 2: folders of safetensors and one JSON, each complete or not there at all.

    OUT/checkpoints/step-00000200/  trainable, ema, optimizer, rng .safetensors, state.json

A folder is written under another name and then renamed. What a killed run left unfinished is
removed by the next one. Tensors that FSDP has sharded are written whole, so that the number of
processes may change.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn

from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.tiny_wan import checkpoints as files

_NAME = re.compile(r"step-(\d{8})")


class TrainingState(TypedDict):
    """How far a run is, as JSON holds it.

    Attributes:
        step, elapsed: optimizer steps, and seconds that count for `minutes`.
        config: `FinetuneConfig.to_dict` of the run.
        processes, clips: number of processes, and of clips that all of them have seen.
        ema_steps: steps of the averaged weights.
        pending: what the log has not shown yet.
        history: losses and validations.
    """

    step: int
    elapsed: float
    config: dict[str, Any]
    processes: int
    clips: int
    ema_steps: int
    pending: dict[str, Any]
    history: list[dict[str, Any]]


def folder_of(out: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return out / "checkpoints"


def find_all(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = folder_of(out)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        path for path in found if _NAME.fullmatch(path.name) and (path / files.JSON_NAME).is_file()
    )


def remove_unfinished(out: Path) -> None:
    """Remove what a killed run has left half written."""
    for path in folder_of(out).glob("step-*.*"):
        shutil.rmtree(path, ignore_errors=True)


def save(
    accelerator: Accelerator,
    out: Path,
    *,
    trainable: Mapping[str, nn.Parameter],
    ema: Sequence[Tensor] | None,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    keep: int,
) -> Path:
    """Write a checkpoint of step `state["step"]`, and remove all but the newest `keep`.

    All processes call it; the first one writes.

    Raises:
        InputError: it cannot be written, for instance because the disk is full. Checkpoints that
            are there stay.
    """
    groups: dict[str, dict[str, Tensor]] = {
        "trainable": {name: whole(p.detach()) for name, p in trainable.items()},
        "optimizer": optimizer_tensors(optimizer, list(trainable)),
        "rng": _random_states(accelerator),
    }
    if ema is not None:
        groups["ema"] = dict(zip(trainable, map(whole, ema), strict=True))
    path = folder_of(out) / f"step-{state['step']:08d}"
    problem = None
    if accelerator.is_main_process:
        try:
            folder_of(out).mkdir(parents=True, exist_ok=True)
            files.save_checkpoint(path, groups, dict(state))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(path.with_name(path.name + ".new"), ignore_errors=True)
            problem = one_line(error)
        if problem is None:
            for old in find_all(out)[:-keep]:
                # Renamed first, so that no half of it is taken for a checkpoint.
                gone = old.rename(old.with_name(old.name + ".old"))
                shutil.rmtree(gone, ignore_errors=True)
    (problem,) = broadcast_object_list([problem])
    if problem is not None:
        rest = find_all(out)
        kept = f"{rest[-1]} is intact" if rest else "there is no earlier one"
        raise InputError(
            f"cannot save the checkpoint {path}: {problem}; {kept}. Make room and use --resume"
        )
    return path


def load(
    accelerator: Accelerator,
    path: Path,
    *,
    trainable: Mapping[str, nn.Parameter],
    ema: Sequence[Tensor] | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put back what `save` wrote into `path`, its state apart (`read_state`).

    Raises:
        InputError: files that cannot be read, or of another network.
    """
    try:
        weights = files.load_group(path, "trainable")
        stored = files.load_group(path, "optimizer")
        averaged = files.load_group(path, "ema") if ema is not None else {}
        states = files.load_group(path, "rng")
        with torch.no_grad():
            for index, (name, parameter) in enumerate(trainable.items()):
                parameter.copy_(_like(weights[name], parameter))
                if ema is not None:
                    ema[index].copy_(_like(averaged[name], ema[index]))
        restore_optimizer(optimizer, trainable, stored)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot read the checkpoint {path}: {one_line(error)}") from error
    _restore_random_states(accelerator, states)


def read_state(path: Path) -> TrainingState:
    """The state that was given to `save`.

    Raises:
        InputError: it cannot be read, or is that of something else.
    """
    try:
        state = files.load_state(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the checkpoint {path}: {one_line(error)}") from error
    if not isinstance(state, dict) or not state.keys() >= TrainingState.__required_keys__:
        raise InputError(
            f"cannot read the checkpoint {path}: its state is not that of a training run; if an "
            "earlier checkpoint lies beside it, remove this one to go on from there"
        )
    return cast(TrainingState, state)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; a collective call where it has shards."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` on the device of `other`, and sharded as it is."""
    tensor = tensor.to(other.device)
    mesh = getattr(other, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, mesh, other.placements)  # type: ignore[attr-defined]


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The state of each parameter as flat tensors, `"{parameter}:{name}"`."""
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = [p for group in inner.param_groups for p in group["params"]]
    return {
        f"{name}:{key}": whole(torch.as_tensor(value))
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in inner.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    trainable: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """The reverse of `optimizer_tensors`."""
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = [p for group in inner.param_groups for p in group["params"]]
    place = dict(zip(trainable, parameters, strict=True))
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(":")
        parameter = place[name]
        if tensor.ndim and tensor.shape == parameter.shape:
            tensor = _like(tensor, parameter)
        elif part != "step" or any(group.get("fused") for group in inner.param_groups):
            tensor = tensor.to(parameter.device)
        value: Any = tensor
        if part == "step" and not tensor.is_floating_point():
            value = int(tensor)  # bitsandbytes counts in Python
        inner.state[parameter][part] = value


def _random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """The random states of all processes, "{process}.cpu" and "{process}.cuda"."""
    own = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    states: dict[str, Tensor] = {}
    for name, state in own.items():
        every = accelerator.gather(state.to(accelerator.device)[None])
        states.update({f"{i}.{name}": row.cpu() for i, row in enumerate(every)})
    return states


def _restore_random_states(accelerator: Accelerator, states: Mapping[str, Tensor]) -> None:
    cpu = states.get(f"{accelerator.process_index}.cpu")
    cuda = states.get(f"{accelerator.process_index}.cuda")
    if cpu is not None:
        torch.set_rng_state(cpu)
    if cuda is not None and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(cuda, accelerator.device)
