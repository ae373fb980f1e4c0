"""Train the transformer and the text encoder of `tiny-wan` on the procedural world.

Low resolution first: motion and colours are learned from millions of cheap 64-pixel clips, edges
from fewer large ones. Rotary positions are spread so that a small clip's tokens stand where they
would in the full-size one. A stage is `size:batch:minutes:shift:rate[:sparsity]`: pixels a side,
clips a process, training time, shift of the noise levels, peak learning rate. In a stage with a
sparsity part of the steps run with SLA2, without trained routers, so that the model is at home with
both kinds of attention (as in SSA, arXiv 2511.20102: one draw a step for the whole network).

    accelerate launch --num_processes 4 -m sla_video.pipelines.tiny_wan.train_transformer \\
        --vae runs/vae --text-encoder runs/text --out runs/tiny-wan \\
        --stages 64:256:4.5:2:2e-3 128:96:3.5:3.5:1.5e-3 256:32:3:6:1e-3

Every minute and after each stage `--out` is written atomically (weights, EMA, optimizers, stages);
a run that finds it goes on from there. `--init` starts from another checkpoint or from a pipeline
folder, such as the embedded model itself.
"""

from __future__ import annotations

import argparse
import random
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from sla_video.pipelines.handle import SLAHandle
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.tiny_wan import checkpoints
from sla_video.pipelines.tiny_wan.data import stream
from sla_video.pipelines.tiny_wan.flow_matching import (
    DenseSelfAttention,
    TextToVideo,
    spread_rotary_positions,
)
from sla_video.pipelines.tiny_wan.latent_bank import LatentBank
from sla_video.pipelines.tiny_wan.models import (
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    load_text_encoder,
    load_vae,
)
from sla_video.pipelines.tiny_wan.muon import BatchedMuon
from sla_video.pipelines.tiny_wan.render import FRAME_SIZE
from sla_video.pipelines.tiny_wan.schedule import Schedule, process_seconds
from sla_video.pipelines.tiny_wan.training_state import restore, save, start_from

LOG_EVERY = 200
ADAM_RATE = 0.5
# The text encoder can read already; it only adapts.
TEXT_RATE = 0.05


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One resolution of the training."""

    size: int
    batch_size: int
    minutes: float
    shift: float
    learning_rate: float
    sparsity: float | None = None

    @classmethod
    def parse(cls, text: str) -> Stage:
        size, batch_size, minutes, shift, rate, *sparsity = text.split(":")
        return cls(
            size=int(size),
            batch_size=int(batch_size),
            minutes=float(minutes),
            shift=float(shift),
            learning_rate=float(rate),
            sparsity=float(sparsity[0]) if sparsity else None,
        )


def build_optimizers(model: TextToVideo, kind: str) -> list[torch.optim.Optimizer]:
    """Muon on the transformer's hidden matrices and AdamW on the rest, or AdamW on everything."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.transformer.named_parameters():
        is_matrix = name.startswith("blocks.") and parameter.ndim == 2
        (matrices if is_matrix and kind == "muon" else others).append(parameter)
    groups = [
        {"params": others, "rate": ADAM_RATE},
        {"params": list(model.text_encoder.parameters()), "rate": TEXT_RATE},
    ]
    adam = torch.optim.AdamW(
        groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=torch.cuda.is_available()
    )
    if kind == "adamw":
        return [adam]
    muon = BatchedMuon(matrices)
    muon.param_groups[0]["rate"] = 1.0
    return [adam, muon]


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
    if args.text_encoder and not resume:
        model.text_encoder.load_state_dict(load_text_encoder(args.text_encoder).state_dict())
    model.to(device)
    ema = EMAModel(model.parameters(), decay=args.ema, foreach=True)
    optimizers = build_optimizers(model, args.optimizer)
    if source and (source / checkpoints.JSON_NAME).is_file():
        restore(source, args.optimizer, ema, optimizers, model)
    vae = load_vae(args.vae).to(device)
    if not args.no_compile:
        # One block is compiled and serves them all; each stage has its own fixed shapes. A block is
        # smaller than a bucket of gradients, so its graph need not be cut at their borders.
        torch._dynamo.config.optimize_ddp = False
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
        self.sla: SLAHandle | None = None
        # Of the same seed in every process.
        self.coin = random.Random(args.seed)

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
        self.choose_attention(stage)
        self.coin.seed(f"{args.seed}/{number}/{before['clips']}")
        bank = LatentBank(
            args.bank * 64**2 // stage.size**2, self.vae, stage.size, accelerator.device
        )
        encode_batch = max(4, args.encode_batch * 64**2 // stage.size**2)
        scenes = stream(encode_batch, seed, args.workers, pairs=args.pairs)
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
                    save(args.out, args.optimizer, self.model, self.ema, self.optimizers, self.done)
        if self.sla is not None:
            self.sla.remove()
            self.sla = None
        return schedule.finished

    def choose_attention(self, stage: Stage) -> None:
        """Dense self-attention that compiles well; and SLA2 beside it where the stage has both."""
        blocks = self.model.transformer.blocks
        if stage.sparsity is not None:
            for block in blocks:
                block.attn1.processor = WanAttnProcessor()
            self.sla = enable_sla(
                self.model.transformer, sparsity=stage.sparsity, impl=self.args.impl
            )
        for block in blocks:
            if self.sla is None:
                block.attn1.processor = DenseSelfAttention()
            else:
                block.attn1.processor.original = DenseSelfAttention()

    def step(self, stage: Stage, factor: float, bank: LatentBank) -> Tensor:
        """One optimizer step; returns its loss."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * group["rate"] * factor
        dense = self.sla is not None and self.coin.random() < self.args.dense_share
        with self.sla.dense() if self.sla is not None and dense else nullcontext():
            loss: Tensor = self.wrapped(*bank.sample(stage.batch_size))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.model.parameters())
        return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True, help="checkpoint of train_vae")
    parser.add_argument("--init", type=Path, help="checkpoint or pipeline folder to start from")
    parser.add_argument(
        "--text-encoder", type=Path, help="checkpoint of train_text_encoder to start with"
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--stages",
        type=Stage.parse,
        nargs="+",
        required=True,
        help="size:batch:minutes:shift:rate[:sparsity]",
    )
    parser.add_argument("--cooldown", type=float, default=0.25, help="of each stage, to rate 0")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--bank", type=int, default=65536, help="clips a process, at 64 pixels")
    parser.add_argument("--reuse", type=int, default=12, help="steps a clip is expected to serve")
    parser.add_argument("--encode-batch", type=int, default=128, help="clips, at 64 pixels")
    parser.add_argument("--pairs", type=float, default=0.75, help="share of two-object clips")
    parser.add_argument(
        "--dense-share",
        type=float,
        default=0.5,
        help="share of the steps with dense attention, in a stage with a sparsity",
    )
    parser.add_argument("--workers", type=int, default=4, help="scene processes a process")
    parser.add_argument("--max-steps", type=int, default=0, help="a stage's; 0: time decides")
    parser.add_argument(
        "--wall-minutes",
        type=float,
        help="save and stop this long after the start of the process",
    )
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--impl", default="auto", choices=("auto", "torch", "triton"), help="of SLA2"
    )
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    kwargs = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(kwargs_handlers=[kwargs])
    train(args, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main()
