"""Train the VAE of `tiny-wan` on clips of the procedural world, rendered as they are needed.

    accelerate launch --num_processes 4 -m sla_video.pipelines.tiny_wan.train_vae \\
        --out runs/vae --minutes 5

Writes `--out` atomically (weights, optimizer, progress) and goes on from there when it exists.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from sla_video.pipelines.tiny_wan import checkpoints
from sla_video.pipelines.tiny_wan.data import Batch, clip_params, stream
from sla_video.pipelines.tiny_wan.models import build_vae, decode_clip, encode_clip, load_vae
from sla_video.pipelines.tiny_wan.placement import ClipParams, place
from sla_video.pipelines.tiny_wan.render import render
from sla_video.pipelines.tiny_wan.scenes import sample_scene
from sla_video.pipelines.tiny_wan.schedule import Schedule

# Windows of the world that training crops: the full-size model's scale, half, and a quarter of it.
EXTENTS = (0.5, 0.5, 1.0, 2.0)
LOG_EVERY = 200


class Autoencoder(nn.Module):
    """Encode, sample, decode and score clips in one compiled pass."""

    def __init__(self, vae: AutoencoderKLWan, kl_weight: float) -> None:
        super().__init__()
        self.vae = vae
        self.kl_weight = kl_weight

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and mean squared error in [-1, 1] units, of clips `[B, 3, T, S, S]`."""
        with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
            mean, log_var = encode_clip(self.vae, video).float().chunk(2, dim=1)
            log_var = log_var.clamp(-20, 10)
            latents = mean + (log_var / 2).exp() * torch.randn_like(mean)
            error = decode_clip(self.vae, latents).float() - video
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
        mse = error.square().mean()
        return error.abs().mean() + 2 * mse + self.kl_weight * kl, mse.detach()


def draw_crop(batch: Batch, device: torch.device, rng: random.Random, size: int) -> Tensor:
    """Clips `[B, 3, T, size, size]` of a random window at one of the scales of `EXTENTS`."""
    extent = rng.choice(EXTENTS)
    slack = 1 - extent
    origin = (slack * rng.random(), slack * rng.random())
    return render(clip_params(batch, device), size, origin=origin, extent=extent)


@torch.no_grad()
def evaluate(
    vae: AutoencoderKLWan, device: torch.device, *, clips: int, size: int
) -> dict[str, float]:
    """PSNR on held-out clips, through the mean of the posterior: dB, mean and 5th percentile."""
    rng = random.Random(20240)
    params = place([sample_scene(rng, held_out=True) for _ in range(clips)], rng).to(device)
    values = []
    for i in range(0, clips, 4):
        part = ClipParams(**{k: v[i : i + 4] for k, v in vars(params).items()})
        video = render(part, size)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean = encode_clip(vae, video).chunk(2, dim=1)[0]
            decoded = decode_clip(vae, mean)
        error = (decoded.float().clamp(-1, 1) - video).square().flatten(1).mean(1)
        values += [-10 * math.log10(e / 4) for e in error.tolist()]
    values.sort()
    return {"psnr_mean": sum(values) / len(values), "psnr_p5": values[len(values) // 20]}


@torch.no_grad()
def measure_latents(
    vae: AutoencoderKLWan, batches: Iterator[Batch], device: torch.device, size: int, count: int
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over `count` batches of whole frames."""
    samples = []
    for _ in range(count):
        params = clip_params(next(batches), device)
        part = ClipParams(**{k: v[:4] for k, v in vars(params).items()})
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            samples.append(encode_clip(vae, render(part, size)).float().chunk(2, dim=1)[0])
    stacked = torch.cat(samples).transpose(0, 1).flatten(1)
    return stacked.mean(1).tolist(), stacked.std(1).tolist()


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Train for the time there is, saving now and then and at the end."""
    device = accelerator.device
    set_seed(args.seed)
    resume = checkpoints.newest(args.out)
    source = resume or args.init
    vae = load_vae(source) if source else build_vae()
    before = checkpoints.load_state(resume)["progress"] if resume else {"clips": 0, "minutes": 0.0}
    vae = vae.train().requires_grad_(True).to(device)
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    for parameter in vae.parameters():
        if parameter.dim() == 5 and args.channels_last:
            parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        vae.parameters(),
        lr=args.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=1e-3,
        fused=device.type == "cuda",
    )
    if resume:
        checkpoints.restore_optimizer(optimizer, checkpoints.load_group(resume, "optimizer"))
    autoencoder = Autoencoder(vae, args.kl_weight)
    if not args.no_compile:
        autoencoder.compile()
    model, prepared = accelerator.prepare(autoencoder, optimizer)
    seed = args.seed + 1000 * accelerator.process_index + before["clips"]
    set_seed(seed)
    batches = stream(args.batch_size, seed, args.workers, with_captions=False)
    rng = random.Random(seed)
    schedule = Schedule(
        accelerator,
        args.minutes,
        before=before["minutes"],
        wall_minutes=args.wall_minutes,
        cooldown=0.4,
        max_steps=args.max_steps,
    )
    saved, going = 0.0, not schedule.finished
    while going:
        for group in prepared.param_groups:
            group["lr"] = args.learning_rate * schedule.factor
        loss, mse = model(draw_crop(next(batches), device, rng, args.crop_size))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        prepared.step()
        prepared.zero_grad(set_to_none=True)
        going = schedule.advance()
        if schedule.steps % LOG_EVERY == 0:
            psnr = -10 * math.log10(mse.item() / 4)
            accelerator.print(
                f"step {schedule.steps} {schedule.fraction:.0%} loss {loss.item():.4f} "
                f"psnr {psnr:.2f}",
                flush=True,
            )
        if 60 * (schedule.elapsed - saved) >= args.save_every or not going:
            saved = schedule.elapsed
            clips = schedule.steps * args.batch_size * accelerator.num_processes
            progress = {
                "clips": before["clips"] + clips,
                "minutes": before["minutes"] + schedule.elapsed,
            }
            if accelerator.is_main_process:
                save(args, vae, optimizer, progress, batches, device)


def save(
    args: argparse.Namespace,
    vae: AutoencoderKLWan,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, float],
    batches: Iterator[Batch],
    device: torch.device,
) -> None:
    """Write the checkpoint, with the statistics of the latents and the held-out PSNR."""
    vae.eval()
    if not args.decoder_only:
        mean, std = measure_latents(vae, batches, device, args.size, 1 + args.eval_clips // 4)
        vae.register_to_config(latents_mean=mean, latents_std=std)
    state = {
        "progress": progress,
        "latents_mean": vae.config.latents_mean,
        "latents_std": vae.config.latents_std,
        "held_out": evaluate(vae, device, clips=args.eval_clips, size=args.size),
    }
    vae.train()
    tensors = {"vae": vae.state_dict(), "optimizer": checkpoints.optimizer_tensors(optimizer)}
    checkpoints.save_checkpoint(args.out, tensors, state)
    print(f"saved {args.out}: {json.dumps(state)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time after compiling")
    parser.add_argument(
        "--wall-minutes", type=float, help="save and stop this long after the start of the process"
    )
    parser.add_argument("--init", type=Path, help="pipeline folder or checkpoint to start from")
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="keep the latents as they are, so that a transformer trained on them stays valid",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="clips a process")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--kl-weight", type=float, default=5e-4)
    parser.add_argument("--workers", type=int, default=4, help="scene processes a process")
    parser.add_argument("--save-every", type=float, default=120.0, help="seconds")
    parser.add_argument("--max-steps", type=int, default=0, help="0: time decides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crop-size", type=int, default=128, help="pixels a side, in training")
    parser.add_argument("--size", type=int, default=256, help="pixels a side, in evaluation")
    parser.add_argument("--eval-clips", type=int, default=64)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true", help="convolve in NDHWC")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator()
    train(args, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main()
