"""What stage 2 starts from: whether it fits together, before hours go into encoding the data."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.lora import LoraAdapter, check_targets
from sla_video.pipelines.model_source import read_json
from sla_video.pipelines.router_files import load_routers
from sla_video.pipelines.router_set import ModelIdentity

logger = logging.getLogger("sla_video")


def check_starting_point(config: FinetuneConfig, folder: Path) -> None:
    """Refuse routers and LoRA that do not fit the model or the settings. Loads no weights.

    Args:
        folder: of the model's pipeline.

    Raises:
        InputError: no routers there, of another model, or with LoRA that the settings contradict;
            or no layers for LoRA.
    """
    routers = None if config.routers is None else load_routers(config.routers)
    settings = read_json(folder / "transformer" / "config.json")
    try:
        with torch.device("meta"):
            transformer = WanTransformer3DModel.from_config(settings)
        if routers is not None:
            routers.check_fits("transformer", ModelIdentity.of(transformer))
        if config.trainable == "lora":
            check_targets(transformer, config.lora_targets)
    except (TypeError, ValueError) as error:
        raise InputError(one_line(error)) from error
    if routers is None:
        return
    if "transformer" in routers.lora:
        _check_lora(config, routers.lora["transformer"])
    if routers.config.layer_sparsity:
        logger.warning(
            "the routers %s have a sparsity for each layer; it is trained, and saved, at %s in "
            "all layers",
            config.routers,
            " and ".join(f"{sparsity:g}" for sparsity in config.sparsity),
        )


def _check_lora(config: FinetuneConfig, lora: LoraAdapter) -> None:
    if config.trainable == "full":
        raise InputError(
            f"the routers {config.routers} come with LoRA, and trainable 'full' trains the weights "
            "themselves: start from routers without LoRA, or train 'lora'"
        )
    if config.trainable != "lora":
        return
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    same = (lora.rank, lora.alpha) == (config.lora_rank, alpha)
    if not same or set(lora.targets) != set(config.lora_targets):
        targets = " ".join(f"--lora-targets {target}" for target in lora.targets)
        raise InputError(
            f"the routers {config.routers} come with LoRA of another shape, which is trained on as "
            f"it is: give --lora-rank {lora.rank} --lora-alpha {lora.alpha:g} {targets}"
        )
