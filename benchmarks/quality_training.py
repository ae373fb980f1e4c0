"""Stages 1 and 2 for a row of the quality table, with what several rows share made once."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from quality_rows import TRAINING, Row
from sla_attention import install_sla, save_projections

from sla_video.calibration import finetune_run
from sla_video.calibration import student as student_module
from sla_video.calibration.calibrate import calibrate
from sla_video.calibration.calibration_request import CalibrationRequest, world_prompts
from sla_video.calibration.finetune import finetune
from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.pipelines.handle import SLAHandle
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.router_files import load_routers, save_routers
from sla_video.pipelines.tiny_wan import evaluate

_CLIPS: dict[Any, Any] = {}


def starting_routers(row: Row, sparsity: float, args: argparse.Namespace) -> Path:
    """Routers before stage 2, made for the first row that starts so."""
    key = json.dumps([row.calibration, row.mix, sparsity, args.seed, args.calibration_steps])
    folder = Path(args.out) / "starts" / hashlib.sha256(key.encode()).hexdigest()[:12]
    if folder.is_dir():
        return folder
    # Processes beside this one may make the same: each makes its own, and the first one counts.
    own = folder.with_name(f"{folder.name}.{os.getpid()}")
    _make_start(row, sparsity, args, own)
    try:
        own.rename(folder)
    except OSError:
        shutil.rmtree(own)
    return folder


def _make_start(row: Row, sparsity: float, args: argparse.Namespace, out: Path) -> None:
    if row.calibration is None:
        pipe = evaluate.load_pipeline(args.model, None, "ema")
        with enable_sla(pipe.transformer, sparsity=sparsity) as handle:
            save_routers(out, handle)
    else:
        calibrate(
            CalibrationRequest(
                out=out,
                prompts=world_prompts(args.calibration_prompts, args.seed),
                model=args.model,
                sparsities=(sparsity,),
                steps=args.calibration_steps,
                height=args.size,
                width=args.size,
                seed=args.seed,
                overwrite=True,
                **row.calibration,
            )
        )
    if row.mix is not None:
        routers = load_routers(out)
        with torch.no_grad():
            for router in routers.routers.values():
                router.alpha_scale.zero_()
                router.alpha_bias.fill_(row.mix)
        save_routers(out, routers)


def train(row: Row, sparsities: tuple[float, ...], args: argparse.Namespace, folder: Path) -> None:
    """Stage 2 of a row into `folder` / "run", unless it is there.

    Steps take one of `sparsities` each; the routers begin as those of the middle one.
    """
    assert row.training is not None
    if (folder / "run" / "routers" / "routers.json").is_file():
        return
    start = starting_routers(row, sorted(sparsities)[len(sparsities) // 2], args)
    # What a run that was stopped has left.
    shutil.rmtree(folder / "run", ignore_errors=True)
    torch._dynamo.reset()
    with _shared_clips(), _as_sla(row.sla) as handles:
        finetune(
            FinetuneConfig(
                out=folder / "run",
                model=args.model,
                routers=str(start),
                sparsity=sparsities,
                max_steps=args.steps,
                batch_size=args.batch_size,
                world_clips=args.world_clips,
                encode_batch=16,
                height=args.size,
                width=args.size,
                warmup_steps=min(50, args.steps // 4),
                save_every=10**6,
                log_every=200,
                seed=args.seed,
                **{**TRAINING, **row.training},
            )
        )
    if row.sla:
        save_projections(handles[0], folder / "projections.safetensors")


@contextmanager
def _shared_clips() -> Iterator[None]:
    """Within the block clips that were encoded for a run serve the next one that wants the same."""
    original = finetune_run.open_clips

    def open_once(config: FinetuneConfig, *others: Any) -> Any:
        key = (config.world_clips, config.height, config.seed, config.validation_clips)
        if key not in _CLIPS:
            _CLIPS[key] = original(config, *others)
        return _CLIPS[key]

    finetune_run.open_clips = open_once
    try:
        yield
    finally:
        finetune_run.open_clips = original


@contextmanager
def _as_sla(wanted: bool) -> Iterator[list[SLAHandle]]:
    """Within the block a training that begins is one of SLA; its handle is in the list."""
    handles: list[SLAHandle] = []
    original = student_module._patch

    def patch(transformer: Any, config: Any) -> SLAHandle:
        handle = original(transformer, config)
        if wanted:
            install_sla(handle)
        handles.append(handle)
        return handle

    student_module._patch = patch
    try:
        yield handles
    finally:
        student_module._patch = original
