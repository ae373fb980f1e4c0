"""Generate the held-out prompts and measure how well the videos keep to them.

    python -m sla_video.pipelines.tiny_wan.evaluate --model tiny-wan --prompts 200 \\
        --settings dense 0.80 0.85 0.90 0.95 0.97 --json adherence.json

Every setting starts from the same noise, so that the videos can be compared pairwise. Several
processes (`accelerate launch`) share the prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import WanPipeline
from PIL import Image, ImageDraw

from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.tiny_wan import adherence, checkpoints
from sla_video.pipelines.tiny_wan.flow_matching import spread_rotary_positions
from sla_video.pipelines.tiny_wan.grammar import caption
from sla_video.pipelines.tiny_wan.models import (
    GUIDANCE_SCALE,
    STEPS,
    TEXT_POSITIONS,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    load_vae,
    load_weights,
)
from sla_video.pipelines.tiny_wan.render import FRAME_SIZE, NUM_FRAMES
from sla_video.pipelines.tiny_wan.scenes import Scene, sample_scene

HELD_OUT_SEED = 4242
SHEET_ROWS = 12
SHEET_FRAMES = (0, 6, 12, 18, 24)
# Pixels: of a frame, between frames, of the line above a row of frames, and between the columns.
SHEET_TILE = 112
SHEET_SEAM = 2
SHEET_CAPTION = 24
SHEET_GAP = 12


def held_out_prompts(count: int) -> tuple[list[Scene], list[str]]:
    """The first `count` held-out scenes, always the same, and a wording of each."""
    rng = random.Random(HELD_OUT_SEED)
    scenes = [sample_scene(rng, held_out=True) for _ in range(count)]
    prompts = [
        caption(scene, random.Random(f"{HELD_OUT_SEED}/{i}")) for i, scene in enumerate(scenes)
    ]
    return scenes, prompts


def load_pipeline(model: str, vae: Path | None, weights: str) -> WanPipeline:
    """The embedded model, a pipeline folder, or a training checkpoint together with its VAE."""
    folder = files("sla_video") / "assets" / model
    path = Path(model) if Path(model).is_dir() else Path(str(folder))
    if (path / "model_index.json").is_file():
        pipe: WanPipeline = WanPipeline.from_pretrained(path, torch_dtype=torch.float32)
        return pipe
    if vae is None:
        raise SystemExit(f"{path} is a checkpoint: --vae names the VAE's")
    tokenizer = build_tokenizer()
    transformer, encoder = build_transformer(), build_text_encoder(len(tokenizer))
    load_weights(checkpoints.load_group(path, weights), transformer, encoder)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=load_vae(vae),
        scheduler=build_scheduler(),
        transformer=transformer,
    )


def generate(pipe: WanPipeline, prompts: list[str], first: int, args: argparse.Namespace) -> Any:
    """Videos `[B, T, H, W, 3]` uint8 of prompts whose numbers start at `first`."""
    device = pipe.transformer.device
    generators = [torch.Generator("cpu").manual_seed(first + i) for i in range(len(prompts))]
    side, channels = args.size // 8, pipe.transformer.config.in_channels
    latents = torch.cat(
        [
            torch.randn(1, channels, (NUM_FRAMES - 1) // 4 + 1, side, side, generator=g)
            for g in generators
        ]
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        frames = pipe(
            prompts,
            height=args.size,
            width=args.size,
            num_frames=NUM_FRAMES,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            latents=latents.to(device),
            max_sequence_length=args.text_positions,
            output_type="pt",
        ).frames
    return (frames.float().permute(0, 1, 3, 4, 2) * 255).round().byte().cpu().numpy()


def run_setting(
    pipe: WanPipeline,
    setting: str,
    prompts: list[str],
    numbers: list[int],
    args: argparse.Namespace,
) -> tuple[Any, float]:
    """Videos of one setting, and the seconds they took.

    A setting is "dense", a sparsity, or a sparsity and a number of dense first steps: "0.9/2".
    """
    handle = None
    if setting != "dense":
        sparsity, _, dense_steps = setting.partition("/")
        handle = enable_sla(pipe, sparsity=float(sparsity), dense_steps=int(dense_steps or 0))
    started = time.monotonic()
    videos = [
        generate(pipe, prompts[i : i + args.batch_size], numbers[i], args)
        for i in range(0, len(prompts), args.batch_size)
    ]
    seconds = time.monotonic() - started
    if handle is not None:
        handle.remove()
    return np.concatenate(videos), seconds


def contact_sheet(videos: Any, prompts: list[str], path: Path) -> None:
    """A few frames of each of the first videos under its prompt, in two columns."""
    pitch = SHEET_TILE + SHEET_SEAM
    width, height = pitch * len(SHEET_FRAMES), SHEET_TILE + SHEET_CAPTION
    count = min(len(videos), len(prompts), SHEET_ROWS)
    image = Image.new("RGB", (2 * width + SHEET_GAP, -(-count // 2) * height), "white")
    draw = ImageDraw.Draw(image)
    for i in range(count):
        left, top = i % 2 * (width + SHEET_GAP), i // 2 * height
        size = 13.0
        while size > 8 and draw.textlength(prompts[i], font_size=size) > width - 4:
            size -= 0.5
        draw.text((left + 2, top + 6), prompts[i], fill="black", font_size=size)
        for column, t in enumerate(SHEET_FRAMES):
            tile = Image.fromarray(videos[i][t]).resize(
                (SHEET_TILE, SHEET_TILE), Image.Resampling.LANCZOS
            )
            image.paste(tile, (left + column * pitch, top + SHEET_CAPTION))
    image.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-wan", help="name, pipeline folder or checkpoint")
    parser.add_argument("--vae", type=Path, help="VAE checkpoint, where --model is a checkpoint")
    parser.add_argument("--weights", default="ema", choices=("ema", "weights"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--settings", nargs="+", default=["dense"], help="dense, 0.9, 0.9/2")
    parser.add_argument("--size", type=int, default=FRAME_SIZE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--text-positions", type=int, default=TEXT_POSITIONS[0])
    parser.add_argument("--shift", type=float, help="of the scheduler's noise levels")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="PNG of the first setting's first videos")
    args = parser.parse_args()

    accelerator = Accelerator()
    pipe = load_pipeline(args.model, args.vae, args.weights).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    if args.shift:
        pipe.scheduler = build_scheduler(args.shift)
    if args.size != FRAME_SIZE:
        spread_rotary_positions(pipe.transformer, args.size // 8, FRAME_SIZE // 8)
    scenes, prompts = held_out_prompts(args.prompts)
    report: dict[str, Any] = {}
    baseline = None
    with accelerator.split_between_processes(list(range(args.prompts))) as numbers:
        mine, mine_scenes = [prompts[i] for i in numbers], [scenes[i] for i in numbers]
        for setting in args.settings:
            videos, seconds = run_setting(pipe, setting, mine, numbers, args)
            results = adherence.measure_many(videos, mine_scenes)
            baseline = videos if baseline is None else baseline
            psnr = [_psnr(a, b) for a, b in zip(videos, baseline, strict=True)]
            results = gather_object(results)
            psnr = gather_object(psnr)
            # A column that no prompt of these speaks of has no percentage.
            columns = {k: v for k, v in adherence.summary(results).items() if not math.isnan(v)}
            row = {**columns, "seconds_per_video": seconds / len(mine)}
            if setting != args.settings[0]:
                row["psnr_to_first"] = float(np.mean(psnr))
            report[setting] = row
            if accelerator.is_main_process:
                print(setting, json.dumps(row), flush=True)
                if args.sheet and setting == args.settings[0]:
                    contact_sheet(videos, mine, args.sheet)
                if args.json:
                    part = args.json.with_name(args.json.name + ".part")
                    part.write_text(json.dumps(report, indent=1))
                    os.replace(part, args.json)
    accelerator.end_training()


def _psnr(a: Any, b: Any) -> float:
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


if __name__ == "__main__":
    main()
