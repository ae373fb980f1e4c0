"""Clips of the procedural world of `tiny-wan`, rendered and encoded on the device at the start."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import fields

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import UMT5EncoderModel

from sla_video.calibration.clip_source import ClipBatch
from sla_video.pipelines.progress import Progress
from sla_video.pipelines.tiny_wan.data import (
    CAPTIONS_PER_SCENE,
    TEXT_LENGTH,
    Batch,
    clip_params,
    token_ids,
)
from sla_video.pipelines.tiny_wan.flow_matching import PaddedTextAttention
from sla_video.pipelines.tiny_wan.grammar import caption
from sla_video.pipelines.tiny_wan.models import (
    LATENT_CHANNELS,
    TEXT_POSITIONS,
    build_tokenizer,
    encode_clip,
    latent_stats,
)
from sla_video.pipelines.tiny_wan.placement import place
from sla_video.pipelines.tiny_wan.render import NUM_FRAMES, render
from sla_video.pipelines.tiny_wan.scenes import Scene, sample_scene

# Share of the clips with two objects, as in the training of the model.
_PAIRS = 0.6


class _Scenes(Dataset[Batch]):
    """Chunk i of the scenes: a function of the seed and of i."""

    def __init__(self, seed: str, count: int, chunk: int, *, held_out: bool) -> None:
        self.seed, self.count, self.chunk, self.held_out = seed, count, chunk, held_out

    def __len__(self) -> int:
        return -(-self.count // self.chunk)

    def scenes(self, index: int) -> list[Scene]:
        rng = random.Random(f"{self.seed}/{index}")
        return [sample_scene(rng, held_out=self.held_out, pairs=_PAIRS) for _ in range(self.chunk)]

    def __getitem__(self, index: int) -> Batch:
        scenes = self.scenes(index)
        rng = random.Random(f"{self.seed}/{index}/wording")
        params = place(scenes, rng)
        batch = {f.name: getattr(params, f.name) for f in fields(params)}
        texts = [caption(scene, rng) for scene in scenes for _ in range(CAPTIONS_PER_SCENE)]
        ids = token_ids(build_tokenizer(), texts)
        batch["ids"] = ids.view(self.chunk, CAPTIONS_PER_SCENE, TEXT_LENGTH)
        return batch


class WorldClips:
    """The world as a `ClipSource`: its clips lie on the device, each with four captions.

    Captions are embedded when they are used, to the few positions that they fill and one that
    stands for all pads; `text_attention` is the cross-attention that takes it so.

    Args:
        accelerator: its processes share the work.
        vae, text_encoder: of the embedded model, on the device.
        size: side of a clip in pixels.
        clips: how many to train on.
        held_out_clips: how many to validate with.
        chunk: clips encoded at once.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel,
        *,
        size: int,
        clips: int,
        held_out_clips: int,
        chunk: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self.accelerator = accelerator
        self.vae = vae
        self.text_encoder = text_encoder
        self.size = size
        self.chunk = chunk
        pads = [math.log(positions - TEXT_LENGTH) for positions in TEXT_POSITIONS]
        self.pad_biases = torch.tensor(pads, device=accelerator.device)
        self.pad_bias = self.pad_biases[0].clone()
        scenes = _Scenes(f"world/{seed}", clips, chunk, held_out=False)
        self.latents, self.ids = self._encode(scenes, "encode clips", progress)
        # One seed for all runs, so that their validations can be compared.
        aside = _Scenes("world/held-out", held_out_clips, chunk, held_out=True)
        self.aside_latents, self.aside_ids = self._encode(aside, "encode held-out clips", progress)
        self.scenes = [s for i in range(len(aside)) for s in aside.scenes(i)][:held_out_clips]
        self.validation_prompts = [caption(s, random.Random(i)) for i, s in enumerate(self.scenes)]

    @torch.no_grad()
    def _encode(self, scenes: _Scenes, label: str, progress: Progress) -> tuple[Tensor, Tensor]:
        """Latents `[clips, C, T, h, w]` and ids `[clips, wordings, TEXT_LENGTH]` of all scenes."""
        accelerator, device = self.accelerator, self.accelerator.device
        side, frames = self.size // 8, (NUM_FRAMES - 1) // 4 + 1
        latents = torch.zeros(
            len(scenes) * scenes.chunk, LATENT_CHANNELS, frames, side, side, device=device
        )
        ids = torch.zeros(
            len(latents), CAPTIONS_PER_SCENE, TEXT_LENGTH, dtype=torch.int32, device=device
        )
        mean, std = latent_stats(self.vae, device)
        mine = range(accelerator.process_index, len(scenes), accelerator.num_processes)
        workers = 4 if len(mine) > 8 and device.type == "cuda" else 0
        loader = DataLoader(scenes, batch_size=None, sampler=mine, num_workers=workers)
        progress.stage(label, len(mine))
        for index, batch in zip(mine, loader, strict=True):
            rows = slice(index * scenes.chunk, (index + 1) * scenes.chunk)
            video = render(clip_params(batch, device), self.size)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                moments = encode_clip(self.vae, video).float()
            latents[rows] = (moments.chunk(2, dim=1)[0] - mean) / std
            ids[rows] = batch["ids"].to(device, torch.int32)
            progress.advance()
        if accelerator.num_processes > 1:
            # Each has zeros where another one was at work.
            latents = accelerator.reduce(latents, "sum")
            ids = accelerator.reduce(ids, "sum")
        return latents[: scenes.count].to(torch.bfloat16), ids[: scenes.count]

    def text_attention(self, transformer: nn.Module) -> None:
        """Give `transformer` the cross-attention that reads this source's text embeddings."""
        for block in transformer.blocks:  # type: ignore[union-attr]
            block.attn2.processor = PaddedTextAttention(self.pad_bias)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """`[B, TEXT_LENGTH + 1, C_text]` from ids `[B, TEXT_LENGTH]`."""
        mask = (ids > 0).long()
        device = ids.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = self.text_encoder(input_ids=ids.long(), attention_mask=mask).last_hidden_state
        return torch.nn.functional.pad(out.float() * mask[..., None], (0, 0, 0, 1))

    def __len__(self) -> int:
        return len(self.latents)

    def num_held_out(self) -> int:
        """How many clips are never trained on."""
        return len(self.aside_latents)

    def load(self, clips: Sequence[int], captioned: Sequence[bool], seed: str) -> ClipBatch:
        """See `ClipSource.load`."""
        device = self.latents.device
        draw = random.Random(f"world/{seed}")
        self.pad_bias.copy_(self.pad_biases[draw.randrange(len(self.pad_biases))])
        wordings = [random.Random(f"{clip}/{seed}").randrange(CAPTIONS_PER_SCENE) for clip in clips]
        index = torch.tensor([list(clips), wordings, list(captioned)])
        clip, wording, with_caption = index.to(device, non_blocking=True)
        ids = self.ids[clip, wording]
        # No caption is the end of a text alone.
        empty = torch.zeros_like(ids)
        empty[:, 0] = 1
        ids = torch.where(with_caption.bool()[:, None], ids, empty)
        return ClipBatch(self.latents[clip].float(), self.embed(ids))

    def held_out(self, clips: Sequence[int]) -> ClipBatch:
        """See `ClipSource.held_out`."""
        self.pad_bias.copy_(self.pad_biases[0])
        index = torch.tensor(list(clips), device=self.latents.device)
        return ClipBatch(self.aside_latents[index].float(), self.embed(self.aside_ids[index, 0]))
