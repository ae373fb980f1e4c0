"""A program of `test_finetune_runs`: FSDP's shards against one whole network, in two processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from finetune_cases import make_batch, make_student
from sla_video.calibration.results import gather_results, trained_routers
from sla_video.calibration.student import Student
from sla_video.calibration.training_checkpoint import (
    optimizer_tensors,
    restore_optimizer,
    whole,
)


def build(**settings: Any) -> Student:
    student = make_student(**settings).train()
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.02)
    student.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    if student.draw is not None:
        student.draw.step(0, 1, 192, 128)
    return student


def check(**settings: Any) -> None:
    one, parts = build(**settings), build(**settings)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for network in (parts.transformer, parts.teacher):
        for block in () if network is None else network.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
    fully_shard(parts, mesh=mesh)
    optimizers = []
    for student in (one, parts):
        student(*make_batch())["velocity"].backward()
        optimizer = torch.optim.AdamW(student.trainable().values(), lr=1e-3)
        optimizer.step()
        optimizers.append(optimizer)
    whole_ones, sharded = one.trainable(), parts.trainable()
    assert list(whole_ones) == list(sharded)
    for name, parameter in sharded.items():
        assert type(parameter).__name__ == "DTensor", name
        torch.testing.assert_close(
            whole(parameter.grad), whole_ones[name].grad, rtol=1e-3, atol=1e-7
        )
    # A checkpoint holds what one process would have written, and is sharded again when read.
    stored = optimizer_tensors(optimizers[1], list(sharded))
    expected = optimizer_tensors(optimizers[0], list(whole_ones))
    for name, tensor in expected.items():
        torch.testing.assert_close(stored[name], tensor, rtol=1e-3, atol=1e-9)
    fresh = torch.optim.AdamW(sharded.values(), lr=1e-3)
    restore_optimizer(fresh, sharded, stored)
    for name, tensor in optimizer_tensors(fresh, list(sharded)).items():
        assert torch.equal(tensor, stored[name]), name
    results = trained_routers(parts, gather_results(parts))
    twin = trained_routers(one, gather_results(one))
    for name, router in results.routers.items():
        for key, tensor in router.state_dict().items():
            torch.testing.assert_close(tensor, twin.routers[name].state_dict()[key])
    assert set(results.lora) == set(twin.lora)
    for name, tensor in results.lora["transformer"].tensors.items() if results.lora else ():
        torch.testing.assert_close(tensor, twin.lora["transformer"].tensors[name])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    check(trainable="lora", loss="ssa")
    check(trainable="full", loss="distill")
    check(trainable="router+alpha", loss="distill")
    dist.destroy_process_group()
