"""The weights that ship: their size, how they load, and that they know the world."""

from __future__ import annotations

import json
import random
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from cli_tools import call
from diffusers import WanPipeline
from torch import Tensor

from sla_video.pipelines.model_source import embedded_folder
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.tiny_wan import adherence
from sla_video.pipelines.tiny_wan.data import TEXT_LENGTH, token_ids
from sla_video.pipelines.tiny_wan.evaluate import held_out_prompts
from sla_video.pipelines.tiny_wan.grammar import caption, parse
from sla_video.pipelines.tiny_wan.models import encode_clip, latent_stats
from sla_video.pipelines.tiny_wan.placement import place
from sla_video.pipelines.tiny_wan.render import render
from sla_video.pipelines.tiny_wan.train_vae import evaluate as vae_quality

SIZE = 256
MUST_BYTES = 25e6
MUST_PSNR = 32.0


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    return WanPipeline.from_pretrained(embedded_folder(), torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def latents(pipe: WanPipeline) -> Tensor:
    """Latents of the first held-out scenes, `[B, C, T, h, w]`."""
    scenes, _ = held_out_prompts(2)
    video = render(place(scenes, random.Random(0)), SIZE)
    mean, std = latent_stats(pipe.vae, "cpu")
    with torch.no_grad():
        return (encode_clip(pipe.vae, video).chunk(2, dim=1)[0] - mean) / std


def velocity_error(pipe: WanPipeline, latents: Tensor, prompts: list[str], sigma: float) -> float:
    """Mean squared error of the velocity at one noise level."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    text = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=64)[0]
    time = torch.full((len(latents),), sigma * 1000)
    with torch.no_grad():
        noisy = latents + sigma * (noise - latents)
        velocity = pipe.transformer(noisy, time, text, return_dict=False)[0]
    return float((velocity - (noise - latents)).square().mean())


def test_it_fits_the_package() -> None:
    folder = embedded_folder()
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= MUST_BYTES
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_its_vae_keeps_what_it_must(pipe: WanPipeline) -> None:
    quality = vae_quality(pipe.vae, torch.device("cpu"), clips=2, size=256)
    assert quality["psnr_mean"] >= MUST_PSNR


def test_it_listens_to_the_prompt(pipe: WanPipeline, latents: Tensor) -> None:
    scenes, _ = held_out_prompts(len(latents))
    right = [caption(scene) for scene in scenes]
    handle = enable_sla(pipe, sparsity=0.9)
    errors = {
        name: velocity_error(pipe, latents, prompts, 0.9)
        for name, prompts in (
            ("right", right),
            ("another", right[1:] + right[:1]),
            ("none", [""] * len(right)),
        )
    }
    handle.remove()
    assert errors["right"] < 0.9 * errors["none"]
    assert errors["none"] < errors["another"]


def test_a_prompt_becomes_its_video(tmp_path: Path) -> None:
    prompt = "a red circle moves left on a white background"
    out = tmp_path / "clip.mp4"
    # A third of the default steps is enough for one object.
    done = call("generate", prompt, "--steps", 4, "--seed", 1, "--device", "cpu", "--out", out)
    assert done.code == 0, done.err
    frames = np.stack(imageio.mimread(out))
    assert frames.shape == (25, 256, 256, 3)
    found = adherence.measure(frames, parse(prompt))
    assert found.all, found
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["attention"]["kind"] == "sla2"


def test_prompts_fit_the_positions_it_was_trained_for(pipe: WanPipeline) -> None:
    _, prompts = held_out_prompts(200)
    ids = token_ids(pipe.tokenizer, prompts)
    assert ids.shape == (200, TEXT_LENGTH)
    assert pipe.tokenizer.unk_token_id not in ids


def test_its_defaults_are_complete() -> None:
    defaults = json.loads((embedded_folder() / "defaults.json").read_text())
    assert 0 < defaults["sparsity"] < 1
    assert defaults["num_frames"] == 25 and defaults["height"] == defaults["width"] == 256
