"""What a finished run leaves: routers, with LoRA where there is any, and the whole model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from sla_video.calibration.student import Student
from sla_video.calibration.training_checkpoint import whole
from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.lora import ADAPTER_NAME, LoraAdapter
from sla_video.pipelines.router_files import save_routers
from sla_video.pipelines.router_set import ModelIdentity, RouterSet


def save_results(
    accelerator: Accelerator,
    student: Student,
    out: Path,
    *,
    resolution: tuple[int, int, int],
    metrics: Mapping[str, Any],
) -> None:
    """Write `out`/routers, and where all weights were trained `out`/transformer.

    All processes call it: FSDP's shards are put together.

    Raises:
        InputError: the files cannot be written.
    """
    weights = gather_results(student)
    if accelerator.is_main_process:
        if student.config.trainable == "full":
            try:
                _save_transformer(student.transformer, weights, out / "transformer")
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"cannot write {out / 'transformer'}: {one_line(error)}; the training is done: "
                    "make room, and --resume writes its results"
                ) from error
        routers = trained_routers(student, weights)
        save_routers(out / "routers", routers, resolution=resolution, metrics=metrics)
    accelerator.wait_for_everyone()


def gather_results(student: Student) -> dict[str, torch.Tensor]:
    """Routers, LoRA and all that was trained, by name, on the CPU and in no shards; collective."""
    inner = f".{ADAPTER_NAME}."
    return {
        name: whole(p.detach()).to("cpu", copy=True)
        for name, p in student.named_parameters()
        if p.requires_grad or name.startswith("routers.") or inner in name
    }


def trained_routers(student: Student, weights: Mapping[str, torch.Tensor]) -> RouterSet:
    """The routers and LoRA of the student with the `weights` that `gather_results` gave."""
    handle = student.handle
    routers = {}
    for name, router in handle.routers.items():
        fresh = type(router)(
            router.heads,
            router.head_dim,
            per_head=router.per_head,
            alpha=router.alpha,
            num_query_blocks=handle.config.num_query_blocks,
        )
        prefix = f"routers.{name.replace('.', '/')}."
        fresh.load_state_dict({key: weights[prefix + key] for key in fresh.state_dict()})
        routers[name] = fresh
    lora = {}
    adapter = getattr(student.transformer, "peft_config", {}).get(ADAPTER_NAME)
    if adapter is not None:
        inner = f".{ADAPTER_NAME}."
        lora["transformer"] = LoraAdapter(
            rank=adapter.r,
            alpha=adapter.lora_alpha,
            targets=tuple(sorted(adapter.target_modules)),
            tensors={
                name.removeprefix("transformer.").replace(inner, "."): tensor
                for name, tensor in weights.items()
                if inner in name
            },
        )
    return RouterSet(
        routers=routers,
        config=handle.config.replace(impl="auto"),
        models={"transformer": ModelIdentity.of(student.transformer)},
        lora=lora,
    )


def _save_transformer(
    transformer: nn.Module, weights: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Write it as stock Diffusers reads it, whole or not at all, from tensors without shards."""
    kind: Any = type(transformer)
    with torch.device("meta"):
        fresh = kind.from_config(transformer.config)
    named = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    fresh.load_state_dict({name: named[name] for name in fresh.state_dict()}, assign=True)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        fresh.save_pretrained(part, safe_serialization=True)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
