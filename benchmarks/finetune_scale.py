"""Samples a second, memory and step time of stage 2 at Wan's own shapes, on random weights.

    accelerate launch --num_processes 1 benchmarks/finetune_scale.py --json one.json
    accelerate launch --num_processes 4 benchmarks/finetune_scale.py --baseline one.json
    accelerate launch --num_processes 4 --use_fsdp --fsdp_version 2 --mixed_precision bf16 \\
        --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \\
        --fsdp_transformer_layer_cls_to_wrap WanTransformerBlock \\
        benchmarks/finetune_scale.py --model 14B --height 720 --width 1280

Runs the steps of `sla_video.calibration` themselves: QAT at 97%, distillation, gradient
checkpointing, one clip a process. Beside it dense training with the same loss on the same weights.
`--tiny` is for machines without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from torch import Tensor

from sla_video.calibration.alignment import full_attention
from sla_video.calibration.clip_source import ClipBatch, Sampler
from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.calibration.launch import is_sharded, make_accelerator
from sla_video.calibration.student import Student, compile_blocks
from sla_video.calibration.training_loop import draw_sparsity
from sla_video.pipelines.json_file import JsonFile

# Transformers of Wan 2.1: layers, heads of 128, width of the feed-forward part.
SHAPES = {"1.3B": (30, 12, 8960), "14B": (40, 40, 13824), "tiny": (2, 2, 64)}


class RandomClips:
    """A `ClipSource` of noise, made on the device."""

    validation_prompts = ()

    def __init__(self, shape: tuple[int, ...], text: tuple[int, int], device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.latents = torch.randn(4, *shape, generator=generator, device=device)
        self.text = torch.randn(4, *text, generator=generator, device=device)

    def __len__(self) -> int:
        return 4

    def num_held_out(self) -> int:
        return 0

    def load(self, clips: Any, captioned: Any, seed: str) -> ClipBatch:
        return ClipBatch(self.latents[clips], self.text[clips])

    def held_out(self, clips: Any) -> ClipBatch:
        return self.load(clips, None, "")


def build(name: str, dtype: torch.dtype, device: torch.device) -> WanTransformer3DModel:
    """A random transformer, made on the device where its weights are to be."""
    layers, heads, width = SHAPES[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return WanTransformer3DModel(
                num_attention_heads=heads,
                attention_head_dim=32 if name == "tiny" else 128,
                num_layers=layers,
                ffn_dim=width,
                text_dim=64 if name == "tiny" else 4096,
            )
    finally:
        torch.set_default_dtype(before)


def measure(args: argparse.Namespace, accelerator: Accelerator, config: FinetuneConfig,
            *, dense: bool) -> dict[str, float]:  # fmt: skip
    """Seconds a step and peak memory, after steps that compile and tune."""
    device = accelerator.device
    on_gpu = device.type == "cuda"
    frozen = config.trainable == "lora" and not is_sharded(accelerator)
    transformer = build(args.model, torch.bfloat16 if frozen and on_gpu else torch.float32, device)
    transformer.enable_gradient_checkpointing()
    student = Student(transformer, config, device).train()
    if dense:
        # The same network and loss with full attention wherever SLA2 would be.
        for processor in student.processors.values():
            processor.attention = _full_attention
    if on_gpu and not is_sharded(accelerator) and not args.no_compile:
        compile_blocks(student)
    if dense:
        student.routers.requires_grad_(False)
    trainable = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-6)
    wrapped, optimizer = accelerator.prepare(student, optimizer)
    latents = (16, (args.frames - 1) // 4 + 1, args.height // 8, args.width // 8)
    clips = RandomClips(latents, (512, 64 if args.model == "tiny" else 4096), device)
    sampler = Sampler(
        clips,
        seed=0,
        batch_size=args.batch_size,
        processes=accelerator.num_processes,
        process=accelerator.process_index,
        accumulate=1,
        shift=3.0,
        caption_dropout=0.1,
    )
    tokens = latents[1] * (latents[2] // 2) * (latents[3] // 2)
    times = []
    for step in range(args.warmup + args.steps):
        if step == args.warmup and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        _wait(accelerator)
        start = time.perf_counter()
        student.set_sparsity(draw_sparsity(config, step))
        if student.draw is not None:
            student.draw.step(0, step, tokens, 128)
        losses = wrapped(*sampler.batch(step, 0).tensors())
        accelerator.backward(losses["velocity"])
        accelerator.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(accelerator)
        times.append(time.perf_counter() - start)
    seconds = sorted(times[args.warmup :])[args.steps // 2]
    count = args.batch_size * accelerator.num_processes
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {
        "tokens": tokens,
        "seconds_a_step": seconds,
        "samples_per_second": count / seconds,
        "peak_gib": memory,
        "loss": float(losses["velocity"].detach()),
    }


def _full_attention(processor: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return full_attention(query, key, value)


def _wait(accelerator: Accelerator) -> None:
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    accelerator.wait_for_everyone()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="1.3B")
    parser.add_argument("--trainable", choices=("lora", "full"), default="lora")
    parser.add_argument("--loss", choices=("distill", "flow", "ssa"), default="distill")
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--sparse-dtype", default="int8_fp8")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--batch-size", type=int, default=1, help="clips a process")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--no-dense", action="store_true", help="leave dense training out")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--baseline", type=Path, help="report of one process, for the efficiency")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a dry run of the smallest sizes")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.frames, args.height, args.width = "tiny", 9, 128, 128
        args.steps, args.warmup = 2, 1
    file = JsonFile(args.json)
    config = FinetuneConfig(
        trainable=args.trainable,
        loss=args.loss,
        sparsity=(args.sparsity,),
        sparse_dtype=args.sparse_dtype,
        max_steps=1,
    )
    accelerator = make_accelerator(config)
    report: dict[str, Any] = {
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "processes": accelerator.num_processes,
        "sharded": is_sharded(accelerator),
        "sla2": measure(args, accelerator, config, dense=False),
    }
    if not args.no_dense:
        accelerator.free_memory()
        gc.collect()
        torch._dynamo.reset()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        report["dense"] = measure(args, accelerator, config, dense=True)
        report["step_time_to_dense"] = (
            report["sla2"]["seconds_a_step"] / report["dense"]["seconds_a_step"]
        )
    if args.baseline:
        one = json.loads(args.baseline.read_text())
        report["efficiency"] = report["sla2"]["samples_per_second"] / (
            accelerator.num_processes * one["sla2"]["samples_per_second"] / one["processes"]
        )
    if accelerator.is_main_process:
        file.write(report)
        accelerator.print(json.dumps(report, indent=2))
    accelerator.end_training()


if __name__ == "__main__":
    main()
