"""The embedded model's networks: whole-clip passes, text padding, positions, tokenizer, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from sla_video.pipelines.tiny_wan import export, grammar
from sla_video.pipelines.tiny_wan.data import TEXT_LENGTH, token_ids
from sla_video.pipelines.tiny_wan.flow_matching import (
    DenseSelfAttention,
    TextToVideo,
    spread_rotary_positions,
)
from sla_video.pipelines.tiny_wan.models import (
    TEXT_POSITIONS,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    decode_clip,
    encode_clip,
    save_pipeline,
)

PROMPTS = ["a red circle moves left", "a small blue star stays still on a gray checked background"]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline at its true size, with random weights, as `export` writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("random")
    encoder = build_text_encoder(len(build_tokenizer()))
    save_pipeline(folder / "raw", build_vae(), build_transformer(), encoder)
    export.export(None, folder / "raw", folder / "tiny-wan", "ema", {"num_inference_steps": 2})
    return folder / "tiny-wan"


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_one_pass_over_a_clip_equals_the_chunks_of_diffusers(frames: int) -> None:
    torch.manual_seed(frames)
    vae = build_vae().eval()
    video = torch.randn(2, 3, frames, 16, 24)
    latents = torch.randn(2, 8, (frames - 1) // 4 + 1, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(
            encode_clip(vae, video), vae.encode(video).latent_dist.parameters, rtol=0, atol=1e-5
        )
        decoded = decode_clip(vae, latents).clamp(-1, 1)
        torch.testing.assert_close(decoded, vae.decode(latents).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", range(len(TEXT_POSITIONS)))
def test_one_pad_slot_stands_for_the_pads_of_the_pipeline(
    pipeline_folder: Path, number: int
) -> None:
    positions = TEXT_POSITIONS[number]
    pipe = WanPipeline.from_pretrained(pipeline_folder)
    model = TextToVideo(build_transformer(), build_text_encoder(len(build_tokenizer())))
    model.transformer.load_state_dict(pipe.transformer.state_dict())
    model.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    model.pad_bias.copy_(model.pad_biases[number])
    noisy, timestep = torch.randn(2, 8, 2, 4, 4), torch.tensor([700.0, 300.0])
    ids = token_ids(build_tokenizer(), PROMPTS)
    with torch.no_grad():
        padded = pipe.encode_prompt(
            PROMPTS, do_classifier_free_guidance=False, max_sequence_length=positions
        )[0]
        expected = pipe.transformer(noisy, timestep, padded, return_dict=False)[0]
        text = model.embed_text(ids)
        actual = model.transformer(noisy, timestep, text, return_dict=False)[0]
        unpadded = pipe.transformer(noisy, timestep, text[:, :-1], return_dict=False)[0]
    assert padded.shape[1] == positions
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    assert (unpadded - expected).abs().max() > 1e-4


def test_self_attention_in_training_is_that_of_diffusers() -> None:
    torch.manual_seed(0)
    transformer = build_transformer().eval()
    inputs = torch.randn(2, 8, 2, 4, 4), torch.tensor([700.0, 300.0]), torch.randn(2, 5, 256)
    with torch.no_grad():
        expected = transformer(*inputs, return_dict=False)[0]
        for block in transformer.blocks:
            block.attn1.processor = DenseSelfAttention()
        actual = transformer(*inputs, return_dict=False)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_spread_positions_leave_the_full_size_alone_and_average_the_small() -> None:
    full, small = build_transformer(), build_transformer()
    before = [t.clone() for t in full.rope(torch.empty(1, 8, 7, 32, 32))]
    spread_rotary_positions(full, 32, 32)
    for a, b in zip(full.rope(torch.empty(1, 8, 7, 32, 32)), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    spread_rotary_positions(small, 16, 32)
    rope = small.rope
    angles = torch.atan2(rope.freqs_sin, rope.freqs_cos)[:, rope.t_dim]
    # The first rotary rate is one radian a position: token i of 16 lies between 2i and 2i + 1.
    torch.testing.assert_close(angles[:2], torch.tensor([0.5, 2.5]))


def test_spread_positions_can_be_spread_again() -> None:
    once, twice = build_transformer(), build_transformer()
    spread_rotary_positions(once, 16, 32)
    spread_rotary_positions(twice, 8, 32)
    spread_rotary_positions(twice, 16, 32)
    torch.testing.assert_close(once.rope.freqs_cos, twice.rope.freqs_cos)
    torch.testing.assert_close(once.rope.freqs_sin, twice.rope.freqs_sin)


def test_tokenizer_knows_every_word_of_the_grammar() -> None:
    tokenizer = build_tokenizer()
    unknown = tokenizer.unk_token_id
    ids = tokenizer(grammar.vocabulary()).input_ids
    assert all(row[0] != unknown and row[1:] == [tokenizer.eos_token_id] for row in ids)
    assert tokenizer("a Red ZEBRA").input_ids == [*tokenizer("a red").input_ids[:2], unknown, 1]


def test_a_caption_too_long_for_the_training_is_refused() -> None:
    with pytest.raises(ValueError, match=str(TEXT_LENGTH)):
        token_ids(build_tokenizer(), ["a " * 40])


def test_the_exported_folder_is_an_ordinary_pipeline(pipeline_folder: Path) -> None:
    size = sum(p.stat().st_size for p in pipeline_folder.rglob("*") if p.is_file())
    assert size <= 25e6
    pipe = WanPipeline.from_pretrained(pipeline_folder)
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32
    assert pipe.scheduler.config.shift == build_scheduler().config.shift
    assert json.loads((pipeline_folder / "defaults.json").read_text())["num_inference_steps"] == 2
    for config in pipeline_folder.glob("*/config.json"):
        assert "_name_or_path" not in json.loads(config.read_text()), config
    grid = (7, 32, 32)
    rope = pipe.transformer.rope(torch.empty(1, 8, *grid))
    assert rope[0].shape[1] == 7168
    assert not list(pipeline_folder.parent.glob("tiny-wan.*"))
