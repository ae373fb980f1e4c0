"""Everything a run of `train_transformer` needs to go on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel
from diffusers.training_utils import EMAModel
from torch import nn

from sla_video.pipelines.tiny_wan import checkpoints
from sla_video.pipelines.tiny_wan.flow_matching import TextToVideo
from sla_video.pipelines.tiny_wan.models import load_text_encoder, load_weights


def start_from(folder: Path, model: TextToVideo) -> None:
    """Weights from a checkpoint's `weights`, or from a pipeline folder."""
    if (folder / "model_index.json").is_file():
        transformer = WanTransformer3DModel.from_pretrained(folder / "transformer")
        model.transformer.load_state_dict(transformer.state_dict())
        model.text_encoder.load_state_dict(load_text_encoder(folder).state_dict())
        return
    if not (folder / checkpoints.JSON_NAME).is_file():
        raise SystemExit(f"no checkpoint and no pipeline in {folder}")
    group = checkpoints.load_group(folder, "weights")
    load_weights(group, model.transformer, model.text_encoder)


def restore(
    folder: Path, kind: str, ema: EMAModel, optimizers: list[Any], model: nn.Module
) -> None:
    """EMA and optimizer states of a checkpoint, as far as it has them."""
    averaged = checkpoints.load_group(folder, "ema")
    for (name, _), shadow in zip(model.named_parameters(), ema.shadow_params, strict=True):
        shadow.copy_(averaged[name])
    # Without its count the average would begin anew, at the weights of the first few steps.
    ema.optimization_step = checkpoints.load_state(folder)["ema_steps"]
    for i, optimizer in enumerate(optimizers):
        if (folder / f"{kind}{i}.safetensors").is_file():
            checkpoints.restore_optimizer(optimizer, checkpoints.load_group(folder, f"{kind}{i}"))


def save(
    folder: Path,
    kind: str,
    model: TextToVideo,
    ema: EMAModel,
    optimizers: list[Any],
    stages: list[dict[str, Any]],
) -> None:
    """Write weights, their moving average, the optimizers' state and the stages so far."""
    names = [name for name, _ in model.named_parameters()]
    groups = {
        "weights": dict(model.named_parameters()),
        "ema": dict(zip(names, ema.shadow_params, strict=True)),
    }
    for i, optimizer in enumerate(optimizers):
        inner = getattr(optimizer, "optimizer", optimizer)
        groups[f"{kind}{i}"] = checkpoints.optimizer_tensors(inner)
    state = {"stages": stages, "ema_steps": ema.optimization_step}
    checkpoints.save_checkpoint(folder, groups, state)
