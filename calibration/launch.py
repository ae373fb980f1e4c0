"""How the processes of a run are set up: what Accelerate was launched with, and what is refused."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType

from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.kernels.api import available_implementations
from sla_video.pipelines.errors import InputError, one_line


def make_accelerator(config: FinetuneConfig) -> Accelerator:
    """The accelerator of a run.

    Raises:
        InputError: something that the settings ask for is not installed or cannot run here.
    """
    if config.optimizer == "adamw8bit":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise InputError(
                "optimizer 'adamw8bit' needs bitsandbytes: `pip install bitsandbytes`, or take "
                "'adamw'"
            ) from error
    available = available_implementations().get(config.impl, "available")
    if available != "available":
        raise InputError(f"impl={config.impl!r} cannot run here: {available}")
    if config.soft_selection and config.impl == "torch":
        raise InputError(
            f"trainable {config.trainable!r} selects softly, which impl={config.impl!r} does not: "
            "leave --impl out"
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "no"
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=config.tracker,
            project_dir=config.out,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"cannot set up Accelerate: {one_line(error)}") from error
    if config.weights == "bf16" and accelerator.mixed_precision != "bf16":
        raise InputError(
            "`weights` 'bf16' needs mixed precision: add --mixed-precision bf16, or leave "
            "--weights out"
        )
    if config.tracker and not accelerator.log_with:
        raise InputError(f"tracker {config.tracker!r} is not installed: `pip install` it first")
    if is_sharded(accelerator):
        if accelerator.state.fsdp_plugin.fsdp_version < 2:
            raise InputError(
                "FSDP version 1 is not supported: set fsdp_version to 2 in Accelerate's config"
            )
        _keep_inputs(accelerator)
        if config.validation_videos:
            raise InputError("validation videos need the whole network: they do not go with FSDP")
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP spreads the network over the processes."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def _keep_inputs(accelerator: Accelerator) -> None:
    """Let FSDP round weights only: not noise levels, rotary tables and losses."""
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            policy, cast_forward_inputs=False, output_dtype=None
        )
