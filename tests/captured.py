"""Q, K and V of real self-attention: those of the embedded model while it makes a video.

Letters: L = 7,168 tokens, H = 4 heads, D = 64.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor

from sla_video.pipelines.families.wan import project_in
from sla_video.pipelines.model_source import embedded_folder

PROMPT = "a red circle and a blue square; the red circle moves left"


class _Captured(Exception):
    """All layers asked for have been seen."""


def capture(
    layers: tuple[int, ...], *, steps: int = 1, schedule: int | None = None
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Layer -> query, key, value `[1, L, H, D]` float32 in the last of `steps` denoising steps.

    These are the first ones of a `schedule` of so many; None: all of it.

    The pipeline runs as the command line runs it, without guidance, up to the last of `layers`.
    """
    pipe: Any = WanPipeline.from_pretrained(embedded_folder(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    captured: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    calls = 0

    def watch(layer: int) -> Any:
        def hook(attn: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            nonlocal calls
            calls += layer == layers[-1]
            if calls < steps - (layer != layers[-1]):
                return
            named = dict(zip(("hidden_states", "encoder_hidden_states"), arguments, strict=False))
            named |= keywords
            rotary = named.get("rotary_emb", arguments[3] if len(arguments) > 3 else None)
            assert rotary is not None
            captured[layer] = project_in(attn, named["hidden_states"], rotary)
            if layer == layers[-1]:
                raise _Captured

        return hook

    for layer in layers:
        block = pipe.transformer.blocks[layer]
        block.attn1.register_forward_pre_hook(watch(layer), with_kwargs=True)
    try:
        with torch.no_grad():
            pipe(
                PROMPT,
                height=256,
                width=256,
                num_frames=25,
                num_inference_steps=schedule or steps,
                guidance_scale=1.0,
                max_sequence_length=64,
                output_type="latent",
                generator=torch.Generator().manual_seed(0),
            )
    except _Captured:
        return captured
    raise AssertionError(f"layers {layers} were not all called {steps} times")
