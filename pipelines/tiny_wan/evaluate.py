"""Generate the held-out prompts and measure how well the videos keep to them.

    python -m sla_video.pipelines.tiny_wan.evaluate --model tiny-wan --prompts 200 \\
        --settings dense 0.80 0.90 0.90/1 runs/routers@0.97:int8 --json adherence.json

A setting is "dense" or `[ROUTERS@]SPARSITY[/DENSE_STEPS][:FORMAT]`: a folder of routers, the
sparsity, how many first steps are dense, and the number format of the sparse branch. With
`--fidelity` it is also compared with dense attention layer by layer (`fidelity.py`). Every setting
starts from the same noise, so that videos can be compared pairwise. Several processes (`accelerate
launch`) share the prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import WanPipeline
from PIL import Image, ImageDraw

from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.handle import SLAHandle
from sla_video.pipelines.json_file import JsonFile
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


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One kind of attention: dense where `sparsity` is None."""

    sparsity: float | None = None
    routers: str | None = None
    dense_steps: int = 0
    sparse_dtype: str = "bf16"

    @classmethod
    def parse(cls, text: str) -> Setting:
        if text == "dense":
            return cls()
        routers, _, rest = text.rpartition("@")
        rest, _, sparse_dtype = rest.partition(":")
        sparsity, _, dense_steps = rest.partition("/")
        return cls(
            sparsity=float(sparsity),
            routers=routers or None,
            dense_steps=int(dense_steps or 0),
            sparse_dtype=sparse_dtype or "bf16",
        )

    def enable(self, pipe: WanPipeline) -> SLAHandle | None:
        """Patch the pipeline; None for dense attention."""
        if self.sparsity is None:
            return None
        return enable_sla(
            pipe,
            self.routers,
            sparsity=self.sparsity,
            dense_steps=self.dense_steps,
            sparse_dtype=self.sparse_dtype,  # type: ignore[arg-type]
        )


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


def generate_all(
    pipe: WanPipeline, prompts: list[str], numbers: list[int], args: argparse.Namespace
) -> tuple[Any, float]:
    """Videos of all prompts with whatever attention `pipe` has, and the seconds they took."""
    started = time.monotonic()
    videos = [
        generate(pipe, prompts[i : i + args.batch_size], numbers[i], args)
        for i in range(0, len(prompts), args.batch_size)
    ]
    return np.concatenate(videos), time.monotonic() - started


def paired_distance(videos: Any, baseline: Any, device: torch.device) -> dict[str, list[float]]:
    """PSNR (dB) and SSIM of each video to its counterpart; `[B, T, H, W, 3]` uint8."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found: dict[str, list[float]] = {"psnr": [], "ssim": []}
    for pair in zip(videos, baseline, strict=True):
        a, b = (torch.from_numpy(x).to(device).permute(0, 3, 1, 2).float() / 255 for x in pair)
        # Videos that are equal have no PSNR; beyond 96 dB nobody could tell.
        error = (a - b).square().mean().clamp_min(2.5e-10)
        found["psnr"].append(float(-10 * error.log10()))
        found["ssim"].append(float(structural_similarity_index_measure(a, b, data_range=1.0)))  # type: ignore[arg-type]
    return found


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


def _setting(text: str) -> str:
    try:
        setting = Setting.parse(text)
        SLAConfig(
            sparsity=setting.sparsity or 0.0,
            dense_steps=setting.dense_steps,
            sparse_dtype=setting.sparse_dtype,  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of dense, 0.9, 0.9/2, FOLDER@0.97:int8: {one_line(error)}"
        ) from error
    return text


def main() -> None:
    try:
        _main()
    except InputError as error:
        print(f"evaluate: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-wan", help="name, pipeline folder or checkpoint")
    parser.add_argument("--vae", type=Path, help="VAE checkpoint, where --model is a checkpoint")
    parser.add_argument("--weights", default="ema", choices=("ema", "weights"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument(
        "--settings",
        nargs="+",
        type=_setting,
        default=["dense"],
        help="dense, 0.9, 0.9/2, FOLDER@0.97:int8; the videos of the first are what others are "
        "compared with",
    )
    parser.add_argument(
        "--fidelity", action="store_true", help="also velocity error, error and recall of attention"
    )
    parser.add_argument("--size", type=int, default=FRAME_SIZE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--text-positions", type=int, default=TEXT_POSITIONS[0])
    parser.add_argument("--shift", type=float, help="of the scheduler's noise levels")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="PNG of the first setting's first videos")
    args = parser.parse_args()
    if args.prompts < 1:
        parser.error(f"argument --prompts: at least 1, got {args.prompts}")
    output = JsonFile(args.json)

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
    probe = None
    if args.fidelity:
        from sla_video.pipelines.tiny_wan import fidelity

        probe = fidelity.make_probe(pipe, size=args.size)
    with accelerator.split_between_processes(list(range(args.prompts))) as numbers:
        mine, mine_scenes = [prompts[i] for i in numbers], [scenes[i] for i in numbers]
        for setting in args.settings:
            handle = Setting.parse(setting).enable(pipe)
            with handle or nullcontext():
                videos, seconds = generate_all(pipe, mine, numbers, args)
                distance = (
                    fidelity.measure_fidelity(pipe, handle, probe)
                    if handle is not None and probe is not None
                    else {}
                )
            results = gather_object(adherence.measure_many(videos, mine_scenes))
            baseline = videos if baseline is None else baseline
            paired = paired_distance(videos, baseline, accelerator.device)
            paired = {name: gather_object(values) for name, values in paired.items()}
            # A column that no prompt of these speaks of has no percentage.
            columns = {k: v for k, v in adherence.summary(results).items() if not math.isnan(v)}
            row = {**columns, "seconds_per_video": seconds / len(mine), **distance}
            if setting != args.settings[0]:
                row |= {f"{name}_to_first": float(np.mean(v)) for name, v in paired.items()}
            report[setting] = row
            if accelerator.is_main_process:
                print(setting, json.dumps(row), flush=True)
                if args.sheet and setting == args.settings[0]:
                    contact_sheet(videos, mine, args.sheet)
                output.write(report)
    accelerator.end_training()


if __name__ == "__main__":
    main()
