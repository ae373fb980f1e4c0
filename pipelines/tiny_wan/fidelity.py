"""How close a patched `tiny-wan` stays to itself with dense attention, apart from its videos.

Clips of held-out scenes are noised to a few levels; what the transformer makes of them is compared
with what it makes of them when its attention is dense.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor
from torch.nn import functional as F

from sla_video.pipelines.handle import SLAHandle
from sla_video.pipelines.processor import SLAAttnProcessor
from sla_video.pipelines.tiny_wan.evaluate import HELD_OUT_SEED, held_out_prompts
from sla_video.pipelines.tiny_wan.models import TEXT_POSITIONS, encode_clip, latent_stats
from sla_video.pipelines.tiny_wan.placement import place
from sla_video.pipelines.tiny_wan.render import FRAME_SIZE, render

NOISE_LEVELS = (0.97, 0.85, 0.6, 0.3)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Noisy latents with their captions, and the velocity of the dense model.

    Attributes:
        noisy: `[P, C, T, h, w]`.
        timestep: `[P]`, in 0 … 1000.
        text: embedded captions `[P, S, C]`.
        velocity: `[P, C, T, h, w]` of the model that is not patched.
    """

    noisy: Tensor
    timestep: Tensor
    text: Tensor
    velocity: Tensor


@torch.no_grad()
def make_probe(pipe: WanPipeline, clips: int = 8, size: int = FRAME_SIZE) -> Probe:
    """A probe of held-out clips at every level of `NOISE_LEVELS`; always the same.

    Args:
        pipe: `tiny-wan`, not patched.
        clips: P is this many times the number of levels.
        size: pixels a side.
    """
    device = pipe.transformer.device
    scenes, prompts = held_out_prompts(clips)
    params = place(scenes, random.Random(HELD_OUT_SEED))
    mean, std = latent_stats(pipe.vae, device)
    with _autocast(device):
        moments = encode_clip(pipe.vae, render(params.to(device), size))
        text, _ = pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_POSITIONS[0],
            device=device,
        )
    latents = (moments.chunk(2, dim=1)[0].float() - mean) / std
    generator = torch.Generator("cpu").manual_seed(HELD_OUT_SEED)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    levels = latents.new_tensor(NOISE_LEVELS).repeat_interleave(clips)
    latents, noise, text = (
        x.repeat(len(NOISE_LEVELS), *[1] * (x.dim() - 1)) for x in (latents, noise, text)
    )
    noisy = latents + levels.view(-1, 1, 1, 1, 1) * (noise - latents)
    probe = Probe(noisy=noisy, timestep=1000 * levels, text=text.float(), velocity=noisy)
    velocity = torch.cat(list(_velocities(pipe, probe)))
    return Probe(noisy=noisy, timestep=probe.timestep, text=probe.text, velocity=velocity)


@torch.no_grad()
def measure_fidelity(pipe: WanPipeline, handle: SLAHandle, probe: Probe) -> dict[str, Any]:
    """What the patch costs on the probe. Starts the statistics of `handle` anew.

    Returns:
        `velocity_error`: relative L2 distance of the velocity to the dense model's.
        `attention_rel_l1`: mean over layers of |SLA2 - full| / |full| in L1, both on the Q, K, V
        that the patched model has. `attention_rel_l1_by_layer`: of each layer.
        `recall`: softmax mass of the selected tokens, exact, mean over layers.
    """
    handle.reset_stats()
    with ExitStack() as stack:
        stack.enter_context(handle.recording(exact_recall=True))
        watched = {
            name: stack.enter_context(_watch(processor))
            for name, processor in handle.processors.items()
            if processor.sparsity is not None
        }
        wrong = sum(
            (mine - theirs).square().sum()
            for mine, theirs in zip(
                _velocities(pipe, probe), probe.velocity.split(_BATCH), strict=True
            )
        )
    error = torch.sqrt(wrong / probe.velocity.square().sum())
    rel_l1 = {name: float(sum(w.distance) / sum(w.size)) for name, w in watched.items()}
    return {
        "velocity_error": float(error),
        # No layer is sparse where only tokens are left out, in steps that this does not see.
        "attention_rel_l1": sum(rel_l1.values()) / len(rel_l1) if rel_l1 else 0.0,
        "recall": handle.stats().recall,
        "attention_rel_l1_by_layer": rel_l1,
    }


# Clips in one forward pass.
_BATCH = 4


class _Watched:
    def __init__(self) -> None:
        self.distance: list[Tensor] = []
        self.size: list[Tensor] = []


@contextmanager
def _watch(processor: SLAAttnProcessor) -> Iterator[_Watched]:
    """Within the block, compare the operator of one layer with full attention."""
    seen = _Watched()
    operator, replaced = processor._operator, vars(processor).get("_operator")

    def watched(
        query: Tensor, key: Tensor, value: Tensor, *, own_query: bool = False, **how: Any
    ) -> Tensor:
        # The query is read again below: its memory is not to be taken.
        output = operator(query, key, value, **how)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        full = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        seen.distance.append((output.float() - full.float()).abs().sum())
        seen.size.append(full.float().abs().sum())
        return output

    processor._operator = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del processor._operator
        if replaced is not None:
            processor._operator = replaced  # type: ignore[method-assign]


def _velocities(pipe: WanPipeline, probe: Probe) -> Iterator[Tensor]:
    for noisy, timestep, text in zip(
        *(x.split(_BATCH) for x in (probe.noisy, probe.timestep, probe.text)), strict=True
    ):
        with _autocast(noisy.device):
            yield pipe.transformer(noisy, timestep, text, return_dict=False)[0].float()


def _autocast(device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
