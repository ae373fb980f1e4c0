"""Videos of the student as it is now, to look at, and in the world their adherence to prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.schedulers import UniPCMultistepScheduler
from torch import nn

from sla_video.calibration.model_parts import load_text, load_vae
from sla_video.calibration.student import Student, eager
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.model_defaults import ModelDefaults
from sla_video.pipelines.model_source import read_json
from sla_video.pipelines.progress import Progress
from sla_video.pipelines.video_files import OutputFolder, slug, write_video

_SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler,
    "UniPCMultistepScheduler": UniPCMultistepScheduler,
}


class VideoMaker:
    """Generates the same prompts from the same seeds, whenever it is called.

    Args:
        folder: of the model's pipeline.
        size: frames, height, width.
        prompts: of the videos.
        scenes: of the world, where the prompts are of it: then adherence is measured.
    """

    def __init__(
        self,
        folder: Path,
        defaults: ModelDefaults,
        size: tuple[int, int, int],
        prompts: Sequence[str],
        scenes: Sequence[Any] | None,
        device: torch.device,
    ) -> None:
        self.defaults = defaults
        self.size = size
        self.prompts = prompts
        self.scenes = scenes
        self.device = device
        settings = read_json(folder / "scheduler" / "scheduler_config.json")
        kind = _SCHEDULERS.get(settings["_class_name"])
        if kind is None:
            raise InputError(
                f"validation videos need one of the schedulers {', '.join(_SCHEDULERS)}, and the "
                f"model has {settings['_class_name']}: leave --validation-videos out"
            )
        self.scheduler = kind.from_config(settings)
        self.vae = load_vae(folder, device)
        self.tokenizer, self.text_encoder = load_text(folder, device)

    @torch.no_grad()
    def __call__(self, student: Student, out: Path, progress: Progress) -> dict[str, float]:
        """Write `out`/*.mp4; returns the adherence in percent, where the prompts are scenes."""
        pipe = WanPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            vae=self.vae,
            scheduler=self.scheduler,
            transformer=student.transformer,
        )
        pipe.set_progress_bar_config(disable=True)
        frames, height, width = self.size
        videos = []
        progress.stage("validation videos", len(self.prompts))
        mode = student.training
        student.eval()
        with OutputFolder(out), student.as_deployed(), stock_text_attention(student), eager():
            for index, prompt in enumerate(self.prompts):
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"
                ):
                    video = pipe(
                        prompt,
                        num_frames=frames,
                        height=height,
                        width=width,
                        num_inference_steps=self.defaults.steps,
                        guidance_scale=self.defaults.guidance_scale,
                        max_sequence_length=self.defaults.max_sequence_length,
                        generator=torch.Generator("cpu").manual_seed(index),
                        output_type="np",
                    ).frames[0]
                videos.append((np.clip(video, 0, 1) * 255).round().astype(np.uint8))
                about = {"prompt": prompt, "seed": index}
                path = out / f"{index:02d}-{slug(prompt)}.mp4"
                write_video(path, videos[-1], self.defaults.fps, lambda about=about: about)  # type: ignore[misc]
                progress.advance()
        student.train(mode)
        if self.scenes is None:
            return {}
        from sla_video.pipelines.tiny_wan import adherence

        found = adherence.summary(
            adherence.measure_many(np.stack(videos), list(self.scenes[: len(videos)]))
        )
        return {f"adherence/{k}": v for k, v in found.items() if not math.isnan(v)}


@contextmanager
def stock_text_attention(student: Student) -> Iterator[None]:
    """Within the block the cross-attention is Diffusers' own, whatever the data asked for."""
    layers: list[nn.Module] = [block.attn2 for block in student.transformer.blocks]  # type: ignore[union-attr]
    before = [layer.processor for layer in layers]
    for layer in layers:
        layer.processor = WanAttnProcessor()
    try:
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = processor
