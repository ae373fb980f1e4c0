"""The parts of a Wan pipeline that fine-tuning loads one by one, and how they encode data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from sla_video.pipelines.errors import InputError, is_out_of_memory, one_line
from sla_video.pipelines.model_source import read_json
from sla_video.pipelines.tiny_wan.models import latent_stats


def load_transformer(folder: Path, dtype: torch.dtype) -> WanTransformer3DModel:
    """The transformer of a pipeline folder; a bfloat16 one keeps float32 where it needs it.

    Raises:
        InputError: files that cannot be read.
    """
    return _load(
        folder / "transformer",
        lambda path: WanTransformer3DModel.from_pretrained(path, torch_dtype=dtype),
    )


def load_vae(folder: Path, device: torch.device) -> AutoencoderKLWan:
    """The VAE in float32, which it needs, frozen."""
    vae = _load(folder / "vae", AutoencoderKLWan.from_pretrained)
    return vae.to(device).eval().requires_grad_(False)


def load_text(folder: Path, device: torch.device) -> tuple[Any, UMT5EncoderModel]:
    """Tokenizer and text encoder, frozen; bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = _load(folder / "tokenizer", AutoTokenizer.from_pretrained)
    encoder = _load(
        folder / "text_encoder", lambda path: UMT5EncoderModel.from_pretrained(path, dtype=dtype)
    )
    return tokenizer, encoder.to(device).eval().requires_grad_(False)


def _load(path: Path, load: Callable[[Path], Any]) -> Any:
    try:
        return load(path)
    except Exception as error:  # Diffusers and Transformers raise a dozen types for a bad file
        if is_out_of_memory(error):
            raise InputError(f"out of memory while loading {path}") from error
        raise InputError(f"cannot load {path}: {one_line(error)}") from error


def noise_shift(folder: Path) -> float:
    """The shift of the noise levels that a pipeline's scheduler is set to."""
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0)


def count_tokens(folder: Path, size: tuple[int, int, int]) -> int:
    """L, the tokens of a clip of (frames, height, width)."""
    frames, height, width = size
    vae = read_json(folder / "vae" / "config.json")
    spatial = int(vae.get("scale_factor_spatial") or 8)
    temporal = int(vae.get("scale_factor_temporal") or 4)
    patch = read_json(folder / "transformer" / "config.json").get("patch_size") or (1, 2, 2)
    t, h, w = (int(p) for p in patch)
    return ((frames - 1) // temporal + 1) // t * (height // spatial // h) * (width // spatial // w)


def encoders(
    folder: Path, device: torch.device, text_positions: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[str], Tensor]]:
    """What turns a video and a caption into what the transformer takes.

    Latents are the mode of the VAE's posterior, normalised as `WanPipeline` does. Embeddings are
    those of `WanPipeline.encode_prompt`, without the zeros at their end.
    """
    vae = load_vae(folder, device)
    mean, std = latent_stats(vae, device)
    tokenizer, text_encoder = load_text(folder, device)
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=None, transformer=None
    )

    @torch.no_grad()
    def encode_video(video: Tensor) -> Tensor:
        latents = vae.encode(video.to(device)).latent_dist.mode()
        out: Tensor = ((latents - mean) / std)[0]
        return out

    @torch.no_grad()
    def encode_text(caption: str) -> Tensor:
        embedding, _ = pipe.encode_prompt(
            caption,
            do_classifier_free_guidance=False,
            max_sequence_length=text_positions,
            device=device,
        )
        filled = embedding[0].abs().sum(-1).nonzero()
        out: Tensor = embedding[0, : int(filled.max()) + 1 if len(filled) else 1]
        return out.float() if out.dtype == torch.float16 else out

    return encode_video, encode_text
