"""Train the transformer and the text encoder of `tiny-wan` on the procedural world.

Low resolution first: motion and colours are learned from millions of cheap 64-pixel clips, edges
from fewer large ones. Rotary positions are spread so that a small clip's tokens stand where they
would in the full-size one. A stage is `size:batch:minutes:shift:rate`: pixels a side, clips a
process, training time, shift of the noise levels, peak learning rate.

    accelerate launch --num_processes 4 -m sla_video.pipelines.tiny_wan.train_transformer \\
        --vae runs/vae --out runs/tiny-wan \\
        --stages 64:256:4.5:2:2e-3 128:96:3.5:3.5:1.5e-3 256:32:3:6:1e-3

Every minute and after each stage `--out` is written atomically (weights, EMA, optimizers, stages);
a run that finds it goes on from there. `--init` starts from another checkpoint or from a pipeline
folder, such as the embedded model itself.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from sla_video.pipelines.tiny_wan import checkpoints
from sla_video.pipelines.tiny_wan.data import stream
from sla_video.pipelines.tiny_wan.flow_matching import TextToVideo, spread_rotary_positions
from sla_video.pipelines.tiny_wan.latent_bank import LatentBank
from sla_video.pipelines.tiny_wan.models import (
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    load_vae,
    load_weights,
)
from sla_video.pipelines.tiny_wan.muon import BatchedMuon
from sla_video.pipelines.tiny_wan.render import FRAME_SIZE
from sla_video.pipelines.tiny_wan.schedule import Schedule, process_seconds

LOG_EVERY = 200
ADAM_RATE = 0.5


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One resolution of the training."""

    size: int
    batch_size: int
    minutes: float
    shift: float
    learning_rate: float

    @classmethod
    def parse(cls, text: str) -> Stage:
        size, batch_size, minutes, shift, rate = text.split(":")
        return cls(
            size=int(size),
            batch_size=int(batch_size),
            minutes=float(minutes),
            shift=float(shift),
            learning_rate=float(rate),
        )


def build_optimizers(model: TextToVideo, kind: str) -> list[torch.optim.Optimizer]:
    """Muon on the hidden matrices and AdamW on the rest, or AdamW on everything."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        hidden = ".blocks." in name or "text_encoder.encoder.block" in name
        is_matrix = hidden and parameter.ndim == 2 and "relative_attention_bias" not in name
        (matrices if is_matrix and kind == "muon" else others).append(parameter)
    adam = torch.optim.AdamW(
        others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=torch.cuda.is_available()
    )
    adam.param_groups[0]["rate"] = ADAM_RATE
    if kind == "adamw":
        return [adam]
    muon = BatchedMuon(matrices)
    muon.param_groups[0]["rate"] = 1.0
    return [adam, muon]


def start_from(folder: Path, model: TextToVideo) -> None:
    """Weights from a checkpoint's `weights`, or from a pipeline folder."""
    if (folder / "model_index.json").is_file():
        transformer = WanTransformer3DModel.from_pretrained(folder / "transformer")
        encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        model.transformer.load_state_dict(transformer.state_dict())
        model.text_encoder.load_state_dict(encoder.state_dict())
        return
    if not (folder / checkpoints.JSON_NAME).is_file():
        raise SystemExit(f"no checkpoint and no pipeline in {folder}")
    group = checkpoints.load_group(folder, "weights")
    load_weights(group, model.transformer, model.text_encoder)


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Run the stages that are not done yet."""
    device = accelerator.device
    set_seed(args.seed)
    model = TextToVideo(build_transformer(), build_text_encoder(len(build_tokenizer())))
    resume = checkpoints.newest(args.out)
    source = resume or (args.init and (checkpoints.newest(args.init) or args.init))
    done: list[dict[str, Any]] = checkpoints.load_state(resume)["stages"] if resume else []
    if source:
        start_from(source, model)
    model.to(device)
    ema = EMAModel(model.parameters(), decay=args.ema, foreach=True)
    optimizers = build_optimizers(model, args.optimizer)
    if source and (source / checkpoints.JSON_NAME).is_file():
        restore(source, args.optimizer, ema, optimizers, model)
    vae = load_vae(args.vae).to(device)
    if not args.no_compile:
        # One block is compiled and serves them all; each stage has its own fixed shapes.
        model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    wrapped, *optimizers = accelerator.prepare(model, *optimizers)
    trainer = Trainer(args, accelerator, model, wrapped, ema, optimizers, vae, done)
    while (number := trainer.next_stage()) is not None:
        if not trainer.run(number):
            accelerator.print("out of time; the same command goes on from here")
            break


class Trainer:
    """The training loop, and what it works on."""

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: TextToVideo,
        wrapped: nn.Module,
        ema: EMAModel,
        optimizers: list[Any],
        vae: AutoencoderKLWan,
        done: list[dict[str, Any]],
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.model = model
        self.wrapped = wrapped
        self.ema = ema
        self.optimizers = optimizers
        self.vae = vae
        self.done = done

    def next_stage(self) -> int | None:
        """Number of the stage to go on with: the interrupted one, the next one, or None."""
        finished = sum(bool(entry["finished"]) for entry in self.done)
        return finished if finished < len(self.args.stages) else None

    def run(self, number: int) -> bool:
        """Train one stage, saving now and then and at the end; whether it is finished."""
        args, accelerator, stage = self.args, self.accelerator, self.args.stages[number]
        if number == len(self.done):
            self.done.append({**vars(stage), "trained_minutes": 0.0, "steps": 0, "clips": 0})
        before = dict(self.done[number])
        seed = args.seed + 1000 * number + accelerator.process_index + before["clips"]
        set_seed(seed)
        spread_rotary_positions(self.model.transformer, stage.size // 8, FRAME_SIZE // 8)
        self.model.shift = stage.shift
        bank = LatentBank(
            args.bank * 64**2 // stage.size**2, self.vae, stage.size, accelerator.device
        )
        encode_batch = max(4, args.encode_batch * 64**2 // stage.size**2)
        scenes = stream(encode_batch, seed, args.workers)
        while bank.drawn < min(stage.batch_size * args.reuse, len(bank.latents)):
            bank.add(next(scenes))
        schedule = Schedule(
            accelerator,
            stage.minutes,
            before=before["trained_minutes"],
            wall_minutes=args.wall_minutes,
            cooldown=args.cooldown,
            max_steps=args.max_steps,
        )
        accelerator.print(f"{stage}: from {schedule.fraction:.0%}, {process_seconds():.0f} s in")
        total = torch.zeros((), device=accelerator.device)
        owed, logged, saved, going = 0.0, (0, 0.0), 0.0, True
        while going:
            owed += stage.batch_size / args.reuse
            while owed >= encode_batch:
                bank.add(next(scenes))
                owed -= encode_batch
            total += self.step(stage, schedule.factor, bank)
            going = schedule.advance()
            if not schedule.synced and going:
                continue
            steps = schedule.steps - logged[0]
            clips = stage.batch_size * accelerator.num_processes
            self.done[number] = {
                **before,
                "trained_minutes": before["trained_minutes"] + schedule.elapsed,
                "steps": before["steps"] + schedule.steps,
                "clips": before["clips"] + schedule.steps * clips,
                "finished": schedule.finished,
            }
            if steps >= LOG_EVERY or not going:
                rate = steps * clips / max(60 * (schedule.elapsed - logged[1]), 1e-9)
                accelerator.print(
                    f"step {schedule.steps} {schedule.fraction:.0%} "
                    f"loss {total.item() / steps:.4f} {rate:.0f} clips/s bank {bank.filled}",
                    flush=True,
                )
                logged = (schedule.steps, schedule.elapsed)
                total.zero_()
            if 60 * (schedule.elapsed - saved) >= args.save_every or not going:
                saved = schedule.elapsed
                if accelerator.is_main_process:
                    save(args, self.model, self.ema, self.optimizers, self.done)
        return schedule.finished

    def step(self, stage: Stage, factor: float, bank: LatentBank) -> Tensor:
        """One optimizer step; returns its loss."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * group["rate"] * factor
        loss: Tensor = self.wrapped(*bank.sample(stage.batch_size))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.model.parameters())
        return loss.detach()


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
    args: argparse.Namespace,
    model: TextToVideo,
    ema: EMAModel,
    optimizers: list[Any],
    stages: list[dict[str, Any]],
) -> None:
    names = [name for name, _ in model.named_parameters()]
    groups = {
        "weights": dict(model.named_parameters()),
        "ema": dict(zip(names, ema.shadow_params, strict=True)),
    }
    for i, optimizer in enumerate(optimizers):
        inner = getattr(optimizer, "optimizer", optimizer)
        groups[f"{args.optimizer}{i}"] = checkpoints.optimizer_tensors(inner)
    state = {"stages": stages, "ema_steps": ema.optimization_step}
    checkpoints.save_checkpoint(args.out, groups, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True, help="checkpoint of train_vae")
    parser.add_argument("--init", type=Path, help="checkpoint or pipeline folder to start from")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--stages", type=Stage.parse, nargs="+", required=True, help="size:batch:minutes:shift:rate"
    )
    parser.add_argument("--cooldown", type=float, default=0.25, help="of each stage, to rate 0")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--bank", type=int, default=65536, help="clips a process, at 64 pixels")
    parser.add_argument("--reuse", type=int, default=12, help="steps a clip is expected to serve")
    parser.add_argument("--encode-batch", type=int, default=128, help="clips, at 64 pixels")
    parser.add_argument("--workers", type=int, default=4, help="scene processes a process")
    parser.add_argument("--max-steps", type=int, default=0, help="a stage's; 0: time decides")
    parser.add_argument(
        "--wall-minutes",
        type=float,
        help="save and stop this long after the start of the process",
    )
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    kwargs = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(kwargs_handlers=[kwargs])
    train(args, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main()
