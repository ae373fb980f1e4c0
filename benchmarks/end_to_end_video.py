"""A whole video through Diffusers' pipeline, from random embeddings of a text."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from end_to_end_models import TEXT_POSITIONS, Model, build_vae
from torch import nn


def generate(transformer: nn.Module, model: Model, *, steps: int, small: bool) -> dict[str, Any]:
    """Seconds of denoising, with guidance, and of decoding.

    Args:
        small: with a small autoencoder, for a dry run.
    """
    device = next(transformer.parameters()).device
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer,
        vae=build_vae(model, device, small=small),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        expand_timesteps=model.per_token_timesteps,
    )
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    texts = torch.randn(2, 1, TEXT_POSITIONS, model.text_dim, device=device).bfloat16()
    start = _now(device)
    latents = pipe(
        prompt_embeds=texts[0],
        negative_prompt_embeds=texts[1],
        height=model.height,
        width=model.width,
        num_frames=model.frames,
        num_inference_steps=steps,
        guidance_scale=5.0,
        output_type="latent",
    ).frames
    denoised = _now(device)
    pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)
    return {
        "steps": steps,
        "denoise_seconds": denoised - start,
        "decode_seconds": _now(device) - denoised,
        "vae_dtype": str(pipe.vae.dtype),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
