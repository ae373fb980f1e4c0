"""The data of a run of stage 2, by its settings."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from sla_video.calibration.clip_source import ClipSource
from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.calibration.video_clips import VideoClips
from sla_video.calibration.world_clips import WorldClips
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.model_defaults import ModelDefaults
from sla_video.pipelines.model_source import EMBEDDED_MODEL, read_json
from sla_video.pipelines.progress import Progress

_CACHE = ".sla-video-cache"


def open_clips(
    config: FinetuneConfig,
    accelerator: Accelerator,
    folder: Path,
    defaults: ModelDefaults,
    size: tuple[int, int, int],
    progress: Progress,
) -> ClipSource:
    """The clips that `config.data` names, encoded.

    Args:
        folder: of the model's pipeline.
        size: frames, height, width.

    Raises:
        InputError: data that is not there or does not fit the model.
    """
    if config.data == "world":
        return _world(config, accelerator, folder, size, progress)
    from sla_video.calibration.model_parts import encoders

    data = Path(config.data).expanduser()
    beside = (data if data.is_dir() else data.parent) / _CACHE
    identity = {
        "model": str(folder.resolve()),
        "vae": read_json(folder / "vae" / "config.json"),
        "text_positions": defaults.max_sequence_length,
    }
    clips = VideoClips(
        accelerator,
        config.data,
        cache=config.cache or beside,
        identity=identity,
        encoders=lambda: encoders(folder, accelerator.device, defaults.max_sequence_length),
        size=size,
        held_out=config.validation_clips,
        text_positions=defaults.max_sequence_length,
        progress=progress,
    )
    if accelerator.device.type == "cuda":
        # The encoders are gone; their memory is wanted for training.
        torch.cuda.empty_cache()
    return clips


def _world(
    config: FinetuneConfig,
    accelerator: Accelerator,
    folder: Path,
    size: tuple[int, int, int],
    progress: Progress,
) -> WorldClips:
    from sla_video.pipelines.tiny_wan.models import (
        LATENT_CHANNELS,
        TEXT_DIM,
        build_tokenizer,
        load_text_encoder,
        load_vae,
    )
    from sla_video.pipelines.tiny_wan.render import NUM_FRAMES

    frames, height, width = size
    settings = read_json(folder / "transformer" / "config.json")
    fits = (settings.get("in_channels"), settings.get("text_dim")) == (LATENT_CHANNELS, TEXT_DIM)
    vocabulary = read_json(folder / "text_encoder" / "config.json").get("vocab_size")
    if not fits or vocabulary != len(build_tokenizer()):
        raise InputError(
            f"the data set 'world' is for {EMBEDDED_MODEL} and models of its kind, and "
            f"{config.model!r} is another: give a folder of videos with --data"
        )
    if height != width or frames != NUM_FRAMES:
        raise InputError(
            f"clips of the world are square and have {NUM_FRAMES} frames, got {frames} frames of "
            f"{height}x{width}"
        )
    device = accelerator.device
    return WorldClips(
        accelerator,
        load_vae(folder).to(device),
        load_text_encoder(folder).to(device).eval().requires_grad_(False),
        size=height,
        clips=config.world_clips,
        held_out_clips=config.validation_clips,
        chunk=config.encode_batch,
        seed=config.seed,
        progress=progress,
    )
