"""A run of stage 2 put together: networks, data, optimizer, loop, results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import nn

from sla_video.calibration import training_checkpoint
from sla_video.calibration.clip_source import ClipSource, Sampler
from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.calibration.finetune_data import open_clips
from sla_video.calibration.launch import is_sharded, make_accelerator
from sla_video.calibration.model_parts import count_tokens, load_transformer, noise_shift
from sla_video.calibration.optimizer import make_optimizer
from sla_video.calibration.pace import Pace
from sla_video.calibration.results import save_results
from sla_video.calibration.starting_point import check_starting_point
from sla_video.calibration.student import Student, compile_blocks
from sla_video.calibration.training_loop import TrainingLoop
from sla_video.calibration.validation import validate
from sla_video.calibration.validation_videos import VideoMaker
from sla_video.calibration.video_clips import VideoClips, list_skipped
from sla_video.calibration.world_clips import WorldClips
from sla_video.pipelines.environment import versions
from sla_video.pipelines.errors import InputError, is_out_of_memory, one_line
from sla_video.pipelines.json_file import JsonFile
from sla_video.pipelines.loading import download
from sla_video.pipelines.model_source import ModelSource, find_model, read_json
from sla_video.pipelines.progress import NoProgress, Progress, TerminalProgress

CONFIG_FILE = "finetune.json"


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune as `config` says; see `finetune`."""
    source = find_model(config.model)
    resume = _check_out(config)
    accelerator = make_accelerator(config)
    progress: Progress = TerminalProgress() if accelerator.is_main_process else NoProgress()
    try:
        return _Run(config, source, accelerator, progress).train(resume)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory ({one_line(error, limit=120)}): lower --batch-size, use "
            "--gradient-checkpointing, or more processes with FSDP"
        ) from error
    finally:
        progress.close()
        accelerator.end_training()


def _check_out(config: FinetuneConfig) -> Path | None:
    """The checkpoint to go on from, before anything is loaded."""
    found = training_checkpoint.find_all(config.out)
    if not config.resume:
        if found:
            raise InputError(
                f"{config.out} holds the checkpoint of another run, {found[-1].name}: add --resume "
                "to go on, or give another --out"
            )
        return None
    if not found:
        raise InputError(f"nothing to resume: {config.out} holds no checkpoint; leave --resume out")
    different = config.differences(training_checkpoint.read_state(found[-1])["config"])
    if different:
        raise InputError(f"{found[-1]} was trained with other settings: {different}")
    return found[-1]


class _Run:
    def __init__(
        self,
        config: FinetuneConfig,
        source: ModelSource,
        accelerator: Accelerator,
        progress: Progress,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.progress = progress
        self.defaults = source.defaults
        self.size = (
            config.frames or source.defaults.frames,
            config.height or source.defaults.height,
            config.width or source.defaults.width,
        )
        source.geometry.check(*self.size)
        if source.folder is None:
            with accelerator.main_process_first():
                self.folder = download(source.name)
        else:
            self.folder = source.folder
        index = read_json(self.folder / "model_index.json")
        if index.get("expand_timesteps") or (index.get("transformer_2") or [None])[0]:
            raise InputError(
                f"model {config.model!r} has two transformers or a noise level for each token, "
                "which fine-tuning does not support yet: take a Wan 2.1 model"
            )
        check_starting_point(config, self.folder)

    def train(self, resume: Path | None) -> dict[str, Any]:
        config, accelerator = self.config, self.accelerator
        set_seed(config.seed)
        if accelerator.is_main_process:
            training_checkpoint.remove_unfinished(config.out)
            _write_settings(config)
        clips = open_clips(
            config, accelerator, self.folder, self.defaults, self.size, self.progress
        )
        student = self._student(clips)
        wrapped, optimizer = self._prepare(student)
        trainable = student.trainable()
        ema = None
        if config.ema:
            ema = EMAModel(trainable.values(), decay=config.ema, foreach=True)
        sampler = Sampler(
            clips,
            seed=config.seed,
            batch_size=config.batch_size,
            processes=accelerator.num_processes,
            process=accelerator.process_index,
            accumulate=config.accumulate,
            shift=self._shift(),
            caption_dropout=config.caption_dropout,
            levels=config.levels,
            paired=bool(config.guidance),
        )
        state = None if resume is None else training_checkpoint.read_state(resume)
        if resume is not None and state is not None:
            self._check_batch(state)
            shadow = None if ema is None else ema.shadow_params
            training_checkpoint.load(
                accelerator, resume, trainable=trainable, ema=shadow, optimizer=optimizer
            )
            if ema is not None:
                ema.optimization_step = state["ema_steps"]
        pace = Pace(
            accelerator,
            max_steps=config.max_steps,
            minutes=config.minutes,
            warmup_steps=config.warmup_steps,
            cooldown=config.cooldown,
            shape=config.schedule,
            steps=0 if state is None else state["step"],
            elapsed=0.0 if state is None else state["elapsed"],
        )

        make_videos = self._video_maker(clips)

        def measure(step: int) -> dict[str, Any]:
            self.progress.stage("validate")
            if ema is not None:
                ema.store(trainable.values())
                ema.copy_to(trainable.values())
            try:
                metrics = validate(
                    accelerator,
                    student,
                    wrapped,
                    clips,
                    sparsities=config.sparsity,
                    batch_size=config.batch_size,
                    shift=self._shift(),
                )
                if make_videos is not None:
                    folder = config.out / "validation" / f"step-{step:08d}"
                    metrics |= make_videos(student, folder, self.progress)
            finally:
                if ema is not None:
                    ema.restore(trainable.values())
            accelerator.wait_for_everyone()
            return metrics

        loop = TrainingLoop(
            accelerator,
            config,
            student=student,
            wrapped=wrapped,
            optimizer=optimizer,
            sampler=sampler,
            pace=pace,
            ema=ema,
            validate=measure,
            progress=self.progress,
            tokens=count_tokens(self.folder, self.size),
            history=[] if state is None else state["history"],
        )
        if state is not None:
            loop.restore(state)
        if config.tracker:
            accelerator.init_trackers("sla-finetune", config=_flat(config.to_dict()))
        if not state:
            loop.validate_and_note(0)
        if not loop.run():
            accelerator.print(f"stopped at step {pace.steps}; --resume goes on", flush=True)
            return {"step": pace.steps, "finished": False, "history": loop.history}
        loop.validate_and_note(pace.steps)
        if ema is not None:
            ema.copy_to(trainable.values())
        return self._results(student, loop, clips)

    def _student(self, clips: ClipSource) -> Student:
        config, device = self.config, self.accelerator.device
        frozen = config.trainable != "full" and device.type == "cuda" and config.data != "world"
        rounded = self.accelerator.mixed_precision == "bf16"
        half = config.weights == "bf16" or (config.weights == "auto" and frozen and rounded)
        transformer = load_transformer(self.folder, torch.bfloat16 if half else torch.float32)
        if not is_sharded(self.accelerator):
            transformer.to(device)
        if config.data == "world":
            from sla_video.pipelines.tiny_wan.flow_matching import spread_rotary_positions

            if self.size[1] != self.defaults.height:
                spread_rotary_positions(transformer, self.size[1] // 8, self.defaults.height // 8)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        student = Student(transformer, config, device)
        if isinstance(clips, WorldClips):
            for network in (student.transformer, student.teacher):
                if network is not None:
                    clips.text_attention(network)
        return student.train()

    def _video_maker(self, clips: ClipSource) -> VideoMaker | None:
        count = self.config.validation_videos
        if not count or not self.accelerator.is_main_process:
            return None
        scenes = clips.scenes[:count] if isinstance(clips, WorldClips) else None
        prompts = clips.validation_prompts[:count]
        device = self.accelerator.device
        return VideoMaker(self.folder, self.defaults, self.size, prompts, scenes, device)

    def _prepare(self, student: Student) -> tuple[nn.Module, Any]:
        config = self.config
        on_gpu = self.accelerator.device.type == "cuda"
        can = on_gpu and not config.soft_selection and not is_sharded(self.accelerator)
        if can if config.compile is None else config.compile:
            compile_blocks(student)
        optimizer = make_optimizer(student, config, fused=not is_sharded(self.accelerator))
        wrapped, optimizer = self.accelerator.prepare(student, optimizer)
        return wrapped, optimizer

    def _shift(self) -> float:
        return self.config.shift or noise_shift(self.folder)

    def _check_batch(self, state: training_checkpoint.TrainingState) -> None:
        config, processes = self.config, self.accelerator.num_processes
        here = config.batch_size * config.accumulate * processes
        there = state["clips"] // max(state["step"], 1)
        if state["step"] and here != there:
            raise InputError(
                f"the checkpoint was trained with {there} clips a step in {state['processes']} "
                f"processes, and here it would be {here} in {processes}: use as many processes"
            )

    def _results(self, student: Student, loop: TrainingLoop, clips: ClipSource) -> dict[str, Any]:
        config, accelerator = self.config, self.accelerator
        metrics = {
            "settings": config.to_dict(),
            "steps": loop.pace.steps,
            "minutes": loop.pace.elapsed / 60,
            "processes": accelerator.num_processes,
            "history": [
                *(r for r in loop.history if "validation" in r),
                *[r for r in loop.history if "loss" in r][-1:],
            ],
            "versions": versions(),
        }
        save_results(accelerator, student, config.out, resolution=self.size, metrics=metrics)
        if isinstance(clips, VideoClips):
            for line in list_skipped(clips.skipped):
                accelerator.print(line, flush=True)
        accelerator.print(f"routers are in {config.out / 'routers'}", flush=True)
        return {"step": loop.pace.steps, "finished": True, "history": loop.history}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them."""
    return {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in values.items()}


def _write_settings(config: FinetuneConfig) -> None:
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {config.out}: {one_line(error)}; give another --out"
        ) from error
    JsonFile(config.out / CONFIG_FILE).write(config.to_dict())
