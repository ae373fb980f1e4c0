"""Encoded clips kept on the training device, so that each serves several steps."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from sla_video.pipelines.tiny_wan.data import Batch, clip_params
from sla_video.pipelines.tiny_wan.models import LATENT_CHANNELS, encode_clip, latent_stats
from sla_video.pipelines.tiny_wan.render import NUM_FRAMES, render


class LatentBank:
    """Encoded clips on the device: each step adds a few new ones, in the place of the oldest."""

    def __init__(self, capacity: int, vae: AutoencoderKLWan, size: int, device: torch.device):
        side = size // 8
        frames = (NUM_FRAMES - 1) // 4 + 1
        shape = (capacity, LATENT_CHANNELS, frames, side, side)
        self.latents = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.ids: Tensor | None = None
        self.filled = self.cursor = self.drawn = 0
        self.vae, self.size, self.device = vae, size, device
        self.mean, self.std = latent_stats(vae, device)

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        video = render(clip_params(batch, self.device), self.size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            mean, log_var = encode_clip(self.vae, video).chunk(2, dim=1)
        mean, log_var = mean.float(), log_var.float()
        latents = mean + (log_var / 2).exp() * torch.randn_like(mean)
        latents = (latents - self.mean) / self.std
        ids = batch["ids"].to(self.device, torch.int16, non_blocking=True)
        if self.ids is None:
            self.ids = ids.new_zeros((len(self.latents), *ids.shape[1:]))
        stop = min(self.cursor + len(latents), len(self.latents))
        count = stop - self.cursor
        self.latents[self.cursor : stop] = latents[:count].to(self.latents)
        self.ids[self.cursor : stop] = ids[:count]
        self.filled = max(self.filled, stop)
        self.cursor = stop % len(self.latents)
        self.drawn += count

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Random latents `[count, C, T, h, w]` in float32, each with one of its wordings."""
        assert self.ids is not None
        index = torch.randint(0, self.filled, (count,), device=self.device)
        wording = torch.randint(0, self.ids.shape[1], (count,), device=self.device)
        return self.latents[index].float(), self.ids[index, wording].long()
